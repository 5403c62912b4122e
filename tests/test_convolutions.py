"Closed-form reconstruction of towers of convolutions: ModifiedResNet, TinyViT, DaViT"

import pytest
import torch
from test_reconstruction import equal, refitted

from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.towers import layout
from tinyclip.towers.architecture import build

SIZE = 64
TEXT = dict(context_length=6, vocab_size=32, width=16, heads=2, layers=1)
VISION = dict(
    resnet=dict(image_size=SIZE, layers=[1, 2, 1, 1], width=8, head_width=16, patch_size=None),
    tinyvit=dict(image_size=SIZE, timm_model_name='tiny_vit_5m_224'),
    davit=dict(image_size=SIZE, timm_model_name='davit_tiny'),
)
TRUNK = dict(
    tinyvit=dict(embed_dims=[16, 16, 32, 32], depths=[2, 2, 1, 1], num_heads=[2, 2, 4, 4]),
    davit=dict(embed_dims=[8, 16, 16, 32], depths=[1, 2, 1, 1], num_heads=[2, 2, 2, 4]),
)
families = pytest.mark.parametrize('family', VISION)


def clip(family, seed=0):
    "A tiny CLIP whose biases, norms and statistics are far from where they start"
    torch.manual_seed(seed)
    own = dict(tinyclip_cfg=dict(trunk=TRUNK[family])) if family in TRUNK else {}
    model = build(dict(embed_dim=12, vision_cfg=VISION[family], text_cfg=TEXT, **own)).eval()
    for n, t in model.visual.state_dict().items():
        if t.ndim > 1:
            fan = t[0].numel() if t.ndim > 2 or 'proj' in n or 'fc' in n or 'qkv' in n else 4
            torch.nn.init.normal_(t, 0, fan**-0.5)
        elif t.ndim and t.is_floating_point():
            torch.nn.init.normal_(t, 0.0 if n.endswith(('bias', 'mean')) else 1.0, 0.2).abs_()
    return model


def batches(n=64, size=16, seed=0, dtype=torch.float32):
    "Smooth pictures, of a few waves each"
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(n, 3, 9, 9, generator=g), SIZE, mode='bicubic')
    t = torch.randint(1, 31, (n, 6), generator=g)
    return list(zip(x.to(dtype).split(size), t.split(size)))


def image_off(model, teacher, seed=1):
    "Relative distance of image features, on pictures that no fit has seen"
    x = batches(32, 32, seed)[0][0]
    with torch.no_grad():
        a, b = (m.encode_image(x) for m in (model, teacher))
    return ((a - b).norm() / b.norm()).item()


def half(teacher):
    return inherit(teacher, manual(teacher, image_width=0.5))


@families
def test_keeping_everything_changes_nothing(family):
    teacher = clip(family)
    new = refitted(inherit(teacher, manual(teacher)), teacher, batches())
    assert equal(new, teacher)
    assert {r['damping'] for r in new.reconstruction} == {None}


def doubled(teacher):
    "Every second half of what a tensor writes equals the first half"
    l, state = layout(teacher), teacher.state_dict()
    for name, dims in l.dims.items():
        for i, d in enumerate(dims):
            writes = i == 0 or dims[0] is None
            if name.startswith('visual.') and d and writes and d.axis != 'embed':
                n = l.sizes[d.axis]
                first, second = torch.arange(n).chunk(2)
                rows = state[name].index_select(i, d.expand(first, n))
                state[name].index_copy_(i, d.expand(second, n), rows)
    return teacher


@families
def test_copies_are_made_up_for(family):
    teacher = doubled(clip(family))
    student = half(teacher)
    new = refitted(student, teacher, batches(192, 64))
    assert image_off(student, teacher) > 0.1
    assert image_off(new, teacher) < 1e-4


@families
def test_half_of_everything_is_closer_on_other_pictures(family):
    teacher = clip(family)
    student = half(teacher)
    new = refitted(student, teacher, batches(256, 64))
    print(family, image_off(student, teacher), image_off(new, teacher))
    assert image_off(new, teacher) < 0.7 * image_off(student, teacher)
    assert all(t.isfinite().all() for t in new.state_dict().values())
