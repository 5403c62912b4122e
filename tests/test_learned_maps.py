"Learned maps: they begin at manual inheritance, and folding them changes nothing"

import importlib
import sys
from pathlib import Path

import pytest
import torch
from test_reconstruction import batches, clip

from tinyclip.inheritance import inherit
from tinyclip.keep import choose, manual
from tinyclip.towers.architecture import architecture


@pytest.fixture
def learned_maps(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / 'benchmarks'))
    yield importlib.import_module('learned_maps').LearnedMaps
    for name in ('learned_maps', 'methods'):
        sys.modules.pop(name, None)


def keeps(teacher):
    yield manual(teacher)
    yield manual(teacher, image_width=0.5, text_depth=0.5)
    yield choose(
        teacher,
        {
            'image.width': range(3, 20),
            'image.layers': [0, 2],
            'image.layers.0.heads': [1, 3],
            'image.layers.2.heads': [],
            'image.layers.2.ffn': range(5, 40),
            'text.layers': [1, 2],
            'text.layers.2.ffn': [],
        },
    )


def outputs(model):
    with torch.no_grad():
        return model(*batches(seed=1)[0])[:2]


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(outputs(a), outputs(b)))


def test_they_begin_at_manual_inheritance(learned_maps):
    teacher = clip()
    for keep in keeps(teacher):
        student = inherit(teacher, keep)
        assert largest_difference(learned_maps(teacher, keep).eval(), student) < 1e-5


def test_folding_changes_nothing(learned_maps):
    teacher = clip()
    for keep in keeps(teacher):
        maps, before = learned_maps(teacher, keep).eval(), inherit(teacher, keep)
        torch.manual_seed(0)
        for p in maps.maps.values():
            p.data += 0.02 * torch.randn_like(p)
        expected = outputs(maps)
        student = maps.fold()
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, outputs(student)))
        assert architecture(student) == architecture(before)
        assert all(p.requires_grad for p in student.parameters())
        assert largest_difference(student, before) > 1e-2


def test_every_map_learns_and_no_weight_does(learned_maps):
    teacher = clip()
    maps = learned_maps(teacher, [*keeps(teacher)][1])
    image, text = maps(*batches(seed=1)[0])[:2]
    (image * text).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in maps.maps.values())
    trained = {n.split('.')[0] for n, p in maps.named_parameters() if p.grad is not None}
    assert trained == {'maps'}


def test_the_maps_combine_what_selection_would_drop(learned_maps):
    "A channel that manual inheritance cuts away reaches the student through its map"
    teacher = clip()
    keep = manual(teacher, image_width=0.5)
    maps, name = learned_maps(teacher, keep), 'visual.conv1.weight'
    maps.maps['visual/conv1/@0'].data[0, 0, 31] = 1.0
    whole = teacher.get_parameter(name)
    assert torch.allclose(maps.weights()[name][0], whole[0] + whole[31])
