"""The loader beyond the plain path: JPEGs at reduced scale, mixed sources, resuming without
decoding, memory."""

import io
import json
import pickle
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, gray_scale, image_transform_v2
from PIL import Image, ImageDraw
from shards import shard
from torchvision import transforms as T

from tinyclip.core import TinyclipError
from tinyclip.data import open_pairs
from tinyclip.data.jpeg import MARGIN, first_step, opener, reduction, window
from tinyclip.data.pairs import captioned, labelled, rebatch
from tinyclip.data.samples import Sample, SamplingPlan, decode
from tinyclip.data.shapes import Shapes
from tinyclip.data.sources import as_source, mix
from tinyclip.data.transforms import Chunk, as_bytes, collate, label_targets, pictures

# the package shows the function of this name in place of the module
transforms_module = import_module('tinyclip.data.transforms')

TRAIN, VAL = (image_transform_v2(PreprocessCfg(size=32), is_train=t) for t in (True, False))
TOKENIZER = open_clip.SimpleTokenizer(context_length=12)
both = pytest.mark.parametrize('workers', [0, 2])


@pytest.fixture(autouse=True)
def few_cores():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            'ignore', message='This DataLoader will create|.* can keep .* loader workers busy'
        )
        yield


def picture(i=0, size=(300, 220), format='JPEG', mode='RGB', **kw):
    "Smooth blobs of many sizes"
    rng = np.random.default_rng(i)
    draw = ImageDraw.Draw(im := Image.new('RGB', (2 * size[0], 2 * size[1]), 'grey'))
    for s in 2 * max(size) / 2 ** np.linspace(1, 6, 120):
        x, y = rng.random(2) * im.size
        draw.ellipse(
            (x, y, x + s, y + s * rng.random()), fill=tuple(int(c) for c in rng.integers(0, 256, 3))
        )
    im.resize(size, Image.LANCZOS).convert(mode).save(
        b := io.BytesIO(), format, **(dict(quality=92) | kw if format == 'JPEG' else kw)
    )
    return b.getvalue()


def tiny(i):
    Image.new('RGB', (20, 16), (i % 250, i * 3 % 250, i * 7 % 250)).save(b := io.BytesIO(), 'JPEG')
    return b.getvalue()


def sample(i, **other):
    return {'jpg': tiny(i), 'txt': f'caption {i}', **other}


def shards(folder, n=3, each=10, name='train', start=0):
    folder.mkdir(exist_ok=True)
    return [
        shard(
            folder / f'{name}-{s:04}.tar',
            [sample(start + s * each + i) for i in range(each)],
            s * each,
        )
        for s in range(n)
    ]


def open_(source, batch_size=4, **kw):
    return open_pairs(source, TRAIN, TOKENIZER, batch_size, **kw)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.image, y.image) and torch.equal(x.text, y.text) for x, y in zip(a, b)
    )


def through(data, transform, seed=0):
    "By the opener, and the plain way with the same chance"
    torch.manual_seed(seed)
    image, rest = opener(transform)(data)
    a = rest(image)
    torch.manual_seed(seed)
    return a, transform(decode(data))


# --- JPEG at reduced scale


@pytest.mark.parametrize('transform', [TRAIN, VAL], ids=['train', 'val'])
@pytest.mark.parametrize(
    'size', [(40, 33), (33, 90), (102, 90), (64, 64), (32, 32), (1, 1), (5, 300)]
)
def test_small_pictures_are_the_same_to_the_bit(transform, size):
    for seed in range(5):
        assert torch.equal(*through(picture(seed, size), transform, seed))


@pytest.mark.parametrize(
    'kw',
    [
        dict(format='PNG'),
        dict(format='WEBP'),
        dict(mode='CMYK'),
        dict(format='PNG', mode='L'),
        dict(format='GIF'),
    ],
)
def test_other_kinds_of_pictures_are_left_alone(kw):
    for t in (TRAIN, VAL):
        assert torch.equal(*through(picture(1, (500, 400), **kw), t))


def test_exif_changes_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    a, b = (through(picture(1, (500, 400), **kw), VAL)[0] for kw in ({}, dict(exif=exif)))
    assert torch.equal(a, b)


@pytest.mark.parametrize('transform', [TRAIN, VAL], ids=['train', 'val'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('size', [(128, 120), (301, 223), (640, 480), (481, 1203)])
def test_large_pictures_differ_less_than_the_resize_method(transform, mode, size):
    "The same crop, at most as far from bicubic as bilinear is"
    other = T.Compose(
        [
            type(s)(
                s.size,
                **(dict(scale=s.scale) if hasattr(s, 'scale') else {}),
                interpolation=T.InterpolationMode.BILINEAR,
            )
            if i == 0
            else s
            for i, s in enumerate(transform.transforms)
        ]
    )
    far, near = [], []
    for seed in range(4):
        data = picture(seed, size, mode=mode)
        a, b = through(data, transform, seed)
        torch.manual_seed(seed)
        c = other(decode(data))
        near.append((a - b).abs().mean())
        far.append((c - b).abs().mean())
    assert sum(near) < sum(far) and (max(near) > 0 or min(size) < 32 * MARGIN * 2)


def test_the_decoder_makes_fewer_pixels(monkeypatch):
    seen = []
    monkeypatch.setattr('tinyclip.data.jpeg.to_rgb', lambda im: (seen.append(im.size), im)[1])
    opener(VAL)(picture(0, (640, 480)))
    opener(VAL)(picture(0, (90, 80)))
    assert seen == [(80, 60), (90, 80)]


@pytest.mark.parametrize(
    'transform',
    [
        T.Compose([T.CenterCrop(32), T.ToTensor()]),
        T.Compose([T.Resize(32, max_size=64), T.CenterCrop(32), T.ToTensor()]),
        lambda im: T.ToTensor()(im.resize((32, 32))),
        T.Compose(
            [
                T.Resize(32, interpolation=T.InterpolationMode.NEAREST),
                T.CenterCrop(32),
                T.ToTensor(),
            ]
        ),
    ],
)
def test_unknown_transforms_get_the_full_picture(transform):
    assert first_step(transform) == (None, transform) and torch.equal(
        *through(picture(0, (640, 480)), transform)
    )


def test_sizes_are_torchvisions():
    for n in (31, 32, (32, 48)):
        step = T.Resize(n, interpolation=T.InterpolationMode.BICUBIC)
        for size in ((640, 480), (333, 500), (100, 100), (47, 1000)):
            assert window(step, Image.new('L', size)).size == step(Image.new('L', size)).size


def test_never_below_the_margin():
    for n in range(10, 3000, 7):
        part = window(first_step(VAL)[0], Image.new('1', (n, n)))
        k = reduction(part)
        assert k == 1 or n / k >= 32 * MARGIN
        assert k == 8 or n / (2 * k) < 32 * MARGIN


@both
def test_reduced_or_not_the_same_samples_and_counts(tmp_path, workers):
    good = [{'jpg': picture(i), 'txt': f'caption {i}'} for i in range(8)]
    source = shard(
        tmp_path / 'a.tar',
        [*good, {'jpg': good[0]['jpg'][:2000], 'txt': 'x'}, {'jpg': b'no', 'txt': 'x'}],
    )
    p, q, r = (
        open_(source, workers=w, reduced=reduced)
        for w, reduced in ((workers, True), (0, True), (workers, False))
    )
    a, b, c = (list(x.epoch(0)) for x in (p, q, r))
    assert same(a, b) and not same(a, c) and p.skipped == r.skipped == {'broken image': 2}
    for x, y in zip(a, c):
        assert torch.equal(x.text, y.text) and (x.image - y.image).abs().mean() < 0.1


def test_evaluation_is_exact_unless_asked(tmp_path):
    source = shard(
        tmp_path / 'a.tar', [{'jpg': picture(i), 'txt': f'caption {i}'} for i in range(4)]
    )
    exact, near = (
        next(iter(captioned(source, VAL, TOKENIZER, reduced=r)))[0] for r in (False, True)
    )
    assert torch.equal(exact[0], VAL(decode(picture(0)))) and torch.equal(
        next(iter(captioned(source, VAL, TOKENIZER)))[0], exact
    )
    assert not torch.equal(exact, near) and (exact - near).abs().mean() < 0.1


# --- pictures travel as bytes


def entries():
    return [
        Sample(str(i), 'here', picture(i, (40 + i, 90), mode=m, format=f), ['x'], 0)
        for i, (m, f) in enumerate(
            [('RGB', 'JPEG'), ('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGBA', 'PNG'), ('P', 'PNG')]
        )
    ]


OURS = [
    image_transform_v2(PreprocessCfg(size=32, **kw), is_train=t)
    for t in (True, False)
    for kw in (
        dict(),
        dict(mean=(0,) * 3, std=(1,) * 3),
        dict(interpolation='bilinear', resize_mode='longest'),
        dict(resize_mode='squash'),
    )
]
OTHERS = [
    T.Compose([T.Resize((32, 32)), T.ToTensor()]),
    T.Compose([*TRAIN.transforms, T.RandomErasing(1.0)]),
    T.Compose([T.Resize((32, 32)), T.ToTensor(), T.Normalize(0.5, 0.5)]),
    lambda im: T.ToTensor()(im.resize((32, 32))),
    T.Compose([T.ColorJitter(0.5), *VAL.transforms]),
    T.Compose(
        [
            T.PILToTensor(),
            T.Resize((32, 32)),
            *VAL.transforms[-3:-1],
            T.ConvertImageDtype(torch.float32),
            VAL.transforms[-1],
        ]
    ),
    T.Compose([*TRAIN.transforms[:2], gray_scale(p=0.5), *TRAIN.transforms[2:]]),
]


@pytest.mark.parametrize('reduced', [True, False])
@pytest.mark.parametrize(
    'transform',
    OURS + OTHERS,
    ids=[f'{k}-{i}' for k, o in (('ours', OURS), ('other', OTHERS)) for i in range(len(o))],
)  # processes must agree on the names
def test_parted_or_whole_the_same_to_the_bit(transform, reduced):
    chunk = collate(entries(), SamplingPlan(seed=3), transform, label_targets, reduced=reduced)
    whole = torch.stack(pictures(entries(), SamplingPlan(seed=3), transform, reduced=reduced)[1])
    assert chunk.ready()[0].dtype == torch.float32 and torch.equal(chunk.ready()[0], whole)
    assert (
        (chunk.fields[0].dtype == torch.uint8)
        == (transform in OURS)
        == (as_bytes(transform)[1] is not None)
    )
    assert pickle.loads(pickle.dumps(chunk.finish)) == chunk.finish


def test_workers_hand_over_bytes(tmp_path, monkeypatch):
    "A quarter of what it was, and the same batches"
    seen, source = [], shards(tmp_path)
    ready = Chunk.ready
    monkeypatch.setattr(Chunk, 'ready', lambda c: (seen.append(c.fields[0].dtype), ready(c))[1])
    got = list(open_(source, workers=2).epoch(0))
    assert set(seen) == {torch.uint8} and same(got, list(open_(source).epoch(0)))
    monkeypatch.setattr(transforms_module, 'as_bytes', lambda t: (t, None))
    seen.clear()
    assert same(got, list(open_(source, workers=2).epoch(0))) and set(seen) == {torch.float32}


# --- mixing


IN_FOURS = SamplingPlan(size=4)


def flow(source, order=IN_FOURS, workers=1):
    "As a loader with so many workers collects them"
    from itertools import zip_longest

    turns = zip_longest(*(source.chunks(order, w, workers) for w in range(workers)))
    return [s for turn in turns for c in turn if c for s in c]


def two(tmp_path, a=64, b=64):
    "Two folders of four shards, mixed three to one"
    shards(tmp_path / 'a', 4, a // 4, 'a')
    shards(tmp_path / 'b', 4, b // 4, 'b', 1000)
    return {f'{tmp_path.as_posix()}/a/*.tar': 3, f'{tmp_path.as_posix()}/b/*.tar': 1}


def of(samples):
    return Counter(s.where[0] for s in samples)


def test_shares_and_one_pass(tmp_path):
    got = flow(mix(two(tmp_path)))
    firsts = [s.key + s.where for s in got if s.where[0] == 'a']
    # 4 streams, each right to within one
    assert len(firsts) == 64 == len(set(firsts)) and abs(of(got)['b'] - 64 / 3) <= 4
    assert len({(s.key, s.where) for s in got}) == len(got)  # 21 of 64: none twice
    for n in (8, 24, 48):
        assert abs(of(got[:n])['b'] - n / 4) <= 4


def test_a_small_source_starts_over(tmp_path):
    got = flow(mix(two(tmp_path, 64, 8)))
    seconds = Counter(s.key.split(' ')[0] + s.where for s in got if s.where[0] == 'b')
    assert (
        len(seconds) == 8
        and set(seconds.values()) <= {2, 3}
        and len({(s.key, s.where) for s in got}) == len(got)
    )


def test_a_given_length(tmp_path):
    for n in (1, 7, 50, 400):
        assert len(flow(mix(two(tmp_path), length=n))) == n


@pytest.mark.parametrize('length', [None, 90])
def test_a_mix_repeats_itself_whatever_the_workers(tmp_path, length):
    parts = [*two(tmp_path).items(), (Shapes(n=70), 2)]  # 4 streams

    def run(epoch=2, **kw):
        return list(open_(mix(parts, length), seed=5, **kw).epoch(epoch))

    first = run()
    for workers in (1, 2, 4):
        assert same(first, run(workers=workers))
    assert not same(first, run(3))


def test_ranks_share_a_mix(tmp_path):
    m = mix([*two(tmp_path).items(), (Shapes(n=50), 2)])
    parts = [flow(m, SamplingPlan(size=4, rank=r, world=2)) for r in range(2)]
    firsts = [s.key + s.where for p in parts for s in p if s.where[0] == 'a']
    assert len(firsts) == 64 == len(set(firsts))
    assert all(abs(len(p) - 64) <= 4 for p in parts)
    with pytest.raises(TinyclipError, match='too small for 3 processes'):
        flow(mix([(shards(tmp_path / 'c'), 1), (Shapes(n=2), 1)]), SamplingPlan(world=3))


def test_labels_stay_where_they_mean_the_same(tmp_path):
    one, other = Shapes(n=30), Shapes('val', n=30)
    m = mix([(one, 1), (other, 1)])
    assert m.classnames == as_source(one).classnames and all(s.label is not None for s in flow(m))
    assert len(next(iter(labelled(m, VAL, 8)))[1]) == 8
    m = mix([(one, 1), (shards(tmp_path), 1)])
    assert m.classnames is None and all(s.label is None for s in flow(m))
    with pytest.raises(TinyclipError, match='no class names'):
        labelled(m, VAL)


@both
def test_a_mix_with_bad_parts_ends(tmp_path, workers):
    empty = shard(tmp_path / 'empty.tar', [])
    pairs = open_(mix([(shards(tmp_path / 'a', 1, 30), 1), (empty, 1)]), 1, workers=workers)
    assert len(list(pairs.epoch(0))) <= 1 and pairs.skipped['source without samples'] == 1
    broken = shard(tmp_path / 'b.tar', [{'jpg': b'no', 'txt': 'x'}] * 5)
    pairs = open_(mix([(shards(tmp_path / 'a', 1, 30), 1), (broken, 1)]), workers=workers)
    assert len(list(pairs.epoch(0))) == 7 and pairs.skipped['broken image'] in (29, 30, 31)


@pytest.mark.parametrize(
    'sources,kw,message',
    [
        ({}, {}, 'no mix of sources'),
        ({'shapes': -1}, {}, 'weight'),
        ({'shapes': '1'}, {}, 'weight'),
        ({'nowhere': 1}, {}, 'no such file'),
        ({'shapes': 1}, dict(length=0), 'length=0'),
    ],
)
def test_no_mix(sources, kw, message):
    with pytest.raises(TinyclipError, match=message):
        mix(sources, **kw)


# --- resuming without decoding


def damaged(tmp_path):
    for s in range(4):
        samples = [sample(s * 20 + i) for i in range(20)]
        for i in {0: (3, 4, 5), 1: (), 2: range(2, 19), 3: (0, 19)}[s]:
            samples[i]['jpg'] = samples[i]['jpg'][:200]
        samples[7].pop('txt')
        shard(tmp_path / f'{s}.tar', samples, 20 * s)
    return str(tmp_path / '*.tar')


def csv(tmp_path):
    for i in range(70):
        (tmp_path / f'{i}.jpg').write_bytes(tiny(i) if i % 9 else b'no')
    (tmp_path / 'pairs.csv').write_text(
        'image,caption\n' + ''.join(f'{i}.jpg,caption {i}\n' for i in range(70))
    )
    return str(tmp_path / 'pairs.csv')


@both
@pytest.mark.parametrize('kind', ['shards', 'table', 'mix'])
@pytest.mark.parametrize('size', [3, 16, 17])
def test_a_mark_leads_to_the_same_batches(tmp_path, kind, size, workers):
    (tmp_path / 's').mkdir()
    source = (
        damaged(tmp_path / 's')
        if kind == 'shards'
        else csv(tmp_path / 's')
        if kind == 'table'
        else [(damaged(tmp_path / 's'), 2), (Shapes(n=70), 1)]
    )

    def make():
        return open_(mix(source) if kind == 'mix' else source, size, seed=4, workers=workers)

    straight = make()
    list(straight.epoch(0))
    whole, marks = [], []
    for b in straight.epoch(1):
        whole.append(b)
        marks.append(straight.mark(1, len(whole)))
    for n in {1, len(whole) // 2, len(whole)} - {0}:
        again = make()
        again.recall(json.loads(json.dumps(marks[n - 1])))
        assert same(whole[n:], list(again.epoch(1, n)))
        assert (
            again.skipped == straight.skipped
            and again.culprits == straight.culprits
            and again.tally.used == straight.tally.used
        )
        if n < len(whole):
            assert again.mark(1, len(whole)) == marks[-1]  # and resumed once more from there


def test_nothing_before_the_mark_is_decoded(tmp_path, monkeypatch):
    seen = []

    def make():
        return open_(csv(tmp_path), 16, reduced=False)

    monkeypatch.setattr(
        'tinyclip.data.jpeg.decode', lambda image: (seen.append(image), decode(image))[1]
    )
    one = make()
    whole = list(one.epoch(0))
    every, seen[:] = list(seen), []
    two = make()
    two.recall(one.mark(0, 2))
    assert same(whole[2:], list(two.epoch(0, 2)))
    assert len(every) == 70 and seen == every[32:]
    seen.clear()
    # without a mark: as before
    assert same(whole[2:], list(make().epoch(0, 2))) and len(seen) == 70


def test_a_foreign_mark_is_not_followed(tmp_path):
    source = shards(tmp_path)
    one = open_(source)
    whole = list(one.epoch(0))
    mark = one.mark(0, 3)
    for kw, start in (
        (dict(seed=1), 3),
        (dict(), 2),
        (dict(workers=2), 3),
        (dict(batch_size=3), 3),
    ):
        other, plain = open_(source, **kw), open_(source, **kw)
        other.recall(mark)
        assert (
            same(list(plain.epoch(0, start)), list(other.epoch(0, start)))
            and other.skipped == plain.skipped
        )
    one.recall(None)
    assert same(whole[3:], list(one.epoch(0, 3))) and one.mark(9, 9) is None


def test_an_epoch_that_ends_at_the_mark(tmp_path):
    one = open_(shards(tmp_path, 2, 8), 4)
    whole = list(one.epoch(0))
    two = open_(shards(tmp_path, 2, 8), 4)
    two.recall(one.mark(0, len(whole)))
    assert list(two.epoch(0, len(whole))) == []


# --- batches and memory


def test_batches_of_any_length_out_of_chunks_of_any_length():
    rng = np.random.default_rng(0)
    for size in (1, 3, 16, 40):
        cuts = np.sort(rng.integers(0, 200, 12)).tolist()
        chunks = [
            (torch.arange(a, b), torch.arange(a, b) * 2) for a, b in zip([0] + cuts, cuts + [200])
        ]
        got = list(rebatch(chunks, size))
        assert [len(x) for x, _ in got] == [size] * (200 // size) and torch.cat(
            [x for x, _ in got]
        ).tolist() == list(range(200 // size * size))
        assert all(torch.equal(2 * x, y) for x, y in got)


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc')
def test_memory_stays_flat_over_epochs(tmp_path):
    source = shard(
        tmp_path / 'a.tar', [{'jpg': picture(i), 'txt': f'caption {i}'} for i in range(48)]
    )
    pairs = open_(source, 16)

    def held():
        return int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 2**20

    for e in range(3):
        list(pairs.epoch(e))
    before = held()
    for e in range(3, 11):
        for _ in pairs.epoch(e):
            pass
    assert held() - before < 8  # MB; the pictures of 8 epochs would be 76 MB
