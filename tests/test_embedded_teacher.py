"The recipe of the embedded teacher: batches that ask for the difference between shapes."

import importlib.util
from pathlib import Path

from tinyclip.data.shapes import Shapes, combinations
from tinyclip.zoo import load

PATH = Path(__file__).parent.parent / 'benchmarks' / 'embedded_teacher.py'


def benchmark():
    spec = importlib.util.spec_from_file_location('embedded_teacher', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_things_that_differ_in_shape_stand_side_by_side():
    pairs = benchmark().Neighbours(load('shapes-teacher').tokenizer)
    assert sorted(pairs.order(1)) == list(range(576, 1152))
    assert next(pairs.epoch(0, start=3)).image.shape == (144, 3, 48, 48)
    labels = Shapes('train').labels(pairs.order(0)[:6])
    assert len({(c, z, p) for c, _, z, p in (combinations[l] for l in labels)}) == 1
    assert len({combinations[l][1] for l in labels}) == 6
