"""SigLIP's loss and its distillation twin: against float64, in tiles, over two processes, and in
runs whose teacher has a bias"""

import copy
import math

import caches
import open_clip
import pytest
import torch
import torch.distributed as dist
from caches import clip, data, opened  # noqa: F401
from groups import joined, spawn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tinyclip.core import TinyclipError
from tinyclip.data.pairs import Batch
from tinyclip.distill import Distiller
from tinyclip.losses import Features, Objective, sigmoid_contrastive, sigmoid_mimicking
from tinyclip.losses.distributed import gather, local_rows
from tinyclip.stages import Stage, Stages
from tinyclip.train.step import split, step, step_in_chunks

NAMES = ['sigmoid', 'sigmoid_mimicking']


def tensors(n, d=5, e=7, seed=0, kind=torch.float64):
    g = torch.Generator().manual_seed(seed)
    rows = [
        F.normalize(torch.randn(n, w, generator=g, dtype=torch.float64), dim=-1).to(kind)
        for w in (d, d, e, e)
    ]
    return [*rows, *(torch.tensor(v, dtype=kind) for v in (12.0, -8.0, 30.0, -11.0))]


def written(name, a, b, c, d, s, u, t, v):
    "The losses as they are defined, entry by entry"
    l = s * a @ b.T + u
    p = torch.eye(len(a)).to(a) if name == 'sigmoid' else (t * c @ d.T + v).sigmoid()
    return -(p * F.logsigmoid(l) + (1 - p) * F.logsigmoid(-l)).sum() / len(a)


def ours(name, a, b, c, d, s, u, t, v, **how):
    if name == 'sigmoid':
        return sigmoid_contrastive(a, b, s, u, **how)
    return sigmoid_mimicking(a, b, c, d, s, u, t, v, **how)


def value_and_grads(f, x):
    x = [v.clone().requires_grad_() for v in x]
    out = f(*x)
    return [out, *torch.autograd.grad(out, x, materialize_grads=True, allow_unused=True)]


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 14),
    tile=st.one_of(st.none(), st.integers(1, 16)),
    seed=st.integers(0, 99),
)
def test_as_written(name, n, tile, seed):
    x = tensors(n, seed=seed)
    got = value_and_grads(lambda *x: ours(name, *x, tile=tile), x)
    for g, r in zip(got, value_and_grads(lambda *x: written(name, *x), x)):
        torch.testing.assert_close(g, r, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('tile', [None, 32])
def test_float32_gradients(name, tile):
    x = tensors(100, 32, 48, kind=torch.float32)
    got = value_and_grads(lambda *x: ours(name, *x, tile=tile), x)
    right = value_and_grads(lambda *x: written(name, *x), [v.double() for v in x])
    for g, r in zip(got, right):
        assert (g.double() - r).norm() <= 1e-5 * r.norm().clamp_min(1e-6)


def test_agreement_has_no_gradient_and_softmax_sees_no_bias():
    a, b, _, _, s, u, *_ = tensors(9)
    same = value_and_grads(lambda *x: sigmoid_mimicking(*x[:2], a, b, *x[2:], s, u), [a, b, s, u])
    assert all(g.abs().max() < 1e-12 for g in same[1:])
    moved = [
        Objective('affinity')(Features(a, b, s, bias), Features(b, a, s, 3.0))['loss']
        for bias in (None, u)
    ]
    assert moved[0] == moved[1]


def test_a_model_without_bias_is_refused():
    a, b, *_ = tensors(4)
    for name in NAMES:
        with pytest.raises(TinyclipError, match='the student has none'):
            Objective(name)(Features(a, b, 10.0), Features(a, b, 10.0, -10.0))
    with pytest.raises(TinyclipError, match='the teacher has none'):
        Objective('sigmoid_mimicking')(Features(a, b, 10.0, -10.0), Features(a, b, 10.0))


WORLD, N = 2, 10
CASES = [(name, tile) for name in NAMES for tile in (None, 3)]


def shared(name, tile, rank=0, world=1):
    "Loss of all rows, and gradients by what one process has of them"
    x = tensors(N)
    own = local_rows(N, rank, world)
    leaves = [v[own].clone().requires_grad_() if v.ndim else v.requires_grad_() for v in x]
    whole = [gather(v) if v.ndim else v for v in leaves]
    s, t = (Features(*(whole[i] for i in k)) for k in ((0, 1, 4, 5), (2, 3, 6, 7)))
    loss = Objective(name, tile=tile)(s, t, distributed=True)['loss']
    return loss.detach(), torch.autograd.grad(loss, [leaves[i] for i in (0, 1, 4, 5)])


def worker(rank, world, port, out):
    with joined(rank, world, port):
        results = []
        for name, tile in CASES:
            loss, grads = shared(name, tile, rank, WORLD)
            for g in grads[2:]:
                dist.all_reduce(g)
            results.append((loss, [g / WORLD for g in grads]))  # as data-parallel training does
        torch.save(results, out / f'{rank}.pt')


def test_two_processes_equal_one(tmp_path):
    spawn(worker, WORLD, tmp_path)
    found = [torch.load(tmp_path / f'{r}.pt') for r in range(WORLD)]
    for case, *parts in zip(CASES, *found):
        loss, grads = shared(*case)
        for rank, (there, slopes) in enumerate(parts):
            torch.testing.assert_close(there, loss)
            own = local_rows(N, rank, WORLD)
            for g, r in zip(slopes, grads):
                torch.testing.assert_close(g, r[own] if r.ndim else r)


class Tiny(nn.Module):
    "Two linear towers that answer as a CLIP of open_clip does"

    def __init__(self, bias=-10.0, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(48, 6, generator=g))
        self.b = nn.Parameter(torch.randn(62, 6, generator=g))
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, image, text):
        rows = image.flatten(1) @ self.a, self.b[text].mean(1)
        out = (*(F.normalize(r, dim=-1) for r in rows), self.logit_scale.exp())
        return out if self.logit_bias is None else (*out, self.logit_bias)


class Pairs:
    def epoch(self, e, start=0):
        for i in range(start, 3):
            g = torch.Generator().manual_seed(10 * e + i)
            yield Batch(
                torch.randn(8, 3, 4, 4, generator=g), torch.randint(1, 62, (8, 5), generator=g)
            )


@pytest.mark.parametrize('name', NAMES)
def test_chunks_equal_whole(name):
    batch = next(Pairs().epoch(0))
    whole, parts, teacher = Tiny(), Tiny(), Tiny(-7.0, 1)
    step(whole, teacher, batch, Objective(name))['loss'].backward()
    step_in_chunks(parts, teacher, split(batch, 3), Objective(name))
    for p, q in zip(whole.parameters(), parts.parameters()):
        assert p.grad is not None and p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_default_is_what_the_teacher_was_trained_with():
    heard = []
    d = Distiller(Tiny(seed=1), Tiny(-6.0), Pairs(), progress=False, listeners=[heard.append])
    assert d.objective.weights == {'sigmoid_mimicking': 1.0}
    before = d.student.logit_bias.item()
    d.fit(4)
    assert d.student.logit_bias.item() != before
    assert any("objective 'sigmoid_mimicking'" in str(e) for e in heard)
    other = Distiller(Tiny(None), Tiny(-6.0), Pairs(), progress=False)
    assert other.objective.weights == {'affinity': 1.0} and other.objective.teacher_scale == 'own'
    assert 'no softmax sees a bias' in other.objective.remark
    plain = Distiller(Tiny(None), Tiny(None), Pairs(), progress=False)
    assert repr(plain.objective) == 'affinity' and plain.objective.teacher_scale == 50.0
    assert plain.objective.remark == ''


def test_affinity_leaves_a_bias_as_it_is():
    d = Distiller(Tiny(seed=1), Tiny(-6.0), Pairs(), objective='affinity', progress=False)
    d.fit(2)
    assert d.student.logit_bias.item() == -10.0


@pytest.mark.parametrize('name', NAMES)
def test_half_precision_rows_are_read_exactly(name):
    x = [v.to(torch.bfloat16) for v in tensors(20, 16, 24)[:4]]
    numbers = (117.0, -12.9, 110.0, -11.0)
    for tile in (None, 6):
        got = ours(name, *x, *numbers, tile=tile)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, ours(name, *[v.float() for v in x], *numbers))


quiet = pytest.mark.filterwarnings('ignore:The teacher has a logit_bias')


def siglip(seed=0, scale=117.0, bias=-12.9):
    torch.manual_seed(seed)
    vision = dict(image_size=16, layers=1, width=32, patch_size=8, head_width=16)
    text = dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    return open_clip.CLIP(16, vision, text, init_logit_scale=math.log(scale), init_logit_bias=bias)


def job(student, folder=None, **kw):
    from test_distill import Pairs as Images

    how = dict(lr=1e-3, warmup=0, device='cpu', precision='fp32', progress=False, log_every=1) | kw
    return Distiller(student, siglip(), Images(), folder=folder, **how)


@quiet
def test_a_scale_above_100_stays_and_a_run_resumes_to_the_bit(tmp_path):
    from test_distill import when

    whole = job(siglip(1), tmp_path / 'whole').fit(4).student
    assert whole.logit_scale.exp() > 110 and whole.logit_bias != siglip(1).logit_bias
    half = job(siglip(1), tmp_path / 'half', save_every=2)
    half.listeners = [when('log', 2, half.stop)]
    half.fit(4)
    assert half.result.steps < 4
    rest = job(siglip(1), tmp_path / 'half').fit(4, resume=True).student
    for a, b in zip(whole.parameters(), rest.parameters()):
        assert torch.equal(a, b)


@quiet
def test_a_copy_of_the_teacher_learns_nothing():
    student = siglip()
    d = job(student)
    before = copy.deepcopy(student)
    step(student, siglip(), next(d.pairs.epoch(0)), d.objective)['loss'].backward()
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-4
    d.fit(1)
    assert student.logit_scale.item() == pytest.approx(before.logit_scale.item(), abs=2e-3)


def biased(seed=0, scale=30.0, bias=-9.0):
    model = clip(seed)
    model.logit_bias = nn.Parameter(torch.tensor(bias))
    nn.init.constant_(model.logit_scale, math.log(scale))
    return model


def test_a_cache_knows_the_bias(data, tmp_path):  # noqa: F811
    teachers = [biased(0), biased(1, 60.0, -11.0)]
    folders = [tmp_path / 'a', tmp_path / 'b']
    for f, t in zip(folders, teachers):
        caches.written(data, f, t)
    pairs = opened(data, folders)
    batch = next(pairs.epoch(0))
    alone = [next(opened(data, f).epoch(0)) for f in folders]
    logits = [b.teacher_scale * b.teacher_image @ b.teacher_text.T + b.teacher_bias for b in alone]
    mean = batch.teacher_scale * batch.teacher_image @ batch.teacher_text.T + batch.teacher_bias
    torch.testing.assert_close(mean, sum(logits) / 2, rtol=1e-4, atol=1e-4)
    one = opened(data, folders[0])
    twin, shown = Objective('sigmoid_mimicking'), Batch(alone[0].image, alone[0].text)
    got = step(biased(3), None, alone[0], twin)
    live = step(biased(3), teachers[0], shown, twin)
    torch.testing.assert_close(got['loss'], live['loss'], rtol=1e-4, atol=1e-5)
    for p in (pairs, one):
        d = Distiller(biased(3), None, p, progress=False)
        assert d.objective.weights == {'sigmoid_mimicking': 1.0}
    caches.written(data, tmp_path / 'c', clip(2))
    mixed = opened(data, [folders[0], tmp_path / 'c'])
    assert mixed.bias is None
    # of several teachers one has no bias, whichever of them is named beside their cache
    assert Distiller(biased(3), teachers[0], mixed, progress=False).objective.weights == {
        'affinity': 1.0
    }


def test_stages_of_a_siglip(tmp_path):
    from test_distill import Pairs as Images

    how = dict(lr=1e-3, device='cpu', precision='fp32', progress=False)
    stages = Stages(siglip(), Images(), [Stage(0.7, 3, 3)], tmp_path / 'run', **how)
    assert str(stages.objective) == 'sigmoid_mimicking'
    with pytest.warns(UserWarning, match='sigmoid_mimicking'):
        stages.fit()
    student = stages.trained()
    assert student.logit_bias != siglip().logit_bias and student.logit_scale.exp() > 105
