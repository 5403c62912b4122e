"A panel is one class and one entry: with both it is in every figure of a run."

import numpy as np
import plotly.graph_objects as go
import pytest

from tinyclip.core import COLOURS
from tinyclip.live import panels
from tinyclip.live.background import Background
from tinyclip.live.dashboard import Dashboard
from tinyclip.live.panels import Curve, CurvePanel, Plan
from tinyclip.train.history import RunLogs

EVENTS = [
    dict(event='log', step=s, loss=1 / s, lr=0.1 * s, **{'eval/top1': s / 10}) for s in (1, 2, 3)
]


@pytest.fixture
def entry(monkeypatch):
    "The list of panels, to be changed by a test"
    monkeypatch.setattr(panels, 'PANELS', list(panels.PANELS))
    return panels.PANELS.append


@pytest.fixture
def run():
    "A run in a background that has heard of three steps"
    from test_distill import job

    run = Background(job(), 4)
    for e in EVENTS:
        run(e)
    return run


class LearningRate(CurvePanel):
    "A panel over the steps"

    title = 'learning rate'

    def curves(self, plan):
        return [Curve(run, ('lr',), run or 'rate', COLOURS[4]) for run in plan.runs]


class Progress:
    "A panel that shares nothing with the others: two subplots of its own, which change by step"

    over_steps = False

    def subplots(self, plan):
        return [(60, ['steps done', 'steps left'])]

    def build(self, fig, cells, plan):
        for row, col in cells:
            fig.add_bar(x=[0], y=['steps'], orientation='h', name='progress', row=row, col=col)

    def update(self, history, plan, step=None):
        done = history[plan.runs[-1]].step if step is None else step
        return [dict(x=np.array([n])) for n in (done, 3 - done)]

    def still(self, history, plan):
        return f'<p>{history[plan.runs[-1]].step} steps done</p>'


def titles(fig):
    return [a.text for a in fig.layout.annotations]


def page_of(history, tmp_path):
    return panels.write_replay(history, tmp_path / 'replay.html').read_text()


@pytest.mark.parametrize(
    'panel, title, traces, picture',
    [
        (LearningRate, 'learning rate', ['rate'], 'learning rate'),
        (Progress, 'steps left', ['progress', 'progress'], '3 steps done'),
    ],
)
def test_a_class_and_an_entry(entry, run, tmp_path, panel, title, traces, picture):
    history = run.history()
    before = panels.draw(history)
    assert title not in titles(before) and picture not in panels.still(history, Plan())
    entry(panel())

    live = Dashboard(run, 'widgets', 3)
    try:
        fig = live.figure_widget
        assert title in titles(fig) and [t.name for t in fig.data][-len(traces) :] == traces
        assert len(fig.data) == len(before.data) + len(traces)
        assert [list(t.x) for t in fig.data[len(before.data) :]] in ([[1, 2, 3]], [[3], [0]])
    finally:
        live.close()
    assert f'"{title}"' in page_of(history, tmp_path)
    assert picture in Dashboard(run, 'html', 3).picture()['text/html']


def test_a_replay_has_frames_for_what_changes_by_step_only(entry, run):
    entry(Progress())
    film = panels.replay(run.history())
    first = film.frames[0]
    assert first.traces == (len(film.data) - 2, len(film.data) - 1)
    assert [list(t.x) for t in first.data] == [[1], [2]] and isinstance(first.data[0], go.Bar)


def test_panels_over_the_steps_share_the_first_row_and_the_cursor(entry, run):
    entry(Progress())
    entry(LearningRate())
    fig = panels.draw(run.history())
    assert titles(fig)[:3] == ['loss', 'accuracy (%)', 'learning rate']
    assert len({tuple(fig.layout[f'yaxis{i}'].domain) for i in ('', 2, 3)}) == 1
    assert [s.xref for s in panels.replay(run.history()).layout.shapes] == ['x', 'x2', 'x3']


def test_a_panel_without_content_leaves_no_room():
    titles_of = [titles(panels.build(Plan(masks=masks))) for masks in (False, True)]
    assert len(titles_of[0]) == 2 and len(titles_of[1]) == 11


def test_a_history_of_two_runs_has_a_colour_each():
    history = RunLogs([e | dict(run=r) for r in ('one', 'other-one') for e in EVENTS])
    fig = panels.draw(history)
    losses = [t for t in fig.data if t.name in ('one', 'other one')]
    assert [t.name for t in losses] == ['one', 'other one'] and all(t.showlegend for t in losses)
    assert len({t.line.color for t in losses}) == 2
    assert 'other one: held out' in [t.name for t in fig.data]
