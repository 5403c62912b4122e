"""`nbdev_proc_nbs` in the present folder, with some changes. Quarto is not needed (nbdev would
download it and install it with sudo). A name leads to the module of its own page first; in
backticks it becomes a link only where a module offers it (`__all__`), where it is plainly a name,
and nowhere inside another link. Figures become data that figures.html draws, and html stands where
quarto adds no scripts to it. Beside the pages come plotly, notebooks to download, and llms.txt."""

import ast
import html
import json
import re
import shutil
from functools import cache
from pathlib import Path

import yaml
from fastcore import docments
from nbdev import doclinks, processors, quarto
from plotly.offline import get_plotlyjs

PLOTLY = 'application/vnd.plotly.v1+json'
LINK = re.compile(r'!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)')
module = ''  # of the page at work


@cache
def offered(
    module: str,  # Path of an exported module
) -> frozenset:
    "Public names of a module"
    for o in ast.parse(Path(module).read_text(encoding='utf-8')).body:
        if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__':
            return frozenset(ast.literal_eval(o.value))
    return frozenset()


def is_name(word: str) -> bool:
    "Is this a name, and no plain word that happens to be one too, like `step` or `share`?"
    return bool(re.search(r'[^a-z]', word)) or word in offered('tinyclip/__init__.py')


def found(self, name):
    "A name's entry: of the page's own module, else of any"
    return self.syms.get(f'tinyclip.{module}.{name}') or of_any(self, name)


def doc(self, name):
    "Link to the documentation of a name; None where it is not public"
    o = found(self, name)
    if not isinstance(o, tuple):
        return o
    return o[0] if offered(o[1]) & set(name.split('.')) else None


def link_line(self, line):
    "Link the names of a line, but for those inside a link and those that are plain words"

    def link(m):
        return self._link_sym(m) if m[0].endswith('()`') or is_name(m[1]) else m[0]

    links = LINK.findall(line) + ['']
    return ''.join(
        doclinks._re_backticks.sub(link, between) + kept
        for between, kept in zip(LINK.split(line), links)
    )


def in_italics(
    docs: str,  # Docstring
) -> str:
    "A docstring as it stands under its name: all of its first paragraph in italics, not a line"
    first, blank, rest = docs.partition('\n\n')
    return f'_{first.strip()}_{blank}{rest}'


def begin(self):
    "Remember whose page this is"
    global module
    names = [c.directives_['default_exp'][0] for c in self.nb.cells if 'default_exp' in dir_of(c)]
    module = names[0] if names else ''
    begin_show_docs(self)


def dir_of(cell):
    return getattr(cell, 'directives_', {})


def drawn_later(
    figure: dict,  # What plotly stores: data, layout and frames
    still: str,  # What stands there where no script draws, in HTML
) -> str:
    "A figure as data of its page; figures.html draws it in the page's colours"
    layout = {k: v for k, v in figure['layout'].items() if k != 'width'}
    data = json.dumps({**figure, 'layout': layout}, separators=(',', ':')).replace('</', r'<\/')
    size = f'height:{int(layout.get("height", 450))}px'
    if wide := figure['layout'].get('width'):  # of a figure laid out for it: it may be wider
        size += f';min-width:{int(wide)}px'
    return (
        f'<div class="figure" style="{size}">'
        f'<script type="application/json">{data}</script>'
        f'<noscript>{still}</noscript></div>'
    )


def still_of(source: str) -> str:
    "The picture that a cell names for its README, else a sentence"
    m = re.search(r'^# readme: !\[(.*)\]\((.+)\)$', source, re.M)
    picture = f'<img src="{m[2]}" alt="{html.escape(m[1])}">' if m else ''
    return picture or 'This figure is drawn by a script, which did not arrive.'


def for_quarto(
    output: dict,  # Of a cell
    source: str,  # Of that cell
) -> dict:
    "An output without anything that makes quarto load scripts from elsewhere"
    data = output.get('data', {})
    page = ''.join(data.get('text/html', ''))
    if PLOTLY in data:
        page = drawn_later(data[PLOTLY], still_of(source))
    if not page:
        return output
    rest = {k: v for k, v in data.items() if k not in (PLOTLY, 'text/html', 'text/markdown')}
    return {**output, 'data': {'text/markdown': f'~~~~~{{=html}}\n{page}\n~~~~~', **rest}}


LIVE = re.compile(r'^\w+, \w+, step \d+ of \d+\s*$')  # what a dashboard prints without a browser
ALT = 'Buttons above curves of loss, kept share and accuracy, and maps of the masks of both towers'
DASHBOARD = f"""![In JupyterLab this cell is a dashboard: buttons to pause, to aim and to cut,
curves, and the masks of both towers](/images/live.png){{fig-alt="{ALT}"}}"""


def pictured(output: dict) -> dict:
    "The picture of a dashboard, where the line is stored that stands for it without a browser"
    if not LIVE.match(''.join(output.get('text', ''))):
        return output
    data = {'text/markdown': DASHBOARD, 'text/plain': 'a dashboard'}
    return dict(output_type='display_data', metadata={}, data=data)


def loads_plotly(output: dict) -> bool:
    "Is this what `notebook_connected` puts in front of the first figure?"
    kinds = output.get('data', {})
    return 'window.PlotlyConfig' in ''.join(kinds.get('text/html', '')) and PLOTLY not in kinds


def finish(page: Path):
    "A processed page as it goes to quarto: its outputs, and a link to the notebook itself"
    nb = json.loads(page.read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type'] == 'code':
            shown = [o for o in c['outputs'] if not loads_plotly(o)]
            c['outputs'] = [for_quarto(pictured(o), ''.join(c['source'])) for o in shown]
    if page.parent.name in ('labs', 'tutorials') and page.stem != 'index':
        at = page.relative_to('_proc')
        link = f'[Download this notebook](/notebooks/{at}){{.download download="{page.name}"}}'
        nb['cells'].insert(1, {'cell_type': 'markdown', 'metadata': {}, 'source': link})
        copy = Path('_proc/notebooks') / at
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path('nbs') / at, copy)
    page.write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding='utf-8')


def llms_txt(
    pages: list,  # Processed, in the order of the sidebars
) -> str:
    "What the site is, and a line per page, for readers that are no people"
    site = yaml.safe_load(Path('_proc/nbdev.yml').read_text())['website']
    lines = [f'# {site["title"]}', '', f'> {site["description"]}', '']
    for page in pages:
        cells = json.loads((Path('_proc') / page).read_text(encoding='utf-8'))['cells']
        front = yaml.safe_load(''.join(cells[0]['source']).strip().strip('-'))
        out = Path(page).with_name(front['output-file'])
        lines.append(f'- [{front["title"]}]({site["site-url"]}/{out}): {front["description"]}')
    return '\n'.join(lines) + '\n'


def in_order() -> list:
    "Pages as the sidebars name them"
    sidebar = Path('_proc/sidebar.yml').read_text(encoding='utf-8')
    return list(dict.fromkeys(re.findall(r'[\w/]+\.ipynb(?![\w#])', sidebar)))


if __name__ == '__main__':
    begin_show_docs, processors.exec_show_docs.begin = processors.exec_show_docs.begin, begin
    of_any, doclinks.NbdevLookup.__getitem__ = doclinks.NbdevLookup.__getitem__, found
    doclinks.NbdevLookup.doc = doc
    doclinks.NbdevLookup.link_line = link_line
    docments._ital_first = in_italics
    quarto._ensure_quarto = lambda: None
    # one process: most of the time goes into imports
    quarto.nbdev_proc_nbs.__wrapped__(n_workers=0)
    for page in [*Path('_proc').rglob('*.ipynb')]:
        finish(page)
    Path('_proc/llms.txt').write_text(llms_txt(in_order()), encoding='utf-8')
    Path('_proc/plotly.min.js').write_text(get_plotlyjs(), encoding='utf-8')
