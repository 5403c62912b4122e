"Masked models: equal to their cut, at home in everything that trains a model, and exact in size"

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_distill import Pairs, different, job, tiny, when
from test_inheritance import models, outputs, quick

from tinyclip.core import TinyclipError
from tinyclip.evaluate.cost import parameters
from tinyclip.inheritance import inherit
from tinyclip.keep import choose
from tinyclip.masking import BRANCHES, KINDS, MaskedCLIP
from tinyclip.sparsity import Goal, Sparsity
from tinyclip.towers.architecture import architecture, build, create
from tinyclip.train.events import read_events


def scatter(masked, scale, seed=0):
    "Masks at random: soft ones with a small scale, hard ones with a large one"
    masked.log_alpha.data.copy_(
        scale * torch.randn(masked.log_alpha.shape, generator=torch.Generator().manual_seed(seed))
    )
    return masked.eval()


def apart(a, b):
    return max(
        ((x - y).abs().max() / y.abs().max().clamp(min=1e-6)).item()
        for x, y in zip(outputs(a), outputs(b))
    )


# --- masked == cut


@quick
@given(st.data())
def test_masked_equals_cut(data):
    model = data.draw(models())
    for p in model.parameters():  # biases and norms start at 0 and 1, where mistakes do not show
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0 if p.mean() > 0.5 else 0.0, 0.5)
    kinds = data.draw(st.sets(st.sampled_from([*KINDS, *BRANCHES]), min_size=1))
    masked = scatter(
        MaskedCLIP(model, sorted(kinds)),
        data.draw(st.sampled_from([0.5, 2.0, 20.0])),
        data.draw(st.integers(0, 99)),
    )
    cut = masked.cut()
    assert apart(masked, cut) <= 1e-5
    there = parameters(cut)
    assert masked.size.count({a: int((m > 0).sum()) for a, m in masked.values().items()}) == {
        t: there[t] for t in ('image', 'text')
    }
    assert {type(m).__module__.split('.')[0] for m in cut.modules()} <= {
        'torch',
        'open_clip',
        'tinyclip',
    }
    assert not [
        m for m in cut.modules() if type(m).__module__ in ('tinyclip.masking', 'tinyclip.masks')
    ]


@pytest.mark.parametrize(
    'text, vision',
    [
        (dict(pool_type='first', eos_id=31), dict(pool_type='avg')),
        (dict(pool_type='last', eos_id=31), dict(final_ln_after_pool=True, pool_type='avg')),
        (dict(pool_type='eos', eos_id=31), dict(no_ln_pre=True)),
        (dict(proj_bias=True), dict(norm_kwargs=dict(eps=1e-2))),
    ],
    ids=lambda d: ' '.join(d),
)
def test_masked_equals_cut_for_other_pooling_and_norms(text, vision):
    torch.manual_seed(0)
    model = build(
        dict(
            embed_dim=8,
            vision_cfg=dict(image_size=16, patch_size=8, head_width=4, width=16, layers=2) | vision,
            custom_text='pool_type' in text,
            text_cfg=dict(context_length=6, vocab_size=32, heads=4, width=16, layers=2) | text,
        )
    ).eval()
    masked = scatter(MaskedCLIP(model, [*KINDS, *BRANCHES]), 2.0)
    assert apart(masked, masked.cut()) <= 1e-5


def test_a_student_that_lost_a_branch_can_be_masked_again():
    torch.manual_seed(0)
    vision = dict(image_size=16, patch_size=8, head_width=4, width=16, layers=2)
    text = dict(context_length=6, vocab_size=32, heads=4, width=16, layers=2)
    teacher = build(dict(embed_dim=8, vision_cfg=vision, text_cfg=text)).eval()
    for axis in ('image.layers.1.heads', 'text.layers.0.ffn'):
        masked = scatter(MaskedCLIP(inherit(teacher, choose(teacher, {axis: []}))), 1.5)
        assert apart(masked, masked.cut()) < 1e-5


# the norm's eps means the same over the open channels as over all
def test_a_small_eps_would_not_tell():
    torch.manual_seed(0)
    model = build(
        dict(
            embed_dim=8,
            vision_cfg=dict(
                image_size=16,
                patch_size=8,
                head_width=4,
                width=16,
                layers=1,
                norm_kwargs=dict(eps=0.5),
            ),
            text_cfg=dict(context_length=6, vocab_size=32, heads=4, width=16, layers=1),
        )
    ).eval()
    masked = scatter(MaskedCLIP(model), 2.0)
    assert apart(masked, masked.cut()) <= 1e-5


def test_cut_reloads_in_a_fresh_process(tmp_path):
    from tinyclip.zoo import load, save

    model, _, _ = load('shapes-teacher')
    masked = scatter(MaskedCLIP(model, [*KINDS, 'attention']), 2.0)
    cut = masked.cut(Goal(masked, 0.4).zeros())
    image = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    text = torch.randint(1, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save(
            (image, text, cut.encode_image(image), cut.encode_text(text)), tmp_path / 'io.pt'
        )
    save(cut, tmp_path / 'student')
    code = f"""import torch; from tinyclip.zoo.loading import load
m,_,_ = load({str(tmp_path / 'student')!r})
image,text,i,t = torch.load({str(tmp_path / 'io.pt')!r})
with torch.no_grad():
    assert torch.equal(m.encode_image(image), i) and torch.equal(m.encode_text(text), t)
print(len(m.keep['image.width']))"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode == 0 and int(out.stdout) == len(cut.keep['image.width']), out.stderr


# --- at home in everything that trains a model


def gradients(model, forward=None):
    torch.manual_seed(5)
    batch = next(Pairs().epoch(0))
    out = (model if forward is None else forward)(batch.image, batch.text)
    sum(o.float().square().sum() for o in out[:2]).backward()
    found = {
        n.removeprefix('_orig_mod.'): p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    model.zero_grad()
    return found


def masked_tiny(**kw):
    return scatter(MaskedCLIP(tiny(0, layers=2), **kw), 1.5).train()


def test_gradient_checkpointing_gives_the_same_gradients():
    model = masked_tiny()
    plain = gradients(model)
    model.set_grad_checkpointing()
    calls = []
    model.clip.visual.transformer.resblocks[0].mlp.c_fc.register_forward_pre_hook(
        lambda *a: calls.append(1)
    )
    again = gradients(model)
    assert len(calls) == 2  # forward, and once more in backward
    assert plain.keys() == again.keys()
    for n in plain:
        torch.testing.assert_close(again[n], plain[n], msg=n)


def test_compiled_gives_the_same_gradients():
    model = masked_tiny()
    plain = gradients(model)
    compiled = gradients(model, torch.compile(model, backend='aot_eager', fullgraph=True))
    for n in plain:
        torch.testing.assert_close(compiled[n], plain[n], msg=n, rtol=1e-4, atol=1e-5)


def test_autocast_runs_the_products_in_bf16():
    model = masked_tiny().eval()
    cut, batch, seen = model.cut(), next(Pairs().epoch(0)), []
    model.clip.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(
        lambda m, i, o: seen.append(o.dtype)
    )
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        ours, dense = model(*batch), cut(*batch)
    assert seen == [torch.bfloat16]
    for a, b in zip(ours[:2], dense[:2]):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.02)


def test_text_stays_causal():
    masked = scatter(MaskedCLIP(tiny(0)), 1.5)
    text = next(Pairs().epoch(0)).text
    other = text.clone()
    other[:, 6:] = 7  # behind the end of the text
    with torch.no_grad():
        assert torch.equal(masked.encode_text(text), masked.encode_text(other))


def test_the_clip_is_copied():
    clip = tiny(0)
    before = copy.deepcopy(clip)
    masked_job(clip).fit(3)
    assert not different(clip, before) and type(clip.visual.ln_pre).__module__.startswith(
        'open_clip'
    )


# --- trained, stopped, resumed


def masked_job(clip=None, share=0.5, lr=0.3, weights_lr=1e-3, **kw):
    masked = MaskedCLIP(clip or tiny(0, layers=2), kw.pop('kinds', KINDS))
    return job(
        masked,
        penalty=Sparsity(
            masked, share, lr=lr, **{k: kw.pop(k) for k in ('towers', 'uniform', 'form') if k in kw}
        ),
        schedule='constant',
        **dict(lr=weights_lr) | kw,
    )


def test_mask_phase_resumes_bit_for_bit(tmp_path):
    straight = masked_job().fit(8).student
    first = masked_job(folder=tmp_path, save_every=3)
    first.listeners = [when('log', 5, first.stop)]
    assert first.fit(8).steps == 5
    second = masked_job(tiny(9, layers=2), folder=tmp_path)
    resumed = second.fit(8, resume=True)
    assert resumed.finished and not different(straight, resumed.student)
    assert (
        torch.equal(straight.log_alpha, resumed.student.log_alpha) and straight.log_alpha.std() > 0
    )


def test_killed_in_the_mask_phase(tmp_path):
    code = (
        f"import sys, os; sys.path.insert(0, {str(Path(__file__).parent)!r}); from "
        "test_masking import *\n"
        f"masked_job(folder={str(tmp_path)!r}, save_every=3, listeners=[when('log', 5, "
        "lambda: os.kill(os.getpid(), 9))]).fit(8)"
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    assert not different(
        masked_job().fit(8).student,
        masked_job(tiny(9, layers=2), folder=tmp_path).fit(8, resume=True).student,
    )


def test_a_target_that_was_moved_is_moved_again(tmp_path):
    def moved():
        j = masked_job(folder=tmp_path, save_every=2)
        j.listeners = [when('log', 2, lambda: j.penalty.set_target(0.8))]
        return j

    straight = masked_job()
    straight.listeners = [when('log', 2, lambda: straight.penalty.set_target(0.8))]
    a = straight.fit(6).student
    half = moved()
    half.listeners.append(when('log', 4, half.stop))
    half.fit(6)
    back = masked_job(folder=tmp_path)
    assert (
        not different(a, back.fit(6, resume=True).student)
        and back.penalty.goal.asked['image'] == 0.8
    )


@pytest.mark.parametrize('form', ['two-sided', 'projected'])
def test_bad_batches_leave_masks_and_multipliers_alone(form):
    j = masked_job(
        pairs=Pairs(spoil=lambda e, i, b: b._replace(image=b.image * float('nan'))), form=form
    )
    before = copy.deepcopy(j.penalty.state_dict()['constraint']) or {}
    assert j.fit(2).skipped == 2
    assert set(j.student.log_alpha.tolist()) == {3.0} and all(
        torch.equal(v, j.penalty.state_dict()['constraint'][k]) for k, v in before.items()
    )


def test_stopped_at_any_moment_it_can_be_cut():
    for n in (1, 4):
        j = masked_job()
        j.listeners = [when('log', n, j.stop)]
        j.fit(6)
        # two heads a layer: steps of 6 %
        assert (
            abs(parameters(j.penalty.cut())['image'] / parameters(tiny(0, layers=2))['image'] - 0.5)
            < 0.06
        )


def test_events_tell_shares_and_masks(tmp_path):
    masked_job(folder=tmp_path).fit(3)
    log = read_events(tmp_path, 'log')
    pictures = read_events(tmp_path, 'masks')
    assert {'share/image', 'share/text', 'target/image', 'target/text', 'loss/penalty'} <= log[
        -1
    ].keys()
    assert len(pictures) == 3 and len(pictures[-1]['open']['image.layers.1.heads']) == 2


WORKER = '''
import sys; sys.path.insert(0, {here!r})
from test_masking import *
import atexit, torch.distributed as dist
def left():  # asked last of all; a file each, since two processes print into each other's lines
    Path({folder!r} + os.environ['RANK']).write_text(str(dist.is_initialized()))
atexit.register(left)
pairs = Pairs(world=2, rank=int(os.environ['RANK']))
masked_job(pairs=pairs, folder={folder!r}, lr=1e-3, weights_lr=1e-6).fit(4)
'''


def test_two_processes_equal_one(tmp_path):
    """The same masks are drawn in both, and pulled equally. (The weights hardly move: where
    masks close them their gradients are near zero, which Adam would turn into steps of either
    sign.)"""
    (tmp_path / 'worker.py').write_text(
        WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path / 'two'))
    )
    out = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(tmp_path / 'worker.py'),
        ],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'),
        timeout=900,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    joined = [(tmp_path / f'two{rank}').read_text() for rank in range(2)]
    assert joined == ['False', 'False']  # else an exit may abort, now and then
    masked_job(folder=tmp_path / 'one', lr=1e-3, weights_lr=1e-6).fit(4)
    one, two = [read_events(tmp_path / n, 'log') for n in ('one', 'two')]
    for k, most in (('loss/affinity', 1e-3), ('loss/penalty', 1e-2), ('share/image', 1e-3)):
        assert max(abs(a[k] - b[k]) / abs(a[k]) for a, b in zip(one, two, strict=True)) < most, k
    other = masked_job(folder=tmp_path / 'other', lr=1e-3, weights_lr=1e-6, seed=1)
    other.fit(4)  # other masks would show
    assert (
        abs(read_events(tmp_path / 'other', 'log')[0]['loss/affinity'] - one[0]['loss/affinity'])
        / one[0]['loss/affinity']
        > 1e-2
    )


def resident() -> int:  # bytes
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


@pytest.mark.filterwarnings('ignore:After 200 steps the student still guesses')
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads /proc')
def test_memory_stays_flat_over_500_steps():
    marks = {}
    masked_job(
        listeners=[
            lambda e: marks.update({e['step']: resident()}) if e['event'] == 'log' else None
        ],
        log_every=50,
    ).fit(500)
    assert marks[500] - marks[100] < 20 * 2**20, {
        k: f'{v / 2**20:.0f} MiB' for k, v in marks.items()
    }


# --- exact in size


@pytest.fixture(scope='module')
def teacher():
    from tinyclip.zoo import load

    return load('shapes-teacher').model


@pytest.mark.parametrize('towers', ['each', 'both'])
@pytest.mark.parametrize('share', [0.75, 0.5, 0.25, 0.1])
def test_the_cut_meets_its_target(teacher, share, towers):
    for scale in (0.0, 0.1, 3.0):  # masks that never moved, that hardly differ, that are settled
        masked = scatter(MaskedCLIP(teacher), scale)
        there = parameters(masked.cut(Goal(masked, share, towers).zeros()))
        whole = parameters(teacher)
        for t in ('image', 'text') if towers == 'each' else ('towers',):
            assert abs(there[t] / whole[t] - share) <= 0.01, (t, there[t] / whole[t])


@pytest.mark.parametrize('share', [0.75, 0.5, 0.25])
def test_uniform_students_are_plain_open_clip(teacher, share):
    masked = scatter(MaskedCLIP(teacher), 1.0)
    cut = masked.cut(Goal(masked, share, uniform=True).zeros())
    cfg = architecture(cut)
    assert 'tinyclip_cfg' not in cfg
    plain = create(cfg).eval()  # open_clip alone
    plain.load_state_dict(cut.state_dict())
    image = torch.randn(2, 3, 48, 48)
    text = torch.randint(1, 99, (2, 16))
    with torch.no_grad():
        assert torch.allclose(plain(image, text)[0], cut(image, text)[0], atol=1e-6)
    assert abs(parameters(cut)['towers'] / parameters(teacher)['towers'] - share) <= 0.01


# --- what is refused


@pytest.mark.parametrize(
    'share, says',
    [
        (0, 'is no share'),
        (-0.5, 'is no share'),
        (1.5, 'is no share'),
        (0.001, 'one head and one neuron per layer'),
        ('half', 'is no share'),
        (float('nan'), 'is no share'),
        (dict(image=0.5), 'each of image and text'),
        (dict(image=0.5, txt=0.5), 'each of image and text'),
    ],
)
def test_refused_shares(teacher, share, says):
    with pytest.raises(TinyclipError, match=says):
        Sparsity(MaskedCLIP(teacher), share)


def test_a_cut_model_cannot_grow(teacher):
    masked = scatter(MaskedCLIP(teacher), 1.0)
    student = masked.cut(Goal(masked, 0.5).zeros())
    with pytest.raises(TinyclipError, match='cut already'):
        Sparsity(MaskedCLIP(student, whole=masked.size.whole), 0.75)
    Sparsity(MaskedCLIP(student, whole=masked.size.whole), 0.25)


@pytest.mark.parametrize(
    'cfg, says',
    [
        (
            dict(
                vision_cfg=dict(
                    image_size=16,
                    patch_size=8,
                    head_width=4,
                    width=8,
                    layers=1,
                    attentional_pool='parallel',
                    attn_pooler_heads=2,
                )
            ),
            'pools by attention twice',
        ),
    ],
)
def test_refused_towers(cfg, says):
    model = build(
        dict(
            embed_dim=8, text_cfg=dict(context_length=6, vocab_size=32, heads=2, width=8, layers=1)
        )
        | cfg
    )
    with pytest.raises(TinyclipError, match=says):
        MaskedCLIP(model)


def test_what_is_saved_inherited_and_masked_is_the_cut(tmp_path, teacher):
    from tinyclip.inheritance import inherit
    from tinyclip.keep import manual
    from tinyclip.zoo import save

    masked = MaskedCLIP(teacher)
    for wrong in (
        lambda: save(masked, tmp_path / 'm'),
        lambda: inherit(masked, manual(teacher)),
        lambda: MaskedCLIP(masked),
    ):
        with pytest.raises(TinyclipError, match='masked.cut'):
            wrong()
    assert not (tmp_path / 'm').exists()


def test_a_frozen_teacher_makes_a_student_that_is_trained():
    clip = tiny(0, layers=2).requires_grad_(False)
    j = masked_job(clip)
    before = copy.deepcopy(j.student)
    j.fit(2)
    assert 'clip.visual.transformer.resblocks.1.mlp.c_fc.weight' in different(j.student, before)
    assert not any(p.requires_grad for p in clip.parameters())


def test_a_plain_model_has_no_goal(teacher):
    with pytest.raises(TinyclipError, match='wrap it'):
        Goal(teacher, 0.5)


def test_a_penalty_of_another_model_is_refused():
    a, b = (MaskedCLIP(tiny(0, layers=2)) for _ in range(2))
    with pytest.raises(TinyclipError, match='masks of another model'):
        job(a, penalty=Sparsity(b, 0.5))


# --- found by reviewers


def test_a_checkpointing_teacher_makes_a_checkpointing_masked_model():
    clip = tiny(0, layers=2)
    clip.set_grad_checkpointing(True)
    masked = scatter(MaskedCLIP(clip), 1.5).train()
    plain = masked_tiny()
    a, b = gradients(masked), gradients(plain)
    for n in b:
        torch.testing.assert_close(a[n], b[n], msg=n)


def test_numpy_shares_can_be_resumed(tmp_path):
    import numpy as np

    masked_job(share=np.float64(0.5), folder=tmp_path).fit(2)
    assert masked_job(share=np.float64(0.5), folder=tmp_path).fit(2, resume=True).finished


def test_deep_uniform_towers_are_projected_whole():
    model = build(
        dict(
            embed_dim=4,
            vision_cfg=dict(image_size=16, patch_size=8, head_width=4, width=8, layers=30),
            text_cfg=dict(context_length=6, vocab_size=32, heads=2, width=8, layers=24),
        )
    )
    masked = MaskedCLIP(model)
    sparsity = Sparsity(masked, 0.6, uniform=True, form='projected', warmup=0.0)
    sparsity(1.0)
    sparsity.project()
    off = (sparsity.goal.measure().detach() - torch.tensor(sparsity.targets())).abs()
    assert len(off) > 99 and off.max() < 0.01


def test_towers_together_may_become_unequal_and_shrink_again(teacher):
    masked = scatter(MaskedCLIP(teacher), 1.0)
    with torch.no_grad():
        for g, a in masked.by_group(masked.log_alpha).items():
            a += 3.0 if g.startswith('text') else -1.0
    half = masked.cut(Goal(masked, 0.5, 'both').zeros())
    again = scatter(MaskedCLIP(half, whole=masked.size.whole), 1.0)
    there = parameters(again.cut(Goal(again, 0.4, 'both').zeros()))
    assert abs(there['towers'] / parameters(teacher)['towers'] - 0.4) <= 0.01
