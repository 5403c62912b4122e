"""The labs in a real JupyterLab: run, watched, steered, interrupted, reloaded, left and misused,
under both of its rules for messages of widgets."""

import importlib.util
import json

import pytest
from browser import CHROMIUM, ROOT, Notebook, chromium, copy_notebook, jupyterlab, until

import tinyclip

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason='no chromium on PATH: apt-get install chromium'),
    pytest.mark.skipif(
        not importlib.util.find_spec('playwright'),
        reason='no playwright: pip install playwright (its own browsers are not needed)',
    ),
]
RULES = dict(
    default={},
    disabled={
        '@jupyterlab/apputils-extension/kernels-settings': dict(commsOverSubshells='disabled')
    },
)
# the target arrives within 20 steps, and every step is told
LONG = {
    'b = lab_setup()': 'b = lab_setup(steps=2000, batch_size=8)',
    'b.steps // 100': '1',
    'warmup=0.6': 'warmup=0.005',
    'importance_warmup=0.15': 'importance_warmup=0.005',
}
# not over before the test has looked, also where a page takes long
BOTH = {'b = lab_setup()': 'b = lab_setup(steps=1990, batch_size=8, n=64)'}
KNOWN = (  # what pages may say, and why
    # plotly: the figure of a cell that was cleared is updated until the cell's next run closes it
    "Error setting state: Cannot read properties of undefined (reading 'length')",
    # plotly: the answer to an update that came just before the figure was closed
    'no comm channel defined',
)


@pytest.fixture(scope='module')
def browser():
    with chromium() as b:
        yield b


@pytest.fixture(scope='module', params=RULES)
def lab(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(f'lab-{request.param}')
    copy_notebook(ROOT / 'nbs/labs/live_masks.ipynb', root / 'masks.ipynb', **LONG)
    copy_notebook(ROOT / 'nbs/labs/manual_or_automatic.ipynb', root / 'both.ipynb', **BOTH)
    with jupyterlab(root, tmp_path_factory.mktemp('home'), RULES[request.param]) as lab:
        lab.rule = request.param
        yield lab


# the rule is about messages to the kernel; these tests send none
once = pytest.mark.parametrize('lab', ['default'], indirect=True)


def opened(name):
    @pytest.fixture(scope='module')
    def notebook(browser, lab):
        nb = Notebook(browser, lab, f'{name}.ipynb')
        nb.run_all()
        yield nb
        nb.close()

    return notebook


masks, both = opened('masks'), opened('both')


@pytest.fixture(autouse=True)
def nothing_complains(lab):
    "Whatever is tested, neither the page nor the server nor the kernel reports an error"
    lab.said.clear()
    yield
    assert not [s for s in lab.said if s not in KNOWN]
    assert not lab.complaints()


CELL = 'live = watch('


def fresh(nb):
    "Another run in its own folder, which trains when this returns"
    nb.tidy()
    for c in ('masked = MaskedCLIP(', CELL):
        nb.run(c)
    nb.until_kernel('live.run.step()>0')
    return nb.lab.root / nb.value('str(run.folder)')


def quiet(nb, cell, live):
    "Wait until the page shows the step that the kernel stands at"
    nb.until(
        '([t, s]) => T.step(t)===s', [cell, nb.value(f'{live}.run.ask({live}.run.step).result()')]
    )


def checkpoints(folder):
    return sorted(int(p.name.split('-')[1]) for p in folder.rglob('checkpoint-*') if p.is_dir())


def told(folder):
    return [
        e
        for e in map(json.loads, (folder / 'events.jsonl').read_text().splitlines())
        if e['event'] == 'log'
    ]


def test_masks_are_watched_and_steered(masks):
    nb = masks  # all its cells have run
    folder = nb.lab.root / nb.value('str(run.folder)')
    nb.grows(CELL)
    nb.until('t => T.line(t, "image: target").at(-1)===50', CELL)
    nb.slide(CELL, *['ArrowLeft'] * 3)
    nb.until_kernel("sparsity.goal.asked['image']==.35 and sparsity.goal.asked['text']==.35")
    nb.until(
        't => T.line(t, "image: target").at(-1)===35 && T.line(t, "text: target").at(-1)===35', CELL
    )
    assert 'Each tower shall keep 35%' in nb.says(CELL, '35%')

    nb.press(CELL, 'Pause')
    nb.shows(CELL, 'paused')
    quiet(nb, CELL, 'live')
    still = nb.step(CELL)
    nb.page.wait_for_timeout(2000)
    assert nb.step(CELL) == still
    nb.press(CELL, 'Go on')
    nb.shows(CELL, 'training')
    assert nb.grows(CELL) > still

    nb.press(CELL, 'Cut here')
    assert 'tower' in nb.says(CELL, 'tudent of step')
    nb.shot(CELL, f'masks-{nb.lab.rule}')
    assert nb.value(
        "type(live.student).__name__!='MaskedCLIP' and "
        "parameters(live.student)['towers']<=parameters(b.teacher)['towers']"
    )

    nb.ask(
        'seen = []; plain = run.stop\nrun.stop = lambda: (seen.append(live.run.step()), plain())'
    )
    nb.press(CELL, 'Stop')
    nb.shows(CELL, 'stopped')
    end = nb.value('live.run.step()')
    assert nb.step(CELL) == end and end <= nb.value('seen[0]') + 2
    assert checkpoints(folder) == [end] and told(folder)[-1]['step'] == end
    nb.press(CELL, 'Start')
    nb.shows(CELL, 'training')
    assert nb.grows(CELL) > end
    nb.ask('live.run.stop(); live.run.wait()')
    assert [e['step'] for e in told(folder)] == [*range(1, checkpoints(folder)[-1] + 1)]


def test_the_stop_square_stops_the_run(masks):
    nb = masks
    folder = fresh(nb)
    nb.interrupt()  # no cell runs
    nb.shows(CELL, 'stopped')
    assert checkpoints(folder) == [nb.value('live.run.step()')]
    nb.press(CELL, 'Start')  # served on another thread, which must not matter
    nb.shows(CELL, 'training')
    nb.grows(CELL)
    nb.interrupt()
    nb.shows(CELL, 'stopped')
    folder = fresh(nb)
    nb.add('live.run.result().finished', wait=False)
    nb.until("T.status()==='busy'")
    nb.interrupt()  # this cell waits
    nb.until("t => T.ran(t)", 'live.run.result().finished')
    assert nb.outputs('live.run.result().finished')[-1].strip() == 'False'
    assert checkpoints(folder) == [nb.value('live.run.step()')]
    nb.shows(CELL, 'stopped')


def test_running_a_cell_again_leaves_one_trainer(masks):
    nb = masks
    trainers = "sum(t.name=='tinyclip-trainer' for t in __import__('threading').enumerate())"
    first = fresh(nb)
    nb.ask('before = live')
    nb.run_all()
    second = nb.lab.root / nb.value('str(run.folder)')
    nb.until_kernel("live.run.state()=='training'")
    assert (
        first != second and nb.value(trainers) == 1 and nb.value('before.run.state()') == 'stopped'
    )
    nb.run(CELL)  # the same job: it goes on
    nb.grows(CELL)
    assert nb.value(trainers) == 1 and nb.value('live.run.state()') == 'training'
    nb.ask('live.run.stop(); live.run.wait()')
    assert [e['step'] for e in told(second)] == [*range(1, checkpoints(second)[-1] + 1)]


@once
def test_a_dashboard_shown_twice_is_alive_in_both_cells(masks):
    nb = masks
    fresh(nb)
    again = 'live # once more'
    nb.add(again)
    nb.grows(again)
    nb.run(again)
    nb.grows(again)
    nb.grows(CELL)
    nb.ask('live.run.stop(); live.run.wait()')


@once
def test_figures_are_as_wide_as_the_page(masks):
    nb = masks
    fresh(nb)
    wide = (
        't => [...T.find(t).node.querySelectorAll(".js-plotly-plot")].every(g => '
        'g._fullLayout.width===g.clientWidth && g.clientWidth>1000)'
    )
    nb.until(wide, CELL)
    nb.ask('live.run.stop(); live.run.wait()')
    nb.run('Replay(')
    nb.until(wide, 'Replay(')
    nb.shot('Replay(', f'replay-{nb.lab.rule}')


def test_the_page_is_reloaded_closed_and_opened_again(masks):
    nb = masks
    nb.run('Replay(')  # another figure, so that the page has more than one to read again
    folder = fresh(nb)
    nb.grows(CELL)
    nb.save()
    nb.open()  # a reload
    nb.until('t => T.points(t)>0', CELL)
    seen = nb.grows(CELL)
    nb.page.close()
    n = len(told(folder))
    until(lambda: len(told(folder)) >= n + 3)
    nb.open()
    nb.until('([t, n]) => T.points(t)>0 && T.step(t)>n', [CELL, n + 2])
    assert nb.grows(CELL) > seen
    nb.press(CELL, 'Stop')
    nb.shows(CELL, 'stopped')
    end = nb.step(CELL)
    nb.save()
    nb.open()
    nb.until('([t, n]) => T.line(t, "loss").length===n', [CELL, end])
    nb.shot(CELL, f'reloaded-{nb.lab.rule}')


@once
def test_without_widgets_a_picture_is_updated(masks):
    nb = masks
    fresh(nb)
    nb.add(nb.source('masked = MaskedCLIP(') + "\npage = watch(run, b.steps, show='html')\npage")
    cell = 'page = watch('

    def text():
        return ' '.join(nb.outputs(cell))

    nb.until(
        't => / step \\d/.test(" '
        '"+T.find(t).node.querySelector(".jp-OutputArea-output")?.innerText)',
        cell,
    )
    before = text()
    nb.until(
        '([t, s]) => '
        'T.find(t).node.querySelector(".jp-OutputArea-output").innerText.trim()!==s.trim()',
        [cell, before],
    )
    assert (
        nb.cell(cell).locator('.jp-OutputArea-output svg').count()
        and nb.cell(cell).locator('.jp-OutputArea-output img').count()
    )
    nb.shot(cell, f'html-{nb.lab.rule}')
    nb.ask('page.run.stop(); page.run.wait()')


@once
@pytest.mark.parametrize(
    'code, says',
    [
        ("lab_setup('nowhere/model')", "no model folder 'nowhere/model'"),
        ("lab_setup(data='nowhere-*.tar')", 'nowhere-*.tar'),
    ],
)
def test_a_mistake_in_a_cell_costs_one_sentence(masks, code, says):
    nb = masks
    nb.idle()
    nb.ask('from tinyclip.lab.setup import lab_setup')
    nb.add(code)
    (said,) = nb.outputs(code)
    assert says in said and len(said.strip().splitlines()) == 1 and 'Traceback' not in said
    nb.shot(code, f'mistake-{nb.lab.rule}')


FORM = 'app = ComparisonApp('


def test_two_ways_are_watched_from_a_form(both):
    nb = both
    nb.grows(FORM)
    assert (
        nb.cell(FORM).locator('input').first.is_visible()
        and nb.cell(FORM).locator('button:has-text("Pause")').is_enabled()
    )
    nb.press(FORM, 'Pause')
    nb.shows(FORM, 'paused')
    quiet(nb, FORM, 'app.live')
    still = nb.step(FORM)
    nb.page.wait_for_timeout(2000)
    assert nb.step(FORM) == still
    nb.shot(FORM, f'form-{nb.lab.rule}')

    nb.fill(FORM, 'teacher', 'ViT-B-33')
    nb.press(FORM, 'Run all')
    said = nb.says(FORM, "no model named 'ViT-B-33'")
    assert '\n' not in said and not any(
        w in ' '.join(nb.get('t => T.words(t)', FORM)) for w in ('Traceback', 'File "')
    )
    assert nb.cell(FORM).locator('.widget-html-content span[style*="c0392b"]').count() == 1
    nb.shot(FORM, f'form-mistake-{nb.lab.rule}')

    nb.press(FORM, 'Go on')  # what trained, still does
    nb.grows(FORM)
    nb.fill(FORM, 'teacher', 'shapes-teacher')
    nb.fill(FORM, 'steps each', '50')
    nb.press(FORM, 'Run all')
    nb.until('t => T.facts(t).includes("of 150")', FORM)
    nb.grows(FORM)
    assert nb.value('app.setup.batch_size') == 8
    nb.press(FORM, 'Stop')
    nb.shows(FORM, 'stopped')
    assert checkpoints(nb.lab.root / nb.value('str(app.comparison.folder)'))


@once
def test_a_finished_contest_shows_a_table_and_saves(both, tmp_path):
    from tinyclip.evaluate.cost import parameters
    from tinyclip.zoo import load

    nb = both
    setup = 'lab_setup(steps=8, batch_size=8, n=64)'
    short = f'short = ComparisonApp({setup}, share=.35).start()\nshort'
    nb.idle()
    nb.ask('from tinyclip.lab.comparison_app import ComparisonApp')
    nb.ask('from tinyclip.lab.setup import lab_setup')
    nb.add(short)
    nb.shows(short, 'finished')
    cell = nb.cell(short)
    nb.until('t => T.find(t).node.querySelectorAll("table").length>0', short)
    assert {'teacher', 'manual', 'automatic'} <= set(
        cell.locator('table').first.inner_text().split()
    )
    cell.get_by_label('save in', exact=True).fill(str(tmp_path))
    cell.get_by_label('save in', exact=True).press('Tab')
    nb.press(short, 'Save automatic')
    nb.says(short, 'saved: ')
    nb.shot(short, f'finished-{nb.lab.rule}')
    student = load(tmp_path / 'automatic').model
    assert parameters(student)['towers'] < 0.37 * parameters(load('shapes-teacher').model)['towers']


@once
def test_names_complete_in_a_fresh_notebook(browser, lab):
    copy_notebook(ROOT / 'nbs/labs/live_masks.ipynb', lab.root / 'names.ipynb')
    nb = Notebook(browser, lab, 'names.ipynb')
    nb.add('import tinyclip')
    assert nb.value("'torch' in __import__('sys').modules")  # so that Tab need not wait for it
    for code, names in (
        ('tinyclip.', tinyclip.__all__),
        ('tinyclip.Distiller.', ('fit', 'step', 'stop', 'plan')),
        ('tinyclip.Stages.', ('fit', 'stop', 'plan')),
    ):
        assert set(names) <= set(nb.completions(code))
    nb.add('tinyclip.Distiller?')
    (shown,) = nb.outputs('tinyclip.Distiller?')
    assert 'objective=None' in shown and 'Trainer of a student' in shown
    nb.close()
