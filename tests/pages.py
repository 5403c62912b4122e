"""Pages of the site in a real browser: served from a folder, visited, and asked what a reader
would see"""

import json
import threading
from contextlib import contextmanager
from functools import partial
from html import escape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from browser import LIMIT, ROOT

# pairs of texts of one figure that lie on each other by more than a hair, texts that it cuts, texts
# that lie under a slider, and a legend above that hangs down into its plot
TEXTS = '''() => [...document.querySelectorAll('div.figure')].flatMap((figure, n) => {
  const seen = [...figure.querySelectorAll('svg text')]
    .map(t => [t.textContent, t.getBoundingClientRect()])
    .filter(([words, box]) => words.trim() && box.width > 1 && box.height > 1);
  const edge = figure.getBoundingClientRect(), out = [];
  const {orientation, y} = figure._fullLayout?.legend ?? {};
  const above = orientation === 'h' && y > 1 && figure.querySelector('.legend');
  for (const plot of above ? figure.querySelectorAll('.nsewdrag') : [])
    if (above.getBoundingClientRect().bottom - plot.getBoundingClientRect().top > 2
        && above.getBoundingClientRect().top < plot.getBoundingClientRect().top)
      out.push(`figure ${n}: its legend lies on its plot`);
  const rails = [...figure.querySelectorAll('.slider-rail-rect')]
    .map(r => r.getBoundingClientRect());
  for (const r of rails) for (const [words, box] of seen)
    if (Math.min(r.right, box.right) - Math.max(r.left, box.left) > 2
        && Math.min(r.bottom, box.bottom) - Math.max(r.top, box.top) > 2)
      out.push(`figure ${n}: ${words} is under a slider`);
  seen.forEach(([a, p], i) => {
    if (p.left < edge.left - 2 || p.right > edge.right + 2) out.push(`figure ${n}: ${a} is cut`);
    for (const [b, q] of seen.slice(i + 1))
      if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2
          && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4)
        out.push(`figure ${n}: ${a} on ${b}`);
  });
  return out;
})'''
# the lowest contrast of the texts that a selector finds with what is behind them, and that text
CONTRAST = r'''selector => {
  const channels = c => c.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > .5) return c;
    }
    return [255, 255, 255];
  };
  let worst = [21, 'nothing'];
  for (const e of document.querySelectorAll(selector)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const [a, b] = [light(channels(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst[0]) worst = [ratio, e.textContent.trim().slice(0, 60)];
  }
  return worst;
}'''
# outputs of which a reader sees a part only: beyond the edge, and nothing moves under a finger
CUT = '''() => [...document.querySelectorAll('.cell-output, main pre, main table, .gallery')]
  .filter(e => e.getClientRects().length)
  .filter(e => {
    let held = e;
    while (held && !/auto|scroll/.test(getComputedStyle(held).overflowX)) held = held.parentElement;
    const edge = document.querySelector('main').getBoundingClientRect();
    return !held && e.getBoundingClientRect().right > edge.right + 2;
  })
  .map(e => `${e.tagName} ${e.textContent.trim().slice(0, 40)} is cut`)'''
# links to the source that name another module than that of the page
SOURCES = '''module => [...document.querySelectorAll('main a')]
  .filter(a => a.textContent === 'source' && a.href.includes('/blob/'))
  .map(a => a.href.replace(/#.*/, ''))
  .filter(u => !u.endsWith(`/${module}.py`) && !u.endsWith(`/${module}/__init__.py`))'''
DRAWN = "() => [...document.querySelectorAll('div.figure')].every(f => f.dataset.drawn)"
PLAYER = '''() => {
  const figures = [...document.querySelectorAll('div.figure')];
  const f = figures.find(f => f._fullLayout?.updatemenus?.length);
  if (!f) return null;
  const s = f._fullLayout.sliders[0];
  const label = f.querySelector('.slider-label')?.textContent;
  return {active: s.active, label, steps: s.steps.length};
}'''


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def served(folder):
    "Address of a folder"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()


@contextmanager
def tab(browser, wide=1280, dark=False):
    "A page that goes nowhere yet, with what it asks for and complains of"
    context = browser.new_context(
        viewport=dict(width=wide, height=900), color_scheme='dark' if dark else 'light'
    )
    page = context.new_page()
    page.set_default_timeout(LIMIT * 1000)
    page.said, page.asked = [], []
    page.on('console', lambda m: page.said.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: page.said.append(str(e)))
    page.on('request', lambda r: page.asked.append(r.url))
    try:
        yield page
    finally:
        context.close()


@contextmanager
def visit(browser, address, wide=1280, dark=False, **blocked):
    "A page that is open, with what it asked for and complained of"
    with tab(browser, wide, dark) as page:
        for pattern in blocked.values():
            page.route(pattern, lambda route: route.abort())
        page.goto(address)
        yield page


def play(page):
    "Play a figure, pause it; the places where its slider stood before, and when paused"
    before = page.evaluate(PLAYER)
    buttons = page.locator('.updatemenu-button')
    buttons.nth(0).click()
    page.wait_for_function(f'n => ({PLAYER})().active !== n', arg=before['active'])
    first = page.evaluate(PLAYER)
    page.wait_for_function(f'n => ({PLAYER})().active > n', arg=first['active'])
    buttons.nth(1).click()
    page.wait_for_timeout(500)
    return before, page.evaluate(PLAYER)


def drawn_page(site, name):
    """The figures of a processed page as quarto would put them on it, without quarto: its style
    sheet's palette in both themes, our own sheet, the outputs, figures.html"""
    nb = json.loads((site / name).read_text(encoding='utf-8'))
    body = []
    for cell in nb['cells']:
        for o in cell.get('outputs', []):
            shown = ''.join(o.get('data', {}).get('text/markdown', ''))
            if 'class="figure"' in shown:
                inner = shown.split('\n', 1)[1].rsplit('\n', 1)[0]
                body.append(f'<div class="cell-output-display">{inner}</div>')
    palette = {
        False: dict(ink='#1e2735', paper='#ffffff', line='#d6d8da', low='#f6f6f7', quiet='#5d6570'),
        True: dict(ink='#d8dde6', paper='#14181f', line='#373c43', low='#1c2027', quiet='#a1a6ae'),
    }

    def root(colours):
        return ':root{' + ''.join(f'--{k}:{v};' for k, v in colours.items()) + '}'

    sheet = (ROOT / 'nbs' / 'styles.css').read_text(encoding='utf-8')
    script = (ROOT / 'nbs' / 'figures.html').read_text(encoding='utf-8')
    up = '../' * name.count('/') or './'
    page = (
        f'<!doctype html><meta charset=utf-8><meta name="quarto:offset" content="{up}">'
        '<link rel=icon href="data:,">'
        f'<title>{escape(name)}</title><style>{root(palette[False])}'
        f'@media(prefers-color-scheme:dark){{{root(palette[True])}}}'
        'body{margin:0 auto;padding:0 16px;max-width:850px;background:var(--paper);'
        f'color:var(--ink)}}{sheet}</style>{"".join(body)}{script}'
    )
    to = (site / name).with_suffix('.drawn.html')
    to.write_text(page, encoding='utf-8')
    return to.relative_to(site).as_posix()
