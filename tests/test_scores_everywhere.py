"""Scores of towers in stages, of convolutions and of one stream in timm: what is read, and what is
chosen"""

import copy
import functools

import pytest
import torch
from small_trunks import FLAT, TWINS, pictures, twin
from torch.nn import functional as F

from tinyclip.inheritance import inherit
from tinyclip.keep import keep_for_size
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import outer_axes, reads, unit_scores
from tinyclip.towers import ParamCount, layout

# of the other two the stem is as large as it is, and most of so small a twin
FAMILIES = [f for f in (*TWINS, *FLAT) if f not in ('mobileclip_b', 'vitamin')]
each = pytest.mark.parametrize('family', FAMILIES)


@functools.cache
def pairs(family, n=96, seed=3):
    "Smooth pictures, and texts"
    x = pictures(twin(family), n, seed)
    x = F.interpolate(F.avg_pool2d(x, 8) * 6, x.shape[-1], mode='bicubic')
    g = torch.Generator().manual_seed(seed)
    return list(zip(x.split(32), torch.randint(1, 31, (n, 6), generator=g).split(32)))


@functools.cache
def scores(family, by='reconstruction'):
    return unit_scores(twin(family), pairs(family), by, progress=False)


@torch.no_grad()
def off(model, family):
    "Relative distance of the features of pictures that nothing was fitted to"
    x, _ = pairs(family, seed=9)[0]
    a, b = (F.normalize(m.encode_image(x), dim=-1) for m in (model, twin(family)))
    return ((a - b).norm() / (b - b.mean(0)).norm()).item()


@each
def test_what_is_read_is_what_the_weights_say(family):
    "A gate on an input is worth the same by its activations as by the weights that read it"
    model = twin(family)
    l, (x, _) = layout(model), pairs(family)[0]
    v = torch.randn(len(x), 12, generator=torch.Generator().manual_seed(0))
    found = reads(model, 'image', l, x, v, at_inputs=True)
    assert {r.axis for r in found} >= {
        a for a in l.sizes if a[:5] == 'image' and a.endswith(('.heads', '.ffn'))
    }
    weights = dict(model.named_parameters())
    z = F.normalize(model.encode_image(x), dim=-1)
    grads = torch.autograd.grad((z * v).sum(), [weights[r.map.weight] for r in found])
    for r, grad in zip(found, grads):
        w = weights[r.map.weight].detach()
        of_weights = (w * grad).movedim(1, 0).flatten(1).sum(1)
        torch.testing.assert_close(
            (r.x * r.u).flatten(0, -2).sum(0),
            of_weights,
            rtol=2e-3,
            atol=2e-3 * of_weights.abs().max(),
        )


@each
@pytest.mark.parametrize('by', ['reconstruction', 'activation'])
def test_the_share_is_met(family, by):
    model = twin(family)
    whole = ParamCount(layout(model)).whole['image']
    for share in (0.7, 0.5, 0.3):
        student = inherit(model, scores(family, by).keep(share))
        left = ParamCount(layout(student)).whole['image']
        assert left == pytest.approx(share * whole, abs=max(0.025 * whole, 150))
        assert student.encode_image(pairs(family)[0][0]).isfinite().all()


@pytest.mark.parametrize('family', TWINS)
def test_better_than_the_rule(family):
    model = twin(family)
    fitted = [
        reconstruct(inherit(model, keep), model, pairs(family), progress=False)
        for keep in (scores(family).keep(0.5), keep_for_size(model, 0.5))
    ]
    scored, rule = (off(m, family) for m in fitted)
    assert scored < rule


def test_copies_of_channels_go_first():
    "Of two inner channels of a bottleneck that say the same, one is free; one that is silent, too"
    model = copy.deepcopy(twin('resnet'))
    block = model.visual.layer2[1]
    with torch.no_grad():
        for t in (*block.bn1.parameters(), *block.bn1.buffers(), block.conv1.weight):
            if t.ndim:
                t[3] = t[5]
        block.bn1.weight[1] = 0
    found = unit_scores(model, pairs('resnet'), progress=False)
    axis = 'image.stages.1.layers.1.inner1'
    each, little = found.units()[axis], 1e-3 * found.lost[axis][-1]
    assert each[1] < little and min(each[3], each[5]) < little < max(each[3], each[5])


def test_layers_with_maps_of_their_own_stay():
    "Without neurons a block of a ConvNeXt adds a constant; one of a FastViT still mixes places"
    for family, goes in (('convnext', True), ('fastvit', False)):
        found = scores(family)
        axis = 'image.stages.1.layers'
        neurons = {f'{axis}.0.ffn': 0, f'{axis}.1.ffn': found.layout.sizes[f'{axis}.1.ffn']}
        assert (found._keep(neurons)[axis] == (1,)) == goes


def test_outer_axes():
    pairs = [('a.width', 'b'), ('b', 'c'), ('c', 'd'), ('e', 'e')]
    outer = outer_axes(pairs, ['a.width'])
    assert outer[0] == 'a.width' and all(set(p) & set(outer) for p in pairs)
    assert len(outer) == 3  # and c, and e
