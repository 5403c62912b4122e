"""Tiles against whole tables in float64, two processes with a share each against one, and the
memory that tiles are for"""

import shutil

import pytest
import torch
import torch.distributed as dist
from groups import joined, spawn
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import DistillClipLoss
from torch.nn import functional as F

from tinyclip.core import TinyclipError, rank_and_world_size
from tinyclip.evaluate.cost import peak_memory
from tinyclip.losses import LOSSES, Features, Objective, affinity_mimicking, contrastive
from tinyclip.losses.distributed import gather, local_rows
from tinyclip.losses.tiled import SMALL, tile_size, tiled_cross_entropy, tiled_log_sum_exp


def unit(*shape, seed, kind=torch.float64):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        dim=-1,
    ).to(kind)


def weights(*n):
    return [
        torch.rand(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in n
    ]


def far(got, right):
    return ((got.double() - right.double()).norm() / right.double().norm().clamp_min(1e-300)).item()


def whole(a, b, c, d, s, t):
    "What rows and columns pay, from whole tables"
    S, T = s * (a @ b.T), t * (c @ d.T)
    return tuple(-(T.softmax(k) * S.log_softmax(k)).sum(k) for k in (1, 0))


def setting(n, m, d, e, s, t, seed=0):  # of everything that can have a gradient
    return [
        unit(n, d, seed=seed),
        unit(m, d, seed=seed + 1),
        unit(n, e, seed=seed + 2),
        unit(m, e, seed=seed + 3),
        torch.tensor(s, dtype=torch.float64),
        torch.tensor(t, dtype=torch.float64),
    ]


def run(f, x):
    "Value and gradients"
    x = [v.clone().requires_grad_() for v in x]
    out = f(*x)
    total = sum((w.to(v) * v).sum() for w, v in zip(weights(*map(len, out)), out))
    return out, torch.autograd.grad(total, x)


SHAPES = [
    (1, 1, 4),
    (1, 7, 4),
    (7, 1, 4),
    (5, 5, 8),
    (8, 8, 4),
    (9, 9, 4),
    (13, 6, 5),
    (6, 13, 5),
    (64, 200, 32),
    (130, 130, 32),
]


@pytest.mark.parametrize('n,m,tile', SHAPES)
def test_exact_in_float64(n, m, tile):
    x = setting(n, m, 6, 9, 50.0, 40.0)
    (values, grads) = run(lambda *x: tiled_cross_entropy(*x, tile=tile), x)
    (right, slopes) = run(whole, x)
    for g, r in zip([*values, *grads], [*right, *slopes]):
        assert g.dtype == torch.float64
        torch.testing.assert_close(g, r, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('n,m,tile', SHAPES[3:])
def test_float32_is_close(n, m, tile):
    x = setting(n, m, 32, 48, 50.0, 50.0)
    values, grads = run(lambda *x: tiled_cross_entropy(*x, tile=tile), [v.float() for v in x])
    right, slopes = run(whole, [v.float().double() for v in x])
    assert all(v.dtype == torch.float32 for v in values)
    for g, r in zip([*values, *grads[:5]], [*right, *slopes[:5]]):
        assert far(g, r) < 1e-5  # all but the teacher's scale, whose slope nearly cancels


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    tile=st.integers(1, 25),
    s=st.floats(0.1, 100),
    t=st.floats(0.1, 100),
    columns=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(n, m, tile, s, t, columns, seed):
    x = setting(n, m, 3, 4, s, t, seed)
    keep = slice(None if columns else 1)
    (values, grads), (right, slopes) = (
        run(lambda *x: f(*x)[keep], x)
        for f in (lambda *x: tiled_cross_entropy(*x, tile=tile, columns=columns), whole)
    )
    for g, r in zip([*values, *grads], [*right, *slopes]):
        torch.testing.assert_close(g, r, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_is_computed_in_float32(kind, autocast):
    x = [v.to(kind) for v in setting(33, 20, 16, 24, 50.0, 50.0)[:4]] + [
        torch.tensor(50.0),
        torch.tensor(50.0),
    ]
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        values, grads = run(lambda *x: tiled_cross_entropy(*x, tile=8), x)
    right, slopes = run(whole, [v.double() for v in x])
    for g, r in zip(values, right):
        assert g.dtype == torch.float32 and far(g, r) < 1e-6
    for g, r, v in zip(grads[:5], slopes, x):
        assert g.dtype == v.dtype and far(g, r) < (1e-5 if v.dtype == torch.float32 else 1e-2)


def test_autocast_leaves_the_backward_pass_alone():
    x = [v.float() for v in setting(33, 33, 16, 16, 50.0, 50.0)]

    def grads(on):
        y = [v.clone().requires_grad_() for v in x]
        with torch.autocast('cpu', torch.bfloat16, enabled=on):
            sum(v.mean() for v in tiled_cross_entropy(*y, tile=8)).backward()
        return [v.grad for v in y]

    for a, b in zip(grads(True), grads(False)):
        assert torch.equal(a, b)


@pytest.mark.parametrize('offset', [0, 3, 14])
def test_local_rows_against_gathered_ones(offset):
    "Row i belongs to column i+offset: hard labels, and the column left out"
    a, b = unit(6, 5, seed=0), unit(20, 5, seed=1)
    S = 30 * (a @ b.T)
    rows, _ = tiled_log_sum_exp(a, b, 30.0, tile=4)
    torch.testing.assert_close(
        rows - S.diagonal(offset), F.cross_entropy(S, torch.arange(6) + offset, reduction='none')
    )
    apart = torch.eye(20, dtype=torch.bool)[offset : offset + 6]

    def brute(a, b):
        return ((30 * (a @ b.T)).masked_fill(apart, -torch.inf).logsumexp(1),)

    (values, grads) = run(
        lambda a, b: tiled_log_sum_exp(a, b, 30.0, tile=4, skip_diagonal=offset, columns=False)[:1],
        [a, b],
    )
    (right, slopes) = run(brute, [a, b])
    for g, r in zip([*values, *grads], [*right, *slopes]):
        torch.testing.assert_close(g, r)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('n,tile', [(2, 1), (9, 4), (9, 64), (40, 16)])
def test_every_loss_is_the_same_in_tiles(name, n, tile):
    x = [unit(n, 6, seed=i) for i in range(4)] + [
        torch.tensor(v, dtype=torch.float64) for v in (30.0, 45.0)
    ]

    def loss(tile):
        objective = Objective(name, 'own', 'own', tile=tile)
        return lambda a, b, c, d, s, t: (
            objective(Features(a, b, s, -9.0), Features(c, d, t, -7.0))['loss'][None]
            + 0 * (a.sum() + b.sum() + c.sum() + d.sum() + s + t),
        )

    (values, grads) = run(loss(tile), x)
    (right, slopes) = run(loss(None), x)
    for g, r in zip([*values, *grads], [*right, *slopes]):
        torch.testing.assert_close(g, r, rtol=1e-9, atol=1e-10)


def test_a_plain_number_is_as_exact_as_a_tensor():
    x = [unit(20, 6, seed=i) for i in range(4)]
    for f in (
        lambda tile: sum(affinity_mimicking(*x, 50.1, 33.3, tile=tile)),
        lambda tile: contrastive(*x[:2], 14.3, tile=tile),
    ):
        torch.testing.assert_close(f(8), f(None), rtol=1e-13, atol=0)


def test_equals_open_clip():
    s = [unit(50, 6, seed=i) for i in (0, 1)]
    t = [unit(50, 9, seed=i) for i in (2, 3)]
    own = torch.tensor(20.0, dtype=torch.float64)
    theirs = DistillClipLoss()(*s, own, *t, torch.tensor(50.0), output_dict=True)
    torch.testing.assert_close(
        sum(affinity_mimicking(*s, *t, own, 50.0, tile=16)) / 2, theirs['distill_loss']
    )
    torch.testing.assert_close(contrastive(*s, own, tile=16), theirs['contrastive_loss'])


@pytest.mark.parametrize('kind', [torch.float32, torch.float64])
def test_agreeing_affinity_has_zero_gradient(kind):
    x = [unit(70, 8, seed=i, kind=kind).requires_grad_() for i in (0, 1)]
    s = torch.tensor(50.0, dtype=kind, requires_grad=True)
    sum(affinity_mimicking(*x, *(v.detach() for v in x), s, 50.0, tile=32)).backward()
    for v in (*x, s):
        assert not v.grad.abs().max() > 0  # to the last bit: student and teacher take the same way


def test_a_teacher_that_is_not_trained_costs_nothing():
    x = [v.float() for v in setting(20, 20, 8, 8, 50.0, 50.0)]
    for i in (0, 1):
        x[i].requires_grad_()
    sum(v.sum() for v in tiled_cross_entropy(*x, tile=8)).backward()
    assert all(v.grad is None for v in x[2:])


def sharp(n):  # pairs so certain that next to nothing is paid
    for i in range(2):
        image = unit(n, 64, seed=i)
        yield from (image, F.normalize(image + 0.9 * unit(n, 64, seed=i + 5), dim=-1))


def test_little_is_lost_where_the_student_is_certain():
    exact = [*sharp(300), torch.tensor(50.0, dtype=torch.float64)]

    def f(kind, tile):
        x = [v.clone().to(kind).requires_grad_(i in (0, 1, 4)) for i, v in enumerate(exact)]
        loss = sum(affinity_mimicking(*x, 50.0, tile=tile))
        loss.backward()
        return loss.detach(), [x[i].grad for i in (0, 1, 4)]

    (right, slopes) = f(torch.float64, None)
    (_, whole) = f(torch.float32, None)
    (loss, grads) = f(torch.float32, 64)
    assert 1e-5 < right < 1e-3  # tiny, and yet
    assert (loss - right).abs() < 1e-6  # nats
    for g, w, e in zip(grads, whole, slopes):
        assert far(g, e) < 3 * far(w, e)  # as good as whole tables are


def test_far_apart_logits_neither_overflow_nor_vanish():
    a = torch.eye(4)
    for x in (a, -a):
        rows, columns = tiled_cross_entropy(a, x, -a, a, 1000.0, 1000.0, tile=2)
        right = whole(*(v.double() for v in (a, x, -a, a)), 1000.0, 1000.0)
        for g, r in zip((rows, columns), right):
            assert torch.isfinite(g).all()
            torch.testing.assert_close(g.double(), r, rtol=1e-6, atol=1e-4)


def test_compiled_is_the_same():
    if not shutil.which('g++'):
        pytest.skip('torch.compile needs a C++ compiler on a CPU')
    x = [v.float() for v in setting(50, 37, 8, 12, 50.0, 50.0)]

    def f(compiled):
        return lambda a, b: tiled_cross_entropy(a, b, *x[2:], tile=16, compiled=compiled)

    for a, b in zip(*(sum(map(list, run(f(c), x[:2])), []) for c in (True, False))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_memory_stays_small():
    n = 8192  # a table takes 256 MiB; whole tables take about ten
    x = [unit(n, 32, seed=i, kind=torch.float32).requires_grad_(i < 2) for i in range(4)]
    small = [v[:2100].detach().requires_grad_(v.requires_grad) for v in x]

    def forward_and_backward(x):
        (sum(affinity_mimicking(*x)) + contrastive(*x[:2], 20.0)).backward()

    forward_and_backward(small)  # what is set up once is not counted
    peak = peak_memory(lambda: forward_and_backward(x))
    if peak is None:
        pytest.skip('the system does not tell the peak of memory')
    assert peak < n * n * 4 / 2


def test_large_batches_are_tiled_by_themselves(monkeypatch):
    import tinyclip.losses.mimicking
    import tinyclip.losses.tiled

    assert tile_size(2048, 2048) is None and tile_size(2048, 2049) == 1024 and SMALL == 2048**2
    monkeypatch.setattr(tinyclip.losses.tiled, 'SMALL', 15)
    seen, real = [], tinyclip.losses.mimicking.tiled_cross_entropy
    monkeypatch.setattr(
        tinyclip.losses.mimicking,
        'tiled_cross_entropy',
        lambda *a, **k: seen.append(len(a[0])) or real(*a, **k),
    )
    for n in (3, 4):
        affinity_mimicking(*[unit(n, 5, seed=i) for i in range(4)])
    assert seen == [4]


@pytest.mark.parametrize(
    'bad,words',
    [
        (lambda x: affinity_mimicking(*x, tile=-1), 'tile=-1'),
        (lambda x: contrastive(*x[:2], 9.0, tile=True), 'tile=True'),
        (lambda x: Objective(tile='big'), "tile='big'"),
        (lambda x: tiled_cross_entropy(*x[:3]), 'neither'),
        (lambda x: tiled_cross_entropy(x[0], x[1][:, :2]), r'\(5, 4\), \(5, 2\)'),
        (lambda x: tiled_cross_entropy(x[0][0], x[1]), 'shapes'),
        (lambda x: tiled_cross_entropy(x[0], x[1], x[2][:3], x[3]), 'shapes'),
        (lambda x: tiled_log_sum_exp(x[0][:0], x[1]), 'no rows'),
        (lambda x: tiled_log_sum_exp(x[0], x[1], torch.ones(5)), 'one number'),
    ],
)
def test_bad_input_is_a_sentence(bad, words):
    with pytest.raises(TinyclipError, match=words):
        bad([unit(5, 4, seed=i) for i in range(4)])


def test_no_second_derivative():
    a, b = unit(5, 4, seed=0).requires_grad_(), unit(5, 4, seed=1)
    with pytest.raises(TinyclipError, match='no second derivative'):
        torch.autograd.grad(tiled_log_sum_exp(a, b)[0].sum(), a, create_graph=True)


def test_shares_are_the_whole():
    for n in range(12):
        for world in range(1, 6):
            assert [i for r in range(world) for i in range(n)[local_rows(n, r, world)]] == list(
                range(n)
            )
    assert rank_and_world_size() == (0, 1)


# of nine pairs the shares are uneven; of one pair the first process has none
WORLD = 2
SIZES = (9, 1)
SPEC = dict(
    affinity=1.0, affinity_i2t=0.7, contrastive=0.5, uni_modal=0.3, cross_modal=0.2, feature=0.1
)


def loss_and_grads(spec, tile, rank=None, distributed=False, scale='own'):
    "Loss of the gathered batch, and the gradients of this process"
    rows = slice(rank * 4, rank * 4 + 4) if rank is not None else slice(None)
    x = [unit(8, 6, seed=i).float()[rows] for i in (0, 1)]
    t = [unit(8, 4, seed=i).float()[rows] for i in (2, 3)]
    w = [torch.nn.Parameter(unit(6, 4, seed=i).float()) for i in (10, 11)] + [
        torch.nn.Parameter(torch.tensor(2.0))
    ]
    student = Features(*(gather(F.normalize(a @ p, dim=-1)) for a, p in zip(x, w)), w[2].exp())
    out = Objective(spec, student_scale=scale, tile=tile)(
        student, Features(*map(gather, t), 50.0), distributed=distributed
    )
    out['loss'].backward()
    return {k: v.detach() for k, v in out.items()}, [
        torch.zeros_like(p) if p.grad is None else p.grad for p in w
    ]


def uneven(rank, N):
    """Rows given to the tiles directly, nine over two processes: what the columns say, and the
    gradient of everything"""
    a, b, c, d = (unit(N, 5, seed=i).requires_grad_(i < 2) for i in range(4))
    own = local_rows(N) if rank is not None else slice(None)
    rows, columns = tiled_cross_entropy(
        a[own], b, c[own], d, 30.0, 50.0, tile=2, distributed=rank is not None
    )
    # over all processes the columns count once
    (rows.sum() + (columns * torch.arange(N)).sum() / (1 if rank is None else WORLD)).backward()
    whole = Objective(['cross_modal', 'affinity', 'contrastive'], tile=2)(
        Features(a, b, 9.0), Features(c, d, 9.0), distributed=rank is not None
    )['loss'].detach()
    return torch.cat([columns.detach(), whole[None]]), a.grad, b.grad


CASES = [
    (spec, tile, distributed)
    for spec in (SPEC, *SPEC)
    for tile in (1, 3, None)
    for distributed in (False, True)
]


def worker(rank, world, port, out):
    with joined(rank, world, port):
        results = []
        for spec, tile, distributed in CASES:
            losses, grads = loss_and_grads(spec, tile, rank, distributed)
            for g in grads:
                dist.all_reduce(g)
                g /= WORLD  # what data-parallel training does
            results.append((losses, grads))
        direct = [uneven(rank, n) for n in SIZES]
        for _, *grads in direct:
            for g in grads:
                dist.all_reduce(g)
        torch.save((results, direct), out / f'{rank}.pt')


def test_two_processes_equal_one(tmp_path):
    spawn(worker, WORLD, tmp_path)
    for rank in range(WORLD):  # every process knows the loss of all
        results, direct = torch.load(tmp_path / f'{rank}.pt')
        for (spec, tile, distributed), (losses, grads) in zip(CASES, results):
            right, slopes = loss_and_grads(spec, None)
            for k in right:
                torch.testing.assert_close(
                    losses[k],
                    right[k],
                    rtol=1e-5,
                    atol=1e-6,
                    msg=f'{k} {spec} {tile} {distributed}',
                )
            for g, e in zip(grads, slopes):
                torch.testing.assert_close(
                    g, e, rtol=1e-5, atol=1e-5, msg=f'{spec} {tile} {distributed}'
                )
        for n, out in zip(SIZES, direct):
            for g, r in zip(out, uneven(None, n)):
                torch.testing.assert_close(g, r)
