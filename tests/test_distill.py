"What a run must survive: interrupts, kills, broken data, several processes, odd settings."

import copy
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from tinyclip.core import TinyclipError
from tinyclip.data import open_pairs
from tinyclip.data.shapes import Shapes
from tinyclip.distill import Distiller
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import Objective
from tinyclip.train.checkpoint import checkpoints
from tinyclip.train.engine import make_accelerator
from tinyclip.train.events import read_events
from tinyclip.train.step import step
from tinyclip.zoo import load


class Batch(NamedTuple):
    image: torch.Tensor
    text: torch.Tensor


class Pairs:
    "In-memory pairs; each of `world` processes takes its slice of every batch"

    def __init__(self, batch_size=8, batches=3, size=16, world=1, rank=0, spoil=lambda e, i, b: b):
        self.n = batch_size
        self.batches = batches
        self.size = size
        self.mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.spoil = spoil

    def epoch(self, e, start=0):
        for i in range(start, self.batches):
            g = torch.Generator().manual_seed(100 * e + i)
            image = torch.randn(self.n, 3, self.size, self.size, generator=g)
            text = torch.randint(1, 62, (self.n, 8), generator=g)
            text[:, 5] = 63
            yield self.spoil(e, i, Batch(image[self.mine], text[self.mine]))


def tiny(seed=0, embed_dim=16, width=32, size=16, layers=1, **vision):
    torch.manual_seed(seed)
    vision = dict(image_size=size, layers=layers, width=width, patch_size=8, head_width=16) | vision
    return open_clip.CLIP(
        embed_dim, vision, dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    )


def job(student=None, teacher='tiny', pairs=None, **kw):
    kw = dict(lr=1e-3, log_every=1, device='cpu', progress=False) | kw
    return Distiller(
        student or tiny(1), tiny(0) if teacher == 'tiny' else teacher, pairs or Pairs(), **kw
    )


def different(a, b):
    return [k for k, v in a.state_dict().items() if not torch.equal(v, b.state_dict()[k])]


def when(kind, n, act):
    return lambda e: act() if (e['event'], e.get('step')) == (kind, n) else None


# --- interrupted, killed, broken


def test_ctrl_c_writes_a_checkpoint_and_raises(tmp_path):
    straight = job(tiny(1, patch_dropout=0.5)).fit(8).student
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        job(
            tiny(1, patch_dropout=0.5),
            folder=tmp_path,
            listeners=[when('log', 4, lambda: signal.raise_signal(signal.SIGINT))],
        ).fit(8)
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in checkpoints(tmp_path)] == ['checkpoint-000004']
    assert read_events(tmp_path, 'end')[-1]['reason'].startswith('KeyboardInterrupt')
    assert not different(
        straight, job(tiny(2, patch_dropout=0.5), folder=tmp_path).fit(8, resume=True).student
    )


def test_killed_process_goes_on_from_its_checkpoint(tmp_path):
    code = (
        f"import sys, os; sys.path.insert(0, {str(Path(__file__).parent)!r}); from "
        "test_distill import *\n"
        f"job(folder={str(tmp_path)!r}, save_every=3, listeners=[when('log', 5, lambda: "
        "os.kill(os.getpid(), 9))]).fit(8)"
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    (tmp_path / '.checkpoint-000006.x.tmp').mkdir()  # as a kill in the middle of writing leaves it
    with open(tmp_path / 'events.jsonl', 'a') as f:
        f.write('{"event": "lo')
    assert not different(
        job().fit(8).student, job(tiny(2), folder=tmp_path).fit(8, resume=True).student
    )
    assert [e['step'] for e in read_events(tmp_path, 'log')] == [*range(1, 9)]


def test_failing_data_loses_nothing(tmp_path):
    def spoil(e, i, b):
        if (e, i) == (1, 1):
            raise OSError('disk gone')
        return b

    with pytest.raises(OSError):
        job(pairs=Pairs(spoil=spoil), folder=tmp_path).fit(8)
    assert [p.name for p in checkpoints(tmp_path)] == ['checkpoint-000004']
    assert not different(
        job().fit(8).student, job(tiny(2), folder=tmp_path).fit(8, resume=True).student
    )


def test_failing_listener_and_evaluation_release_the_student():
    student = tiny(1)

    def bad(_):
        raise RuntimeError('my own mistake')

    with pytest.raises(RuntimeError, match='my own mistake'):
        job(student, precision='bf16', evaluate=bad).fit(2)
    assert 'forward' not in vars(student) and not student.training
    student(*next(Pairs().epoch(0)))  # still works as it did
    copy.deepcopy(student)


def test_too_many_bad_steps_keep_the_good_checkpoint(tmp_path):
    def spoil(e, i, b):
        return b._replace(image=b.image / 0) if e > 0 else b

    student = tiny(1)
    with pytest.raises(TinyclipError, match="4 steps in a row.*checkpoint-000006"):
        job(student, pairs=Pairs(spoil=spoil), folder=tmp_path, save_every=3, max_skipped=3).fit(20)
    # after 3 good steps, and after 3 more that were skipped
    good, last = [load_file(p / 'student.safetensors') for p in checkpoints(tmp_path)]
    assert all(
        torch.equal(good[k], last[k]) and torch.equal(good[k], v)
        for k, v in student.state_dict().items()
    )
    assert (
        read_events(tmp_path, 'log')[-1]['skipped'] == 4
        and read_events(tmp_path, 'log')[-1]['loss'] is None
    )


def test_a_bad_batch_leaves_running_statistics_alone():
    student = tiny(1, size=32, layers=(1, 1, 1, 1), width=8, head_width=4)
    good = copy.deepcopy(student)

    def spoil(e, i, b):
        return b._replace(image=b.image * float('nan'))

    result = job(student, None, Pairs(size=32, spoil=spoil), objective='contrastive').fit(2)
    assert (
        result.skipped == 2
        and any('running_mean' in k for k in student.state_dict())
        and not different(student, good)
    )


# --- what is refused


@pytest.mark.parametrize(
    'settings, steps, says',
    [
        (dict(teacher=None), 2, 'teacher=None'),
        (dict(), 0, 'above 0'),
        (dict(), 2.5, 'above 0'),
        (dict(objective='afinity'), 2, 'affinity'),
        (dict(pairs=Pairs(batches=0)), 2, 'Epoch 0 of the pairs holds no batch'),
        (dict(pairs=Pairs(size=32)), 2, r'takes \(n, 3, 16, 16\)'),
        (dict(teacher=tiny(size=24)), 2, 'image size is'),
        (dict(precision='fp16'), 2, 'needs a GPU'),
        (dict(precision='bf61'), 2, "Did you mean 'bf16'"),
        (dict(device='cdua'), 2, "Did you mean 'cuda'"),
        (dict(trackers=['tensorboard']), 2, 'folder='),
        (dict(evaluate=lambda m: 3), 2, 'a dict of numbers'),
        (dict(student=tiny(1).requires_grad_(False)), 2, 'nothing would be trained'),
    ],
)
def test_refusals(settings, steps, says):
    with pytest.raises(TinyclipError, match=says):
        job(**settings).fit(steps)


def test_teacher_and_student_may_not_share_weights():
    teacher, student = tiny(0), tiny(1)
    student.visual = teacher.visual
    with pytest.raises(TinyclipError, match="share memory"):
        job(student, teacher)


@pytest.mark.skipif(find_spec('wandb') is not None, reason='wandb is installed here')
def test_missing_tracker_package():
    with pytest.raises(TinyclipError, match='pip install wandb'):
        job(trackers=['wandb']).fit(1)


def test_a_run_is_not_overwritten_nor_mixed_up(tmp_path):
    job(folder=tmp_path).fit(2)
    before = (tmp_path / 'events.jsonl').read_bytes()
    with pytest.raises(TinyclipError, match='already holds a run'):
        job(folder=tmp_path).fit(2)
    with pytest.raises(TinyclipError, match='made longer, not shorter'):
        job(folder=tmp_path).fit(1, resume=True)
    with pytest.raises(TinyclipError, match='belongs to another run: .*there and'):
        job(tiny(1, width=48), folder=tmp_path).fit(2, resume=True)
    with pytest.raises(TinyclipError, match='seed is 0 there and 1 here'):
        job(folder=tmp_path, seed=1).fit(2, resume=True)
    assert (tmp_path / 'events.jsonl').read_bytes() == before


# --- settings do what they say


def test_logit_scale():
    student = tiny(1)
    was = student.logit_scale.item()
    job(student, None, objective='contrastive', scale='fixed').fit(3)
    assert student.logit_scale.item() == was and student.logit_scale.requires_grad
    job(student, None, objective='contrastive').fit(3)
    assert student.logit_scale.item() != was
    with torch.no_grad():
        student.logit_scale.fill_(9.0)
    job(student, None, objective='contrastive').fit(1)
    assert student.logit_scale.exp().item() <= 100.001


def test_evaluation_changes_nothing_and_is_logged(tmp_path):
    def look(model):
        torch.rand(7)
        assert not model.training and not torch.is_grad_enabled()
        return dict(a=1)

    looked = job(tiny(1, patch_dropout=0.5), evaluate=look, evaluate_every=2, folder=tmp_path).fit(
        5
    )
    assert not different(looked.student, job(tiny(1, patch_dropout=0.5)).fit(5).student)
    assert [e['step'] for e in read_events(tmp_path, 'evaluation')] == [
        2,
        4,
        5,
    ] and looked.evaluation == dict(a=1.0)


def test_mixed_precision_computes_losses_in_float32():
    seen = {}

    class Spy(Objective):
        def __call__(self, s, t, **how):
            seen.update(dtype=s.image.dtype, product=(s.image @ s.text.T).dtype)
            return super().__call__(s, t, **how)

    student = tiny(1)
    assert job(student, objective=Spy('affinity'), precision='bf16').fit(2).finished
    assert set(seen.values()) == {torch.float32} and student.visual.proj.dtype == torch.float32


def test_teacher_stays_as_it_is():
    teacher = tiny(0)
    before = copy.deepcopy(teacher)
    job(teacher=teacher).fit(2)
    assert not different(teacher, before) and all(p.grad is None for p in teacher.parameters())


def test_widths_may_differ():
    assert job(tiny(1, embed_dim=12)).fit(2).finished


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    job(folder=tmp_path, trackers=['tensorboard'], evaluate=lambda m: dict(a=1)).fit(2)
    assert list(tmp_path.rglob('events.out.tfevents*'))


def test_resuming_decodes_nothing_again(tmp_path):
    """Only what comes after the checkpoint is read, and the weights are those of a run that
    nobody stopped"""

    class Counted(Shapes):
        read = 0

        def batch(self, indices):
            Counted.read += len(indices)
            return super().batch(indices)

    model, preprocess, tokenizer = load('shapes-teacher')

    def run(folder, steps=30, **kw):
        student = inherit(model, manual(model, image_width=0.5, text_depth=0.5))
        Counted.read = 0
        return job(
            student,
            model,
            open_pairs(Counted('train', n=320), preprocess, tokenizer, 8),
            folder=tmp_path / folder,
            save_every=100,
            **kw,
        ).fit(steps, resume=True).student, Counted.read

    whole, read = run('whole')
    assert read >= 240
    stopped = []

    def stop(e):
        if (e['event'], e.get('step')) == ('log', 25):
            stopped.append(1)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as e:
        run('stopped', listeners=[stop])
    assert e.value.code == 75 and stopped
    again, read = run('stopped')
    assert not different(whole, again)
    assert read <= 5 * 8 + 64, read  # five batches, and what the loader holds at a time


# --- several processes

WORKER = '''
import sys; sys.path.insert(0, {here!r})
from test_distill import *
from torch.nn.parallel import DistributedDataParallel
rank,world = int(os.environ['RANK']),int(os.environ['WORLD_SIZE'])
for name,objective in OBJECTIVES.items():
    folder = Path({folder!r})/name
    run = lambda: job(
        pairs=Pairs(world=world, rank=rank),
        folder=folder, objective=objective, log_every=2, lr=1e-4)
    half = run(); half.listeners = [when('log', 4, half.stop)]
    assert half.fit(6).steps==4
    assert run().fit(6, resume=True).finished
    student = tiny(1)
    wrapped = DistributedDataParallel(student)
    found = gradients(student, wrapped, objective, Pairs(world=world, rank=rank))
    if rank==0: torch.save(found, folder/'gradients.pt')
'''
# with affinity alone the logit scale gets no gradient
OBJECTIVES = dict(
    mimic='affinity',
    both=['affinity', 'contrastive'],
    tiles=Objective(['affinity', 'contrastive'], tile=3),
)


def gradients(student, wrapped, objective, pairs):
    step(
        wrapped.train(),
        tiny(0).eval(),
        next(pairs.epoch(0)),
        objective if isinstance(objective, Objective) else Objective(objective),
    )['loss'].backward()
    return {n: p.grad for n, p in student.named_parameters()}


def test_two_processes_equal_one(tmp_path):
    """Gradients to rounding, and losses through a stop and a resume. Later losses only roughly:
    where a gradient is all rounding, Adam makes a whole step of it, of either sign, and how much is
    rounded depends on the machine."""
    (tmp_path / 'worker.py').write_text(
        WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path))
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
    for name, objective in OBJECTIVES.items():
        student = tiny(1)
        alone = gradients(student, student, objective, Pairs())
        two = torch.load(tmp_path / name / 'gradients.pt', weights_only=True)
        for n, g in alone.items():
            assert (g - two[n]).norm() <= 1e-5 * g.norm() + 1e-6, n
        job(objective=objective, folder=tmp_path / 'one' / name, log_every=2, lr=1e-4).fit(6)
        one, two = [read_events(o / name, 'log') for o in (tmp_path / 'one', tmp_path)]
        assert [e['step'] for e in one] == [e['step'] for e in two] == [1, 2, 4, 6]
        assert abs(one[0]['loss'] - two[0]['loss']) < 1e-6 * one[0]['loss']
        assert max(abs(a['loss'] - b['loss']) / a['loss'] for a, b in zip(one, two)) < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU joins the processes')
def test_processes_that_cannot_join_are_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(
        TinyclipError,
        match="2 processes were started, and each believes that it is alone.*device='cpu'",
    ):
        make_accelerator()
