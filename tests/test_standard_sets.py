"""Standard test sets: labels against CLIP_benchmark's own data sets, numbers against its own
metrics, and every wrong folder in one sentence"""

import io
import json
import shutil
import tarfile
import types
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tinyclip.core import TinyclipError
from tinyclip.data import transforms
from tinyclip.data.pairs import captioned, labelled
from tinyclip.data.samples import Sample, SamplingPlan, Skip, decode
from tinyclip.data.shards import Shards
from tinyclip.evaluate import zero_shot
from tinyclip.evaluate.standard_sets import (
    SETS,
    ClassFolders,
    Karpathy,
    ObjectNet,
    class_names,
    evaluate_on,
    standard,
    wnids,
)

ALL = SamplingPlan(shuffle=False, size=10**6)


def samples(source):
    return [s for chunk in source.chunks(ALL) for s in chunk]


def where(s):
    return f'{Path(s.image).parent.name}/{Path(s.image).name}'


def picture(path, colour=(200, 30, 40), size=(8, 6), format=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path, format)


def tree(root, folders, n=1, ext='JPEG'):
    "One folder per name with `n` pictures each; one encoding, written often"
    Image.new('RGB', (8, 6), 'red').save(b := io.BytesIO(), 'JPEG')
    for f in folders:
        (root / str(f)).mkdir(parents=True)
        for i in range(n):
            (root / str(f) / f'{i}.{ext}').write_bytes(b.getvalue())
    return root


def shard(path, entries):
    "entries: dicts of extension -> bytes"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for i, fields in enumerate(entries):
            for ext, data in fields.items():
                info = tarfile.TarInfo(f'{i:05}.{ext}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def theirs():
    "CLIP_benchmark's data sets"
    return pytest.importorskip(
        'clip_benchmark.datasets.builder',
        reason="CLIP_benchmark is not installed (pip install 'tinyclip[eval]')",
        exc_type=ImportError,
    )


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=12,
        vision_cfg=dict(image_size=16, layers=1, width=32, patch_size=8, head_width=16),
        text_cfg=dict(context_length=12, vocab_size=49408, width=16, heads=2, layers=1),
    ).eval()
    return model, transforms(model)[1], open_clip.get_tokenizer('ViT-B-32', context_length=12)


# Which folder is which class


@pytest.mark.parametrize(
    'wnid,label,name',
    [
        ('n01440764', 0, 'tench'),
        ('n02099601', 207, 'Golden Retriever'),
        ('n02123045', 281, 'tabby cat'),
        ('n02692877', 405, 'airship'),
        ('n15075141', 999, 'toilet paper'),
    ],
)
def test_anchors(tmp_path, wnid, label, name):
    (s,) = samples(standard('imagenet', tree(tmp_path, [wnid]), part=True).source)
    assert (s.label, s.captions) == (label, [f'a photo of a {name}.'])


def test_v2_counts_by_number_not_by_alphabet(tmp_path):
    v2 = standard('imagenet-v2', tree(tmp_path, range(1000)), part=True)
    got = samples(v2.source)
    assert all(int(Path(s.image).parent.name) == s.label for s in got) and len(got) == 1000
    assert (
        v2.classnames[10] == IMAGENET_CLASSNAMES[10] and sorted(map(str, range(1000)))[10] != '10'
    )


@pytest.mark.parametrize(
    'ours,their_name',
    [
        ('imagenet-r', 'imagenet-r'),
        ('imagenet-a', 'imagenet-a'),
        ('imagenet-sketch', 'imagenet_sketch'),
    ],
)
def test_labels_and_names_are_clip_benchmarks(tmp_path, theirs, ours, their_name):
    tree(tmp_path, wnids(ours))
    ds = theirs.build_dataset(
        their_name, root=str(tmp_path), transform=None, split='test', download=False
    )
    mine = standard(ours, tmp_path, part=True)
    assert mine.classnames == ds.classes and len(ds.classes) == SETS[ours].classes
    assert [(where(s), s.label) for s in samples(mine.source)] == [
        ('/'.join(Path(f).parts[-2:]), l) for f, l in ds.samples
    ]
    # 'openai', the default
    assert [t.replace('{c}', 'cat') for t in ds.templates] == [
        t('cat') for t in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]


def test_the_lists_are_clip_benchmarks(theirs):
    names = json.loads((Path(theirs.__file__).parent / 'en_classnames.json').read_text())[
        'imagenet1k'
    ]
    assert (
        class_names('imagenet') == class_names('imagenet-v2') == names
        and wnids() == theirs.all_imagenet_wordnet_ids
    )


def objectnet(root, folders=('air_freshener', 'banana', 't_shirt', 'Zipper'), n=2):
    "A miniature: two of four classes are ImageNet's; red border around green"
    # in no order
    labels = dict(
        t_shirt='T-shirt', air_freshener='Air freshener', banana='Banana', Zipper='Zipper'
    )
    m = root / 'mappings'
    m.mkdir(parents=True)
    for file, content in (
        ('folder_to_objectnet_label.json', labels),
        (
            'objectnet_to_imagenet_1k.json',
            {'T-shirt': 'jersey, T-shirt; sarong', 'Banana': 'banana'},
        ),
        ('pytorch_to_imagenet_2012_id.json', {'0': 0, '1': 1, '2': 2}),
    ):
        (m / file).write_text(json.dumps(content))
    (m / 'imagenet_to_label_2012_v2').write_text('banana\njersey, T-shirt\nsarong\n')
    for f in folders:
        for i in range(n):
            im = Image.new('RGB', (14, 10), 'red')
            im.paste(Image.new('RGB', (10, 6), (0, 100 + i, 0)), (2, 2))
            (root / 'images' / f).mkdir(parents=True, exist_ok=True)
            im.save(root / 'images' / f / f'{i}.png')
    return root


def test_objectnet_is_cropped_and_named_as_clip_benchmark_names_it(tmp_path, theirs):
    root = objectnet(tmp_path / 'ours')
    got = samples(standard('objectnet', root, part=True).source)
    shutil.copytree(root, tmp_path / 'theirs' / 'objectnet-1.0')
    for f in (root / 'mappings').iterdir():
        shutil.copy(f, tmp_path / 'theirs')
    ds = theirs.build_dataset(
        'objectnet',
        root=str(tmp_path / 'theirs'),
        transform=lambda im: im,
        split='test',
        download=False,
    )
    assert ds.classes == ['banana', 't-shirt'] == standard('objectnet', root, part=True).classnames
    assert [s.label for s in got] == [ds[i][1] for i in range(len(ds))] == [0, 0, 1, 1]
    for i, s in enumerate(got):
        im = decode(s.image)
        # no red is left, and no green is lost
        assert im.size == (10, 6) and im.getcolors() == [(60, (0, 100 + i % 2, 0))]
        assert ds[i][0].size == (14, 10)  # CLIP_benchmark leaves the border on: border=0
    assert decode(
        samples(standard('objectnet', root, part=True, border=0).source)[0].image
    ).size == (14, 10)


def test_broken_objectnet_images_are_skipped(tmp_path):
    root = objectnet(tmp_path)
    (root / 'images/banana/0.png').write_bytes(b'no picture')
    picture(root / 'images/banana/1.png', size=(4, 9))
    got = samples(ObjectNet(root, part=True))
    assert [s.kind if isinstance(s, Skip) else s.label for s in got] == [
        'broken image',
        'broken image',
        1,
        1,
    ]
    assert str(tmp_path) not in str(got[0]) and 'less than its border' in got[1].detail


# Karpathy


def karpathy(file, entries):
    "entries: (filepath or None, filename, split, captions)"
    images = [
        (dict(filepath=p) if p else {})
        | dict(filename=f, split=s, sentences=[dict(raw=c, tokens=c.split()) for c in cs])
        for p, f, s, cs in entries
    ]
    file.write_text(json.dumps(dict(dataset='x', images=images)))
    return file


def test_karpathy_is_what_clip_benchmark_reads(tmp_path, theirs):
    said = {'b.jpg': ['One. ', 'Two, with a comma'], 'a.jpg': ['Three', 'Four', 'Five']}
    for i, f in enumerate(said):
        picture(tmp_path / f, (i * 50, 0, 0))
    karpathy(
        tmp_path / 'dataset_flickr30k.json',
        [(None, f, 'test', cs) for f, cs in said.items()]
        + [(None, 'gone.jpg', 'train', ['Never looked for'])],
    )
    (tmp_path / 'ann.txt').write_text(
        'image,caption\n' + ''.join(f'{f},{c.strip()}\n' for f, cs in said.items() for c in cs)
    )
    ds = theirs.build_dataset(
        'flickr30k',
        root=str(tmp_path),
        annotation_file=str(tmp_path / 'ann.txt'),
        transform=None,
        split='test',
        download=False,
        task='zeroshot_retrieval',
    )
    got = samples(standard('flickr30k', tmp_path, part=True).source)
    assert (
        [s.captions for s in got]
        == [ds[i][1] for i in range(len(ds))]
        == [[c.strip() for c in cs] for cs in said.values()]
    )
    assert [decode(s.image).getpixel((0, 0)) for s in got] == [
        ds[i][0].getpixel((0, 0)) for i in range(2)
    ]


def test_karpathy_splits_folders_and_caption_counts(tmp_path):
    for f in ('val2014/1.jpg', 'val2014/2.jpg', 'train2014/3.jpg'):
        picture(tmp_path / f)
    file = karpathy(
        tmp_path / 'dataset_coco.json',
        [
            ('val2014', '1.jpg', 'test', list('abcdef')),
            ('val2014', '2.jpg', 'val', list('abcde')),
            ('train2014', '3.jpg', 'restval', list('abcde')),
        ],
    )

    def count(**kw):
        return [
            len(s.captions) for s in samples(standard('coco', tmp_path, part=True, **kw).source)
        ]

    assert (count(), count(captions=5), count(split='restval'), count(captions=1, split='val')) == (
        [6],
        [5],
        [5],
        [1],
    )
    # without the folder of the set
    assert [s.key for s in samples(Karpathy(file, tmp_path / 'val2014'))] == ['1.jpg']
    assert (
        standard('coco', tmp_path, part=True).images == 5000
        and standard('coco', tmp_path, split='val').images is None
    )


# Numbers


class Remembered(nn.Module):
    "A CLIP that encodes every batch of images once, however often it is asked"

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.cache = {}

    def encode_image(self, image, normalize=False):
        for row in (todo := [r for r in image if r.numpy().tobytes() not in self.cache]) and [
            torch.stack(todo)
        ]:
            for r, f in zip(row, self.model.encode_image(row)):
                self.cache[r.numpy().tobytes()] = f
        f = torch.stack([self.cache[r.numpy().tobytes()] for r in image])
        return F.normalize(f, dim=-1) if normalize else f

    def encode_text(self, *a, **kw):
        return self.model.encode_text(*a, **kw)


@pytest.fixture(scope='module')
def teacher():
    folder = Path(__file__).resolve().parents[2] / 'shared/teachers/cifar10'
    if not folder.is_dir():
        pytest.skip('no ../shared/teachers/cifar10 beside the project')
    model = open_clip.create_model(f'local-dir:{folder}').float().eval()
    return Remembered(model), transforms(model)[1], open_clip.get_tokenizer(f'local-dir:{folder}')


def test_cifar10_agrees_with_clip_benchmark_and_with_the_documented_number(
    tmp_path, shared, teacher, theirs
):
    pytest.importorskip('sklearn')
    from tinyclip.evaluate.benchmarks import benchmark

    data = shared / 'data/cifar10'
    (model, preprocess, tokenizer) = teacher
    (tmp_path / 'test').mkdir()
    (tmp_path / 'test/nshards.txt').write_text('1')
    (tmp_path / 'test/0.tar').symlink_to(data / 'val-0000.tar')
    shutil.copy(data / 'classnames.txt', tmp_path)
    (tmp_path / 'zeroshot_classification_templates.txt').write_text('a photo of a {c}.')
    r = benchmark(
        model, preprocess, tokenizer, 'wds/cifar10', tmp_path, theirs=True, progress=False
    )
    assert (r['n'], round(r['top1'], 6)) == (2000, 0.7195)
    for ours, other in (('top1', 'acc1'), ('top5', 'acc5'), ('per_class', 'mean_per_class_recall')):
        assert r[ours] == pytest.approx(r['theirs'][other], abs=1e-9)
    mine = zero_shot(model, tokenizer, labelled(str(data / 'val-0000.tar'), preprocess, 128))
    assert {k: r[k] for k in mine} == mine  # our own loader, our own page


def test_flickr8k_agrees_by_three_roads(tmp_path, shared, teacher, theirs):
    "From shards, from a Karpathy file, and through CLIP_benchmark with its own recall"
    from tinyclip.evaluate.benchmarks import benchmark

    model, preprocess, tokenizer = teacher
    some = [
        s
        for s, _ in zip(
            Shards(str(shared / 'data/flickr8k/val-0000.tar')).samples(
                [str(shared / 'data/flickr8k/val-0000.tar')]
            ),
            range(200),
        )
    ]
    assert all(isinstance(s, Sample) and len(s.captions) == 5 for s in some)
    shard(
        tmp_path / 'wds/test/0.tar',
        [dict(jpg=s.image, txt='\n'.join(s.captions).encode()) for s in some],
    )
    (tmp_path / 'wds/test/nshards.txt').write_text('1')
    (tmp_path / 'wds/dataset_type.txt').write_text('retrieval')
    shards = shard(
        tmp_path / 'pairs-0.tar',
        [dict(jpg=s.image, json=json.dumps(dict(captions=s.captions)).encode()) for s in some],
    )
    for i, s in enumerate(some):
        (tmp_path / f'{i}.jpg').write_bytes(s.image)
    karpathy(
        tmp_path / 'dataset_flickr30k.json',
        [(None, f'{i}.jpg', 'test', s.captions) for i, s in enumerate(some)],
    )
    r = benchmark(
        model,
        preprocess,
        tokenizer,
        'wds/flickr8k',
        tmp_path / 'wds',
        theirs=True,
        progress=False,
        batch_size=64,
    )
    assert (r['images'], r['texts']) == (200, 1000) and 0.01 < r['i2t_r10'] < 0.9
    for k in (1, 5, 10):
        assert r[f't2i_r{k}'] == pytest.approx(r['theirs'][f'image_retrieval_recall@{k}'], abs=1e-6)
        assert r[f'i2t_r{k}'] == pytest.approx(r['theirs'][f'text_retrieval_recall@{k}'], abs=1e-6)
    from_file = evaluate_on(
        model,
        preprocess,
        tokenizer,
        standard('flickr30k', tmp_path, part=True),
        batch_size=64,
        progress=False,
    )
    from tinyclip.evaluate import retrieval

    from_shards = retrieval(model, captioned(str(shards), preprocess, tokenizer, 64))
    assert {k: r[k] for k in from_shards} == from_shards == {k: from_file[k] for k in from_shards}


def test_a_folder_and_its_shards_give_the_same_numbers(tmp_path, small):
    """ImageNet-R in miniature: 200 classes, two different pictures each of some, label = place
    among the 200"""
    ids, g = wnids('imagenet-r'), np.random.default_rng(0)
    chosen = [ids[i] for i in (0, 51, 120, 199)]
    entries = []
    for w in chosen:
        for i in range(2):
            Image.fromarray(g.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                b := io.BytesIO(), 'PNG'
            )
            (tmp_path / 'r' / w).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'r' / w / f'{i}.png').write_bytes(b.getvalue())
            entries.append(dict(png=b.getvalue(), cls=str(ids.index(w)).encode()))
    model, preprocess, tokenizer = small

    def run(root):
        return evaluate_on(
            model,
            preprocess,
            tokenizer,
            standard('imagenet-r', root, templates='simple', part=True),
            progress=False,
        )

    a = run(tmp_path / 'r')
    b = run(str(shard(tmp_path / 'r-0.tar', entries)))
    assert {k: v for k, v in a.items() if k != 'skipped'} == {
        k: v for k, v in b.items() if k != 'skipped'
    }
    assert (a['n'], a['of'], a['chance'], a['skipped'], b['skipped']) == (
        8,
        30_000,
        1 / 200,
        {'class folder without images': 196},
        {},
    )


def test_equal_names_go_to_the_first(small):
    "Against a stable sort over all classes, equal names and all"
    model, _, tokenizer = small
    names = ['cat', 'sunglasses', 'dog', 'sunglasses', 'missile', 'ship', 'sunglasses', 'missile']
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(60) % 8
    got = zero_shot(model, tokenizer, zip(images.split(7), labels.split(7)), names, 'simple')
    from tinyclip.evaluate import class_embeddings

    z = class_embeddings(model, tokenizer, list(dict.fromkeys(names)))
    with torch.no_grad():
        scores = (model.encode_image(images, normalize=True) @ z.T)[
            :, [list(dict.fromkeys(names)).index(n) for n in names]
        ]
    order = scores.argsort(dim=1, descending=True, stable=True)
    assert got['top1'] == pytest.approx((order[:, 0] == labels).double().mean().item()) and got[
        'top5'
    ] == pytest.approx((order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert got['per_class'] == pytest.approx(
        np.mean([(order[labels == c, 0] == c).double().mean().item() for c in range(8)])
    )


def test_prompts_for_each_class(small):
    model, _, tokenizer = small
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(12) % 3
    batches, names = [(images, labels)], ['cat', 'dog', 'ship']
    given = zero_shot(model, tokenizer, batches, names, {n: [f'a photo of a {n}.'] for n in names})
    assert given == pytest.approx(zero_shot(model, tokenizer, batches, names, 'simple'))
    with pytest.raises(TinyclipError, match="no prompts for the class 'ship'"):
        zero_shot(model, tokenizer, batches, names, dict(cat=['x', 'y'], dog=['z'], ship=[]))


def test_progress_goes_to_stderr(tmp_path, small, capsys):
    model, preprocess, tokenizer = small
    test = standard(
        'imagenet-a', tree(tmp_path, wnids('imagenet-a')[:2]), templates='simple', part=True
    )
    evaluate_on(model, preprocess, tokenizer, test, progress=False)
    assert capsys.readouterr() == ('', '')
    evaluate_on(model, preprocess, tokenizer, test)
    out, err = capsys.readouterr()
    assert out == '' and '200/200' in err and '2/2' in err  # prompts, images


# One sentence each


def full(root, name='imagenet-r', n=1):
    return tree(root, wnids(name), n)


def loose(root):
    picture(root / 'ILSVRC2012_val_00000001.JPEG')
    return root


def archive(root):
    (root / 'ILSVRC2012_img_val.tar').write_bytes(b'')
    return root


def a_file(root):
    (root / 'x').write_text('')
    return root / 'x'


def inside(root):
    tree(root, wnids()[:1])
    return root / wnids()[0]


def empty(root):
    [(root / w).mkdir() for w in wnids('imagenet-a')]
    return root


def stray(root):
    tree(root, ['n02099601', '__MACOSX'])
    return root


def without(root, file):
    objectnet(root)
    (root / 'mappings' / file).unlink()
    return root


def other_map(root, text):
    objectnet(root)
    (root / 'mappings/objectnet_to_imagenet_1k.json').write_text(text)
    return root


def one_coco(root, *entry, place='val2014/1.jpg'):
    if place:
        picture(root / place)
    karpathy(root / 'dataset_coco.json', [entry or ('val2014', '1.jpg', 'test', ['a', 'b'])])
    return root


def text(path, said):
    path.write_text(said)
    return path


def counted(root, n):
    (root / 'classnames.txt').write_text('\n'.join(map(str, range(n))))
    return str(shard(root / 'a-0.tar', [dict(png=b'x', cls=b'0')]))


BAD = {
    "There is no standard test set named 'imagenet-1k'. Did you mean": lambda t: standard(
        'imagenet-1k', t
    ),
    "There is no folder": lambda t: standard('imagenet', t / 'nowhere'),
    "is a file; name the folder": lambda t: standard('imagenet', a_file(t)),
    "does not hold the class folders of ImageNet, but": lambda t: standard(
        'imagenet', [tree(t / 'ILSVRC/val', wnids()), t][1]
    ),
    "val' does: name that one": lambda t: standard(
        'imagenet', [tree(t / 'ILSVRC/val', wnids()), t][1]
    ),
    "is itself a class folder of ImageNet: name the folder above": lambda t: standard(
        'imagenet', inside(t)
    ),
    "holds images but no class folders of ImageNet": lambda t: standard('imagenet', loose(t)),
    "holds archives (ILSVRC2012_img_val.tar)": lambda t: standard('imagenet', archive(t)),
    (
        "holds no class folder of ImageNet-V2 (0, ...). These are the folders of 'imagenet-a'"
    ): lambda t: standard('imagenet-v2', full(t, 'imagenet-a')),
    "holds no class folder of ImageNet (n01440764, ...). Check the path": lambda t: standard(
        'imagenet', tree(t, ['cats', 'dogs'])
    ),
    "1 of the folders in": lambda t: standard('imagenet', stray(t), part=True),
    "the first is '__MACOSX'. Move them away": lambda t: standard('imagenet', stray(t), part=True),
    "800 of the folders in": lambda t: standard('imagenet-a', full(t, 'imagenet')),
    (
        "no images for 800 of the 1000 classes of ImageNet-Sketch; the first is 'n01440764' "
        "(tench). These are the folders of 'imagenet-r'"
    ): lambda t: standard('imagenet-sketch', full(t)),
    "Complete it, or pass part=True": lambda t: standard('imagenet', tree(t, wnids()[:999])),
    "None of the class folders": lambda t: standard('imagenet-a', empty(t), part=True),
    "holds 200 images, and ImageNet-A has 7500": lambda t: standard(
        'imagenet-a', full(t, 'imagenet-a')
    ),
    "matches no file": lambda t: standard('imagenet', str(t / 'val-*.tar')),
    "names 1000 classes, and ImageNet-R has 200": lambda t: standard(
        'imagenet-r', counted(t, 1000)
    ),
    "has no {}": lambda t: standard(
        'imagenet', tree(t, wnids()[:1]), part=True, templates=['a photo']
    ),
    "There is no set of templates named 'opneai'": lambda t: standard(
        'imagenet', tree(t, wnids()[:1]), part=True, templates='opneai'
    ),
    "annotations= means nothing for ObjectNet; it takes border, templates": lambda t: standard(
        'objectnet', objectnet(t), annotations='x'
    ),
    "templates= means nothing for COCO; it takes annotations, captions, split": lambda t: standard(
        'coco', t, templates='simple'
    ),
    "border=-1": lambda t: standard('objectnet', objectnet(t), border=-1),
    "holds no folder 'mappings', but": lambda t: standard(
        'objectnet', objectnet(t / 'objectnet-1.0').parent
    ),
    "name the unpacked ObjectNet download": lambda t: standard('objectnet', tree(t, ['banana'])),
    (
        "folder_to_objectnet_label.json'; it should be ObjectNet's list of folders and labels"
    ): lambda t: standard('objectnet', without(t, 'folder_to_objectnet_label.json')),
    "is not valid JSON": lambda t: standard('objectnet', other_map(t, '{"Banana":')),
    "holds a list, not an object": lambda t: standard('objectnet', other_map(t, '["Banana"]')),
    "('Bananna' is in only one of them)": lambda t: standard(
        'objectnet', other_map(t, '{"Bananna":""}')
    ),
    "do not belong together;": lambda t: standard('objectnet', other_map(t, '{}')),
    "no images for 1 of the 2 classes of ObjectNet; the first is 't_shirt' (t-shirt)": lambda t: (
        standard('objectnet', objectnet(t, ('banana', 'Zipper')))
    ),
    "holds 4 images, and ObjectNet has 18574": lambda t: standard('objectnet', objectnet(t)),
    "Where are the captions of Flickr30k?": lambda t: standard('flickr30k', t),
    "There is no file": lambda t: standard('coco', t, annotations=t / 'gone.json'),
    "has no list 'images'": lambda t: Karpathy(text(t / 'a.json', '{"annotations":[]}'), t),
    "Entry 0 of 'a.json' lacks filename, split or sentences": lambda t: Karpathy(
        text(t / 'a.json', '{"images":[{"id":1}]}'), t
    ),
    "There is no split of dataset_coco.json named 'tset'. Did you mean 'test'": lambda t: standard(
        'coco', one_coco(t), split='tset'
    ),
    "1 of the 1 images of split 'test' are not in": lambda t: standard(
        'coco', one_coco(t, place=None)
    ),
    "the first is val2014/1.jpg. Complete the images": lambda t: standard(
        'coco', one_coco(t, place=None)
    ),
    "images' has it: name that one": lambda t: standard(
        'coco', one_coco(t, place='images/val2014/1.jpg')
    ),
    "There is no folder ": lambda t: standard(
        'coco', t / 'nowhere', annotations=one_coco(t) / 'dataset_coco.json'
    ),
    "1 images of dataset_coco.json have fewer than 5 captions": lambda t: standard(
        'coco', one_coco(t), captions=5
    ),
    "1 images of dataset_coco.json have fewer than 1 captions": lambda t: standard(
        'coco', one_coco(t, 'val2014', '1.jpg', 'test', [' '])
    ),
    "captions=0: keep at least one": lambda t: standard('coco', one_coco(t), captions=0),
    "holds 1 images, and COCO has 5000": lambda t: standard('coco', one_coco(t)),
    "2 class names for 1 class folders": lambda t: ClassFolders(t, ['a'], ['a', 'b']),
}


@pytest.mark.parametrize('message', BAD)
def test_bad_input_is_named(tmp_path, message):
    with pytest.raises(TinyclipError) as e:
        BAD[message](tmp_path)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_labels_of_another_set_are_refused(tmp_path, small):
    """Shards whose cls counts ImageNet's 1000 classes, opened as the 200 of ImageNet-R: what
    fits would look like a result"""
    Image.new('RGB', (16, 16)).save(b := io.BytesIO(), 'PNG')
    shards = str(
        shard(
            tmp_path / 'a-0.tar',
            [dict(png=b.getvalue(), cls=str(i).encode()) for i in (3, 150, 700)],
        )
    )
    with pytest.raises(
        TinyclipError,
        match='1 labels of 1 shards: a-0.tar are outside the 200 classes of ImageNet-R',
    ):
        evaluate_on(*small, standard('imagenet-r', shards, templates='simple'), progress=False)


# The adapter


@pytest.mark.parametrize(
    'message,kw',
    [
        ("Did you mean 'cifar10'", dict(name='cifar01')),
        ("Did you mean 'language'", dict(languag='en')),
        ('Did you mean', dict(task='zeroshot')),
        ('There is no folder', dict(root='nowhere')),
        ("cannot open 'cifar10' with split 'val'", dict(split='val')),
        ("cannot open 'cifar10' with split 'test'", {}),
        ('has no test/nshards.txt', dict(name='wds/x')),
        ('image caption selection', dict(name='winoground')),
        ('would now fetch it (wget', dict(name='flickr8k')),
        ('would now fetch it (https', dict(name='imagenetv2')),
        ('needs the package', dict(name='vtab/pets')),
    ],
)
def test_the_adapter_refuses(tmp_path, theirs, message, kw):
    from tinyclip.evaluate.benchmarks import open_benchmark

    if message == 'needs the package' and _installed('tensorflow'):
        pytest.skip('tensorflow is installed')
    given = dict(name='cifar10', root=tmp_path, preprocess=lambda im: torch.zeros(3, 4, 4)) | kw
    with pytest.raises(TinyclipError) as e:
        open_benchmark(given.pop('name'), given.pop('root'), given.pop('preprocess'), **given)
    assert message in str(e.value) and '\n' not in str(e.value)
    # as before
    assert theirs.call.__module__ == 'subprocess' and isinstance(
        theirs.imagenetv2.requests, types.ModuleType
    )


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_shards_without_names_and_broken_shards(tmp_path, theirs, small, capsys):
    from tinyclip.evaluate.benchmarks import benchmark

    Image.new('RGB', (16, 16)).save(b := io.BytesIO(), 'PNG')
    shard(
        tmp_path / 'test/0.tar', [dict(png=b.getvalue(), cls=b'0'), dict(png=b'broken', cls=b'1')]
    )
    (tmp_path / 'test/nshards.txt').write_text('1')
    with pytest.raises(TinyclipError, match='they stand in classnames.txt'):
        benchmark(*small, 'wds/x', tmp_path, progress=False)
    out, err = capsys.readouterr()
    # CLIP_benchmark prints this; stdout belongs to --json
    assert out == '' and 'classnames.txt not found' in err
    (tmp_path / 'classnames.txt').write_text('cat\ndog')
    (tmp_path / 'zeroshot_classification_templates.txt').write_text('a {c}')
    with pytest.raises(TinyclipError, match="'wds/x' cannot be read"):
        benchmark(*small, 'wds/x', tmp_path, progress=False)


def test_the_adapter_prints_nothing_on_stdout(tmp_path, theirs, small, capsys):
    from tinyclip.evaluate.benchmarks import benchmark

    picture(tmp_path / 'b.jpg')
    picture(tmp_path / 'c.jpg', (0, 90, 255))
    (tmp_path / 'ann.txt').write_text('image,caption\nb.jpg,One\nb.jpg,Two\nc.jpg,Three\n')
    r = benchmark(
        *small,
        'flickr30k',
        tmp_path,
        annotation_file=str(tmp_path / 'ann.txt'),
        theirs=True,
        progress=False,
        workers=1,
    )
    assert (r['task'], r['images'], r['texts']) == ('retrieval', 2, 3) and r['theirs'][
        'image_retrieval_recall@1'
    ] == pytest.approx(r['t2i_r1'])
    assert capsys.readouterr().out == ''


def test_without_the_package(monkeypatch, tmp_path):
    import sys

    from tinyclip.evaluate.benchmarks import open_benchmark

    for m in [m for m in sys.modules if m.split('.')[0] == 'clip_benchmark']:
        monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, 'clip_benchmark', None)
    with pytest.raises(TinyclipError, match=r"pip install 'tinyclip\[eval\]'"):
        open_benchmark('cifar10', tmp_path, None)
