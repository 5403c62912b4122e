"""A dial under bad luck: drawings that fail, change their structure, take long, or have nobody
to look at them."""

import threading
import time

import plotly.graph_objects as go
import pytest

import tinyclip.live.dial as module
from tinyclip.core import TinyclipError
from tinyclip.live.dial import Dial, filmed


def line(x, **kw):
    return go.Figure(go.Scatter(y=[x, 2 * x]), dict(title=f'x is {x}', **kw))


def moody(x, mood):
    if mood == 'refuses':
        raise TinyclipError(f'x={x} <b>is</b> refused.')
    if mood == 'crashes':
        raise KeyError('nothing there')
    if mood == 'returns text':
        return 'text'
    return line(x).add_bar(y=[x]) if mood == 'adds a bar' else line(x)


MOODS = ['draws', 'refuses', 'crashes', 'returns text', 'adds a bar']


def turn(dial, **values):
    for k, v in values.items():
        dial.controls[k].value = v
    assert dial.idle.wait(20)
    return dial


@pytest.fixture
def dial():
    d = Dial(moody, x=range(5), mood=MOODS)
    d.widget()
    return d


@pytest.mark.parametrize(
    'mood,said',
    [
        ('refuses', 'x=0 &lt;b&gt;is&lt;/b&gt; refused.'),
        ('crashes', 'KeyError: &#x27;nothing there&#x27;'),
        ('returns text', 'returned a str'),
    ],
)
def test_a_failed_drawing_says_so_and_the_dial_goes_on(dial, mood, said):
    before = dial.fig
    turn(dial, mood=mood)
    assert said in dial.note.value and ('Traceback' in dial.note.value) == (mood == 'crashes')
    assert dial.fig is before and dial.fig.layout.title.text == 'x is 0'
    turn(dial, mood='draws', x=3)
    assert dial.note.value == '' and dial.fig is before and dial.fig.layout.title.text == 'x is 3'


def test_the_first_drawing_may_fail():
    dial = Dial(moody, x=range(5), mood=(MOODS, 'refuses'))
    assert len(dial.widget().children) == 2 and 'refused' in dial.note.value
    assert 'text/html' not in dial.bundle()
    turn(dial, mood='draws')
    assert len(dial.box.children) == 3 and dial.note.value == ''


def test_another_structure_replaces_the_figure(dial):
    before = dial.fig
    turn(dial, mood='adds a bar')
    assert (
        dial.fig is not before
        and len(dial.fig.data) == 2
        and dial.box.children[2] is dial.fig
        and len(dial.box.children) == 3
    )
    now = dial.fig
    turn(dial, x=2)
    assert dial.fig is now and list(dial.fig.data[1].y) == [2]
    turn(dial, mood='draws')
    assert len(dial.fig.data) == 1 and len(dial.box.children) == 3


def test_nothing_of_the_last_drawing_lingers():
    def draw(x):
        return go.Figure(
            go.Scatter(y=[1], marker=dict(color='red', size=9) if x == 1 else dict(size=9)),
            dict(annotations=[dict(text='a')] * x),
        )

    dial = Dial(draw, x=([0, 1, 2], 1))
    dial.widget()
    turn(dial, x=2)
    assert dial.fig.data[0].marker.color is None and len(dial.fig.layout.annotations) == 2
    turn(dial, x=1)
    assert dial.fig.data[0].marker.color == 'red' and len(dial.fig.layout.annotations) == 1


def test_a_zoom_survives_the_next_drawing(dial):
    dial.fig.layout.xaxis.range = (0, 0.5)  # what plotly does when the user zooms
    turn(dial, x=4)
    assert tuple(dial.fig.layout.xaxis.range) == (0, 0.5)


def test_a_reloaded_page_shows_the_present(dial):
    turn(dial, x=4)
    assert (
        list(dial.fig._widget_data[0]['y']) == [4, 8]
        and dial.fig._widget_layout['title']['text'] == 'x is 4'
    )


def test_only_one_drawing_at_a_time_and_the_newest_last():
    busy, most, drawn = [], [], []

    def draw(x, y):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.02)
        busy.pop()
        drawn.append((x, y))
        return line(x + y)

    dial = Dial(draw, x=range(30), y=range(30))
    dial.widget()

    def pull(k):
        for v in range(1, 30):
            dial.controls[k].value = v
            time.sleep(0.003)

    # two controls may be served by two threads
    both = [threading.Thread(target=pull, args=[k]) for k in 'xy']
    for t in both:
        t.start()
    for t in both:
        t.join()
    assert dial.idle.wait(20)
    assert (
        max(most) == 1
        and drawn[-1] == (29, 29)
        and dial.fig.layout.title.text == 'x is 58'
        and len(drawn) < 59
    )


@pytest.fixture
def shown(monkeypatch):
    out = []
    monkeypatch.setattr(module, 'display', lambda o, **kw: out.append(o))
    return out


def test_without_a_kernel_a_page_gets_frames(shown):
    Dial(moody, x=(range(5), 2), mood=MOODS)._ipython_display_()
    (fig,) = shown
    assert (
        isinstance(fig, go.Figure)
        and [f.name for f in fig.frames] == list('01234')
        and fig.layout.title.text == 'x is 2'
    )
    assert (
        fig.layout.sliders[0].active == 2
        and '(mood draws)' in fig.layout.sliders[0].currentvalue.suffix
    )


def test_with_a_kernel_the_widget_and_a_picture_for_viewers_without(shown, monkeypatch):
    monkeypatch.setattr(module, 'has_kernel', lambda: True)
    dial = Dial(moody, x=range(5), mood=MOODS)
    dial._ipython_display_()
    assert {
        'application/vnd.jupyter.widget-view+json',
        'text/html',
        'application/vnd.plotly.v1+json',
    } <= set(shown[0])
    before = dial.fig
    turn(dial, x=3)
    dial._ipython_display_()  # its cell was run again: another figure, at the same place
    assert (
        dial.fig is not before
        and dial.fig.layout.title.text == 'x is 3'
        and before.comm is None
        and dial.box.children[2] is dial.fig
    )
    monkeypatch.setattr(module, 'can_show_widgets', lambda: False)
    dial._ipython_display_()
    assert isinstance(shown[2], go.Figure)


def test_a_page_shows_errors_as_a_cell_does():
    with pytest.raises(TinyclipError, match='refused'):
        Dial(moody, x=range(3), mood=(MOODS, 'refuses')).figure()
    with pytest.raises(TinyclipError, match='other traces or layout parts at x 1'):
        Dial(lambda x: line(x) if x != 1 else line(x, height=300), x=range(3)).figure()


def test_frames_carry_what_changes_only():
    still = go.Scatter(y=[1] * 1000)
    fig = filmed(
        [go.Figure([still, go.Bar(y=[1 / 3 * x])], dict(title='same')) for x in range(9)],
        list('012345678'),
    )
    assert all(
        f.traces == (1,) and len(f.data) == 1 and f.layout.title.text is None for f in fig.frames
    )
    assert list(fig.frames[1].data[0].y) == [0.3333]
    assert len(fig.to_json()) < 25_000


@pytest.mark.parametrize(
    'make,said',
    [
        (lambda: Dial(line), 'nothing to turn'),
        (lambda: Dial(line, x=[]), 'at least two values'),
        (lambda: Dial(line, x=[1]), 'at least two values'),
        (lambda: Dial(line, x='abc'), 'leaves nothing to turn'),
        (lambda: Dial(line, x=([1, 2], 5)), 'cannot start at 5'),
        (lambda: Dial(line, y=[1, 2]), "missing a required argument: 'x'"),
        (lambda: Dial(line, x=[[1], [2]]), 'cannot stand on a dial'),
        (lambda: Dial(line, x=[1, 2]).draw_at(x=3), 'its values are 1, 2'),
    ],
)
def test_a_dial_that_cannot_be_is_refused_in_a_sentence(make, said):
    with pytest.raises(TinyclipError) as e:
        make()
    assert said in str(e.value) and '\n' not in str(e.value)
