"""Families of towers: no other module knows one, one layout per cut, and a new family fits in"""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.masking import MaskedCLIP
from tinyclip.towers import FAMILIES, ParamCount, layout
from tinyclip.towers.architecture import build

ROOT = Path(__file__).parent.parent
# parameters and classes of open_clip and timm: whoever names them knows a family
NAMES = re.compile(
    r'\b(resblocks|in_proj\w*|c_fc|c_proj|conv1|token_embedding|positional_embedding'
    r'|class_embedding|attnpool|trunk|ln_[12]|ln_pre|ln_post|ln_final|text_projection'
    r'|VisionTransformer|TextTransformer|ModifiedResNet|TimmModel|DaVit|TinyVit|davit\w*|tiny_vit\w*'
    r'|ResidualAttentionBlock|MultiheadAttention)\b'
)
# Pages that translate names between two libraries have to say both.
TRANSLATORS = {
    'zoo/even_layers.py': {
        'resblocks',
        'in_proj_weight',
        'in_proj_bias',
        'c_fc',
        'c_proj',
        'conv1',
        'token_embedding',
        'positional_embedding',
        'class_embedding',
        'ln_pre',
        'ln_post',
        'ln_final',
        'text_projection',
    },
    'zoo/siglip.py': {
        'in_proj_weight',
        'in_proj_bias',
        'in_proj_',
        'in_proj',
        'ln_1',
        'ln_2',
        'trunk',
        'c_fc',
        'c_proj',
        'token_embedding',
        'positional_embedding',
        'ln_final',
        'text_projection',
    },
    'zoo/from_transformers.py': {
        'in_proj_',
        'in_proj',
        'trunk',
        'c_fc',
        'c_proj',
        'conv1',
        'class_embedding',
    },
    # counts matrices of a kind, whatever the tower: plain torch
    'train/speed.py': {'MultiheadAttention'},
}
TINY = dict(
    embed_dim=4,
    vision_cfg=dict(image_size=16, patch_size=8, head_width=4, width=8, layers=3),
    text_cfg=dict(context_length=6, vocab_size=32, heads=2, width=8, layers=2),
)


def code_of(path):
    "A module without docstrings: identifiers and other strings"
    tree = ast.parse(path.read_text())
    for o in ast.walk(tree):
        if isinstance(o, ast.Expr) and isinstance(o.value, ast.Constant):
            o.value = ast.Constant(None)
    return ast.unparse(tree)


def named(path):
    return {m[0] for m in NAMES.finditer(code_of(path))}


MODULES = {
    str(p.relative_to(ROOT / 'tinyclip')): p
    for p in sorted((ROOT / 'tinyclip').rglob('*.py'))
    if p.name != '_modidx.py'
    and p.relative_to(ROOT / 'tinyclip').parts[0] not in ('towers', 'assets')
}


@pytest.mark.parametrize('name', MODULES)
def test_only_towers_name_parameters_of_other_libraries(name):
    bad = named(MODULES[name]) - TRANSLATORS.get(name, set())
    assert not bad, f'{name} names {sorted(bad)}; ask the family of the tower (tinyclip.towers)'


@pytest.mark.parametrize('name', TRANSLATORS)
def test_the_exceptions_are_needed(name):
    assert TRANSLATORS[name] <= named(MODULES[name])


def test_the_search_finds_what_towers_name():
    assert {'resblocks', 'VisionTransformer'} <= named(ROOT / 'tinyclip/towers/vit.py') | named(
        ROOT / 'tinyclip/towers/transformer.py'
    )


@pytest.fixture
def laid_out(monkeypatch):
    "Depth of the image tower at every call that lays one out"
    depths, family = [], FAMILIES[0]
    plain = type(family).lay_out

    def lay_out(self, l, tower, path):
        depths.append(len(tower.transformer.resblocks))
        return plain(self, l, tower, path)

    monkeypatch.setattr(type(family), 'lay_out', lay_out)
    return depths


def test_one_layout_per_cut(laid_out):
    teacher = build(TINY)
    keep = manual(teacher, image_depth=0.34, width_by='magnitude')
    assert laid_out == [3]
    inherit(teacher, keep)
    assert laid_out == [3, 3, 1]  # the teacher, then the student that is checked
    del laid_out[:]
    inherit(teacher, {**TINY, 'vision_cfg': dict(TINY['vision_cfg'], layers=1)})
    assert laid_out.count(3) == 1
    del laid_out[:]
    masked = MaskedCLIP(teacher)
    assert laid_out == [3]
    masked.cut()
    assert laid_out == [3, 3, 3]  # nothing of the depth is masked: teacher and student are alike


def test_a_layout_stands_for_its_model():
    teacher = build(TINY)
    l = layout(teacher)
    assert layout(l) is l
    assert manual(l, text_depth=0.5) == manual(teacher, text_depth=0.5)
    assert ParamCount(l).whole == ParamCount(layout(teacher)).whole


def test_a_new_family_is_one_page_and_one_entry():
    "The tower half of the tutorial Add your own, which leaves the registry as it was"
    before = list(FAMILIES)
    page = json.loads((ROOT / 'nbs/tutorials/add_your_own.ipynb').read_text())['cells']
    world = {}
    try:
        for c in page:
            source = ''.join(c['source'])
            if source.startswith('## A loss'):
                break
            if c['cell_type'] == 'code':
                exec(source, world)
        assert layout(world['student']).families['image'].name == 'PatchMLP'
        assert world['student'].keep['image.layers'] == (0, 2)
        weight = world['teacher'].visual.patch.weight[:32]
        assert torch.equal(world['student'].visual.patch.weight, weight)
    finally:
        FAMILIES[:] = before


def features(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        image = model.encode_image(torch.randn(2, 3, 16, 16, generator=g))
        return image, model.encode_text(torch.randint(1, 31, (2, 6), generator=g))


def test_coca_pools_by_attention():
    "What its queries read can be cut and masked; its decoder is not inherited"
    torch.manual_seed(0)
    pool = dict(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=3)
    cfg = TINY | dict(custom_text=True, vision_cfg=dict(TINY['vision_cfg'], **pool))
    model = build(cfg).eval()
    for a, b in zip(features(inherit(model, manual(model))), features(model)):
        assert torch.equal(a, b)
    masked = MaskedCLIP(model).eval()
    with torch.no_grad():
        masked.log_alpha.copy_(torch.randn_like(masked.log_alpha) * 3)
    small = masked.cut().eval()
    for a, b in zip(features(masked), features(small)):
        assert (a - b).norm() < 1e-5 * b.norm()
    assert small.visual.attn_pool.ln_k.weight.numel() < 8
