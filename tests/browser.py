"""JupyterLab as a user has it: a server of its own, Debian's chromium, and a notebook whose
buttons are pressed and whose page is read"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
# seconds to wait for anything at all: a busy machine without bf16 units may take minutes for what
# takes a second elsewhere
LIMIT = 600
CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
SETTINGS = {  # <folder of user settings>/<package>/<plugin>.jupyterlab-settings
    '@jupyterlab/apputils-extension/notification': dict(
        fetchNews='false', checkForUpdates=False, doNotDisturbMode=True
    ),
    '@jupyterlab/notebook-extension/tracker': dict(
        windowingMode='none'
    ),  # cells off the screen can be read, too
    '@jupyterlab/docmanager-extension/plugin': dict(autosave=False),
}
# tornado, of a page that was closed while the server wrote to it
GONE = re.compile(
    r'Task exception was never retrieved\nfuture: '
    r'[^\n]*WebSocketProtocol13.*?\ntornado\.websocket\.WebSocketClosedError\n',
    re.S,
)


def copy_notebook(nb, to, **changes):
    """Copy a notebook without its outputs; `changes` replace pieces of its code, each of which
    must be there"""
    d = json.loads(Path(nb).read_text())
    for c in d['cells']:
        if c['cell_type'] != 'code':
            continue
        c['outputs'], c['execution_count'], c['source'] = [], None, ''.join(c['source'])
    for old, new in changes.items():
        assert any(old in c['source'] for c in d['cells'] if c['cell_type'] == 'code'), (
            f'{nb} no longer holds {old}'
        )
        for c in d['cells']:
            if c['cell_type'] == 'code':
                c['source'] = c['source'].replace(old, new)
    Path(to).write_text(json.dumps(d))


def until(what):
    "Wait until something comes true here"
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, 'it did not come true'
        time.sleep(0.1)


class Lab:
    "A running JupyterLab"

    def __init__(self, address, root, log):
        # `said`: errors of its pages
        self.address = address
        self.root = Path(root)
        self.log = log
        self.said = []

    def complaints(self):
        return [
            l
            for l in GONE.sub('', self.log.read_text()).splitlines()
            if 'Traceback' in l or 'ERROR' in l
        ]


@contextmanager
def jupyterlab(root, home, settings=None, **env):
    "Serve `root`; settings, logs and whatever else a server leaves go to `home`"
    home = Path(home)
    for k, v in (SETTINGS | (settings or {})).items():
        f = home / 'settings' / f'{k}.jupyterlab-settings'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(v))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    address, log = f'http://127.0.0.1:{port}', home / 'log'
    env = (
        os.environ
        | {f'JUPYTER_{n}_DIR': str(home / n.lower()) for n in ('CONFIG', 'RUNTIME', 'DATA')}
        | dict(IPYTHONDIR=str(home / 'ipython'), PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
        | env
    )
    command = [
        '-m',
        'jupyterlab',
        '--no-browser',
        '--allow-root',
        '--ip=127.0.0.1',
        f'--port={port}',
        '--IdentityProvider.token=',
        '--ServerApp.port_retries=0',
        f'--ServerApp.root_dir={root}',
        '--expose-app-in-browser',
        '--LabApp.extension_manager=readonly',
        f'--LabApp.user_settings_dir={home}/settings',
        f'--LabApp.workspaces_dir={home}/workspaces',
    ]
    with open(log, 'w') as out:
        p = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, env=env)
        try:

            def answers():
                if p.poll() is not None:
                    raise RuntimeError(log.read_text()[-2000:])
                try:
                    return urllib.request.urlopen(f'{address}/api/status', timeout=10)
                except OSError:
                    return False

            until(answers)
            yield Lab(address, root, log)
        finally:
            p.terminate()  # shuts the kernels down, too
            p.wait(LIMIT)


@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as pw:
        b = pw.chromium.launch(
            executable_path=CHROMIUM,
            args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'],
        )
        try:
            yield b
        finally:
            b.close()


SCRIPT = '''
const nb = () => window.jupyterapp?.shell.currentWidget;
const coded = () => nb().content.widgets.filter(
  c => c.model.type==='code' && c.model.sharedModel.source.trim());
const find = text => coded().findLast(c => c.model.sharedModel.source.includes(text));
window.T = {
  nb, coded, find,
  ready: () => nb()?.context?.isReady
    && nb().sessionContext.session?.kernel?.connectionStatus==='connected',
  status: () => nb().sessionContext.session?.kernel?.status,
  index: text => nb().content.widgets.indexOf(find(text)),
  run: text => {
    const c = find(text);
    c.model.executionCount = null;
    nb().content.activeCellIndex = nb().content.widgets.indexOf(c);
    window.jupyterapp.commands.execute('notebook:run-cell') },
  ran: text => find(text).model.executionCount!==null,
  errors: () => coded().flatMap(c => c.model.outputs.toJSON())
    .filter(o => o.output_type==='error').map(o => o.ename+': '+o.evalue),
  add: source => {
    const m = nb().content.model.sharedModel;
    m.insertCell(m.cells.length, {cell_type:'code', source, metadata:{added:true}}) },
  edit: text => {
    const n = nb().content, c = find(text);
    n.activeCellIndex = n.widgets.indexOf(c);
    n.mode = 'edit';
    c.editor.focus();
    c.editor.setCursorPosition({line:0, column:text.length}) },
  tidy: () => {
    const m = nb().content.model.sharedModel;
    for (let i = m.cells.length-1; i>=0; i--)
      if (m.cells[i].getMetadata('added')) m.deleteCell(i) },
  words: text => [...find(text).node.querySelectorAll('.widget-html-content')]
    .map(e => e.innerText.trim()),
  facts: text => T.words(text).find(
    w => /^(not started|preparing|training|paused|stopped|finished|failed)/.test(w)) ?? '',
  step: text => +(T.facts(text).match(/step (\\d+)/)?.[1] ?? 0),
  traces: text => [...find(text).node.querySelectorAll('.js-plotly-plot')]
    .flatMap(g => g._fullData ?? []),
  points: text => T.traces(text).reduce((n, t) => n + (t.z || t.y || []).length, 0),
  line: (text, name) => [...(T.traces(text).find(t => t.name===name)?.y ?? [])],
  ask: async code => {
    let out = '';
    const f = nb().sessionContext.session.kernel.requestExecute({code, store_history:false});
    f.onIOPub = m => {
      if (m.header.msg_type==='stream') out += m.content.text;
      if (m.header.msg_type==='error') out += m.content.ename+': '+m.content.evalue };
    await f.done;
    return out.trim() }}'''


class Notebook:
    "A notebook in a page; a cell is named by a piece of its code"

    def __init__(self, browser, lab, name):
        self.browser = browser
        self.lab = lab
        self.name = name
        self.page = None
        self.open()

    def open(self):
        "Open its page, again if it was closed"
        if not self.page or self.page.is_closed():
            self.page = self.browser.new_page(viewport=dict(width=1400, height=1400))
            self.page.set_default_timeout(LIMIT * 1000)
            self.page.add_init_script(SCRIPT)
            self.page.on(
                'console', lambda m: self.lab.said.append(m.text) if m.type == 'error' else None
            )
            self.page.on('pageerror', lambda e: self.lab.said.append(str(e)))
        self.page.goto(f'{self.lab.address}/doc/tree/{self.name}')
        self.until('T.ready()')
        return self

    def close(self):
        "Its kernel goes, too"
        self.page.evaluate('T.nb().sessionContext.shutdown()')
        self.page.close()

    def get(self, script, arg=None):
        return self.page.evaluate(script, arg)

    def until(self, script, arg=None):
        "Wait until a script comes true; what the page said goes into the error"
        try:
            self.page.wait_for_function(script, arg=arg)
        except Exception:
            (ROOT / 'test-artefacts').mkdir(exist_ok=True)
            self.page.screenshot(path=ROOT / 'test-artefacts' / 'failed.png')
            cell = arg[0] if isinstance(arg, list) else arg
            shown = (
                [self.step(cell), self.points(cell), *self.get('t => T.words(t)', cell)]
                if cell and self.get('t => T.index(t)>=0', cell)
                else ''
            )
            raise AssertionError(
                f'{script} with {arg} did not come true; the cell shows {shown}, the page '
                f'says {set(self.lab.said)}, cells say {self.get("T.errors()")}'
            ) from None

    def command(self, name):
        # braces: do not wait
        self.page.evaluate('n => { window.jupyterapp.commands.execute(n) }', name)

    def save(self):
        self.page.evaluate('T.nb().context.save()')

    def run_all(self):
        "Run all cells but those that `add` added, which go; an error in one is raised here"
        self.tidy()
        self.get('T.coded().forEach(c => c.model.executionCount = null)')
        self.command('notebook:run-all-cells')
        self.until('T.errors().length || T.coded().every(c => c.model.executionCount!==null)')
        assert not (e := self.get('T.errors()')), e
        self.idle()

    def tidy(self):
        "Take away the cells that were added"
        self.idle()
        self.get('T.tidy()')

    def run(self, cell, wait=True):
        "Run one cell"
        self.get('t => T.run(t)', cell)
        if wait:
            self.until('t => T.ran(t)', cell)
            self.idle()

    def add(self, source, wait=True):
        "Add a cell at the end, and run it"
        self.get('s => T.add(s)', source)
        self.run(source, wait)

    def idle(self):
        self.until("T.status()==='idle'")

    def interrupt(self):
        self.command('notebook:interrupt-kernel')

    def ask(self, code):
        "Run code in the kernel, out of sight, between cells; what it printed"
        return self.page.evaluate('c => T.ask(c)', code)

    def value(self, expression):
        return json.loads(self.ask(f'import json; print(json.dumps({expression}))'))

    def until_kernel(self, expression):
        "Wait until an expression comes true in the kernel"
        end = time.monotonic() + LIMIT
        while not self.value(f'bool({expression})'):
            assert time.monotonic() < end, f'{expression} did not come true'
            self.page.wait_for_timeout(200)

    def completions(self, code):
        "What Tab offers at the end of a new cell, which is not run; a slow kernel is asked again"
        self.get('s => T.add(s)', code)
        self.get('t => T.edit(t)', code)
        shown = self.page.locator('.jp-Completer:not(.lm-mod-hidden) .jp-Completer-match')

        def offered():
            self.page.keyboard.press('Tab')
            self.page.wait_for_timeout(1500)
            return shown.count()

        until(offered)
        names = shown.all_inner_texts()
        self.page.keyboard.press('Escape')
        self.tidy()
        return names

    def cell(self, cell):
        return self.page.locator('.jp-Notebook-cell').nth(self.get('t => T.index(t)', cell))

    def outputs(self, cell):
        return self.cell(cell).locator('.jp-OutputArea-output').all_inner_texts()

    def source(self, cell):
        return self.get('t => T.find(t).model.sharedModel.source', cell)

    def press(self, cell, button):
        self.cell(cell).locator(f'button.jupyter-button:has-text("{button}")').first.click()

    def slide(self, cell, *keys):
        "Move the cell's first slider, by keyboard"
        self.cell(cell).locator('.widget-slider .noUi-handle').first.focus()
        for k in keys:
            self.page.keyboard.press(k)

    def fill(self, cell, label, text):
        "Type into a field of a form"
        field = self.cell(cell).get_by_label(label, exact=True).first
        field.fill(text)
        field.press('Tab')

    def step(self, cell):
        return self.get('t => T.step(t)', cell)

    def points(self, cell):
        return self.get('t => T.points(t)', cell)

    def grows(self, cell):
        "See the figure change and the steps count up; the step then shown"
        self.until(
            '([t, n, s]) => T.points(t)>n && T.step(t)>s',
            [cell, self.points(cell), self.step(cell)],
        )
        return self.step(cell)

    def shows(self, cell, word):
        self.until('([t, w]) => T.facts(t).startsWith(w)', [cell, word])

    def says(self, cell, words):
        "Wait for words in the output of widgets, and return the whole sentence"
        self.until('([t, w]) => T.words(t).some(s => s.includes(w))', [cell, words])
        return next(s for s in self.get('t => T.words(t)', cell) if words in s)

    def shot(self, cell, name):
        "Keep a picture of a cell in `test-artefacts`"
        (ROOT / 'test-artefacts').mkdir(exist_ok=True)
        box = self.cell(cell).bounding_box()
        self.page.set_viewport_size(dict(width=1400, height=max(1400, int(box['height']) + 200)))
        self.page.mouse.move(0, 0)
        self.cell(cell).screenshot(path=ROOT / 'test-artefacts' / f'{name}.png')
        self.page.set_viewport_size(dict(width=1400, height=1400))
