"""Models of transformers on the way in: those that transformers made, and folders that are
damaged, hostile or of another kind."""

import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

transformers = pytest.importorskip(
    'transformers', reason="transformers is optional: pip install 'tinyclip[export]'"
)
from hub import CAPTIONS, refuse, same, shake, short, tiny
from safetensors.torch import load_file
from test_siglip_transformers import cut

from tinyclip.core import TinyclipError
from tinyclip.zoo import load
from tinyclip.zoo.from_transformers import from_transformers, read_images, read_merges_of
from tinyclip.zoo.to_transformers import to_transformers
from tinyclip.zoo.vocabulary import vocab_and_merges

# ---- models that transformers made


def foreign(tmp_path, eos=49407, **save):
    torch.manual_seed(3)
    v = dict(
        hidden_size=60,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=24,
        patch_size=8,
        hidden_act='quick_gelu',
        layer_norm_eps=1e-6,
    )
    t = dict(
        hidden_size=32,
        intermediate_size=33,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act='quick_gelu',
        eos_token_id=eos,
    )
    model = shake(
        transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=v, text_config=t, projection_dim=20)
        )
    )
    model.save_pretrained(str(tmp_path), **save)
    images = transformers.CLIPImageProcessor(
        size=dict(shortest_edge=24), crop_size=dict(height=24, width=24)
    )
    images.save_pretrained(str(tmp_path))
    return model


@torch.no_grad()
def reads(model, tmp_path):
    ours, _, tokenizer = from_transformers(tmp_path)
    pixels, ids = torch.randn(3, 3, 24, 24), tokenizer(CAPTIONS)
    mask = (torch.arange(16) <= ids.argmax(1)[:, None]).long()
    same(ours.encode_image(pixels), model.get_image_features(pixel_values=pixels).pooler_output)
    same(
        ours.encode_text(ids),
        model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output,
    )
    return ours


@pytest.mark.parametrize('eos', [2, 49407, 267])  # 267 is a comma: the first one is taken, in both
def test_a_model_of_transformers(eos, tmp_path):
    model = foreign(tmp_path, eos)
    ours = reads(model, tmp_path)
    assert ours.text_pool_type == ('eos' if eos == 267 else 'argmax')
    if eos != 267:
        assert to_transformers(ours, tmp_path / 'back')['form'] == 'clip'
        back = load_file(tmp_path / 'back' / 'model.safetensors')
        assert set(back) == set(model.state_dict()) and all(
            torch.equal(back[k], v) for k, v in model.state_dict().items()
        )


def test_a_model_in_several_files(tmp_path):
    model = foreign(tmp_path, max_shard_size='1MB')
    assert not (tmp_path / 'model.safetensors').exists()
    reads(model, tmp_path)
    index = tmp_path / 'model.safetensors.index.json'
    held = json.loads(index.read_text())
    held['weight_map']['logit_scale'] = '../elsewhere.safetensors'
    index.write_text(json.dumps(held))
    with pytest.raises(TinyclipError, match='not in its folder'):
        from_transformers(tmp_path)


def test_an_old_model(tmp_path):
    """Torch weights, constants among them, the configuration doubled as old versions wrote it,
    sizes as plain numbers"""
    model = foreign(tmp_path, eos=2)
    (tmp_path / 'model.safetensors').unlink()
    torch.save(
        model.state_dict()
        | {
            'text_model.embeddings.position_ids': torch.arange(16)[None],
            'vision_model.embeddings.position_ids': torch.arange(10)[None],
        },
        tmp_path / 'pytorch_model.bin',
    )
    cfg = json.loads((tmp_path / 'config.json').read_text())
    for k in ('vision_config', 'text_config'):
        cfg[k + '_dict'], cfg[k] = cfg[k], dict(hidden_size=7)
    (tmp_path / 'config.json').write_text(json.dumps(cfg))
    (tmp_path / 'preprocessor_config.json').write_text(
        json.dumps(
            dict(
                size=24,
                crop_size=24,
                do_resize=True,
                do_center_crop=True,
                do_normalize=True,
                resample=3,
            )
        )
    )
    reads(model, tmp_path)


class Hostile:
    def __reduce__(self):
        return os.system, ('touch pwned',)


def test_nothing_of_the_folder_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = short(tiny())
    to_transformers(model, 'm', form='slim')
    Path('m/modeling_tinyclip.py').write_text('import os; os.system("touch pwned")')
    assert all(
        torch.equal(v, model.state_dict()[k])
        for k, v in from_transformers('m').model.state_dict().items()
    )
    Path('m/model.safetensors').unlink()
    torch.save(dict(logit_scale=Hostile()), 'm/pytorch_model.bin')
    with pytest.raises(TinyclipError):
        from_transformers('m')
    assert not Path('pwned').exists()


# ---- image processors, as transformers means them


@pytest.mark.parametrize(
    'cfg',
    [
        dict(size=dict(shortest_edge=24), crop_size=24),  # no type: CLIP's
        dict(image_processor_type='CLIPImageProcessor', size=[24, 24], crop_size=24, resample=2),
        dict(feature_extractor_type='ViTFeatureExtractor', size=24, image_std=[0.2, 0.3, 0.4]),
        dict(
            image_processor_type='ViTImageProcessorFast',
            size=dict(height=24, width=24),
            resample=3,
            do_center_crop=None,
            crop_size=None,
        ),
        dict(image_processor_type='SiglipImageProcessorFast', size=dict(height=24, width=24)),
        dict(
            image_processor_type='SiglipImageProcessor',
            size=dict(shortest_edge=24),
            do_center_crop=True,
            crop_size=dict(height=24, width=24),
        ),
    ],
)
def test_image_processors_of_three_kinds(cfg, tmp_path):
    foreign(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(cfg))
    noise = torch.randint(0, 256, (72, 48, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    image = Image.fromarray(noise.numpy())
    theirs = transformers.AutoImageProcessor.from_pretrained(str(tmp_path), backend='pil')
    want = theirs(images=image, return_tensors='pt')['pixel_values'][0]
    got = read_images(tmp_path, [24, 24])
    assert (
        image_transform_v2(PreprocessCfg(size=24, **got), False)(image) - want
    ).abs().max() < 1e-4


@pytest.mark.parametrize(
    'cfg, says',
    [
        (dict(image_processor_type='ConvNextImageProcessor', size=24), 'a way of its own'),
        (dict(image_processor_type='BlipImageProcessor', size=24), 'ViTImageProcessor'),
        (dict(feature_extractor_type='DeiTFeatureExtractor'), "'DeiTFeatureExtractor'"),
        # the shorter side alone, without a crop: images of many shapes
        (dict(image_processor_type='SiglipImageProcessor', size=24), 'do_center_crop'),
        (
            dict(image_processor_type='ViTImageProcessor', size=dict(shortest_edge=24)),
            'center_crop',
        ),
        (dict(image_processor_type='ViTImageProcessor'), 'with size'),  # 224, by its own defaults
        (dict(size=dict(shortest_edge=24, longest_edge=48), crop_size=24), 'with size'),
    ],
)
def test_image_processors_of_other_kinds_are_refused(cfg, says, tmp_path):
    foreign(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(cfg))
    refuse(says, from_transformers, tmp_path)


# ---- tokens that were added to the vocabulary


def clip_tokenizer(**kw):
    vocab, merges = vocab_and_merges(open_clip.SimpleTokenizer().bpe_ranks)
    merges = [tuple(m.split()) for m in merges]
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16, **kw)


def test_added_tokens_are_refused_by_name(tmp_path):
    for add, names in (
        (lambda t: t.add_tokens(['<sks>', 'my dog']), "'<sks>', 'my dog'"),
        (lambda t: t.add_special_tokens({'additional_special_tokens': ['<x>']}), "'<x>'"),
    ):
        add(tokenizer := clip_tokenizer())
        tokenizer.save_pretrained(str(tmp_path))
        refuse(f'not of its BPE: {names}', read_merges_of, tmp_path, 49408)
    for name, held in (  # as older versions wrote them
        ('added_tokens.json', {'<sks>': 49408}),
        ('tokenizer_config.json', dict(added_tokens_decoder={'49408': dict(content='<sks>')})),
        ('special_tokens_map.json', dict(additional_special_tokens=['<sks>'])),
    ):
        clip_tokenizer().save_pretrained(str(tmp_path))
        (tmp_path / name).write_text(json.dumps(held))
        refuse("not of its BPE: '<sks>'", read_merges_of, tmp_path, 49408)
        (tmp_path / name).unlink()


def test_padding_is_no_added_token(tmp_path, recwarn):
    model = foreign(tmp_path)
    clip_tokenizer(pad_token='[PAD]').save_pretrained(str(tmp_path))  # of a row behind the others
    reads(model, tmp_path)
    assert not recwarn
    clip_tokenizer(pad_token='!').save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="marks '!' as special"):
        reads(model, tmp_path)


# ---- repositories of the hub


@pytest.mark.parametrize(
    'kind', ['one file', 'shards', 'torch', 'torch shards', 'a variant beside']
)
def test_repositories_of_every_kind(kind, tmp_path, monkeypatch):
    import huggingface_hub

    repo = tmp_path / 'repo'
    model = foreign(repo, max_shard_size='1MB' if 'shards' in kind else '1GB')
    if kind in ('torch', 'a variant beside'):
        torch.save(model.state_dict(), repo / 'pytorch_model.bin')
        there = repo / 'model.safetensors'
        there.rename(repo / 'model.fp16.safetensors') if 'variant' in kind else there.unlink()
    if kind == 'torch shards':
        index = repo / 'model.safetensors.index.json'
        held = json.loads(index.read_text())['weight_map']
        index.unlink()
        names = {n: n.replace('model', 'pytorch_model', 1)[:-11] + 'bin' for n in held.values()}
        for old, new in names.items():
            torch.save(load_file(repo / old), repo / new)
            (repo / old).unlink()
        index = dict(weight_map={k: names[n] for k, n in held.items()})
        (repo / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    taken = []

    def snapshot(name, allow_patterns):
        folder = tmp_path / f'snapshot{len(taken)}'
        folder.mkdir()
        taken.append([f for f in repo.iterdir() if any(f.match(p) for p in allow_patterns)])
        for f in taken[-1]:
            shutil.copy(f, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
    files = [f.name for f in repo.iterdir()]
    monkeypatch.setattr(huggingface_hub.HfApi, 'list_repo_files', lambda self, name: files)
    pixels = torch.randn(2, 3, 24, 24)
    for read, name in ((load, 'hf-hub:org/repo'), (from_transformers, 'org/repo')):
        ours = read(name).model
        same(
            ours.encode_image(pixels),
            model.get_image_features(pixel_values=pixels).pooler_output,
        )
    if kind in ('one file', 'shards'):
        assert not any(f.suffix == '.bin' for fs in taken for f in fs) and len(taken) == 2


# ---- sentences


def test_images_that_open_clip_cannot_prepare(tmp_path):
    to_transformers(short(tiny()), tmp_path)
    path = tmp_path / 'preprocessor_config.json'
    good = json.loads(path.read_text())
    for change in (
        dict(size=dict(shortest_edge=40)),
        dict(crop_size=dict(height=24, width=24)),
        dict(do_center_crop=False),
        dict(do_normalize=False),
        dict(resample=0),
        dict(rescale_factor=1.0),
        dict(image_mean=[1]),
        dict(image_std=[0.0, 1.0, 1.0]),
        dict(size='x'),
    ):
        path.write_text(json.dumps(good | change))
        refuse(f'cannot prepare images with {next(iter(change))}', from_transformers, tmp_path)
    path.write_text(json.dumps(dict(image_processor=good)))
    path.rename(tmp_path / 'processor_config.json')
    assert from_transformers(tmp_path).model.visual.image_size == (32, 32)


def test_a_hub_name_without_a_network(monkeypatch):
    import huggingface_hub

    def fail(*a, **k):
        raise ConnectionError('no route')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
    refuse("'some/model' could not be downloaded.*no route", from_transformers, 'some/model')
    refuse('There is no model folder', from_transformers, 'nowhere')


def test_another_tokenizer_is_refused(tmp_path):
    to_transformers(short(tiny()), tmp_path)
    path = tmp_path / 'tokenizer.json'
    held = json.loads(path.read_text())
    held['model']['vocab']['a</w>'], held['model']['vocab']['b</w>'] = (
        held['model']['vocab']['b</w>'],
        held['model']['vocab']['a</w>'],
    )
    path.write_text(json.dumps(held))
    refuse('not the tokenizer of CLIP', from_transformers, tmp_path)
    path.unlink()
    refuse('no tokenizer.json', from_transformers, tmp_path)


# ---- damage


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp('exports')
    torch.manual_seed(0)
    model = short(tiny(vision=dict(layers=1, width=16), text=dict(layers=1, width=16, heads=1)))
    for form in ('clip', 'slim'):
        to_transformers(model, folder / form, form=form)
    model, tokenizer = cut('ViT-B-16-SigLIP2', 'short')
    to_transformers(model, folder / 'siglip', tokenizer=tokenizer)
    return folder


WRONG = [
    None,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**40,
    1e308,
    float('nan'),
    '',
    'x',
    '../../x',
    [],
    [1] * 5000,
    {},
    {'a': 1},
    True,
]


@pytest.mark.parametrize('form', ['clip', 'slim', 'siglip'])
@pytest.mark.parametrize('seed', range(2))
def test_damaged_folders_give_one_sentence(form, seed, exports, tmp_path):
    draw = torch.Generator().manual_seed(seed)

    def n(k):
        return int(torch.randint(k, (), generator=draw))

    good = {p.name: p.read_bytes() for p in (exports / form).iterdir()}
    names = ['config.json', 'preprocessor_config.json', 'tokenizer.json', 'model.safetensors']
    for k, v in good.items():
        (tmp_path / k).write_bytes(v)
    refused = 0
    for _ in range(50):
        name = names[n(4)]
        raw = bytearray(good[name])
        if name.endswith('.json') and n(2):
            held = json.loads(raw)
            at = held
            while True:  # a random place in it
                keys = list(at) if isinstance(at, dict) else range(len(at))
                k = list(keys)[n(len(keys))]
                if not isinstance(at[k], (dict, list)) or not at[k] or n(4) == 0:
                    break
                at = at[k]
            at[k] = WRONG[n(len(WRONG))]
            raw = json.dumps(held).encode()
        elif n(2):
            raw = raw[: n(len(raw))]
        else:
            for _ in range(1 + n(4)):
                raw[n(min(len(raw), 4000))] ^= 1 << n(8)
        (tmp_path / name).write_bytes(raw)
        try:
            from_transformers(tmp_path)
        except TinyclipError as e:
            refused += 1
            assert '\n' not in str(e) and len(str(e)) < 700
        (tmp_path / name).write_bytes(good[name])
    assert refused > 20
    from_transformers(tmp_path)
