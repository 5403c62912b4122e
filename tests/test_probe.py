"The linear probe against scikit-learn and plain loops, on real photographs, and with bad input"

import functools
import math
import warnings

import pytest
import torch
from torch import nn

from tinyclip.core import Table, TinyclipError
from tinyclip.data.pairs import labelled
from tinyclip.evaluate.probe import (
    _fit,
    accuracy,
    held_out,
    image_features,
    linear_probe,
    logistic,
    search_penalty,
)
from tinyclip.zoo import load


@functools.cache
def photographs(shared):
    "The real teacher; features of 2,000 photographs to learn from and 1,000 to test with"
    model, preprocess, _ = load(shared / 'teachers/cifar10')
    sets = []
    for name, n in (('train-0000', 2000), ('val-0000', 1000)):
        batches = labelled(
            shared / f'data/cifar10/{name}.tar',
            preprocess,
            100,
            classnames=shared / 'data/cifar10/classnames.txt',
        )
        sets.append(image_features(model, [b for b, _ in zip(batches, range(n // 100))]))
    return model, *sets


@pytest.fixture
def sklearn():
    pytest.importorskip(
        'sklearn', reason='scikit-learn is not installed: it is what the probe is compared with'
    )
    from sklearn.linear_model import LogisticRegression

    def fit(x, y, C):  # another algorithm than ours, to its limit
        return LogisticRegression(C=C, solver='newton-cholesky', tol=1e-10, max_iter=1000).fit(
            x.double().numpy(), y.numpy()
        )

    return fit


def clouds(n=240, d=6, k=3, seed=0, spread=1.0):
    "Overlapping classes, off centre and of unequal scale"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    return (
        torch.randn(k, d, generator=g)[y] + spread * torch.randn(n, d, generator=g)
    ) * torch.logspace(-2, 1, d) + 5, y


def alike(probe, theirs, x, weights=1e-3):
    want = torch.from_numpy(theirs.predict_proba(x.double().numpy()))
    torch.testing.assert_close(probe.probabilities(x), want, rtol=0, atol=1e-4)
    assert probe.predict(x).tolist() == theirs.predict(x.double().numpy()).tolist()
    coef = torch.from_numpy(theirs.coef_)
    intercept = torch.from_numpy(theirs.intercept_)
    own = (
        (probe.weight, probe.bias)
        if len(probe.classes) > 2
        else (probe.weight[1:] - probe.weight[:1], probe.bias[1:] - probe.bias[:1])
    )
    for a, b in zip(own, (coef, intercept)):
        assert (a - b).abs().max() <= weights * max(1, b.abs().max())


@pytest.mark.parametrize('C', [1e-6, 1e-4, 1e-2, 0.316, 10])
def test_photographs_as_scikit_learn(shared, sklearn, C):
    _, (x, y), (x_test, y_test) = photographs(shared)
    assert (x.shape, x_test.shape) == ((2000, 128), (1000, 128))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        probe = logistic(x, y, C, tol=1e-7)
    theirs = sklearn(x, y, C)
    alike(probe, theirs, x_test)
    assert probe.facts['converged'] and probe.facts['gradient'] <= 1e-7
    assert accuracy(probe, x_test, y_test)['top1'] == pytest.approx(
        theirs.score(x_test.double().numpy(), y_test.numpy())
    )


class Flat(nn.Module):
    "A model that takes features for images"

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))

    def encode_image(self, x):
        return x.flatten(1)


def batches(x, y, size=100):
    return list(zip(x[:, None, None].split(size), y.split(size)))


def test_the_features_are_the_models(shared):
    model, (x, _), _ = photographs(shared)
    image, _ = next(
        iter(
            labelled(
                shared / 'data/cifar10/train-0000.tar',
                load(shared / 'teachers/cifar10').preprocess,
                50,
                classnames=shared / 'data/cifar10/classnames.txt',
            )
        )
    )
    with torch.no_grad():
        torch.testing.assert_close(x[:50], model.encode_image(image), rtol=1e-4, atol=1e-4)


def test_a_whole_probe_of_photographs(shared, sklearn):
    "linear_probe with its search, against scikit-learn's fits at the same C and around it"
    _, (x, y), (x_test, y_test) = photographs(shared)
    x, y = x[:600], y[:600]
    ours = linear_probe(Flat(), batches(x, y), batches(x_test, y_test))
    learn, choose = held_out(y)

    def score(C):
        return sklearn(x[learn], y[learn], C).score(x[choose].double().numpy(), y[choose].numpy())

    assert score(ours['C']) >= max(score(10.0**e) for e in (-6, -4, -2, 0, 2)) - 1 / len(choose)
    assert ours['top1'] == pytest.approx(
        sklearn(x, y, ours['C']).score(x_test.double().numpy(), y_test.numpy()), abs=0.0011
    )
    assert (
        (ours['n_train'], ours['n_test'], ours['chance'], ours['converged'])
        == (600, 1000, 0.1, True)
        and ours['top1'] > 0.6
        and ours['majority'] < 0.15
    )


@pytest.mark.parametrize(
    'n, d, k, C',
    [
        (240, 6, 3, 1.0),
        (240, 6, 2, 0.1),
        (60, 6, 2, 1e4),
        (240, 6, 3, 1e-5),
        (20, 30, 4, 0.5),
        (500, 3, 10, 2.0),
    ],
    ids=str,
)
def test_clouds_as_scikit_learn(sklearn, n, d, k, C):
    "Two classes, more dimensions than images, labels that are not 0, 1, 2"
    x, y = clouds(n, d, k)
    names = torch.tensor([7, 2, 30, 4, 11, 5, 6, 8, 9, 10])[y]
    alike(logistic(x, names, C, tol=1e-8), sklearn(x, names, C), x)


def test_a_constant_channel_and_constant_features(sklearn):
    x, y = clouds()
    x[:, 2] = 3.0
    alike(logistic(x, y, 0.5, tol=1e-8), sklearn(x, y, 0.5), x)
    y = torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(
        logistic(torch.ones(4, 3), y, tol=1e-8).probabilities(torch.ones(1, 3)),
        torch.tensor([[0.75, 0.25]]).double(),
        atol=1e-6,
        rtol=0,
    )


def test_the_way_does_not_matter():
    "Chunks, the start, shifts and turns"
    x, y = clouds()
    one = logistic(x, y, tol=1e-8)

    def fit(x, **kw):
        return _fit(x, y, 1.0, tol=1e-8, **kw)

    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    for p, z in (
        (fit(x, rows=7), x),
        (fit(x, start=logistic(x, y, 1e-3)), x),
        (fit(x + 9), x + 9),
        (fit(x.double() @ turn.double()), x.double() @ turn.double()),
    ):
        torch.testing.assert_close(p.probabilities(z), one.probabilities(x), rtol=0, atol=1e-6)


def test_it_says_when_it_has_not_converged():
    x, y = clouds()
    with pytest.warns(UserWarning, match='C=10 stopped after 2 steps.*not at the optimum'):
        probe = logistic(x, y, 10, max_iter=2)
    assert (
        not probe.facts['converged']
        and probe.facts['gradient'] > 1e-6
        and probe.facts['iterations'] == 2
    )


@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning"
)  # theirs gives way to L-BFGS at large C
def test_the_search(sklearn):
    (x, y), (x_val, y_val) = (clouds(300, 6, 3, spread=s) for s in (1.0, 1.1))
    best, tried = search_penalty(x, y, x_val, y_val)

    def score(C):
        return sklearn(x, y, C).score(x_val.double().numpy(), y_val.numpy())

    grid = {f'{10 ** (i / 8):.2g}': 10 ** (i / 8) for i in range(-48, 49)}
    assert (
        isinstance(tried, Table) and 7 <= len(tried) <= 15 and {r['C'] for r in tried} <= set(grid)
    )
    assert {f'{10.0**e:.2g}' for e in (-6, -4, -2, 0, 2, 4, 6)} <= {r['C'] for r in tried}
    for r in tried:
        # a point on the border may fall to either side
        assert r['top1'] == pytest.approx(score(grid[r['C']]), abs=1.1 / 300), r
    top = max(r['top1'] for r in tried)
    # the strongest penalty among equals
    assert next(r['C'] for r in tried if r['top1'] == top) == f"{best.facts['C']:.2g}"
    i = round(8 * math.log10(best.facts['C']))
    # an eighth of a decade on both sides
    assert {f'{10 ** (j / 8):.2g}' for j in (i - 1, i + 1) if -48 <= j <= 48} <= {
        r['C'] for r in tried
    }


def test_held_out():
    labels = torch.arange(100) % 3
    learn, choose = held_out(labels, 0.2)
    assert sorted([*learn.tolist(), *choose.tolist()]) == list(range(100)) and labels[
        choose
    ].bincount().tolist() == [7, 7, 7]
    assert [o.tolist() for o in held_out(labels, 0.2)] == [
        learn.tolist(),
        choose.tolist(),
    ] and held_out(labels, 0.2, seed=1)[1].tolist() != choose.tolist()


def test_models_are_as_before():
    model = Flat().train()
    x, y = clouds()
    a = linear_probe(model, batches(x, y), batches(x, y), val=batches(*clouds(60)))
    assert (
        model.training
        and torch.is_grad_enabled()
        and a['n_train'] == 300
        and 0 < a['top1'] <= a['top5'] == 1.0
    )


def test_bad_data():
    x, y = clouds(30)
    good = batches(x, y)

    def probe(train=good, test=good, **kw):
        return linear_probe(Flat(), train, test, **kw)

    class Named(list):
        def __init__(self, rows, names):
            super().__init__(rows)
            self.classnames = names

    nan = x.clone()
    nan[3, 1] = float('nan')
    for run, says in (
        (lambda: probe([]), 'no images'),
        (lambda: probe(test=[]), 'no images'),
        (lambda: probe(batches(x, y * 0)), 'All 30 images have the label 0'),
        (lambda: probe(batches(nan, y)), 'not finite'),
        (lambda: probe(test=batches(nan, y)), 'not finite'),
        (lambda: probe(batches(x, y.float())), 'whole numbers'),
        (lambda: probe(test=batches(x, y + 1)), 'Label 3 is in the test set'),
        (lambda: probe(batches(x, y - 1)), 'Label -1 is outside'),
        (lambda: probe([(x[:, None, None], y[:9])]), r'\(9,\) do not belong to 30 images'),
        (lambda: probe(test=[(x[:, None, None], y[:9])]), '30 images and 9 labels'),
        (lambda: probe(Named(good, [*'abcdefghij'] * 4)), 'too few to learn 40 classes'),
        (lambda: probe(Named(good, [*'ab'])), 'outside the 2 classes'),
        (lambda: probe(Named(good, [*'abc']), Named(good, [*'acb'])), 'different classes'),
    ):
        with pytest.raises(TinyclipError, match=says) as e:
            run()
        assert '\n' not in str(e.value)


def test_bad_settings():
    x, y = clouds(30)
    probe = logistic(x, y, tol=1e-4)
    for run, says in (
        (lambda: logistic(x, y, C=-1), 'positive number'),
        (lambda: logistic(x, y, C=float('nan')), 'positive number'),
        (lambda: logistic(x, y, C='1'), 'positive number'),
        (lambda: logistic(x[0], y), r'give \(n, d\)'),
        (lambda: logistic(x[:0], y[:0]), 'nothing to learn'),
        (lambda: logistic(x, y, classes=31), 'too few to learn 31'),
        (lambda: logistic(x, y > 0), 'whole numbers'),
        (lambda: logistic(x, y, start=logistic(x[:, :3], y, tol=1e-3)), 'start from'),
        (lambda: probe.scores(x[:, :5]), 'width 6'),
        (lambda: search_penalty(x, y, x[:, :5], y), 'width 6'),
        (lambda: search_penalty(x, y, x, y + 1), 'Label 3'),
        (lambda: search_penalty(x, y, x[:0], y[:0]), 'at least one'),
        (lambda: held_out(y, 1.0), 'between 0 and 1'),
        (lambda: held_out(torch.arange(5)), 'No class has two'),
        (lambda: linear_probe(Flat(), [], [], C=0), 'C=0'),
    ):
        with pytest.raises(TinyclipError, match=says) as e:
            run()
        assert '\n' not in str(e.value)


def test_without_progress_nothing_is_printed(capsys):
    linear_probe(Flat(), batches(*clouds()), batches(*clouds()))
    assert capsys.readouterr() == ('', '')
    linear_probe(Flat(), batches(*clouds()), batches(*clouds()), progress=True)
    assert 'features' in capsys.readouterr().err


@pytest.mark.cuda
def test_on_a_gpu():
    x, y = clouds(600, 16, 5)
    cpu, gpu = logistic(x, y, 0.1), logistic(x.cuda(), y, 0.1)
    torch.testing.assert_close(
        gpu.probabilities(x.cuda()).cpu().double(), cpu.probabilities(x), rtol=0, atol=1e-3
    )
