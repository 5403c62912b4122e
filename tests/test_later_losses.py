"""Losses of later papers: against loops, with gradients that stop where they should, with a
projection and an annealed weight that survive a stop"""

import pytest
import torch
from test_distill import Pairs, different, job, tiny
from torch.nn import functional as F

from tinyclip.core import TinyclipError
from tinyclip.losses import (
    Features,
    Objective,
    Projection,
    cross_relational,
    feature,
    interactive_contrastive,
    repulsive,
    vertical_relational,
)
from tinyclip.losses.later import repulsive_weight
from tinyclip.train.checkpoint import checkpoints
from tinyclip.train.events import read_events


def unit(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def four(n=7, d=5, e=5):
    "Student images and texts, teacher images and texts"
    return [unit(n, w, seed=i) for i, w in enumerate((d, d, e, e))]


# --- values, entry by entry


def row(a, b, i, s):
    "Probabilities of row i of `a` over the rows of `b`"
    z = [s * float(a[i] @ b[j]) for j in range(len(b))]
    top = max(z)
    w = [torch.exp(torch.tensor(v - top, dtype=torch.float64)) for v in z]
    return [v / sum(w) for v in w]


def mean(rows):
    rows = list(rows)
    return sum(rows) / len(rows)


def hard(a, b, s):
    "Mean of what the pairs pay in their rows"
    return mean(-row(a, b, i, s)[i].log() for i in range(len(a)))


def kl(a, b, c, d, s):
    "Mean divergence of the rows of `a b` from those of the target `c d`"
    pairs = [(row(a, b, i, s), row(c, d, i, s)) for i in range(len(a))]
    return mean(sum(p * (p / q).log() for q, p in zip(*rows)) for rows in pairs)


def slow_interactive(x, y, X, Y, s):
    return (hard(x, Y, s) + hard(y, X, s)) / 2


def slow_vertical(x, y, X, Y, s):
    anchors = (hard(X, x, s) + hard(x, X, s) + hard(Y, y, s) + hard(y, Y, s)) / 2
    return anchors + (kl(X, x, Y, y, s) + kl(x, X, y, Y, s)) / 2


def slow_cross(x, y, X, Y, s):
    rows = kl(X, y, Y, x, s) + kl(Y, x, X, y, s)
    return (rows + kl(y, X, x, Y, s) + kl(x, Y, y, X, s)) / 4


SLOW = {
    interactive_contrastive: slow_interactive,
    vertical_relational: slow_vertical,
    cross_relational: slow_cross,
}


def total(value):
    return sum(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize('loss', SLOW, ids=lambda f: f.__name__)
@pytest.mark.parametrize('tile', [None, 1, 3, 64])
def test_values_are_those_of_a_loop(loss, tile):
    f = four()
    torch.testing.assert_close(total(loss(*f, 9.0, tile=tile)), SLOW[loss](*f, 9.0))


@pytest.mark.parametrize('weight', [2.0, 1.0, 0.3, 0.0, -0.8])
@pytest.mark.parametrize('tile', [None, 1, 3, 64])
def test_repulsive_is_that_of_a_loop(weight, tile):
    x, y, X, Y = four(e=4)

    def slow(a, b, A, B):
        out = 0
        for i in range(len(a)):
            q, p = row(a, b, i, 9.0), row(A, B, i, 6.0)
            out -= sum((1 if i == j else weight) * p[j] * q[j].log() for j in range(len(a)))
        return out / len(a)

    i2t, t2i = repulsive(x, y, X, Y, 9.0, 6.0, weight, tile=tile)
    torch.testing.assert_close(i2t, slow(x, y, X, Y))
    torch.testing.assert_close(t2i, slow(y, x, Y, X))


def test_the_weight_falls_from_attraction_to_repulsion():
    assert [repulsive_weight(d) for d in (0.0, 1.0)] == pytest.approx([2.0, -0.8])
    assert repulsive_weight(2 / 2.8) == pytest.approx(0.0)
    o = Objective('repulsive', 9.0, 6.0)
    f = four(e=4)
    for o.done in (0.0, 0.4, 1.0):
        right = sum(repulsive(*f, 9.0, 6.0, 2 - 2.8 * o.done))
        got = o(Features(*f[:2], 9.0), Features(*f[2:], 6.0))['repulsive']
        torch.testing.assert_close(got, right)


# --- gradients


def slopes(loss, f, s):
    f = [v.clone().requires_grad_() for v in f[:2]] + f[2:]
    s = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    total(loss(*f, s)).backward()
    return f[0].grad, f[1].grad, s.grad


def plain_divergence(S, T):
    T = T.detach()
    return sum((T.softmax(k) * (T.log_softmax(k) - S.log_softmax(k))).sum(k).mean() for k in (1, 0))


def plain_vertical(x, y, X, Y, s):
    image, text = s * X @ x.T, s * Y @ y.T
    pairs = torch.arange(len(x))
    anchors = sum(F.cross_entropy(z, pairs) for z in (image, image.T, text, text.T)) / 2
    return anchors + plain_divergence(image, text) / 2


def plain_cross(x, y, X, Y, s):
    one, other = s * X @ y.T, s * Y @ x.T
    return (plain_divergence(one, other) + plain_divergence(other, one)) / 4


@pytest.mark.parametrize(
    'loss, plain', [(vertical_relational, plain_vertical), (cross_relational, plain_cross)]
)
@pytest.mark.parametrize('tile', [None, 3])
def test_no_gradient_flows_into_a_target(loss, plain, tile):
    for got, right in zip(
        slopes(lambda *f: loss(*f, tile=tile), four(), 9.0), slopes(plain, four(), 9.0)
    ):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize('loss', [*SLOW, repulsive], ids=lambda f: f.__name__)
@pytest.mark.parametrize('kind, eps', [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_tiles_give_the_same_loss_and_gradient(loss, kind, eps):
    how = dict(weight=-0.8) if loss is repulsive else {}

    def of(tile):
        f = [v.to(kind).requires_grad_(i < 2) for i, v in enumerate(four(40, 16, 16))]
        total(value := loss(*f, 20.0, tile=tile, **how)).backward()
        return total(value).detach(), f[0].grad, f[1].grad

    for got, right in zip(of(16), of(None)):
        assert (got - right).norm() <= eps * right.norm()


def test_a_student_that_is_its_teacher():
    "Nothing is left to learn from features, and from what is imitated; what is known of the rest"
    X, Y = four()[2:]
    twin = [X.clone().requires_grad_(), Y.clone().requires_grad_()]

    def grads(value):
        return torch.autograd.grad(total(value), twin)

    for g in (*grads(feature(*twin, X, Y)), *grads(repulsive(*twin, X, Y, 9.0, 9.0, 1.0))):
        assert g.abs().max() < 1e-12
    # the teacher's own contrastive loss, of which only one side can move
    pairs = torch.arange(len(X))
    torch.testing.assert_close(
        interactive_contrastive(*twin, X, Y, 9.0),
        sum(F.cross_entropy(z, pairs) for z in (9 * X @ Y.T, 9 * Y @ X.T)) / 2,
    )
    # a model whose images are its texts is as symmetric as these losses ask for
    alike = [X.clone().requires_grad_(), X.clone().requires_grad_()]
    for value in (vertical_relational(*alike, X, X)[1], cross_relational(*alike, X, X)):
        assert value.abs() < 1e-12
        for g in torch.autograd.grad(value, alike, materialize_grads=True):
            assert g.abs().max() < 1e-12


# --- a student of another width


@pytest.mark.parametrize('width, to', [(4, 9), (9, 4)])
def test_a_projection_begins_as_a_rotation(width, to):
    state = torch.get_rng_state()
    p, q, r = Projection(width, to), Projection(width, to), Projection(width, to, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, q.state_dict()[k]) for k, v in p.state_dict().items())
    assert not torch.equal(p.image.weight, r.image.weight)
    w = p.image.weight.double() if width < to else p.image.weight.double().T
    torch.testing.assert_close(
        w.T @ w, torch.eye(min(width, to), dtype=torch.float64), atol=1e-5, rtol=0
    )
    rows = p(torch.eye(width), torch.eye(width))
    torch.testing.assert_close(rows[0].norm(dim=1), torch.ones(width))


MIX = ['feature', 'interactive_contrastive', 'vertical_relational', 'cross_relational', 'repulsive']


def trainer(seed=1, **kw):
    return job(tiny(seed, embed_dim=12, patch_dropout=0.5), objective=MIX, **kw)


def stopped(folder, at, **kw):
    d = trainer(folder=folder, **kw)
    d.listeners = [lambda e: d.stop() if (e['event'], e['step']) == ('log', at) else None]
    return d


def learned(folder):
    return torch.load(checkpoints(folder)[-1] / 'trainer.pt', weights_only=True)['projection']


def test_a_run_with_a_projection_and_an_annealed_weight_resumes_to_the_bit(tmp_path):
    straight = trainer(folder=tmp_path / 'whole').fit(10)
    assert stopped(tmp_path / 'two', 4).fit(10).steps == 4
    rest = trainer(seed=7, folder=tmp_path / 'two').fit(10, resume=True)
    assert rest.finished and not different(straight.student, rest.student)
    a, b = learned(tmp_path / 'whole'), learned(tmp_path / 'two')
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    first = Projection(12, 16).state_dict()
    assert not any(torch.equal(v, first[k]) for k, v in a.items())  # all of it was trained
    logs = [[e['loss'] for e in read_events(tmp_path / k, 'log')] for k in ('whole', 'two')]
    assert logs[0] == logs[1]
    assert rest.student.state_dict().keys() == tiny(embed_dim=12).state_dict().keys()


def test_an_objective_serves_many_runs_alike():
    objective = Objective(MIX)
    runs = [job(tiny(1, embed_dim=w), objective=objective).fit(3) for w in (12, 8, 12)]
    assert not different(runs[0].student, runs[2].student)
    assert objective.projection is None and objective.done == 0.0


def test_equal_widths_are_compared_as_they_are(tmp_path):
    assert job(objective=MIX, folder=tmp_path).fit(2).finished
    assert learned(tmp_path) is None


@pytest.mark.parametrize('schedule', ['constant', 'cosine'])
def test_a_longer_run_follows_the_longer_annealing(tmp_path, schedule):
    how = dict(objective='repulsive', schedule=schedule, warmup=0.0, folder=tmp_path)
    job(**how).fit(4)
    with pytest.warns(
        UserWarning, match='What is annealed .repulsive. follows the longer run: 50%'
    ):
        assert job(tiny(2), **how).fit(8, resume=True).finished

    def weights(steps):
        return [repulsive_weight(i / steps) for i in range(steps)]

    assert weights(4)[-1] < 0 < weights(8)[4]  # it jumps back, as a cosine does


def test_a_model_that_does_not_say_its_inputs_is_refused_in_a_sentence():
    student = tiny(1, embed_dim=12)
    del student.context_length
    with pytest.raises(TinyclipError, match="Project the student's"):
        job(student, objective='interactive_contrastive').fit(1)


def test_bad_batches_leave_the_projection_alone(tmp_path):
    def spoil(e, i, b):
        return b._replace(image=b.image * float('nan')) if (e, i) == (0, 1) else b

    result = trainer(pairs=Pairs(spoil=spoil), folder=tmp_path).fit(3)
    assert result.skipped == 1
    assert all(v.isfinite().all() for v in learned(tmp_path).values())
