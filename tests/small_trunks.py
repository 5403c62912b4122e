"""Small CLIPs around an image tower with stages, one per family, and what tests ask of them"""

import copy
import functools
import subprocess
import sys

import torch
from hypothesis import strategies as st

from tinyclip.inheritance import inherit
from tinyclip.keep import Keep, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.towers import layout
from tinyclip.towers.architecture import architecture, build
from tinyclip.zoo import onnx, save

TEXT = dict(context_length=6, vocab_size=32, width=16, heads=2, layers=1)


def _timm(name, size=64, proj='linear', pool='avg', **trunk):
    vision = dict(image_size=size, timm_model_name=name, timm_proj=proj, timm_pool=pool)
    return dict(vision_cfg=vision, tinyclip_cfg=dict(trunk=trunk))


_CONV = dict(dims=[8, 12, 16, 20], depths=[1, 2, 1, 1])
_FAST = dict(embed_dims=[8, 16, 32, 64], layers=[1, 2, 1, 1])
TWINS = dict(
    resnet=dict(
        vision_cfg=dict(image_size=64, layers=[1, 2, 1, 1], width=8, head_width=16, patch_size=None)
    ),
    tinyvit=_timm(
        'tiny_vit_5m_224', embed_dims=[16, 16, 32, 32], depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 4]
    ),
    davit=_timm(
        'davit_tiny', embed_dims=[8, 16, 16, 32], depths=[1, 2, 1, 1], num_heads=[2, 2, 2, 4]
    ),
    convnext=_timm('convnext_tiny', 32, **_CONV),
    convnext_mlp=_timm('convnext_atto', 32, 'mlp', **_CONV),
    fastvit=_timm('fastvit_mci0', proj=None, **_FAST),
    fastvit_merged=_timm('fastvit_mci0', proj=None, **_FAST, inference_mode=True),
    fastvit_five=_timm('fastvit_mci3', proj=None, embed_dims=[4, 8, 16, 32, 64], layers=[1] * 5),
)
_SMALL = dict(img_size=32, patch_size=8, embed_dim=12, num_heads=3, depth=3, mlp_ratio=2)
_STEM = {'image.width': 12}  # convolutions before the blocks are not built to size
_STEM |= {f'image.layers.{i}.{k}': n for i in range(2) for k, n in (('heads', 2), ('ffn', 20))}
_STEM = dict(img_size=32, depth=2, sizes=_STEM)
FLAT = dict(  # of one stream, in timm
    siglip=_timm('vit_base_patch16_siglip_224', 32, 'none', 'map', **_SMALL),
    siglip_proj=_timm('vit_base_patch32_siglip_256', 32, 'linear', 'map', **_SMALL),
    token=_timm('vit_large_patch14_clip_224', 32, None, 'token', **_SMALL),
    medium=_timm('vit_medium_patch16_gap_256', 32, 'mlp', '', **_SMALL),
    mobileclip_b=_timm('vit_base_mci_224', 32, None, 'token', **_STEM),
    vitamin=_timm('vitamin_small_224', 32, **_STEM),
)


def configuration(family):
    cfg = dict(embed_dim=12, text_cfg=TEXT, custom_text=True)
    return cfg | copy.deepcopy((TWINS | FLAT)[family])


@functools.cache
def twin(family, seed=0):
    "A tiny CLIP whose biases, norms and statistics are far from where they start; do not change it"
    torch.manual_seed(seed)
    model = build(configuration(family)).eval()
    for n, t in model.visual.state_dict().items():
        if t.ndim > 1 and t.shape[-2:] != (1, 1) or t.ndim == 4:
            torch.nn.init.normal_(t, 0, max(t[0].numel(), 4) ** -0.5)
        elif t.ndim and t.is_floating_point():
            torch.nn.init.normal_(t, 0.0 if n.endswith(('bias', 'mean')) else 1.0, 0.2)
            if n.endswith(('var', 'weight', 'gamma')):
                t.abs_()
    return model


def pictures(model, n=2, seed=0):
    g, size = torch.Generator().manual_seed(seed), model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    return torch.randn(n, 3, size, size, generator=g)


@torch.no_grad()
def features(model, seed=0):
    return model.encode_image(pictures(model, seed=seed))


def off(a, b):
    "Relative distance of image features"
    a, b = (t if isinstance(t, torch.Tensor) else features(t) for t in (a, b))
    return ((a - b).abs().max() / b.abs().max()).item()


def keeps(sizes, needed, values=True):
    "Hypothesis: any keep of a model with these sizes"

    @st.composite
    def draw(draw):
        g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        share, axes, soft = draw(st.sampled_from([0.3, 0.6, 0.9])), {}, {}
        for a, n in sizes.items():
            if a == 'embed':
                continue
            chosen = (torch.rand(n, generator=g) < share).nonzero()[:, 0].tolist()
            must = list(needed.get(a, ()))
            if not ('.layers.' in a and a.endswith(('.heads', '.ffn'))) and not chosen + must:
                must = [n - 1]
            axes[a] = sorted({*chosen, *must})
            if values and not a.endswith('.layers'):
                soft[a] = (torch.rand(len(axes[a]), generator=g) * 0.9 + 0.1).tolist()
        return Keep(sizes, axes, soft)

    return draw()


def any_keep(model, values=False):
    l = layout(model)
    return keeps(l.sizes, l.needed, values)


def equal(a, b):
    "Whether two models have the same weights, to the bit"
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


# --- What holds for every family


def check_whole(model):
    "Keeping everything is the identity"
    student = inherit(model, manual(model))
    assert equal(student, model) and torch.equal(features(student), features(model))
    assert architecture(student) == architecture(model)


def check_composed(model, data):
    "A student of a student is a student by the composed keep, and no shape is unknown; returns it"
    first = inherit(model, data.draw(any_keep(model)))
    second = inherit(first, data.draw(any_keep(first)))
    assert equal(second, inherit(model, second.keep))
    assert features(second).isfinite().all()
    l = layout(second)
    for n, dims in l.dims.items():
        for d, size in zip(dims, l.shapes[n]):
            assert not d or size == l.sizes[d.axis] * d.block * d.copies, n
    return second


def check_masked(model, kinds, hard, seed, mean):
    "What is masked is what is cut, and masks matter"
    torch.manual_seed(seed)
    masked = MaskedCLIP(model, kinds, hard=hard).eval()
    masked.log_alpha.data.normal_(mean, 2)
    assert off(masked, masked.cut()) < 1e-5
    assert masked.hard or off(masked, model) > 1e-3


FRESH = """
import sys, torch
from pathlib import Path
from tinyclip.zoo import load
folder = Path(sys.argv[1])
for x in folder.glob('*.x.pt'):
    name = x.name.removesuffix('.x.pt')
    model = load(folder / name).model.eval()
    torch.save(model.encode_image(torch.load(x)).detach(), folder / f'{name}.y.pt')
"""


def check_fresh(students, folder):
    "Students by name, saved and loaded in another process, give the same features to the bit"
    for name, student in students.items():
        save(student, folder / name)
        torch.save(pictures(student), folder / f'{name}.x.pt')
    subprocess.run([sys.executable, '-c', FRESH, str(folder)], check=True)
    for name, student in students.items():
        assert torch.equal(torch.load(folder / f'{name}.y.pt'), features(student)), name


def check_onnx(student, folder):
    "An image tower says the same in onnxruntime, for batches of any size"
    x = pictures(student, 3)
    file = onnx.export_tower(onnx.float_copy(student), 'image', x, folder / 'a.onnx')
    with torch.no_grad():
        want = student.encode_image(x, normalize=True)
    for n in (1, 3):
        got = torch.as_tensor(onnx.run_rows(onnx.session(file), x[:n]))
        assert off(got, want[:n]) < 1e-4
