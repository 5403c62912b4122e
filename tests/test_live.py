"""Runs in the background and their dashboards under bad luck: interrupted, started over and
over, drawn wrongly, gone on with elsewhere."""

import gc
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from test_distill import Pairs, job, tiny
from test_stages import MASKS, plan

from tinyclip.comparison import Comparison, by_masks, by_rule
from tinyclip.live import Dashboard, Replay, watch
from tinyclip.live.background import Background
from tinyclip.train.events import read_events

HERE, STATUS = Path(__file__).parent, Path('/proc/self/status')
LIMIT = 600  # seconds to wait for anything at all, on the busiest machine


def until(what):
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, 'it did not come true'
        time.sleep(0.01)


def threads():
    return [t.name for t in threading.enumerate() if 'tinyclip' in t.name]


@pytest.fixture(autouse=True)
def nothing_left():
    "Every test leaves a kernel in which nothing trains"
    yield
    if Dashboard.last:
        Dashboard.last.close()
    if Background.live:
        Background.live.stop()
        Background.live.wait(LIMIT)
    Background.live = None
    until(lambda: not threads())


def masked(folder, **kw):
    "A run with masks, steps of a few milliseconds"
    from tinyclip.masking import MaskedCLIP
    from tinyclip.sparsity import Sparsity

    m = MaskedCLIP(tiny(0), hard=True)
    return job(
        m,
        tiny(0),
        folder=folder,
        penalty=Sparsity(m, 0.5, form='projected', lr=0.1),
        schedule='constant',
        **kw,
    )


# --- nothing leaks


def memory():
    "Megabytes that are this process's own; pages of libraries come and go"
    return int(re.search(r'RssAnon:\s*(\d+)', STATUS.read_text())[1]) / 1024


def widgets():
    "What ipywidgets keeps"
    import ipywidgets

    return set(getattr(ipywidgets.widgets.widget, '_instances', ()))  # by their id


def cycle(folder):
    "A run is watched, stopped and closed; what it was made of, as weak references"
    live = watch(masked(folder), 1000, show='widgets', rate=5)
    until(lambda: live.run.step() > 1)
    live.controls.stop.click()
    assert live.run.wait(LIMIT)
    until(lambda: not live.thread.is_alive())
    refs = [
        weakref.ref(o)
        for o in (
            live,
            live.run,
            live.run.job,
            live.run.job.student,
            live.controls,
            live.figure_widget,
        )
    ]
    live.close()
    return refs


@pytest.mark.skipif(not STATUS.exists(), reason='resident memory is read from /proc')
def test_fifty_runs_leave_nothing(tmp_path):
    before = widgets()
    for i in range(10):
        cycle(tmp_path / f'warm-{i}')  # caches and the allocator's pools fill up
    gc.collect()
    start, refs = memory(), []
    for i in range(40):
        refs += cycle(tmp_path / str(i))
        if i % 5 == 4:
            gc.collect()  # what refers to itself goes when Python finds the time
    Background.live = None  # the last one could still be asked
    gc.collect()
    grown = memory() - start
    assert not threads() and Dashboard.last is None and widgets() == before
    assert not [type(r()) for r in refs if r()]
    # what one run holds (figure, history, widgets, two models, an optimizer) weighs .8 MB here;
    # without a leak 40 runs grow by less than 1 MB together
    assert grown < 10, f'{grown:.1f} MB in 40 runs'


# --- interrupts

WAITING = f"""import os, signal, sys, threading, time; sys.path.insert(0, {str(HERE)!r})
from test_live import *
# whatever started the tests may ignore interrupts, and that is inherited
signal.signal(signal.SIGINT, signal.default_int_handler)
inside,release = threading.Event(), threading.Event()
def spoil(e, i, batch): # a step that takes as long as we like
    if i==2: inside.set(); release.wait(LIMIT)
    return batch
run = Background(job(pairs=Pairs(spoil=spoil), folder=sys.argv[1]), 8)
run.start()
press = lambda: os.kill(os.getpid(), signal.SIGINT)
def hands():
    inside.wait(LIMIT)
    press()
    until(lambda: run.ending) # heard; the step still goes on
    if sys.argv[2]=='twice': press()
    else: release.set()
threading.Thread(target=hands, daemon=True).start()
try: print(run.result().steps, run.state())
except KeyboardInterrupt: print('interrupted', run.state())
release.set()
run.done.wait(LIMIT)
"""


@pytest.mark.parametrize(
    'presses, says', [('once', '3 stopped'), ('twice', 'interrupted training')]
)
def test_an_interrupt_while_waiting(tmp_path, presses, says):
    r = subprocess.run(
        [sys.executable, '-c', WAITING, str(tmp_path), presses],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert r.stdout.strip() == says, r.stderr[-2000:]
    assert [p.name for p in tmp_path.glob('checkpoint-*')] == ['checkpoint-000003']  # in any case


# --- drawing and training do not hurt each other


def test_a_figure_that_cannot_be_drawn_does_not_end_training(tmp_path, monkeypatch):
    import tinyclip.live.dashboard as module

    def broken(*_):
        raise ZeroDivisionError('in the figure')

    live = watch(masked(tmp_path), 12, show='widgets', rate=5, start=False)
    with monkeypatch.context() as m:
        m.setattr(module, 'fill', broken)
        live.start()
        assert live.run.result(LIMIT).finished
        until(lambda: not live.thread.is_alive())
    assert (
        'ZeroDivisionError: in the figure' in live.controls.said.value
        and 'training goes on' in live.controls.said.value
    )
    live.update()
    assert live.figure_widget.data[0].x[-1] == 12


def test_what_comes_after_the_end_may_fail_too(tmp_path):
    live = watch(masked(tmp_path), 4, show='widgets', rate=5, start=False)

    def then():
        raise OSError('no table')

    live.then = then
    live.start()
    live.run.result(LIMIT)
    until(lambda: not live.thread.is_alive())
    assert 'no table' in live.controls.said.value


def test_a_button_never_raises(tmp_path):
    live = watch(job(), 4, show='widgets', rate=5, start=False)
    live.controls.cut.click()  # nothing has begun
    assert 'The student of step 0' in live.controls.said.value
    live.controls.start.click()
    live.run.wait(LIMIT)
    live.controls.start.click()
    assert 'make a new one' in live.controls.said.value


# --- gone on with


def test_the_same_job_again_goes_on(tmp_path):
    run = masked(tmp_path)
    first = watch(run, 1000, show='widgets', rate=5)
    until(lambda: first.run.step() > 2)
    second = watch(run, 1000, show='widgets', rate=5)  # its cell is run again
    assert (
        first.run.state() == 'stopped' and first.closed.is_set() and first.run not in run.listeners
    )
    until(lambda: second.run.step() > first.run.step() + 2)
    assert threads().count('tinyclip-trainer') == 1
    second.run.stop()
    second.run.wait(LIMIT)
    steps = [s for s, _ in second.run.history()[''].lines['loss']]
    assert steps == [*range(1, steps[-1] + 1)] == [e['step'] for e in read_events(tmp_path, 'log')]


def test_a_job_without_a_folder_begins_again():
    run = job()
    Background(run, 2).start()
    Background.live.result(LIMIT)
    again = Background(run, 3)
    again.start()
    assert again.result(LIMIT).steps == 3


def test_a_fresh_process_shows_what_was_and_goes_on(tmp_path):
    code = (
        f"import os, sys; sys.path.insert(0, {str(HERE)!r}); from test_live import *\n"
        f"run = Background(masked({str(tmp_path)!r}, listeners=[lambda e: os._exit(3) if "
        "(e['event'], e['step'])==('log', 7) else None], save_every=2), 12); run.start(); "
        "run.wait()"
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 3
    live = watch(masked(tmp_path), 12, show='widgets', rate=5, start=False, resume=True)
    assert (
        list(live.figure_widget.data[0].x) == [*range(1, 8)] and live.run.state() == 'not started'
    )
    live.start()
    assert live.run.result(LIMIT).finished
    until(lambda: not live.thread.is_alive())
    assert list(live.figure_widget.data[0].x) == [*range(1, 13)]
    assert list(Replay(tmp_path).history[''].lines) == list(live.run.history()[''].lines)


# --- jobs made of jobs


def stages(folder):
    return plan(folder)


def contest(folder):
    teacher = tiny(0, layers=2)
    return Comparison(
        dict(masks=by_masks(0.6, 8, 4, masks=MASKS), rule=by_rule(0.6, 8)),
        teacher,
        Pairs,
        folder,
        lr=1e-3,
        log_every=1,
        save_every=2,
        device='cpu',
    )


@pytest.mark.parametrize('make', [stages, contest])
def test_stopped_and_paused_in_every_phase(tmp_path, make):
    straight = make(tmp_path / 'straight')
    straight.progress = False
    rows = straight.fit()
    live = watch(make(tmp_path / 'a'), show='widgets', rate=5)
    run = live.run

    def phases():
        return sum(len(s.phases) for s in run.history().values())

    def once_more(n):
        "Stand still somewhere in phase `n`, go on, stop there, and start again"
        until(lambda: phases() == n)
        run.pause()
        until(lambda: run.state() == 'paused')
        seen = run.step()
        time.sleep(0.1)
        assert run.step() == seen
        live.controls.pause.click()
        live.controls.stop.click()
        assert run.wait(LIMIT) and run.state() == 'stopped', run.trace
        live.controls.start.click()

    for n in range(1, dict(stages=5, contest=4)[make.__name__]):
        once_more(n)
    done = run.result(LIMIT)
    assert run.state() == 'finished' and run.step() == run.total
    same = [k for k in rows[0] if k not in ('pairs/s', 'speed', 'spread')]  # measured anew
    assert [{k: r.get(k) for k in same} for r in done] == [
        {k: r.get(k) for k in same} for r in rows
    ]
