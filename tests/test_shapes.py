"""What the embedded data set promises: pure in (split, seed, index), and held-out combinations
stay unseen."""

import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tinyclip.core import TinyclipError
from tinyclip.data.shapes import (
    SPLITS,
    WORDS,
    Shapes,
    combinations,
    heldout,
    render,
    trained,
)


def print_of(split, indices, **kwargs):
    images, captions, labels = Shapes(split, **kwargs).batch(indices)
    return hashlib.sha256(
        images.numpy().tobytes() + '\n'.join(captions).encode() + labels.numpy().tobytes()
    ).hexdigest()


@pytest.mark.parametrize('split', SPLITS)
def test_a_sample_depends_on_nothing_else(split):
    rng = np.random.default_rng(0)
    for seed in rng.integers(0, 2**31, 4).tolist():
        ds = Shapes(split, seed=seed)
        indices = rng.integers(0, 10**7, 37)
        images, captions, labels = ds.batch(indices)
        for k in rng.integers(0, 37, 5):
            image, text, label = ds.batch(indices[k : k + 1])
            assert torch.equal(image[0], images[k]) and text == [captions[k]] and label == labels[k]


def test_another_process_draws_the_same():
    code = (
        'from tests.test_shapes import print_of; print(print_of("heldout", range(40, 60), seed=5))'
    )
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONHASHSEED': '7'}
    root = os.path.dirname(os.path.dirname(__file__))
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=root
    )
    assert out.stdout.strip() == print_of('heldout', range(40, 60), seed=5), out.stderr


def test_held_out_combinations_are_never_drawn_nor_said():
    said = {w: a for a, ws in WORDS.items() for w in ws} | {
        a: a for o in combinations for a in o[:3]
    }
    find = re.compile('|'.join(sorted(map(re.escape, said), key=len, reverse=True)))
    for seed in range(3):
        ds = Shapes('train', seed=seed)
        labels = ds.labels(range(2048))
        assert not set(labels) & set(heldout)
        for text, label in zip(
            ds.captions(range(2048)), labels
        ):  # read the combination back from the words alone
            assert {said[w] for w in find.findall(text)} == set(combinations[label]), text


def test_every_value_and_pair_is_trained():
    def pair(ls):
        return {
            (i, j, combinations[l][i], combinations[l][j])
            for l in ls
            for i in range(4)
            for j in range(i)
        }

    assert pair(trained) == pair(range(len(combinations)))
    assert len(heldout) * 10 == len(combinations)


def test_rounds_hold_every_label_once():
    ds = Shapes('heldout', seed=2)
    for r in range(3):
        assert sorted(ds.labels(range(r * 64, (r + 1) * 64))) == sorted(heldout)
    assert list(ds.labels(range(64))) != list(ds.labels(range(64, 128)))


def test_the_shape_stands_where_and_how_the_label_says():
    def label(size, place):
        return combinations.index(('red', 'square', size, place))

    key = np.arange(40).astype(np.uint64)

    def red(*a):
        return (lambda o: (o[:, 0] > 1.7 * o[:, 1:].amax(1)).float())(
            render([label(*a)] * 40, key).float()
        )

    small = red('small', 'centre').sum((1, 2)).mean()
    large = red('large', 'centre').sum((1, 2)).mean()
    assert large > 2 * small > 0
    for place, (y, x) in {
        'top left': (0, 0),
        'top right': (0, 1),
        'bottom left': (1, 0),
        'bottom right': (1, 1),
    }.items():
        mass = red('small', place).reshape(40, 2, 24, 2, 24).sum((0, 2, 4))
        assert mass[y, x] > 0.95 * mass.sum()


@pytest.mark.parametrize(
    'wrong, message',
    [(dict(split='tain'), "'train'"), (dict(n=0), 'at least 1'), (dict(size=4), 'at least 8')],
)
def test_bad_input(wrong, message):
    with pytest.raises(TinyclipError, match=message):
        Shapes(**wrong)


def test_iterating_ends():
    assert len(list(Shapes('val', n=3))) == 3


def test_other_sizes():
    for size in (8, 33, 96):
        assert Shapes(size=size).batch([0, 1])[0].shape == (2, 3, size, size)
