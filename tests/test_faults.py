"""What machines do to a run: kills at any moment, a full disk, another number of processes, a
cluster that wants its machine back"""

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distill import Pairs, different, job, tiny, when
from test_stages import PLAN, plan

from tinyclip.core import TinyclipError
from tinyclip.data import open_pairs
from tinyclip.data.shapes import Shapes
from tinyclip.distill import Terminated
from tinyclip.losses import Objective
from tinyclip.stages import Stage
from tinyclip.train.checkpoint import checkpoints
from tinyclip.train.events import read_events
from tinyclip.zoo import load

HERE = Path(__file__).parent
ENV = os.environ | dict(
    OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', PYTHONPATH=f'{HERE}{os.pathsep}{HERE.parent}'
)


def half_written(folder):
    return [p for p in Path(folder).rglob('.*.tmp') if p.is_dir()]


def weights(folder):
    return {
        str(p.relative_to(folder)): load_file(p)
        for p in sorted(Path(folder).glob('stage-*/*/*.safetensors'))
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- killed twenty times

LONG = [Stage(0.7, 12, 12), Stage(0.4, 12, 12)]


def child(folder, resume, tell):
    "Train in a process of its own, and `tell` when it sets out and when it begins to train"
    begun = []

    def listen(e):
        if not begun:
            begun.append(os.write(tell, b't'))

    compression = plan(folder, stages=LONG, save_every=1, listeners=[listen])
    os.write(tell, b's')
    compression.fit(resume=resume)


def attempt(folder, resume, wait=0, delay=None):
    """One process, killed `delay` seconds after it has told `wait` times; how it ended, and how
    long it trained"""
    heard, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            child(folder, resume, tell)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(tell)
    for _ in range(wait):
        os.read(heard, 1)
    start = time.perf_counter()
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os.close(heard)
    return status, time.perf_counter() - start


def standing(folder):
    """The newest phase of a compression, its newest checkpoint, and whether something was being
    written"""
    place = sorted(
        Path(folder).glob('stage-*/*/events.jsonl'),
        key=lambda p: (p.parts[-3], p.parts[-2] == 'distil'),
    )[-1].parent
    return dict(
        phase=place.name,
        stage=place.parent.name,
        step=max([0, *(int(p.name[-6:]) for p in checkpoints(place))]),
        writing=bool(half_written(folder)),
    )


def many_kills(folder, least=20, seed=0):
    "Run in a process that has only imported: forking is safe there, and no kill costs an import"
    folder = Path(folder)
    rng = random.Random(seed)
    kills = []
    runs = 0
    status, whole = attempt(folder / 'straight', False, wait=2)
    assert status == 0
    while len(kills) < least:  # one run, unless the machine has become faster meanwhile
        runs += 1
        while True:
            # on its way to its checkpoint
            early = (folder / f'run-{runs}').exists() and rng.random() < 0.2
            status, _ = attempt(
                folder / f'run-{runs}',
                True,
                1 if early else 2,
                rng.uniform(0, 0.05 if early else whole / 10),
            )
            if status == 0:
                break
            assert status == signal.SIGKILL, f'the process ended by itself: {status}'
            kills.append(standing(folder / f'run-{runs}') | dict(early=early))
    print(json.dumps(dict(runs=runs, kills=kills, seconds=whole)))


def test_twenty_random_kills(tmp_path):
    out = subprocess.run(
        [
            sys.executable,
            '-c',
            f'from test_faults import many_kills; many_kills({str(tmp_path)!r})',
        ],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=900,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    said = json.loads(out.stdout.splitlines()[-1])
    kills, straight = said['kills'], tmp_path / 'straight'
    assert len(kills) >= 20
    hit = Counter(k['phase'] for k in kills)
    print(
        len(kills),
        'kills,',
        hit,
        sum(k['writing'] for k in kills),
        'while writing,',
        sum(k['early'] for k in kills),
        'while setting out',
    )
    assert (
        min(hit['masks'], hit['distil']) >= 3
        and any(k['writing'] for k in kills)
        and len({(k['stage'], k['phase'], k['step']) for k in kills}) >= 10
    )
    whole = weights(straight)
    assert sorted(whole) == [
        f'stage-{i}/{n}/open_clip_model.safetensors' for i in (1, 2) for n in ('cut', 'student')
    ]
    for r in range(said['runs']):
        folder = tmp_path / f'run-{r + 1}'
        again = weights(folder)
        for n in whole:
            assert same(whole[n], again[n]), n
        for log in straight.glob('stage-*/*/events.jsonl'):
            a, b = [
                [(e['step'], e['loss']) for e in read_events(o.parent, 'log')]
                for o in (log, folder / log.relative_to(straight))
            ]
            assert a == b and [n for n, _ in a] == [*range(1, 13)]
        assert not half_written(folder)


def stopped(folder, step, steps=8, **kw):
    "A run that is told to stop"
    half = job(folder=folder, **kw)
    half.listeners = [when('log', step, half.stop)]
    assert half.fit(steps).steps == step


# --- a full disk


@contextlib.contextmanager
def small_files():
    """Yields a function that sets how large a file may grow: the system refuses what is more, in
    the middle of a write"""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


@pytest.mark.parametrize('file', ['student.safetensors', 'trainer.pt'])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, file):
    with small_files() as limit:

        def fill():
            return limit((tmp_path / 'checkpoint-000002' / file).stat().st_size - 1)

        with pytest.raises(
            TinyclipError,
            match=r"checkpoint-000004' could not be written \(File too large\): [\d.]+ ?[kMGT]?B "
            r"are free there.*Make room.*resume=True",
        ):
            job(folder=tmp_path, save_every=2, listeners=[when('log', 3, fill)]).fit(6)
    assert names(tmp_path) == ['checkpoint-000002', 'events.jsonl']
    assert read_events(tmp_path, 'end')[-1]['reason'].startswith('TinyclipError')
    assert not different(
        job().fit(6).student, job(tiny(2), folder=tmp_path).fit(6, resume=True).student
    )


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    job(folder=tmp_path / 'measure').fit(1)
    one = sum(p.stat().st_size for p in (tmp_path / 'measure').rglob('*') if p.is_file())
    if (
        shutil.which('mount') is None
        or subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', f'size={int(1.7 * one)}', 'tmpfs', disk],
            capture_output=True,
        ).returncode
    ):
        pytest.skip('a small disk can be mounted by root only')
    try:
        with pytest.raises(TinyclipError, match='No space left on device'):
            job(folder=disk, save_every=2).fit(6)
        assert names(disk) == ['checkpoint-000002', 'events.jsonl']
        subprocess.run(['mount', '-o', f'remount,size={9 * one}', disk], check=True)
        assert not different(
            job().fit(6).student, job(tiny(2), folder=disk).fit(6, resume=True).student
        )
    finally:
        subprocess.run(['umount', disk], check=True)


def test_a_log_without_room_waits(tmp_path):
    log = tmp_path / 'events.jsonl'
    with (
        small_files() as limit,
        pytest.warns(UserWarning, match='wait in memory until there is room') as caught,
    ):
        # ten bytes of step 4 fit
        listeners = [
            when('log', 3, lambda: limit(log.stat().st_size + 10)),
            when('log', 5, lambda: limit(10**9)),
        ]
        assert job(folder=tmp_path, listeners=listeners).fit(8).finished
    assert [e['step'] for e in read_events(tmp_path, 'log')] == [*range(1, 9)] and len(caught) == 1


def test_a_disk_that_stays_full_says_what_is_lost(tmp_path):
    log = tmp_path / 'events.jsonl'
    with (
        small_files() as limit,
        pytest.warns(UserWarning) as caught,
        pytest.raises(TinyclipError, match='checkpoint-000005.*File too large'),
    ):
        job(
            folder=tmp_path, listeners=[when('log', 3, lambda: limit(log.stat().st_size + 10))]
        ).fit(5)
    assert 'lacks its last 3 events' in str(caught[-1].message)  # two steps and the end
    assert log.read_text().endswith('\n') and [e['step'] for e in read_events(tmp_path, 'log')] == [
        1,
        2,
        3,
    ]


def test_no_run_begins_on_a_full_disk(tmp_path):
    stopped(tmp_path / 'old', 3, 5)
    before = (tmp_path / 'old' / 'events.jsonl').read_bytes()
    with small_files() as limit:
        limit(10)
        with pytest.raises(TinyclipError, match='cannot be written .*make room'):
            job(folder=tmp_path / 'new').fit(5)
        with pytest.raises(TinyclipError, match='cannot be rewritten .*make room'):
            job(folder=tmp_path / 'old').fit(5, resume=True)
    assert (tmp_path / 'old' / 'events.jsonl').read_bytes() == before and names(
        tmp_path / 'old'
    ) == ['checkpoint-000003', 'events.jsonl']


def test_a_cut_that_does_not_fit_is_cut_again(tmp_path):
    plan(tmp_path / 'straight', stages=PLAN[:1]).fit()
    with small_files() as limit:

        def fill(e):
            return limit(10_000) if (e['phase'], e['event']) == ('masks', 'end') else None

        with pytest.raises(
            TinyclipError, match="cut' could not be written .*Make room.*resume=True"
        ):
            plan(tmp_path / 'full', stages=PLAN[:1], listeners=[fill]).fit()
    assert not (tmp_path / 'full' / 'stage-1' / 'cut').exists() and not half_written(tmp_path)
    plan(tmp_path / 'full', stages=PLAN[:1]).fit(resume=True)
    a, b = weights(tmp_path / 'straight'), weights(tmp_path / 'full')
    assert len(a) == 2 and all(same(a[n], b[n]) for n in a)


# --- SIGTERM when nothing is left to train, but the student is not saved yet


def at(event, step=None, phase=None):
    "A listener that is sent SIGTERM at an event"

    def hear(e):
        if e['event'] == event and step in (None, e['step']) and phase in (None, e.get('phase')):
            signal.raise_signal(signal.SIGTERM)

    return hear


@pytest.mark.parametrize('moment', [('config',), ('log', 8), ('checkpoint',), ('end',)])
def test_a_run_that_is_told_before_or_after_its_steps(tmp_path, moment):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as said:
        job(folder=tmp_path, listeners=[at(*moment)]).fit(8)
    assert said.value.code == 75 and signal.getsignal(signal.SIGTERM) is before
    assert str(said.value) == (
        'stopped after step 0' if moment == ('config',) else 'stopped after the last step'
    )
    again = job(tiny(2) if checkpoints(tmp_path) else tiny(1), folder=tmp_path).fit(8, resume=True)
    assert again.finished and not different(job().fit(8).student, again.student)


@pytest.mark.parametrize(
    'moment, kept, left',
    [
        (
            ('log', 4, 'masks'),
            ['cut'],
            'stopped after step 0',
        ),  # the last step of a phase: what follows from it is written down, and no more is begun
        (('end', None, 'masks'), ['cut'], 'stopped after step 0'),
        (('end', None, 'distil'), ['cut', 'student'], 'stopped after the last step'),
    ],
)
def test_stages_that_are_told_between_two_phases(tmp_path, moment, kept, left):
    with pytest.raises(Terminated) as said:
        plan(tmp_path / 'told', stages=PLAN[:1], listeners=[at(*moment)]).fit()
    assert said.value.code == 75 and str(said.value) == left
    assert sorted(
        n for n in names(tmp_path / 'told' / 'stage-1') if n in ('cut', 'student')
    ) == kept and not half_written(tmp_path)
    plan(tmp_path / 'told', stages=PLAN[:1]).fit(resume=True)
    plan(tmp_path / 'straight', stages=PLAN[:1]).fit()
    a, b = weights(tmp_path / 'straight'), weights(tmp_path / 'told')
    assert len(a) == 2 and all(same(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    'options', [('--image-width', '.5'), ('--share', '.5', '--mask-steps', '1')]
)
def test_the_command_saves_the_student_first(tmp_path, monkeypatch, capsys, options):
    "The signal comes between the last step and the saved student"
    import tinyclip.cli.train as cli
    from tinyclip.cli.main import main

    save = cli.save

    def late(*args, **kw):
        signal.raise_signal(signal.SIGTERM)
        return save(*args, **kw)

    monkeypatch.setattr(cli, 'save', late)
    command = [
        'distill',
        '--teacher',
        'shapes-teacher',
        '--data',
        'shapes',
        '--steps',
        '2',
        '--batch-size',
        '4',
        '--out',
        str(tmp_path),
        *options,
    ]
    assert main(command) == 75
    assert (
        'stopped after the last step; run the command again with --resume'
        in capsys.readouterr().err
    )
    assert load(tmp_path / 'student').model and (tmp_path / 'result.json').is_file()
    monkeypatch.setattr(cli, 'save', save)
    assert main([*command, '--resume']) == 0


# --- another number of processes


class Sized(Pairs):
    batch_size = property(lambda self: self.mine.stop - self.mine.start)


def test_nothing_else_changes_with_the_processes(tmp_path):
    """A checkpoint that claims to be of two processes with half the batch goes on as if nothing
    had happened, and says so"""
    stopped(tmp_path, 5, pairs=Sized())
    file = checkpoints(tmp_path)[-1] / 'trainer.pt'
    trainer = torch.load(file, weights_only=True)
    torch.save(
        trainer
        | dict(
            places=trainer['places'] * 2,
            marks=[None, None],
            batch_size=4,
            config=trainer['config'] | dict(processes=2),
        ),
        file,
    )
    with pytest.warns(
        UserWarning,
        match='on 2 processes with batches of 4 and goes on with 1 process with batches of 8: a '
        'step sees 8 pairs instead of 8.*epoch 1, after 2 batches',
    ):
        rest = job(tiny(2), pairs=Sized(), folder=tmp_path).fit(8, resume=True)
    assert not different(job().fit(8).student, rest.student)
    assert [e['step'] for e in read_events(tmp_path, 'warning')] == [5]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        job(pairs=Sized(), folder=tmp_path).fit(8, resume=True)  # said once


class Noted:
    "Pairs that remember what was taken of them"

    def __init__(self, pairs):
        self.pairs = pairs
        self.taken = []

    def __getattr__(self, name):
        return getattr(self.pairs, name)

    def epoch(self, e, start=0):
        for b in self.pairs.epoch(e, start):
            if e == 0:
                self.taken += [hashlib.sha1(o.numpy().tobytes()).hexdigest()[:16] for o in b.image]
            yield b


def shapes_job(folder, **kw):
    model, preprocess, tokenizer = load('shapes-teacher')
    pairs = Noted(open_pairs(Shapes('train', n=96), preprocess, tokenizer, 8))
    return job(load('shapes-teacher').model, model, pairs, folder=folder, **kw), pairs


class Slow(Pairs):
    def epoch(self, e, start=0):
        for b in super().epoch(e, start):
            time.sleep(0.05)
            yield b


def two_processes(folder, rank):
    "What one of two processes does; what it has to say goes to a file of its own"
    (folder / f'pid-{rank}').write_text(str(os.getpid()))
    mine, told = Sized(world=2, rank=rank), {}
    stopped(folder / 'two', 4, pairs=mine, precision='fp32')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        job(pairs=mine, folder=folder / 'one', precision='fp32').fit(8, resume=True)
    told['warnings'] = [str(w.message) for w in caught if 'This run was on' in str(w.message)]
    compression = plan(folder / 'stages', pairs=mine, stages=PLAN[:1])
    compression.listeners = [
        lambda e: (
            compression.stop()
            if (e['phase'], e['event'], e['step']) == ('distil', 'log', 2)
            else None
        )
    ]
    compression.fit()
    half, pairs = shapes_job(folder / 'listing')
    half.listeners = [when('log', 3, half.stop)]
    half.fit(9)
    told['taken'] = pairs.taken

    def heard(e, i, b):
        if (rank, e, i) == (1, 1, 0):
            signal.raise_signal(signal.SIGTERM)
        return b

    with pytest.raises(SystemExit) as e:
        job(pairs=Sized(world=2, rank=rank, spoil=heard), folder=folder / 'heard', log_every=2).fit(
            8
        )
    told['heard'] = [e.value.code, str(e.value)]
    save = torch.save

    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    if rank == 0:
        torch.save = full
    with pytest.raises(TinyclipError) as e:
        job(pairs=mine, folder=folder / 'full').fit(2)
    torch.save = save
    told['full'] = str(e.value)
    (folder / f'told-{rank}.json').write_text(json.dumps(told))
    try:
        job(pairs=Slow(world=2, rank=rank), folder=folder / 'term', log_every=5).fit(10_000)
    except SystemExit as e:
        (folder / f'end-{rank}').write_text(f'{e.code} {e}')
        raise


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """Two processes that stop, go on, fill a disk and are taken away; their folder, what they
    told, and the launcher's exit code"""
    folder = tmp_path_factory.mktemp('pair')
    stopped(folder / 'one', 4, pairs=Sized(), precision='fp32')
    (folder / 'worker.py').write_text(
        "import os; from pathlib import Path; from test_faults import "
        f"two_processes\ntwo_processes(Path({str(folder)!r}), int(os.environ['RANK']))"
    )
    with open(folder / 'output', 'w') as out:
        launcher = subprocess.Popen(
            [
                sys.executable,
                '-m',
                'torch.distributed.run',
                '--standalone',
                '--nproc_per_node=2',
                str(folder / 'worker.py'),
            ],
            stdout=out,
            stderr=out,
            env=ENV,
        )
    try:
        end = time.monotonic() + 600
        while launcher.poll() is None and not (
            (folder / 'term' / 'events.jsonl').exists()
            and len(read_events(folder / 'term', 'log')) >= 2
        ):
            assert time.monotonic() < end, (folder / 'output').read_text()[-3000:]
            time.sleep(0.05)
        assert launcher.poll() is None, (folder / 'output').read_text()[-3000:]
        pids = [int((folder / f'pid-{r}').read_text()) for r in (0, 1)]
        for pid in [*pids, launcher.pid, *pids]:
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.01)  # the cluster tells everybody, and the launcher tells its own again
        code = launcher.wait(600)
    finally:
        if launcher.poll() is None:
            for pid in folder.glob('pid-*'):
                # a launcher that is killed leaves its processes behind
                os.kill(int(pid.read_text()), signal.SIGKILL)
            launcher.kill()
    return folder, [json.loads((folder / f'told-{r}.json').read_text()) for r in (0, 1)], code


def by_hand(folder):
    """What the loss of step 5 must be: the checkpoint's student on the second batch of the
    second epoch"""
    from tinyclip.train.step import step

    student = tiny(2)
    student.load_state_dict(load_file(folder / 'checkpoint-000004' / 'student.safetensors'))
    return step(student.train(), tiny(0).eval(), list(Pairs().epoch(1))[1], Objective('affinity'))[
        'loss'
    ].item()


def logged(folder, step):
    return next(e['loss'] for e in read_events(folder, 'log') if e['step'] == step)


def test_from_one_process_to_two(pair):
    folder, (first, second), _ = pair
    assert second['warnings'] == [] and len(first['warnings']) == 1
    assert (
        'on 1 process with batches of 8 and goes on with 2 processes with batches of 4: a '
        'step sees 8 pairs instead of 8'
    ) in first['warnings'][0]
    assert [e['step'] for e in read_events(folder / 'one', 'log')] == [
        *range(1, 9)
    ] and read_events(folder / 'one', 'warning')[0]['message'] == first['warnings'][0]
    assert logged(folder / 'one', 5) == pytest.approx(by_hand(folder / 'one'), rel=1e-5)


def test_from_two_processes_to_one(pair):
    folder = pair[0]
    hand = by_hand(folder / 'two')
    with pytest.warns(
        UserWarning,
        match='on 2 processes with batches of 4 and goes on with 1 process with batches of 8',
    ):
        assert (
            job(tiny(2), pairs=Sized(), folder=folder / 'two', precision='fp32')
            .fit(8, resume=True)
            .finished
        )
    assert [e['step'] for e in read_events(folder / 'two', 'log')] == [*range(1, 9)]
    assert logged(folder / 'two', 5) == pytest.approx(hand, rel=1e-5)
    # nearly the same run: see test_distill.test_two_processes_equal_one
    straight = job(precision='fp32').fit(8).losses['loss']
    assert logged(folder / 'two', 8) == pytest.approx(straight, rel=0.05)


def test_stages_go_on_with_other_processes(pair):
    folder = pair[0] / 'stages'
    with pytest.warns(
        UserWarning,
        match='on 2 processes with batches of 4 and goes on with 1 process with batches of 8',
    ):
        assert len(plan(folder, pairs=Sized(), stages=PLAN[:1]).fit(resume=True)) == 1
    assert [e['step'] for e in read_events(folder / 'stage-1' / 'distil', 'log')] == [1, 2, 3, 4]


def test_a_listing_goes_on_with_what_nobody_has_seen(pair):
    folder, told, _ = pair
    again, pairs = shapes_job(folder / 'listing')
    with pytest.warns(UserWarning, match='after 6 batches of each process'):
        again.fit(9, resume=True)
    everything = shapes_job(None)[1]
    list(everything.epoch(0))
    seen = [*(x for t in told for x in t['taken'][:24]), *pairs.taken[-48:]]
    whole = everything.taken
    assert len(set(seen)) == 96 and set(seen) == set(whole)


def test_no_process_waits_for_one_whose_disk_is_full(pair):
    _, told, _ = pair
    assert told[0]['full'] == told[1]['full'] and 'No space left on device' in told[0]['full']


def test_one_process_that_hears_is_enough(pair):
    assert [t['heard'] for t in pair[1]] == [[75, 'stopped after step 4']] * 2
    assert [p.name for p in checkpoints(pair[0] / 'heard')] == ['checkpoint-000004']


def test_a_cluster_takes_two_processes_away(pair):
    """SIGTERM comes twice, from the cluster and from the launcher; both end alike, after the
    same step. The launcher has a code of its own"""
    folder, _, code = pair
    ends = [(folder / f'end-{r}').read_text() for r in (0, 1)]
    last = checkpoints(folder / 'term')[-1].name
    assert ends[0] == ends[1] == f'75 stopped after step {int(last[-6:])}' and code != 0
    assert int(last[-6:]) % 5 == 0 and read_events(folder / 'term', 'end')[-1]['reason'].startswith(
        'Terminated'
    )
