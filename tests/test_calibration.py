"Reconstruction on the ordinary ways: one call, stages, the command line; stopped anywhere"

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_distill import Pairs, different, tiny
from test_inheritance import models, quick, random_keep

from tinyclip.cli.main import main
from tinyclip.comparison import Comparison, by_masks, by_rule
from tinyclip.core import TinyclipError
from tinyclip.data import open_pairs
from tinyclip.data.shapes import Shapes
from tinyclip.distill import (
    EPOCHS,
    CalibratedDistiller,
    Distiller,
    LaterEpochs,
    calibration_pairs,
)
from tinyclip.evaluate.cost import parameters
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.masking import MaskedCLIP
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import scored
from tinyclip.stages import SHORT, Stage, Stages
from tinyclip.towers import ParamCount, layout
from tinyclip.train.events import read_events
from tinyclip.zoo import load

QUIET = dict(device='cpu', progress=False)
MASKS = dict(SHORT, importance_warmup=0.5)


@pytest.fixture(scope='module')
def teacher():
    return tiny(0, layers=2)


def student_of(teacher):
    return inherit(teacher, manual(teacher, 0.5, text_width=0.5))


def calibrated(teacher, folder=None, calibrate=16, **kw):
    kw = dict(lr=1e-3, log_every=1, folder=folder, **QUIET) | kw
    return CalibratedDistiller(student_of(teacher), teacher, Pairs(), calibrate=calibrate, **kw)


PLAN = [Stage(0.7, 3, 2), Stage(0.4, 3, 2)]


def stages(teacher, folder, plan=PLAN, pairs=None, **kw):
    kw = dict(masks=MASKS, calibrate=16, lr=1e-3, log_every=1, save_every=2, **QUIET) | kw
    return Stages(teacher, pairs or Pairs(), plan, folder, **kw)


# --- in one call


def test_inherit_and_reconstruct_in_one_call(teacher):
    pairs, keep = list(Pairs().epoch(0)), manual(teacher, 0.5, text_width=0.5)
    one = inherit(teacher, keep, calibrate=pairs, samples=20, progress=False)
    two = reconstruct(inherit(teacher, keep), teacher, pairs, 20, progress=False)
    assert not different(one, two) and one.keep == keep
    assert different(one, inherit(teacher, keep)) and one.reconstruction.samples == 20


def test_a_student_of_a_student(teacher):
    "Its keep says what stays of the first teacher, and it is reconstructed against the second"
    middle, pairs = student_of(teacher), list(Pairs().epoch(0))
    keep = manual(middle, image_depth=0.5)
    new = inherit(middle, keep, calibrate=pairs, progress=False)
    assert new.keep == middle.keep.compose(keep)
    strange = copy.deepcopy(middle)
    del strange.keep  # a model like any other
    assert not different(new, inherit(strange, keep, calibrate=pairs, progress=False))


@settings(quick, max_examples=20)
@given(st.data())
def test_what_a_second_keep_was(data):
    model = data.draw(models())
    one = inherit(model, random_keep(data.draw, model))
    second = random_keep(data.draw, one)
    both = one.keep.compose(second)
    assert one.keep.compose(both.after(one.keep)) == both
    assert not different(inherit(one, both.after(one.keep)), inherit(one, second))


# --- before a training


def test_the_start_is_the_reconstructed_student(teacher):
    found = calibrated(teacher).fit(0).student
    by_hand = reconstruct(
        student_of(teacher), teacher, calibration_pairs(Pairs()), 16, progress=False
    )
    assert not different(found, by_hand)


@pytest.mark.parametrize('n', [0, 1, 3])
def test_stopped_anywhere_it_is_not_calibrated_again(teacher, tmp_path, monkeypatch, n):
    straight = calibrated(teacher).fit(4)
    job = calibrated(teacher, tmp_path)
    if not n:
        job.stop()
    job.listeners = [lambda e: job.stop() if (e['event'], e['step']) == ('log', n) else None]
    assert job.fit(4).steps == n and job.reconstruction['samples'] == 16
    monkeypatch.setattr('tinyclip.distill.reconstruct', None)  # not to be called
    again = calibrated(teacher, tmp_path)
    assert not different(again.fit(4, resume=True).student, straight.student)
    assert again.reconstruction == job.reconstruction
    (told,) = read_events(tmp_path, 'reconstruction')
    assert told['samples'] == 16 and told['after'] <= told['before']


def test_untrained_first_and_trained_later(teacher, tmp_path):
    assert calibrated(teacher, tmp_path, evaluate=lambda m: dict(n=1)).fit(0).evaluation['n'] == 1
    later = calibrated(teacher, tmp_path).fit(3, resume=True).student
    assert not different(later, calibrated(teacher).fit(3).student)


def test_a_teacher_in_half_precision(teacher):
    low = copy.deepcopy(teacher).bfloat16()
    student = inherit(low, manual(low, 0.5)).float()
    job = CalibratedDistiller(student, low, Pairs(), calibrate=16, precision='fp32', **QUIET)
    assert {p.dtype for p in job.fit(0).student.parameters()} == {torch.float32}
    assert next(low.parameters()).dtype == torch.bfloat16


def test_a_folder_that_was_begun_otherwise(teacher, tmp_path):
    calibrated(teacher, tmp_path).fit(0)
    with pytest.raises(TinyclipError, match='already holds a reconstructed student'):
        calibrated(teacher, tmp_path).fit(2)
    with pytest.raises(TinyclipError, match='calibration on 16 pairs, not 24'):
        calibrated(teacher, tmp_path, 24).fit(2, resume=True)


@pytest.mark.parametrize('n, says', [(-5, 'calibrate=-5'), (7, 'too few'), (1.5, 'calibrate=1.5')])
def test_numbers_of_pairs_that_make_no_calibration(teacher, tmp_path, n, says):
    with pytest.raises(TinyclipError, match=says):
        calibrated(teacher, calibrate=n)
    with pytest.raises(TinyclipError, match=says):
        stages(teacher, tmp_path / 'x', calibrate=n)
    assert not (tmp_path / 'x').exists()


# --- in stages


@pytest.fixture(scope='module')
def straight(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp('straight')
    stages(teacher, folder).fit()
    return folder


def last(folder):
    return load(Path(folder) / 'stage-2' / 'student').model


def test_every_cut_is_reconstructed_from_the_first_teacher(teacher, straight):
    masked = MaskedCLIP(teacher)
    for number in (1, 2):
        path = straight / f'stage-{number}' / 'cut'
        cut, facts = load(path).model, json.loads((path / 'stage.json').read_text())
        pairs = calibration_pairs(stages(teacher, straight).phase(number, 'masks', masked).pairs)
        by_hand = inherit(teacher, cut.keep, calibrate=pairs, samples=16, progress=False)
        assert not different(cut, by_hand)
        assert facts['reconstruction'] == by_hand.reconstruction.summary()
    assert last(straight).keep == cut.keep and cut.keep.sizes['image.width'] == 32


@pytest.mark.parametrize('where', [(1, 'masks', 2), (1, 'distil', 1), (2, 'masks', 3)], ids=str)
def test_a_compression_goes_on_bit_for_bit(teacher, straight, tmp_path, where):
    "Stopped in a phase, and after the last mask step, before the cut is written"
    job = stages(teacher, tmp_path)
    at = (*where[:2], 'log', where[2])
    job.listeners = [
        lambda e: job.stop() if (e['stage'], e['phase'], e['event'], e['step']) == at else None
    ]
    assert len(job.fit()) < 2
    assert len(stages(teacher, tmp_path).fit(resume=True)) == 2
    assert not different(last(straight), last(tmp_path))


def test_killed_while_calibrating(teacher, straight, tmp_path):
    code = f"""import sys, os; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_calibration import *
import tinyclip.stages
tinyclip.stages.recut = lambda *_: os.kill(os.getpid(), 9)
stages(tiny(0, layers=2), {str(tmp_path)!r}).fit()"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    assert not (tmp_path / 'stage-1' / 'cut').exists()
    assert len(stages(teacher, tmp_path).fit(resume=True)) == 2
    assert not different(last(straight), last(tmp_path))


def test_a_stage_without_distillation(teacher, tmp_path):
    plan = [Stage(0.5, 3, 0)]
    rows = stages(teacher, tmp_path, plan, evaluate=lambda m: dict(n=3)).fit()
    cut, student = (load(tmp_path / 'stage-1' / n).model for n in ('cut', 'student'))
    assert not different(cut, student) and rows[0]['n after distilling'] == 3
    assert rows[0]['calibrated on'] == 16 and rows[0]['error after'] <= rows[0]['error before']
    assert not (tmp_path / 'stage-1' / 'distil').exists()
    stages(teacher, tmp_path, [Stage(0.5, 3, 2)]).fit(resume=True)  # and trained after all
    assert different(cut, load(tmp_path / 'stage-1' / 'student').model)


def test_a_compression_that_was_begun_without(teacher, tmp_path):
    stages(teacher, tmp_path, [Stage(0.5, 2, 1)], calibrate=0).fit()
    with pytest.raises(TinyclipError, match='stage 1 calibrate is 0 there and 16 here'):
        stages(teacher, tmp_path, [Stage(0.5, 2, 1)]).fit(resume=True)


def test_a_student_is_compressed_further(teacher, tmp_path):
    "Its students know their place in the first teacher of all"
    small = student_of(teacher)
    stages(small, tmp_path, [Stage(0.6, 2, 0)]).fit()
    cut = load(tmp_path / 'stage-1' / 'cut').model
    assert cut.keep.sizes == small.keep.sizes
    assert set(cut.keep['image.width']) <= set(small.keep['image.width'])


WORKER = '''
import sys, os; sys.path.insert(0, {here!r})
from test_calibration import *
rank, teacher = int(os.environ['RANK']), tiny(0, layers=2)
pairs, folder = Pairs(batch_size=16, world=2, rank=rank), Path({folder!r})
stages(teacher, folder / 'stages', [Stage(0.5, 2, 0)], pairs=pairs, calibrate=32).fit()
stages(teacher, folder / 'scored', [Stage(0.5)], pairs=pairs, calibrate=32).fit()
keep = scored(teacher, calibration_pairs(pairs), 0.5, samples=32, progress=False)
torch.save(dict(keep.axes), folder / f'keep-{{rank}}.pt')
for resume in (False, True):
    job = CalibratedDistiller(
        student_of(teacher), teacher, pairs, calibrate=32, folder=folder / 'run', lr=1e-3, **QUIET
    )
    state = job.fit(0, resume).student.state_dict()
    torch.save((state, job.reconstruction), folder / f'{{rank}}-{{resume}}.pt')
'''


def test_two_processes_calibrate_together(teacher, tmp_path):
    (tmp_path / 'worker.py').write_text(
        WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    )
    launch = '-m torch.distributed.run --standalone --nproc_per_node=2'
    out = subprocess.run(
        [sys.executable, *launch.split(), str(tmp_path / 'worker.py')],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'),
        timeout=900,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    done = [torch.load(tmp_path / f'{r}-{again}.pt') for r in range(2) for again in (False, True)]
    for state, facts in done:
        assert all(torch.equal(v, done[0][0][k]) for k, v in state.items())
        assert facts == done[0][1] and facts['samples'] == 32
    cut = json.loads((tmp_path / 'stages' / 'stage-1' / 'cut' / 'stage.json').read_text())
    assert cut['reconstruction']['samples'] == 32
    # as one process would, but for the random directions, which fall on other pairs
    student = load(tmp_path / 'scored/stage-1/student').model
    for rank in range(2):
        assert torch.load(tmp_path / f'keep-{rank}.pt') == dict(student.keep.axes)
    assert student.keep.sizes == layout(teacher).sizes


# --- chosen by scores

SCORED = [Stage(0.6, steps=2), Stage(0.4, steps=2)]


class Killed(BaseException):
    "What nothing catches"


@pytest.fixture(scope='module')
def by_scores(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp('scored')
    stages(teacher, folder, SCORED).fit()
    return folder


def test_scores_choose_from_the_student_before(teacher, by_scores):
    before, whole = teacher, ParamCount(layout(teacher)).whole
    for number, stage in enumerate(SCORED, 1):
        path = by_scores / f'stage-{number}'
        cut, facts = load(path / 'cut').model, json.loads((path / 'cut/stage.json').read_text())
        pairs = calibration_pairs(LaterEpochs(Pairs(), EPOCHS * 2 * (number - 1)))
        share = {t: stage.share * n / parameters(before)[t] for t, n in whole.items()}
        keep = scored(before, pairs, share, samples=16, progress=False)
        by_hand = inherit(before, keep, calibrate=pairs, samples=16, progress=False)
        assert not different(cut, by_hand) and cut.keep == by_hand.keep
        assert facts['reconstruction'] == by_hand.reconstruction.summary()
        assert 'masks_reached' not in facts and not (path / 'masks').exists()
        for t, n in whole.items():
            assert parameters(cut)[t] == pytest.approx(stage.share * n, rel=0.02)
            assert facts['share'][t] == parameters(cut)[t] / n
        before = load(path / 'student').model
        assert before.keep == cut.keep and different(before, cut)


@pytest.mark.parametrize('number', [1, 2])
@pytest.mark.parametrize('name', ['_cut', 'distil'])
def test_ended_before_and_after_a_cut_it_goes_on(
    teacher, by_scores, tmp_path, monkeypatch, name, number
):
    real = getattr(Stages, name)

    def end(self, i, *a, **kw):
        if i == number:
            raise Killed
        return real(self, i, *a, **kw)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(Stages, name, end)
        stages(teacher, tmp_path, SCORED).fit()
    assert (tmp_path / f'stage-{number}' / 'cut').exists() == (name == 'distil')
    assert len(stages(teacher, tmp_path, SCORED).fit(resume=True)) == 2
    assert not different(last(by_scores), last(tmp_path))


def test_stopped_before_it_scores(teacher, tmp_path):
    job = stages(teacher, tmp_path, SCORED)
    job.stop()
    assert job.fit() == [] and not (tmp_path / 'stage-1').exists()


def test_scores_first_and_masks_later(teacher, tmp_path):
    plan, exact = [Stage(0.6), Stage(0.4, 3, 1)], dict(precision='fp32')
    rows = stages(teacher, tmp_path, plan, calibrate=None, **exact).fit()
    assert rows[0]['calibrated on'] == 24 and 'masks_reached' not in rows[0]  # all of an epoch
    assert 'calibrated on' not in rows[1] and 'masks_reached' in rows[1]
    assert rows[1]['kept'] == pytest.approx(0.4, abs=0.01)


def test_both_towers_together(teacher, tmp_path):
    plan = [Stage(0.6), Stage(0.3)]
    rows = stages(teacher, tmp_path, plan, masks=dict(towers='both')).fit()
    assert [r['kept'] for r in rows] == pytest.approx([0.6, 0.3], abs=0.005)


@pytest.mark.parametrize(
    'settings, says',
    [
        (dict(calibrate=0), 'look at calibration pairs'),
        (dict(masks=dict(SHORT, uniform=True)), 'belongs to masks that learn'),
        (dict(plan=[Stage(1e-6)]), 'cannot shrink'),
        (dict(plan=[Stage(dict(image=0.5))]), 'one for each of image and text'),
    ],
)
def test_what_scores_cannot_choose(teacher, tmp_path, settings, says):
    with pytest.raises(TinyclipError, match=says):
        stages(teacher, tmp_path / 'x', **dict(dict(plan=[Stage(0.5)]), **settings))
    assert not (tmp_path / 'x').exists()


# --- the rate after it


def rate(folder):
    "The learning rate that a run began with"
    return read_events(folder, 'config')[0]['lr']


@pytest.mark.parametrize('lr, after, otherwise', [(None, 1e-4, 5e-4), (3e-3, 3e-3, 3e-3)])
def test_a_reconstructed_student_trains_gently(teacher, tmp_path, lr, after, otherwise):
    stages(teacher, tmp_path / 'a', [Stage(0.6, steps=1), Stage(0.4, 2, 1)], lr=lr).fit()
    assert rate(tmp_path / 'a/stage-1/distil') == rate(tmp_path / 'a/stage-2/distil') == after
    assert rate(tmp_path / 'a/stage-2/masks') == otherwise
    stages(teacher, tmp_path / 'b', [Stage(0.6, 2, 1)], lr=lr, calibrate=None).fit()
    assert rate(tmp_path / 'b/stage-1/distil') == otherwise
    calibrated(teacher, tmp_path / 'c', lr=lr).fit(1)
    assert rate(tmp_path / 'c') == after
    student = inherit(teacher, manual(teacher, 0.5), calibrate=Pairs(), progress=False)
    for n, model in dict(d=student, e=student_of(teacher)).items():
        Distiller(model, teacher, Pairs(), folder=tmp_path / n, lr=lr, **QUIET).fit(1)
    assert rate(tmp_path / 'd') == after and rate(tmp_path / 'e') == otherwise


# --- compared


def test_methods_with_and_without(teacher, tmp_path):
    methods = {
        'rule': by_rule(0.5, 4),
        'rule calibrated': by_rule(0.5, 4, calibrate=16),
        'masks calibrated': by_masks(0.5, 4, 4, masks=MASKS, calibrate=16),
    }

    def make():
        return Comparison(methods, teacher, Pairs, tmp_path, lr=1e-3, **QUIET)

    job = make()
    job.fit()
    assert (tmp_path / 'rule-calibrated' / 'start').exists()
    again = make()
    again.fit(resume=True)
    for name in job.names:
        assert not different(job.students[name], again.students[name])
    with pytest.raises(TinyclipError, match='nothing to reconstruct'):
        by_rule(0.5, 4, random=True, calibrate=16)


# --- from the command line

DISTILL = ['distill', '--teacher', 'shapes-teacher', '--data', 'shapes', '--batch-size', '8']
HALF = ['--image-width', '.5', '--text-depth', '.5', '--calibrate', '16']


def command(capsys, out, *more, start=DISTILL):
    "Result of `tinyclip distill`; where it fails, what it says"
    code = main([*start, '--json', '--device', 'cpu', '--out', str(out), *map(str, more)])
    told = capsys.readouterr()
    return json.loads(told.out) if code == 0 else told.err


def weights(out):
    return load_file(out / 'student' / 'open_clip_model.safetensors')


def test_inherited_and_reconstructed_and_never_trained(tmp_path, capsys):
    out = tmp_path / 'a'
    found = command(capsys, out, *HALF, '--steps', 0, '--eval-data', 'shapes')
    assert found['steps'] == 0 and found['evaluation']
    assert found['reconstruction']['samples'] == 16
    teacher, preprocess, tokenizer = load('shapes-teacher')
    keep = manual(teacher, image_width=0.5, text_depth=0.5)
    pairs = calibration_pairs(open_pairs(Shapes('train'), preprocess, tokenizer, 8))
    by_hand = inherit(teacher, keep, calibrate=pairs, samples=16, progress=False).state_dict()
    assert all(torch.equal(v, by_hand[k]) for k, v in weights(out).items())
    again = command(capsys, out, *HALF, '--steps', 2, '--resume')
    assert again['steps'] == 2 and again['reconstruction'] == found['reconstruction']
    command(capsys, tmp_path / 'b', *HALF, '--steps', 2)
    a, b = weights(out), weights(tmp_path / 'b')
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert 'was begun with --calibrate' in command(
        capsys, out, *HALF[:-2], '--steps', 2, '--resume'
    )


def test_scores_choose_unless_masks_are_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('tinyclip.stages.CALIBRATION', 32)
    share = ['--share', '.5', '--steps']
    found = command(capsys, tmp_path / 'a', *share, 0)
    (row,) = found['stages']
    assert found['steps'] == 0 and row['calibrated on'] == 32 and 'masks_reached' not in row
    assert row['kept'] == pytest.approx(0.5, abs=0.001)
    teacher, preprocess, tokenizer = load('shapes-teacher')
    pairs = calibration_pairs(open_pairs(Shapes('train'), preprocess, tokenizer, 8))
    keep = scored(teacher, pairs, 0.5, samples=32, progress=False)
    by_hand = inherit(teacher, keep, calibrate=pairs, samples=32, progress=False).state_dict()
    assert all(torch.equal(v, by_hand[k]) for k, v in weights(tmp_path / 'a').items())
    (row,) = command(capsys, tmp_path / 'b', *share, 3, '--mask-steps', 2)['stages']
    assert 'masks_reached' in row and 'calibrated on' not in row
    assert 'look at calibration pairs' in command(
        capsys, tmp_path / 'c', *share, 2, '--calibrate', 0
    )
    assert 'say with --mask-steps' in command(capsys, tmp_path / 'c', *share, 2, '--uniform')


def test_masks_and_reconstruction(tmp_path, capsys):
    share = ['--share', '.5', '--mask-steps', 2, '--calibrate', 16]
    assert 'leave nothing' in command(capsys, tmp_path / 'x', *share[:4], '--steps', 2)
    found = command(capsys, tmp_path / 'a', *share, '--steps', 2)
    assert found['steps'] == 2 and found['stages'][0]['calibrated on'] == 16
    assert found['stages'][0]['kept'] == pytest.approx(0.5, abs=0.01)
    again = command(capsys, tmp_path / 'a', *share, '--steps', 2, '--resume')
    assert again['stages'] == found['stages']


@pytest.mark.parametrize(
    'more, says',
    [
        (['--calibrate', -3], '--calibrate=-3'),
        (['--calibrate', 7], '7 calibration pairs are too few'),
        (['--calibrate', 16, '--random-start'], 'inherits nothing'),
        (['--share', 0.5, '--calibrate', 3], 'too few'),
    ],
)
def test_refused_at_once(tmp_path, capsys, more, says):
    assert says in command(capsys, tmp_path / 'x', '--steps', 1, *more)
    assert not (tmp_path / 'x').exists()


def test_nothing_to_inherit_from(tmp_path, capsys):
    start = ['distill', '--data', 'shapes', '--student', 'ViT-B-32']
    said = command(capsys, tmp_path / 'x', '--steps', 1, '--calibrate', 16, start=start)
    assert 'name one with --teacher' in said
