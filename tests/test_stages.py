"Progressive compression: killed and stopped in every phase, exact in size, refused in sentences"

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distill import Pairs, different, tiny

from tinyclip.core import TinyclipError
from tinyclip.data import open_pairs
from tinyclip.data.shapes import Shapes
from tinyclip.evaluate.cost import parameters
from tinyclip.keep import keep_for_size
from tinyclip.sparsity import Sparsity
from tinyclip.stages import SHORT, Stage, Stages, compare, laion400m, yfcc15m
from tinyclip.zoo import load

PLAN = [Stage(0.7, 4, 4), Stage(0.4, 4, 4)]
MASKS = dict(SHORT, importance_warmup=0.5)


def plan(folder, teacher=None, stages=PLAN, pairs=None, **kw):
    return Stages(
        teacher or tiny(0, layers=2),
        pairs or Pairs(),
        stages,
        folder,
        **dict(masks=MASKS, lr=1e-3, log_every=1, save_every=2, device='cpu', progress=False) | kw,
    )


def last(folder):
    return load(Path(folder) / 'stage-2' / 'student').model


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The student of a run that nobody disturbed"
    folder = tmp_path_factory.mktemp('straight')
    plan(folder).fit()
    return last(folder)


def test_every_student_of_the_way_is_kept(tmp_path):
    rows = plan(tmp_path, evaluate=lambda m: dict(n=parameters(m)['towers'])).fit()
    assert [r['stage'] for r in rows] == [1, 2] and [r['asked'] for r in rows] == [0.7, 0.4]
    kept = [load(tmp_path / f'stage-{i}' / n).model for i in (1, 2) for n in ('cut', 'student')]
    sizes = [parameters(m)['towers'] for m in kept]
    assert (
        sizes[0] == sizes[1] > sizes[2] == sizes[3] and rows[-1]['n after distilling'] == sizes[3]
    )
    assert kept[-1].keep.sizes == kept[0].keep.sizes  # in terms of the first teacher
    assert set(kept[-1].keep['image.width']) <= set(kept[0].keep['image.width'])


@pytest.mark.parametrize(
    'stage, phase, n',
    [
        (1, 'masks', 1),
        (1, 'masks', 3),
        (1, 'distil', 2),
        (2, 'masks', 1),
        (2, 'masks', 2),
        (2, 'distil', 3),
    ],
)
def test_killed_anywhere_it_goes_on_bit_for_bit(tmp_path, straight, stage, phase, n):
    code = f"""import sys, os; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_stages import *
def die(e):
    if (e['stage'], e['phase'], e['event'], e['step'])==({stage}, {phase!r}, 'log', {n}):
        os.kill(os.getpid(), 9)
plan({str(tmp_path)!r}, listeners=[die]).fit()"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    assert len(plan(tmp_path).fit(resume=True)) == 2
    assert not different(straight, last(tmp_path))


WORKER = '''
import sys, os; sys.path.insert(0, {here!r})
from test_stages import *
rank = int(os.environ['RANK'])
rows = plan({folder!r}, pairs=Pairs(world=2, rank=rank)).fit()
assert len(rows)==2
# processes that print at once may break each other's lines
(Path({folder!r}).parent/f'kept-{{rank}}').write_text(str(rows[-1]['kept']))
'''


def test_two_processes_share_a_plan(tmp_path):
    import os

    (tmp_path / 'worker.py').write_text(
        WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path / 'run'))
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
    kept = [(tmp_path / f'kept-{r}').read_text() for r in range(2)]
    assert kept[0] == kept[1] and last(tmp_path / 'run').keep


def test_stopped_after_every_step(tmp_path, straight):
    for _ in range(20):
        job = plan(tmp_path)
        job.listeners = [lambda e: job.stop() if e['event'] == 'log' else None]
        if len(job.fit(resume=True)) == 2:
            break
    assert not different(straight, last(tmp_path))


def test_the_paper_s_form_resumes_too(tmp_path):
    masks = dict(form='two-sided', lr=0.3)
    plan(tmp_path / 'a', masks=masks).fit()
    job = plan(tmp_path / 'b', masks=masks)
    job.listeners = [
        lambda e: (
            job.stop()
            if (e['stage'], e['phase'], e['event'], e['step']) == (2, 'masks', 'log', 3)
            else None
        )
    ]
    assert len(job.fit()) == 1
    plan(tmp_path / 'b', masks=masks).fit(resume=True)
    assert not different(last(tmp_path / 'a'), last(tmp_path / 'b'))


@pytest.mark.parametrize('share', [0.75, 0.5, 0.25, 0.1])
def test_a_trained_cut_meets_its_target_and_equals_its_masked_model(tmp_path, share):
    from tinyclip.distill import Distiller
    from tinyclip.masking import MaskedCLIP

    teacher, preprocess, tokenizer = load('shapes-teacher')
    masked = MaskedCLIP(teacher)
    sparsity = Sparsity(masked, share, **{k: v for k, v in MASKS.items() if k != 'hard'})
    pairs = open_pairs(Shapes('train', n=64), preprocess, tokenizer, 16)
    Distiller(
        masked,
        teacher,
        pairs,
        lr=3e-4,
        penalty=sparsity,
        schedule='constant',
        device='cpu',
        progress=False,
    ).fit(8)
    batch, natural = next(pairs.epoch(9)), masked.cut()
    with torch.no_grad():
        ours, dense = masked(*batch), natural(*batch)
    for a, b in zip(ours[:2], dense[:2]):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    there, whole = parameters(sparsity.cut()), parameters(teacher)
    for t in ('image', 'text'):
        assert abs(there[t] / whole[t] - share) <= 0.01, (t, there[t] / whole[t])


def test_uniform_stages_end_as_plain_open_clip(tmp_path):
    from tinyclip.towers.architecture import architecture

    teacher = load('shapes-teacher').model
    _, preprocess, tokenizer = load('shapes-teacher')
    pairs = open_pairs(Shapes('train', n=32), preprocess, tokenizer, 8)
    rows = Stages(
        teacher,
        pairs,
        [Stage(0.6, 2, 1), Stage(0.3, 2, 1)],
        tmp_path,
        masks=dict(SHORT, uniform=True),
        lr=1e-4,
        device='cpu',
        progress=False,
    ).fit()
    assert (
        'tinyclip_cfg' not in architecture(last(tmp_path)) and abs(rows[-1]['kept'] - 0.3) <= 0.01
    )


@pytest.mark.parametrize('recipe', [laion400m, yfcc15m])
def test_recipes(recipe):
    real, small = recipe(), recipe(small=True)
    assert [s.share for s in real.stages] == [s.share for s in small.stages]
    assert (
        {s.mask_steps for s in real.stages} == {3000}
        and real.masks['lr'] == 0.01
        and real.settings['lr'] == 1e-4
    )
    epochs = {laion400m: (6, 16, 16), yfcc15m: (25, 25)}[recipe]
    pairs = {laion400m: 400_000_000, yfcc15m: 15_000_000}[recipe]
    for s, e in zip(real.stages, epochs):
        assert 0 <= (s.mask_steps + s.steps) * real.batch_size - e * pairs < real.batch_size


@pytest.mark.parametrize(
    'stages, says',
    [
        ([], 'at least one stage'),
        ([Stage(0.5, 1, 1), Stage(0.5, 1, 1)], 'must be smaller'),
        ([Stage(1.5, 1, 1)], 'is no share'),
        ([Stage(0.5, 1, 1), Stage(1e-4, 1, 1)], 'one head and one neuron'),
    ],
)
def test_refused_plans(tmp_path, stages, says):
    with pytest.raises(TinyclipError, match=says):
        plan(tmp_path / 'x', stages=stages)
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
    'settings, says',
    [
        (dict(masks=dict(form='tow-sided')), "Did you mean 'two-sided'"),
        (dict(lr=-1), 'trains nothing'),
        (dict(masks=dict(kinds=['heads'], uniform=True)), 'needs masks on'),
        (dict(masks=dict(importance_warmup=1.0)), 'importance_warmup=1.0'),
    ],
)
def test_refused_settings(tmp_path, settings, says):
    with pytest.raises(TinyclipError, match=says):
        plan(tmp_path / 'x', **settings)
    assert not (tmp_path / 'x').exists()


def test_another_plan_does_not_go_on(tmp_path):
    plan(tmp_path, stages=PLAN[:1]).fit()
    with pytest.raises(TinyclipError, match='another plan'):
        plan(tmp_path, stages=[Stage(0.6, 4, 4)]).fit(resume=True)
    with pytest.raises(TinyclipError, match='already holds'):
        plan(tmp_path, stages=PLAN[:1]).fit()


def test_comparison_needs_the_same_total(tmp_path):
    with pytest.raises(TinyclipError, match='different numbers of steps'):
        compare(dict(a=[Stage(0.5, 1, 1)], b=[Stage(0.5, 1, 2)]), tiny(0), Pairs(), tmp_path)


def test_comparison_looks_at_every_plan_first(tmp_path):
    with pytest.raises(TinyclipError, match='one head and one neuron'):
        compare(
            dict(a=[Stage(0.5, 1, 1)], b=[Stage(1e-4, 1, 1)]),
            tiny(0),
            Pairs(),
            tmp_path / 'x',
            device='cpu',
            progress=False,
        )
    assert not (tmp_path / 'x').exists()


def test_a_half_precision_teacher_is_compressed_in_float32(tmp_path):
    teacher = tiny(0, layers=2)
    plan(
        tmp_path / 'a', teacher=copy.deepcopy(teacher).bfloat16(), stages=PLAN[:1], precision='bf16'
    ).fit()
    assert {p.dtype for p in load(tmp_path / 'a' / 'stage-1' / 'student').model.parameters()} == {
        torch.float32
    }


def test_a_tokenizer_that_must_be_saved_is_asked_for_at_once(tmp_path):
    teacher = tiny(0, layers=2)
    teacher.tokenizer_cfg = dict(hf_tokenizer_name='bert-base-uncased')
    with pytest.raises(TinyclipError, match='pass it as tokenizer='):
        plan(tmp_path / 'x', teacher=teacher)


def test_the_rule_at_a_share():
    from tinyclip.inheritance import inherit

    teacher = load('shapes-teacher').model
    for share in (0.75, 0.5, 0.25):
        assert (
            abs(
                parameters(inherit(teacher, keep_for_size(teacher, share)))['towers']
                / parameters(teacher)['towers']
                - share
            )
            < 0.005
        )


def test_a_tower_may_stay_as_it_is(tmp_path):
    for seed in range(3):
        rows = plan(
            tmp_path / str(seed),
            stages=[Stage(dict(image=0.6, text=0.6), 2, 1), Stage(dict(image=0.3, text=0.6), 2, 1)],
            seed=seed,
        ).fit()
        assert len(rows) == 2


def test_a_run_goes_on_with_other_intervals(tmp_path):
    job = plan(tmp_path)
    job.listeners = [
        lambda e: job.stop() if (e['phase'], e['event']) == ('distil', 'log') else None
    ]
    job.fit()
    assert len(plan(tmp_path, save_every=5, log_every=2).fit(resume=True)) == 2


def test_both_phases_recompute_where_they_are_told_to(tmp_path, straight, monkeypatch):
    from tinyclip.train.engine import Engine

    seen, real = [], Engine.update

    def spy(self, *a, **k):
        seen.append(
            any(
                getattr(m, 'grad_checkpointing', False) or vars(m).get('recompute', False)
                for m in self.live.modules()
            )
        )
        return real(self, *a, **k)

    monkeypatch.setattr(Engine, 'update', spy)
    plan(tmp_path, grad_checkpointing=True).fit()
    # also after a cut, when the student was read from its folder
    assert len(seen) == 16 and all(seen)
    worst = max(
        (v.float() - last(tmp_path).state_dict()[k].float()).abs().max().item()
        for k, v in straight.state_dict().items()
    )
    assert worst < 1e-5
