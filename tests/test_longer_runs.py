"A run that goes on to more steps than it was planned for: the same weights, or a sentence"

import json

import pytest
import torch
from safetensors.torch import load_file
from test_distill import different, job, tiny
from test_stages import MASKS, plan

from tinyclip.cli.main import main
from tinyclip.core import TinyclipError
from tinyclip.masking import MaskedCLIP
from tinyclip.sparsity import Sparsity
from tinyclip.stages import Stage
from tinyclip.train.checkpoint import checkpoints
from tinyclip.train.engine import learning_rate
from tinyclip.train.events import read_events
from tinyclip.zoo import load


def run(folder, steps, stop=None, seed=1, **kw):
    "Fit to `steps`, or stop before; goes on with what the folder holds"
    d = job(tiny(seed, patch_dropout=0.5), folder=folder, **kw)
    d.listeners = [lambda e: d.stop() if (e['event'], e['step']) == ('log', stop) else None]
    return d.fit(steps, resume=True)


@pytest.mark.parametrize(
    'schedule, warmup, planned, stop, steps',
    [
        ('constant', 0.25, 4, None, 8),  # finished
        ('constant', 0.5, 6, 2, 9),  # stopped in its warm-up
        ('constant', 0.0, 5, 3, 20),
        ('cosine', 0.5, 8, 3, 12),  # the cosine has not begun
        ('cosine', 0.5, 8, 4, 12),  # it stands at its top
    ],
)
def test_a_longer_run_is_the_one_planned_so(tmp_path, schedule, warmup, planned, stop, steps):
    how = dict(schedule=schedule, warmup=warmup)
    run(tmp_path, planned, stop, **how)
    with pytest.warns(UserWarning, match=f'planned for {planned} steps.*as if it had been planned'):
        longer = run(tmp_path, steps, seed=7, **how)
    climb = int(warmup * planned)
    straight = job(
        tiny(1, patch_dropout=0.5),
        schedule=schedule,
        warmup=(climb - 0.5) / steps if climb else 0.0,
    ).fit(steps)
    assert longer.finished and not different(straight.student, longer.student)
    assert [e['step'] for e in read_events(tmp_path, 'log')] == [*range(1, steps + 1)]
    assert read_events(tmp_path, 'resume')[-1]['steps'] == steps


@pytest.mark.parametrize('stop', [None, 7])
def test_a_cosine_that_has_fallen_goes_on_with_the_longer_one(tmp_path, stop):
    run(tmp_path, 10, stop, warmup=0.2)
    done = stop or 10
    was, now = (learning_rate(done, n, 1e-3, 2) for n in (10, 16))
    with pytest.warns(
        UserWarning, match=f'is {now:.2g} where the shorter one had come to {was:.2g}'
    ):
        assert run(tmp_path, 16, warmup=0.2).finished
    rates = [e['lr'] for e in read_events(tmp_path, 'log')]
    right = [learning_rate(i, 10 if i < done else 16, 1e-3, 2) for i in range(16)]
    assert rates == pytest.approx(right)
    assert len(read_events(tmp_path, 'warning')) == 1


def test_longer_and_longer_keeps_the_first_warm_up(tmp_path):
    how = dict(schedule='constant', warmup=0.5)
    run(tmp_path, 4, **how)
    for steps in (6, 10):
        with pytest.warns(UserWarning, match='same warm-up of 2'):
            run(tmp_path, steps, seed=steps, **how)
    assert [e['lr'] for e in read_events(tmp_path, 'log')] == [5e-4, *[1e-3] * 9]
    assert run(tmp_path, 10, **how).finished  # nothing is left, and nothing is said


@pytest.mark.parametrize('steps, says', [(3, 'longer, not shorter'), (5, 'longer, not shorter')])
def test_a_shorter_run_is_refused_and_nothing_moves(tmp_path, steps, says):
    run(tmp_path, 6, 4)
    before = load_file(checkpoints(tmp_path)[-1] / 'student.safetensors')
    student = tiny(3)
    own = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(TinyclipError, match=says):
        job(student, folder=tmp_path).fit(steps, resume=True)
    assert all(torch.equal(v, own[k]) for k, v in student.state_dict().items())
    after = load_file(checkpoints(tmp_path)[-1] / 'student.safetensors')
    assert all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize('form', ['projected', 'two-sided'])
def test_masks_close_over_the_length_that_was_planned(tmp_path, form):
    def fit(steps):
        masked = MaskedCLIP(tiny(1, layers=2))
        penalty = Sparsity(masked, 0.5, form=form)
        return job(masked, folder=tmp_path, penalty=penalty).fit(steps, resume=True)

    fit(4)
    with pytest.raises(TinyclipError, match='masks close over its 4 steps.*cut, and distil'):
        fit(8)


def test_other_settings_may_still_not_change(tmp_path):
    run(tmp_path, 4)
    with pytest.raises(TinyclipError, match=r'belongs to another run: lr is 0\.001 there'):
        run(tmp_path, 8, lr=1e-4)


def test_more_steps_on_the_command_line(tmp_path, capsys):
    def distill(steps, *more):
        args = 'distill --teacher shapes-teacher --data shapes --image-width .5 --batch-size 8'
        args += f' --device cpu --json --schedule constant --warmup 0 --steps {steps} --out'
        assert main([*args.split(), str(tmp_path / 'run'), *more]) == 0
        return json.loads(capsys.readouterr().out)['steps']

    assert distill(2) == 2
    short = load(tmp_path / 'run' / 'student').model
    with pytest.warns(UserWarning, match='planned for 2 steps, has done 2, and goes on to 3'):
        assert distill(3, '--resume') == 3
    assert different(short, load(tmp_path / 'run' / 'student').model)


# --- a compression in stages

ONE, TWO = Stage(0.7, 3, 3), Stage(0.4, 3, 3)
PLATEAU = dict(schedule='constant', warmup=0.0)


def students(folder):
    return [load(p).model for p in sorted(folder.glob('stage-*/student'))]


@pytest.mark.filterwarnings('ignore:This run was planned for')
@pytest.mark.parametrize(
    'first, then',
    [
        ([ONE], [Stage(0.7, 3, 5)]),  # more steps at the end
        ([ONE], [ONE, TWO]),  # one more stage
        ([ONE, TWO], [ONE, Stage(0.4, 3, 7), Stage(0.3, 2, 2)]),  # both
    ],
)
def test_a_longer_plan_is_the_one_planned_so(tmp_path, first, then):
    plan(tmp_path / 'a', stages=first, **PLATEAU).fit()
    before = [s.steps for s in first]
    facts = json.loads((tmp_path / f'a/stage-{len(first)}/student/stage.json').read_text())
    assert facts['steps'] == before[-1]
    plan(tmp_path / 'a', stages=then, **PLATEAU).fit(resume=True)
    plan(tmp_path / 'b', stages=then, **PLATEAU).fit()
    ours, straight = students(tmp_path / 'a'), students(tmp_path / 'b')
    assert len(ours) == len(straight) == len(then)
    assert not any(different(a, b) for a, b in zip(ours, straight))


@pytest.mark.filterwarnings('ignore:This run was planned for')
@pytest.mark.parametrize('phase, step', [('masks', 2), ('distil', 2)])
def test_a_running_compression_may_be_given_more_steps(tmp_path, phase, step):
    job = plan(tmp_path / 'a', stages=[ONE, TWO], **PLATEAU)
    at = (1, phase, 'log', step)
    job.listeners = [
        lambda e: job.stop() if (e['stage'], e['phase'], e['event'], e['step']) == at else None
    ]
    assert len(job.fit()) == 0
    then = [Stage(0.7, 3, 4), Stage(0.3, 2, 2)]  # the second one has not begun
    plan(tmp_path / 'a', stages=then, **PLATEAU).fit(resume=True)
    plan(tmp_path / 'b', stages=then, **PLATEAU).fit()
    assert not any(
        different(*pair) for pair in zip(students(tmp_path / 'a'), students(tmp_path / 'b'))
    )


@pytest.mark.filterwarnings('ignore:This run was planned for')
def test_the_student_stays_until_the_longer_one_is_there(tmp_path):
    plan(tmp_path, stages=[ONE], **PLATEAU).fit()
    short = students(tmp_path)[0]
    job = plan(tmp_path, stages=[Stage(0.7, 3, 6)], **PLATEAU)
    job.listeners = [lambda e: job.stop() if (e['event'], e['step']) == ('log', 5) else None]
    job.fit(resume=True)
    assert not different(short, students(tmp_path)[0])
    plan(tmp_path, stages=[Stage(0.7, 3, 6)], **PLATEAU).fit(resume=True)
    assert different(short, students(tmp_path)[0])


@pytest.mark.parametrize(
    'then, says',
    [
        ([Stage(0.7, 4, 3), TWO], 'stage 1 mask_steps is 3 there and 4 here'),
        ([Stage(0.7, 3, 9), TWO], 'stage 1 steps is 3 there and 9 here'),  # its student was taken
        ([ONE, Stage(0.4, 3, 2)], 'stage 2 steps is 3 there and 2 here'),
        ([ONE, Stage(0.3, 3, 3)], 'stage 2 share is 0.4 there and 0.3 here'),
        ([ONE], 'stage 2 share is 0.4 there and missing here'),
    ],
)
def test_what_has_begun_must_stay(tmp_path_factory, then, says):
    folder = tmp_path_factory.getbasetemp() / 'what-has-begun'
    if not folder.exists():
        plan(folder, stages=[ONE, TWO], masks=MASKS).fit()
    written = (folder / 'stages.json').read_text()
    with pytest.raises(TinyclipError, match=f'another plan: (.*, )?{says}'):
        plan(folder, stages=then, masks=MASKS).fit(resume=True)
    assert (folder / 'stages.json').read_text() == written
