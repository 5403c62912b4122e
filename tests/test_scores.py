"""Scores: what is left after the best compensation, and keeps of an exact share."""

import copy

import pytest
import torch
from groups import spawn, started
from hypothesis import given, reject
from hypothesis import strategies as st
from test_reconstruction import batches, clip, few, models, off

from tinyclip.core import TinyclipError
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import CHANNELS, MEASURES, eliminate, hull, scored, unit_scores
from tinyclip.towers import TOWERS, ParamCount, layout

each = pytest.mark.parametrize('by', MEASURES)


def scores(model, pairs=None, by='reconstruction', **settings):
    return unit_scores(model, pairs or batches(), by, progress=False, **settings)


def kept(model, keep):
    "Share of the parameters that stays, by tower, and of both"
    whole, left = (ParamCount(layout(m)).count({}) for m in (model, inherit(model, keep)))
    both = sum(left.values()) / sum(whole.values())
    return {t: left[t] / whole[t] for t in TOWERS} | {'both': both}


# --- the closed form


def least_squares_error(h, g, w, gone, block):
    "What is left of `tr(G D H D^T)` when the columns of the others are free, by explicit refit"
    columns = torch.arange(len(h)).view(-1, block)
    out = columns[gone].flatten()
    stay = torch.tensor([i for i in range(len(h)) if i not in set(out.tolist())])
    # the rest takes over what it can: D_stay = W_gone H_gone,stay H_stay,stay^-1
    taken = torch.linalg.lstsq(h[stay][:, stay], h[stay][:, out] @ w[:, out].T).solution.T
    d = torch.zeros_like(w)
    d[:, out], d[:, stay] = w[:, out], -taken
    return torch.trace(g @ d @ h @ d.T).item()


@pytest.mark.parametrize('block', [1, 2])
def test_against_explicit_refits(block):
    "Greedy, step by step: the least of all refits, and its error"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=g) @ torch.randn(8, 8, generator=g)
    w, u = torch.randn(3, 8, generator=g).double(), torch.randn(9, 3, generator=g).double()
    h, sensitivity = (x.T @ x).double() / 50, u.T @ u
    p, q = torch.linalg.inv(h)[None], (w.T @ sensitivity @ w)[None]
    order, lost = eliminate([(p[0], q[0])], 8 // block)
    gone = []
    for unit, error in list(zip(order, lost.tolist()))[:-1]:
        left = [i for i in range(8 // block) if i not in gone]
        errors = {i: least_squares_error(h, sensitivity, w, [*gone, i], block) for i in left}
        assert min(errors, key=errors.__getitem__) == unit
        assert errors[unit] == pytest.approx(error, rel=1e-6)
        gone.append(unit)
    assert sorted(order) == list(range(8 // block))


def test_several_readers_add_up():
    h = torch.diag(torch.tensor([4.0, 1.0])).double()
    p = torch.linalg.inv(h)[None].repeat(2, 1, 1)
    q = torch.diag_embed(torch.tensor([[1.0, 1.0], [0.0, 8.0]])).double()
    order, lost = eliminate(list(zip(p, q)), 2)
    assert order == [0, 1] and lost.tolist() == pytest.approx([4.0, 13.0])


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 30))
def test_hull(steps, rest):
    lost = torch.tensor(steps).double().cumsum(0).tolist()
    segments = hull(lost, rest)
    assert sum(k for k, _, _ in segments) == len(lost)
    assert sum(e for _, _, e in segments) == pytest.approx(lost[-1])
    assert sum(x for _, x, _ in segments) == pytest.approx(len(lost) + rest)
    slopes = [e / x for _, x, e in segments]
    assert slopes == sorted(slopes)
    at, total = 0, 0.0
    for k, _, e in segments:
        at, total = at + k, total + e
        assert total == pytest.approx(lost[at - 1])


# --- who goes first


def test_copies_and_the_dead_go_first():
    teacher = clip()
    for tower in (teacher.visual, teacher):
        mlp = tower.transformer.resblocks[1].mlp
        with torch.no_grad():
            for p in (mlp.c_fc.weight, mlp.c_fc.bias):
                p *= 20  # far from linear: no neuron follows from the others
                p[5] = p[3]  # says what another says
            mlp.c_proj.weight[:, 7] = 0  # nobody listens
            mlp.c_fc.weight[9] = 0  # never changes
    found = scores(teacher, batches(256, 64))
    for t in TOWERS:
        axis = f'{t}.layers.1.ffn'
        at = {unit: i for i, unit in enumerate(found.order[axis])}
        lost, first, last = found.units()[axis], *sorted((3, 5), key=at.get)
        little = 1e-4 * found.lost[axis][-1]  # what damping makes of nothing
        assert at[7] == 0 and lost[9] < little and lost[first] < little
        assert at[last] > 30 and lost[last] > 2 * lost[first]


def test_copies_of_heads_and_channels():
    teacher = clip()
    attention = teacher.visual.transformer.resblocks[0].attn
    with torch.no_grad():
        for p in (attention.in_proj_weight, attention.in_proj_bias):
            qkv = p.view(3, 4, -1)
            qkv[:, 2] = qkv[:, 0]
    found = scores(teacher)
    axis = 'image.layers.0.heads'
    assert found.order[axis][0] in (0, 2)
    assert found.lost[axis][0] < 0.05 * found.lost[axis][1]


def test_a_channel_that_nobody_reads():
    teacher = clip()
    for name, p in teacher.visual.named_parameters():
        with torch.no_grad():
            if name.endswith(('in_proj_weight', 'c_fc.weight')):
                p[:, 4] = 0
            if name == 'proj':
                p[4] = 0
    assert scores(teacher).order['image.width'][0] == 4


# --- the share


@few
@given(models(), st.sampled_from(MEASURES), st.floats(0.15, 1), st.sampled_from(['each', 'both']))
def test_the_share_is_met(model, by, share, towers):
    found, size = scores(model, by=by), ParamCount(layout(model))
    try:
        keep = found.keep(share, towers)
    except TinyclipError as e:  # tiny towers: one channel is more than this share of them
        assert 'cannot shrink' in str(e) and share * min(size.whole.values()) < 4000
        reject()
    exact = kept(model, keep)
    # a few neurons; a head where a tower has no neurons left to settle it with
    width = max(size.sizes[f'{t}.width'] for t in TOWERS)
    settled = not any(keep[a] for a in keep.axes if a.endswith('.ffn'))
    most = 4 * (2 * width + 1) + settled * (4 * width * width)
    for t in TOWERS if towers == 'each' else ['both']:
        whole = sum(size.whole.values()) if t == 'both' else size.whole[t]
        assert abs(exact[t] - share) * whole <= most


def test_a_share_for_each_tower():
    teacher = clip()
    exact = kept(teacher, scores(teacher).keep(dict(image=0.3, text=0.7)))
    assert exact['image'] == pytest.approx(0.3, abs=0.005)
    assert exact['text'] == pytest.approx(0.7, abs=0.005)


def test_everything_stays():
    teacher = clip()
    for by in MEASURES:
        for towers in ('each', 'both'):
            assert scores(teacher, by=by).keep(1, towers).axes == {}


def test_less_is_lost_than_by_another_division():
    "Both towers together are never worse, by their own account, than each apart"
    teacher = clip()
    found = scores(teacher)

    def loss(keep):
        return sum(
            e[n - 1].item() * (CHANNELS if a.endswith('.width') else 1)
            for a, e in found.lost.items()
            if (n := len(e) - len(keep.axes.get(a, e)))
        )

    assert loss(found.keep(0.4, 'both')) <= 1.02 * loss(found.keep(0.4))


# --- every measure


@each
def test_every_measure_is_repeatable_whatever_the_batches(by):
    teacher = clip()
    a, b, c = (scores(teacher, batches(64, n), by) for n in (16, 16, 7))
    assert a.order == b.order and all(torch.equal(a.lost[x], b.lost[x]) for x in a.lost)
    for x in a.lost:  # rounding may turn the order of two that are worth the same
        total = a.lost[x][-1].item()
        torch.testing.assert_close(a.lost[x], c.lost[x], rtol=2e-3, atol=0.1 * total)
        assert c.lost[x][-1].item() == pytest.approx(total, rel=2e-3)


def test_the_teacher_stays_as_it_is():
    teacher = clip().train()
    before = copy.deepcopy(teacher.state_dict())
    scores(teacher)
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_better_than_the_rule_and_than_chance():
    teacher = clip()
    data = batches(256, 64)

    def error(keep):
        return off(
            reconstruct(inherit(teacher, keep), teacher, data, progress=False), teacher, data
        )

    found = {by: error(scored(teacher, data, 0.5, by, progress=False)) for by in MEASURES}
    assert found['reconstruction'] < min(found['random'], found['magnitude'])


def test_a_student_can_be_scored():
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5, text_depth=0.6))
    keep = scored(student, batches(), 0.5, progress=False)
    assert inherit(student, keep).keep.sizes == layout(teacher).sizes


def test_a_student_of_which_branches_are_gone():
    teacher = clip()
    student = inherit(teacher, scored(teacher, batches(), 0.03, progress=False))
    sizes = layout(student).sizes
    assert len(sizes) < len(layout(teacher).sizes)
    assert set(scores(student).order) <= set(sizes)


def test_a_frozen_teacher_in_half_precision():
    teacher = clip().to(torch.bfloat16).requires_grad_(False)
    assert kept(teacher, scored(teacher, batches(), 0.5, progress=False))['image'] == pytest.approx(
        0.5, abs=0.005
    )


# --- several processes


def half_of_the_samples(rank, world, port, folder):
    started(rank, world, port)
    teacher = clip()
    found = {by: scores(teacher, batches(64, 4)[8 * rank : 8 * rank + 8], by) for by in MEASURES}
    torch.save({by: (f.order, f.lost) for by, f in found.items()}, folder / f'{rank}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    spawn(half_of_the_samples, 2, tmp_path)
    a, b = (torch.load(tmp_path / f'{r}.pt') for r in range(2))
    for by in MEASURES:
        alone = scores(clip(), batches(64, 4), by)
        assert a[by][0] == b[by][0]
        for x, e in alone.lost.items():
            torch.testing.assert_close(a[by][1][x], e, rtol=2e-3, atol=1e-6)


# --- bad input


def refused(contains, *args, **settings):
    with pytest.raises(TinyclipError, match=contains):
        scored(*args, progress=False, **settings)


def test_bad_input():
    teacher = clip()
    x, t = batches()[0]
    for share in (0, -1, 1.5, True, 'half', float('nan')):
        refused('share=', teacher, batches(), share)
    refused(
        "named 'reconstructed'. Did you mean 'reconstruction'",
        teacher,
        batches(),
        0.5,
        'reconstructed',
    )
    refused("named 'all'", teacher, batches(), 0.5, towers='all')
    refused('one for each of image and text', teacher, batches(), dict(image=0.5))
    refused('takes one number', teacher, batches(), dict(image=0.5, text=0.5), towers='both')
    refused('are too few', teacher, [(x[:7], t[:7])], 0.5)
    refused('are too few', teacher, [], 0.5)
    refused('looks at calibration pairs', teacher, None, 0.5)
    refused(r'images are \(8, 8\)', teacher, [(x[..., :8, :8], t)], 0.5)
    refused('samples', teacher, batches(), 0.5, samples=0)
    refused('NaN or infinity', teacher, [(x * float('inf'), t)], 0.5)
    refused('cannot shrink', teacher, batches(), 1e-9)
