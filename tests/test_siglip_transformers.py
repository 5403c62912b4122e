"""SigLIP and SigLIP 2 as transformers' SiglipModel, and back: small twins of open_clip's
configurations, whole and cut, and models that transformers made"""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip(
    'transformers', reason="transformers is optional: pip install 'tinyclip[export]'"
)
import open_clip
from hub import refuse, same, shake, tiny
from safetensors.torch import load_file
from test_token_tables import CORPUS, made

from tinyclip.cli.main import main
from tinyclip.data.shapes import Shapes
from tinyclip.inheritance import inherit
from tinyclip.keep import choose, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.towers.architecture import architecture, build, config, create
from tinyclip.zoo import load, save
from tinyclip.zoo.from_transformers import from_transformers
from tinyclip.zoo.siglip import describe_siglip, pack_siglip
from tinyclip.zoo.to_transformers import chosen, to_transformers
from tinyclip.zoo.vocabulary import shorten

TEXTS = [*CORPUS[:5], 'A  PHOTO of_a (café), 12 &things!', '', 'long ' * 40]
PICTURES = [Shapes('val')[i][0].resize((40, 33)) for i in range(4)]
KINDS = {'ViT-B-16-SigLIP': 'unigram, bytes', 'ViT-B-16-SigLIP2': 'gemma'}
CUTS = dict(
    whole={},
    depth={'image.layers': 2, 'text.layers': 1},
    ffn={'image.layers.*.ffn': 100, 'image.pool.ffn': 100, 'text.layers.*.ffn': 50},
    narrow={'embed': 32, 'image.width': 32, 'image.pool.heads': 2, 'image.layers.*.heads': 2}
    | {'text.width': 32, 'text.layers.*.heads': 2},
    uneven={'image.layers.0.heads': [], 'image.layers.1.ffn': 33, 'text.layers.2.heads': 1}
    | {'image.pool.heads': 1, 'text.layers.0.ffn': []},
)


@functools.cache
def twin(name, image=(), **text):
    "open_clip's configuration with small towers and a tokenizer of its kind; do not change it"
    torch.manual_seed(0)
    tokenizer, cfg = made(KINDS[name], clean='canonicalize'), config(name)
    words = {k: v for k, v in cfg['text_cfg'].items() if not k.endswith(('name', 'kwargs'))}
    words |= dict(vocab_size=len(tokenizer.tokenizer), context_length=16)
    words |= dict(width=48, heads=3, layers=3) | text
    trunk = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4)
    vision = cfg['vision_cfg'] | dict(image_size=32) | dict(image)
    own = dict(embed_dim=64, vision_cfg=vision, text_cfg=words, tinyclip_cfg=dict(trunk=trunk))
    model = shake(build(cfg | own))
    pixels = dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', resize_mode='squash')
    model.visual.preprocess_cfg = dict(size=(32, 32)) | pixels
    model.visual.image_mean = model.visual.image_std = (0.5,) * 3
    return model, tokenizer


def cut(name, how):
    model, tokenizer = twin(name)
    if how == 'short':
        return shorten(model, CORPUS[:3], tokenizer)
    return shake(inherit(model, choose(model, CUTS[how]))), tokenizer


def theirs(folder):
    "The export in the hands of transformers; nothing may be missing or left over"
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is transformers.SiglipModel
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder, backend='pil')


@torch.no_grad()
def agree(model, preprocess, tokenizer, folder, tol=1e-5):
    "Pixels and tokens, features, logits and probabilities"
    other, processor = theirs(folder)
    i = processor(
        text=TEXTS, images=PICTURES, return_tensors='pt', padding='max_length', truncation=True
    )
    assert set(i) == {'input_ids', 'pixel_values'}  # no mask: padding counts, as in training
    ids, pixels = tokenizer(TEXTS), torch.stack([preprocess(p) for p in PICTURES])
    assert torch.equal(i['input_ids'], ids) and torch.equal(i['pixel_values'], pixels)
    assert torch.equal(
        transformers.AutoTokenizer.from_pretrained(folder)(
            TEXTS, padding='max_length', truncation=True, return_tensors='pt'
        )['input_ids'],
        ids,
    )
    image, text = model.encode_image(pixels), model.encode_text(ids)
    same(other.get_image_features(pixel_values=pixels).pooler_output, image, tol)
    same(other.get_text_features(input_ids=ids).pooler_output, text, tol)
    image, text = (torch.nn.functional.normalize(f, dim=-1) for f in (image, text))
    want = model.logit_scale.exp() * image @ text.T + model.logit_bias
    logits = other(**i).logits_per_image
    same(logits, want, tol)
    assert (logits.sigmoid() - want.sigmoid()).abs().max() < tol


@pytest.mark.parametrize('how', [*CUTS, 'short'])
@pytest.mark.parametrize('name', KINDS)
def test_students_of_a_siglip_there_and_back(name, how, tmp_path):
    model, tokenizer = cut(name, how)
    out = to_transformers(model, tmp_path / 'm', tokenizer=tokenizer)
    assert out['form'] == 'siglip' and not out['why']
    again = load(tmp_path / 'm')
    agree(model, again.preprocess, tokenizer, tmp_path / 'm')
    agree(again.model, again.preprocess, again.tokenizer, tmp_path / 'm')
    held = load_file(tmp_path / 'm' / 'model.safetensors')
    assert out['stored'] == sum(t.numel() for t in held.values())
    if how not in ('narrow', 'uneven'):  # what asks the pooling has moved, or there are zeros
        want = model.state_dict()
        assert architecture(again.model) == architecture(model)
        for k, v in again.model.state_dict().items():
            assert torch.equal(v, want[k].reshape(v.shape)), k
    save(again.model, tmp_path / 'ours', tokenizer=again.tokenizer)
    ours = load(tmp_path / 'ours')
    agree(ours.model, ours.preprocess, ours.tokenizer, tmp_path / 'm')
    to_transformers(ours.model, tmp_path / 'twice', tokenizer=ours.tokenizer)
    twice = load_file(tmp_path / 'twice' / 'model.safetensors')
    assert all(torch.equal(v, held[k]) for k, v in twice.items()) and len(twice) == len(held)
    assert (tmp_path / 'twice' / 'tokenizer.json').read_text() == (
        tmp_path / 'm' / 'tokenizer.json'
    ).read_text()


@pytest.mark.parametrize(
    'name',
    ['ViT-B-16-SigLIP', 'ViT-B-16-SigLIP2', 'ViT-SO400M-14-SigLIP2', 'ViT-gopt-16-SigLIP2-256'],
)
def test_names_and_shapes_at_full_size(name):
    with torch.device('meta'):
        model = create(config(name))
        d = describe_siglip(model)
        state = {k.removeprefix('text.'): v for k, v in model.state_dict().items()}
        got = {k: v.shape for k, v in pack_siglip(state, d).items()}
        v, t = d['vision'], d['text']

        def sizes(t):
            kinds = dict(hidden_size=t['width'], intermediate_size=t['ffn'][0])
            return kinds | dict(
                num_hidden_layers=len(t['heads']), num_attention_heads=t['heads'][0]
            )

        theirs = transformers.SiglipModel(
            transformers.SiglipConfig(
                vision_config=sizes(v)
                | dict(image_size=v['image_size'][0])
                | dict(patch_size=v['patch_size'][0]),
                text_config=sizes(t)
                | dict(vocab_size=t['vocab_size'], max_position_embeddings=t['context_length'])
                | dict(projection_size=d['projection_dim']),
            )
        )
    assert got == {k: v.shape for k, v in theirs.state_dict().items()}


ALONE = """import sys, torch
sys.modules['tinyclip'] = sys.modules['open_clip'] = sys.modules['timm'] = None
from transformers import AutoModel, AutoProcessor
folder = sys.argv[1]
held = torch.load(folder + '.in', weights_only=False)
inputs = AutoProcessor.from_pretrained(folder, backend='pil')(
    **held, return_tensors='pt', padding='max_length', truncation=True)
with torch.no_grad(): out = AutoModel.from_pretrained(folder)(**inputs)
torch.save(out.logits_per_image, folder + '.out')"""


def test_logits_without_our_packages(tmp_path):
    model, tokenizer = cut('ViT-B-16-SigLIP2', 'short')
    to_transformers(model, tmp_path / 'm', tokenizer=tokenizer)
    torch.save(dict(text=TEXTS, images=PICTURES), tmp_path / 'm.in')
    run = subprocess.run(
        [sys.executable, '-c', ALONE, str(tmp_path / 'm')],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    preprocess = load(tmp_path / 'm').preprocess
    pixels, ids = torch.stack([preprocess(p) for p in PICTURES]), tokenizer(TEXTS)
    with torch.no_grad():
        image, text, scale, bias = model(pixels, ids)
    same(torch.load(tmp_path / 'm.out'), scale * image @ text.T + bias)


def test_the_command_line_exports_a_siglip(tmp_path, capsys):
    model, tokenizer = cut('ViT-B-16-SigLIP2', 'uneven')
    save(model, tmp_path / 'm', tokenizer=tokenizer)
    command = ['export', str(tmp_path / 'm'), '--to', 'transformers', '--out', str(tmp_path / 'o')]
    assert main([*command, '--json', '--fp16']) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['form'] == 'siglip' and said['stored'] > said['parameters']
    assert 'SiglipProcessor' in said['snippet'] and 'sigmoid' in said['snippet']
    assert said['rows'][1]['difference'] < 1e-2
    assert {v.dtype for v in load_file(tmp_path / 'o' / 'model.safetensors').values()} == {
        torch.float16
    }
    assert main(command) == 0
    assert 'As a SiglipModel it holds' in (shown := capsys.readouterr().out)
    assert '--form slim' not in shown


# ---- models that transformers made


def foreign(folder, act='gelu_pytorch_tanh', **text):
    torch.manual_seed(3)
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_act=act)
    tokenizer = made('gemma').tokenizer
    own = transformers.SiglipConfig(
        vision_config=sizes
        | dict(hidden_size=32, intermediate_size=50, image_size=32, patch_size=8),
        text_config=sizes
        | dict(hidden_size=24, intermediate_size=40, projection_size=32)
        | dict(vocab_size=len(tokenizer), max_position_embeddings=16)
        | text,
    )
    model = shake(transformers.SiglipModel(own))
    model.save_pretrained(folder)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)
    transformers.SiglipImageProcessor(size=dict(height=32, width=32)).save_pretrained(folder)
    return model


@pytest.mark.parametrize('act', ['gelu', 'gelu_pytorch_tanh'])
def test_a_siglip_of_transformers(act, tmp_path):
    model = foreign(tmp_path / 'm', act)
    ours, preprocess, tokenizer = from_transformers(tmp_path / 'm')
    pixels = torch.stack([preprocess(p) for p in PICTURES])
    lower = ['a photo of a cat', 'two dogs']
    ids = tokenizer(lower)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / 'm')
    read = own(lower, padding='max_length', truncation=True, max_length=16, return_tensors='pt')
    assert torch.equal(read['input_ids'], ids)
    assert torch.equal(tokenizer(['A Photo, of a cat!', 'TWO_dogs']), ids)  # as open_clip has it
    with torch.no_grad():
        image, text, scale, bias = ours(pixels, ids)
        want = model(pixel_values=pixels, input_ids=ids).logits_per_image
    same(scale * image @ text.T + bias, want)
    to_transformers(ours, tmp_path / 'back', tokenizer=tokenizer)
    back = load_file(tmp_path / 'back' / 'model.safetensors')
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())
    student = inherit(ours, manual(ours, image_depth=0.5, text_depth=0.5))
    assert chosen(student)[0] == 'siglip'


def test_folders_that_are_no_siglip_of_open_clip(tmp_path):
    foreign(tmp_path)
    path = tmp_path / 'config.json'
    good = json.loads(path.read_text())
    for kind, change, says in (
        ('vision_config', dict(vision_use_head=False), 'vision_use_head = False'),
        ('vision_config', dict(layer_norm_eps=1e-5), "eps = '1e-05'"),
        ('vision_config', dict(hidden_act='relu'), "act = 'relu'"),
        ('vision_config', dict(num_channels=1), 'num_channels = 1'),
        ('text_config', dict(projection_size=31), 'projection_size = 31'),
        ('text_config', dict(hidden_act='quick_gelu'), "act = 'quick_gelu'"),
        ('text_config', dict(num_attention_heads=5), '5 heads do not divide'),
        ('text_config', dict(num_hidden_layers=3), 'do not fit its configuration'),
        ('vision_config', dict(num_hidden_layers=1), 'is not expected'),
        ('vision_config', dict(image_size=40), 'cannot prepare images'),
    ):
        path.write_text(json.dumps(good | {kind: good[kind] | change}))
        refuse(says, from_transformers, tmp_path)
    path.write_text(json.dumps(good | dict(model_type='siglip2')))
    refuse("type 'siglip2'.*SiglipModel.*open_clip, too", from_transformers, tmp_path)
    path.write_text(json.dumps(good))
    from_transformers(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{}')
    refuse('holds no tokenizer', from_transformers, tmp_path)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (tmp_path / name).unlink()
    refuse('tokenizer', from_transformers, tmp_path)


# ---- sentences


def test_students_that_do_not_fit_name_the_axis(tmp_path):
    model, tokenizer = twin('ViT-B-16-SigLIP2')
    for kept, says in (
        ({'image.width': 32}, r'image\.width is 32 and embed 64\. Cut both alike'),
        ({'embed': 32}, r'image\.width is 64 and embed 32'),
        ({'embed': 32, 'image.width': 32}, '4 heads of 16 do not fit into the width 32'),
        ({'text.width': 20}, '3 heads of 16 do not fit into the width 20 of its text tower'),
    ):
        student = inherit(model, choose(model, kept))
        refuse(f'{says}.*ONNX', to_transformers, student, tmp_path / 'm', tokenizer=tokenizer)
    assert not (tmp_path / 'm').exists()


def test_what_a_siglipmodel_has_not_is_refused(tmp_path):
    name = 'ViT-B-16-SigLIP2'
    for change, says in (
        (dict(pool_type='argmax'), "pools the last token of a text, not 'argmax'"),
        (dict(no_causal_mask=False), 'reads texts in both directions'),
        (dict(proj_bias=False), 'has no place for text_projection|needs text_projection.weight'),
        (dict(image=(('timm_proj', 'linear'),)), 'has no place for visual.head.proj.weight'),
    ):
        model, tokenizer = twin(name, **change)
        refuse(f'{says}.*ONNX', to_transformers, model, tmp_path / 'm', tokenizer=tokenizer)
    model, tokenizer = twin(name)
    for form in ('clip', 'slim'):
        refuse("Use form='siglip'", to_transformers, model, tmp_path / 'm', form, None, tokenizer)
    refuse('pass it as tokenizer=|not the', to_transformers, model, tmp_path / 'm')
    refuse('cut it', to_transformers, MaskedCLIP(model), tmp_path / 'm', tokenizer=tokenizer)
    refuse('timm ViT, not a ViT', to_transformers, tiny(init_logit_bias=-10.0), tmp_path / 'm')
    refuse('timm ViT, not a ViT', to_transformers, tiny(), tmp_path / 'm', 'siglip')
    words, _ = twin(name, vocab_size=49408)
    plain = open_clip.SimpleTokenizer(context_length=16)
    refuse('is padded otherwise', to_transformers, words, tmp_path / 'm', tokenizer=plain)
    assert not (tmp_path / 'm').exists()
