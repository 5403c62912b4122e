"""The site without quarto: runs nbdev_proc_nbs in a copy of the tree, then names, a sentence each,
what quarto would stumble over or a reader would miss. `python tools/site.py` leaves the processed
pages in _proc/ and exits with 1 if anything is wrong."""

import ast
import fnmatch
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from configparser import ConfigParser
from functools import cached_property
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROCESS = ROOT / 'tools' / 'process_pages.py'
WIDGET = 'application/vnd.jupyter.widget-view+json'
STATE = 'application/vnd.jupyter.widget-state+json'
# what quarto puts on a page
SHOWN = {
    'text/html',
    'text/markdown',
    'image/svg+xml',
    'image/png',
    'image/jpeg',
    'text/plain',
}
LATER = {'try_it/index.html'}  # `make docs` makes it when quarto is done
THEMES = set(
    [
        'default',
        'cerulean',
        'cosmo',
        'cyborg',
        'darkly',
        'flatly',
        'journal',
        'litera',
        'lumen',
        'lux',
        'materia',
        'minty',
        'morph',
        'pulse',
        'quartz',
        'sandstone',
        'simplex',
        'sketchy',
        'slate',
        'solar',
        'spacelab',
        'superhero',
        'united',
        'vapor',
        'yeti',
        'zephyr',
    ]
)
# what plotly's cartesian bundle draws, of what we may come to use (tools/small_plotly.py)
TRACES = {'bar', 'box', 'contour', 'heatmap', 'histogram', 'image', 'pie', 'scatter', 'violin'}
PRIVATE = re.compile(r'(?:/home/|/root/|/Users/|/tmp/|site-packages)[^\s"\']*')
FILE = re.compile(r'[^:\s*]+\.(?:css|scss|html|js|lua|svg|png|jpe?g|ipynb|qmd|yml)')
WITH_FIGURES = 'labs', 'tutorials'  # folders whose pages show at least one
WITHOUT = 'labs/index.ipynb', 'tutorials/when_something_fails.ipynb'  # but for these
COPIES = 'notebooks'  # the folder of what is only downloaded
RAW = re.compile(r'^~~~~~\{=html\}\n(.*?)\n~~~~~$', re.M | re.S)  # html, as process_pages leaves it


def text(s):
    return s if isinstance(s, str) else ''.join(s or [])


def is_list(o):
    return o if isinstance(o, list) else [] if o is None else [o]


# --- the site as quarto would read it ---


def process(
    root: Path,  # A tree with settings.ini
    to: Path,  # Becomes the processed site; what was there is removed
):
    """`nbdev_proc_nbs` in a copy, so that neither the index of names nor a stale page of the
    tree plays a part"""
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root / 'settings.ini', encoding='utf-8')
    with tempfile.TemporaryDirectory() as tmp:
        for n in (ini['DEFAULT']['nbs_path'], ini['DEFAULT']['lib_path']):
            shutil.copytree(
                root / n,
                Path(tmp) / n,
                symlinks=True,
                ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs'),
            )
        for n in ('settings.ini', '_quarto.yml'):
            shutil.copy(root / n, tmp)
        env = {'OMP_NUM_THREADS': '1', **os.environ, 'PYTHONPATH': tmp}
        done = subprocess.run(
            [sys.executable, PROCESS], cwd=tmp, env=env, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f'nbdev_proc_nbs failed:\n{done.stderr[-3000:]}')
        shutil.rmtree(to, ignore_errors=True)
        shutil.move(Path(tmp) / '_proc', to)


class Strict(yaml.SafeLoader):
    "YAML as quarto reads it: a key that stands twice is an error, not a silent choice"

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for i, (n, _) in enumerate(node.value):
            if (k := keys[i]) in keys[:i]:
                raise yaml.YAMLError(
                    f'{k!r} stands twice in one mapping, in line {n.start_mark.line + 1}'
                )
        return super().construct_mapping(node, deep)


def leaves(
    o,  # What YAML holds
    at: str = '',  # Where that is
):  # Yields (where, value)
    "Every value of a configuration"
    if isinstance(o, dict):
        for k, v in o.items():
            yield from leaves(v, f'{at}.{k}' if at else str(k))
    elif isinstance(o, list):
        for v in o:
            yield from leaves(v, at)
    else:
        yield at, o


def merged(a: dict, b: dict) -> dict:
    "Two configurations as one"
    return a | {
        k: merged(a[k], v) if isinstance(a.get(k), dict) and isinstance(v, dict) else v
        for k, v in b.items()
    }


def no_code(md: str) -> str:
    "Markdown without its code, where brackets and hashes mean nothing"
    md = re.sub(r'^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\1[`~]*\s*$', '', md, flags=re.M | re.S)
    return re.sub(
        r'(`+)(?!`).+?(?<!`)\1(?!`)', lambda m: re.sub(r'[\[\]()<>#]', '', m[0].strip('`')), md
    )


def slug(heading: str) -> str:
    "The anchor pandoc gives a heading"
    s = re.sub(r'!?\[([^\]]*)\]\([^)]*\)|<[^>]+>', r'\1', heading)
    s = re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', s).strip()).lower()
    return re.sub(r'^[\W\d_]+', '', s) or 'section'


class Page:
    "A processed notebook"

    def __init__(self, site: Path, path: Path):
        self.name = path.relative_to(site).as_posix()
        self.nb = json.loads(path.read_text(encoding='utf-8'))
        self.cells = self.nb['cells']
        first = (
            text(self.cells[0]['source'])
            if self.cells and self.cells[0]['cell_type'] == 'raw'
            else ''
        )
        m = re.match(r'---\s*\n(.*?)\n---\s*', first, flags=re.S)
        self.front = (yaml.load(m[1], Strict) if m else None) or {}
        self.out = posixpath.join(
            posixpath.dirname(self.name),
            self.front.get('output-file', Path(self.name).with_suffix('.html').name),
        )

    @property
    def code(self):
        return [c for c in self.cells if c['cell_type'] == 'code']

    @property
    def outputs(self):
        return [(c, o) for c in self.code for o in c.get('outputs', [])]

    @cached_property
    def markdown(self):  # cells and outputs, raw html included
        md = [text(c['source']) for c in self.cells if c['cell_type'] == 'markdown']
        return md + [text(o.get('data', {}).get('text/markdown')) for _, o in self.outputs]

    @cached_property
    def html(self):  # raw html, without what scripts hold
        raw = '\n'.join(h for md in self.markdown for h in RAW.findall(md))
        return re.sub(r'(<script\b[^>]*>).*?</script>', r'\1', raw, flags=re.S)

    @cached_property
    def prose(self):
        return '\n\n'.join([*(no_code(RAW.sub('', md)) for md in self.markdown), self.html])

    @cached_property
    def anchors(self):
        seen = {}
        ids = set(re.findall(r'\bid\s*=\s*["\']([^"\']+)', self.prose)) | set(
            re.findall(r'\{#([^\s}]+)', self.prose)
        )
        for h in re.findall(
            r'^#{1,6}[ \t]+(.+?)[ \t#]*$', re.sub(r'\{[^}]*\}', '', self.prose), flags=re.M
        ):
            s = slug(h)
            n = seen[s] = seen.get(s, -1) + 1
            ids.add(f'{s}-{n}' if n else s)
        return ids

    @cached_property
    def links(self):
        md = r'(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)'
        return list(
            dict.fromkeys(
                [u for _, u in re.findall(md, self.prose)]
                + re.findall(r'^\[[^\]]+\]:\s+(\S+)', self.prose, flags=re.M)
                + [
                    unescape(u)
                    for u in re.findall(r'\b(?:href|src)\s*=\s*["\']([^"\']+)', self.prose)
                ]
            )
        )


# --- what can be wrong ---


def read_config(site: Path, wrong: list) -> dict:
    "_quarto.yml and the files it names as metadata, as one"
    cfg, files = {}, ['_quarto.yml']
    while files:
        n = files.pop(0)
        try:
            one = yaml.load((site / n).read_text(encoding='utf-8'), Strict) or {}
        except FileNotFoundError:
            wrong.append(f'{n} is not there.')
            continue
        except yaml.YAMLError as e:
            wrong.append(f"{n} is no valid YAML: {' '.join(str(e).split())}.")
            continue
        if not isinstance(one, dict):
            wrong.append(f'{n} holds no mapping.')
            continue
        files += is_list(one.get('metadata-files'))
        cfg = merged(cfg, one)
    return cfg


def check_config(site: Path, cfg: dict) -> list:
    "Files and themes that the configuration names"
    wrong = [
        f'{at} names {v}, which is not there.'
        for at, v in leaves(cfg)
        if isinstance(v, str)
        and at != 'metadata-files'
        and FILE.fullmatch(v)
        and not (site / v.lstrip('/')).is_file()
    ]
    globs = is_list(cfg.get('project', {}).get('resources'))
    wrong += [
        f'project.resources names {g}, which matches nothing.'
        for g in globs
        if not [*site.glob(g.lstrip('/'))]
    ]
    theme = cfg.get('format', {}).get('html', {}).get('theme', [])
    for at, v in leaves(theme, 'theme'):
        if v not in THEMES and not v.endswith('.scss'):
            wrong.append(f'{at} names {v}, which is neither a theme of quarto nor a .scss file.')
        elif (
            v.endswith('.scss')
            and (site / v).is_file()
            and not re.search(
                r'^/\*-- scss:(defaults|rules|functions|mixins|uses) --\*/$',
                (site / v).read_text(),
                flags=re.M,
            )
        ):
            wrong.append(
                f'{v} has no line like /*-- scss:rules --*/, and quarto refuses a theme file '
                'without one.'
            )
    web = cfg.get('website', {})
    for kind in ('open-graph', 'twitter-card'):
        image = (web.get(kind) or {}).get('image') if isinstance(web.get(kind), dict) else None
        if not image:
            wrong.append(f'website.{kind} names no image.')
        elif not image.startswith('/'):
            wrong.append(
                f'website.{kind}.image is {image}; without a slash in front, pages in '
                'folders look for it in their own.'
            )
        elif not any(fnmatch.fnmatch(image.lstrip('/'), g.lstrip('/')) for g in globs):
            wrong.append(
                f'website.{kind}.image is {image}, which project.resources does not publish.'
            )
    if not str(web.get('site-url', '')).startswith('http'):
        wrong.append('website.site-url is missing, and without it social cards have no address.')
    return wrong


def check_sidebar(cfg: dict, pages: dict) -> list:
    "Each page stands in one sidebar, once; entries within pages lead somewhere"
    named = [
        v.lstrip('/')
        for at, v in leaves(is_list(cfg.get('website', {}).get('sidebar')), 'sidebar')
        if re.search(r'\.(contents|href|file|section)$', at)
        and isinstance(v, str)
        and re.search(r'\.ipynb(#|$)', v)
    ]
    entries = [v for v in named if '#' not in v]
    within = [v.split('#') for v in named if '#' in v]
    return (
        [
            f'The sidebar names {p}#{a}, which is not there.'
            for p, a in within
            if p not in pages or a not in pages[p].anchors
        ]
        + [f'{p} is not in the sidebar, so no reader finds it.' for p in pages if p not in entries]
        + [
            f'The sidebar names {e} {entries.count(e)} times.'
            for e in dict.fromkeys(entries)
            if entries.count(e) > 1
        ]
    )


def check_fronts(pages: dict) -> list:
    "Titles, descriptions, and the names of the files they become"
    wrong, by = [], {}
    for n, p in pages.items():
        for k in ('title', 'description'):
            if not isinstance(p.front.get(k), str) or not p.front[k].strip():
                wrong.append(
                    f'{n} has no {k}: its first cell must be "# Title", a blank line, "> one '
                    'sentence".'
                )
        by.setdefault(p.out.lower(), []).append(n)
    return wrong + [
        f"{' and '.join(ns)} both become {h}; the number in front does not count."
        for h, ns in by.items()
        if len(ns) > 1
    ]


def check_links(site: Path, pages: dict, web: dict) -> list:
    "Links and images inside the site, with their anchors"
    wrong, by_html = [], {p.out: p for p in pages.values()}
    base, repo = (str(web.get(k) or 'https://').rstrip('/') + '/' for k in ('site-url', 'repo-url'))
    for n, p in pages.items():
        attached = {a for c in p.cells for a in c.get('attachments', {})}
        for link in p.links:
            # nbdev links names and sources in full
            own = (
                link.removeprefix(base)
                if link.startswith(base) and not link.startswith(repo + 'blob/')
                else None
            )
            if own is None and re.match(r'[a-zA-Z][\w+.-]*:|//', link):
                if link.startswith('attachment:') and unquote(link[11:]) not in attached:
                    wrong.append(f'{n} shows {link}, which no cell holds.')
                continue
            path, _, anchor = unquote(own if own is not None else link).partition('#')
            path = path.partition('?')[0]
            to = (
                path.lstrip('/')
                if own is not None or path.startswith('/')
                else posixpath.normpath(posixpath.join(posixpath.dirname(n), path))
                if path
                else n
            )
            page = pages.get(to) or by_html.get(to or 'index.html')
            if to in LATER:
                continue
            if not page and (to.startswith('..') or not (site / to).is_file()):
                wrong.append(f'{n} links to {link}, which is not on the site.')
            # nbdev links a method as class.method, a heading that only show_doc makes; its class is
            # near enough
            elif (
                page
                and anchor
                and not page.anchors & {anchor, anchor.rpartition('.')[0] if own else anchor}
            ):
                wrong.append(f'{n} links to {link}, but {page.name} has no anchor #{anchor}.')
    return wrong


def check_names(p: Page) -> list:
    "Links that nbdev makes of names: none within another, and sources of the page's own module"
    inner = r'\[(?:[^\[\]]|\[[^\[\]]*\](?!\())*\[[^\[\]]*\]\(https?://[^)]*\)[^\[\]]*\]\('
    wrong = [
        f'{p.name} has a link inside a link, which shows as raw markdown: {m[0][:60]}.'
        for md in p.markdown
        for m in re.finditer(inner, re.sub(r'^\s*(```|~~~).*?^\s*\1', '', md, flags=re.M | re.S))
    ]
    module = p.out.removesuffix('.html').removesuffix('/index') + '.py'
    return wrong + [
        f'{p.name} links the source of {path}, which is not its module.'
        for md in p.markdown
        for path in re.findall(r'\[source\]\([^)]*/blob/[^/)]+/([^)#]*)#', md)
        if not f'/{path}'.endswith((f'/{module}', f'/{module[:-3]}/__init__.py'))
    ]


def speaks(source: str) -> bool:
    """Whether a cell surely shows something: it prints, or ends in a value. The result of a
    function may be None, so it does not count."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False

    def calls(o):
        return getattr(o, 'func', None) and (
            getattr(o.func, 'id', None) or getattr(o.func, 'attr', '')
        )

    if any(isinstance(s, ast.Expr) and calls(s.value) in ('print', 'display') for s in body):
        return True
    if not body or not isinstance(body[-1], ast.Expr) or source.rstrip().endswith(';'):
        return False
    v = body[-1].value
    if isinstance(v, ast.Call):
        return calls(v)[:1].isupper()  # Table(...), a class
    return not isinstance(v, (ast.Await, ast.Yield)) and not (
        isinstance(v, ast.Constant) and v.value in (None, ...)
    )


def check_silence(p: Page) -> list:
    "Cells without the output they were run for"

    def called(c):
        return next(
            (l for l in text(c['source']).splitlines() if l.strip() and not l.startswith('#|')), ''
        )[:60]

    off = re.compile(r'^#\|\s*(eval|output):\s*false', re.M)
    wrong = [
        f'{p.name} has no output stored for the cell "{called(c)}".'
        for c in p.code
        if not c.get('outputs') and not off.search(text(c['source'])) and speaks(text(c['source']))
    ]
    pictures = [
        o
        for _, o in p.outputs
        if any(
            k.startswith('image/')
            or k == 'text/markdown'
            and re.search(r'<svg|<img|<canvas|<div class="figure"', text(v))
            for k, v in o.get('data', {}).items()
        )
    ]
    if p.name.split('/')[0] in WITH_FIGURES and p.name not in WITHOUT and not pictures:
        wrong.append(f'{p.name} shows no figure.')
    return wrong


def check_outputs(p: Page) -> list:
    "Outputs that would show nothing, the wrong thing, or what concerns nobody"
    wrong = []
    state = p.nb.get('metadata', {}).get('widgets', {}).get(STATE, {}).get('state', {})
    for c, o in p.outputs:
        data = o.get('data', {})
        said = '\n'.join(
            [
                text(o.get('text')),
                *(text(v) for k, v in data.items() if k in SHOWN and not k.startswith('image/')),
            ]
        )

        def bad(s):
            return wrong.append(
                f"{p.name}: an output {s} (below "
                f"\"{next(iter(text(c['source']).splitlines()), '')[:60]}\")."
            )

        if o['output_type'] == 'error':
            bad(f"holds an error, {o.get('ename')}")
            continue
        if o.get('name') == 'stderr':
            bad(f'holds what went to stderr, {said.strip()[:60]!r}')
        if m := re.search(r'\b\w*Warning: |Traceback \(most recent', said):
            bad(f'holds {m[0].strip(": ")!r}')
        if m := PRIVATE.search(said):
            bad(f'holds a private path, {m[0]}')
        if m := re.search(r'\bat 0x[0-9a-f]{6,}', said):
            bad(f'holds an address in memory, {m[0]!r}')
        if WIDGET in data and data[WIDGET].get('model_id') not in state:
            bad(
                'is a live widget, which shows nothing without a kernel and hides what is '
                'stored beside it'
            )
        elif data and not SHOWN & data.keys():
            bad(f"has only {', '.join(data)}, which quarto does not show; add text/html")
        elif set(data) == {'text/plain'} and re.match(
            r'<[\w.]+ object|<IPython|(?:\w*Figure\w*|\w+Box|Output)\(', said.strip()
        ):
            bad(f'shows only how an object prints, {said.strip()[:40]!r}')
        drawn = any(k.startswith('image/') for k in data)
        if drawn and '#| fig-alt:' not in text(c['source']):
            bad('is a picture without words; begin its cell with #| fig-alt:')
        if 'text/html' in data:
            bad(
                'is html, for which quarto loads scripts from elsewhere; process_pages makes it raw'
            )
        raw = '\n'.join(RAW.findall(text(data.get('text/markdown'))))
        for figure in re.findall(r'<script type="application/json">(.*?)</script>', raw, re.S):
            for kind in {t.get('type', 'scatter') for t in json.loads(figure)['data']} - TRACES:
                bad(f'draws {kind}, which is not in the bundle of plotly that the site loads')
        if m := re.search(
            r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(https?://[^"]*)', raw
        ):
            bad(f'asks {m[1]}, another host')
    return wrong


def pages_of(site: Path) -> list:  # Files
    "Processed notebooks, without the copies that are only downloaded"
    return [f for f in sorted(site.rglob('*.ipynb')) if COPIES not in f.relative_to(site).parts]


def check(site: Path) -> list:  # Sentences
    "All that is wrong with a processed site"
    wrong = []
    cfg = read_config(site, wrong)
    pages = {p.name: p for p in (Page(site, f) for f in pages_of(site))}
    wrong += (
        check_config(site, cfg)
        + check_sidebar(cfg, pages)
        + check_fronts(pages)
        + check_links(site, pages, cfg.get('website', {}))
    )
    for p in pages.values():
        wrong += check_names(p) + check_silence(p) + check_outputs(p)
    return wrong or ([] if pages else [f'{site} holds no page.'])


def main(args=None) -> int:  # What the shell gets
    "Process, check, tell"
    p = ArgumentParser(description=__doc__)
    p.add_argument(
        '--out',
        type=Path,
        default=ROOT / '_proc',
        help='the folder that becomes the processed site',
    )
    to = p.parse_args(args).out
    process(ROOT, to)
    wrong = check(to)
    print(
        '\n'.join(wrong)
        or (
            f"{len(pages_of(to))} pages: front matter, links, anchors, sidebar, "
            "outputs and the files of the theme are in order."
        )
    )
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
