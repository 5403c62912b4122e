"""The website, checked without quarto: once as it is, and once for each fault that the check
must find."""

import importlib.util
import json
import re
import shutil
import struct
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium
from pages import (
    CONTRAST,
    CUT,
    DRAWN,
    PLAYER,
    SOURCES,
    TEXTS,
    drawn_page,
    play,
    served,
    tab,
    visit,
)

ROOT = Path(__file__).parent.parent
# `site` itself is a module of Python
spec = importlib.util.spec_from_file_location('tools_site', ROOT / 'tools' / 'site.py')
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The site of this tree, processed"
    to = tmp_path_factory.mktemp('site') / '_proc'
    site.process(ROOT, to)
    return to


def test_the_site_is_in_order(built):
    wrong = site.check(built)
    assert not wrong, '\n'.join(wrong)


def test_it_is_the_processed_site(built):
    losses = site.Page(built, built / 'losses/03_mimicking.ipynb')
    assert losses.out == 'losses/mimicking.html' and 'affinity_mimicking' in losses.anchors
    assert (built / 'images' / 'card.png').is_file() and not [*built.rglob('runs')]


# --- a small site without a fault ---

CONFIG = '''project:
  type: website
  resources: [images/*]
format:
  html:
    theme: {light: [cosmo, theme.scss], dark: [cosmo, theme.scss, dark.scss]}
    css: styles.css
    include-after-body: figures.html
    filters: [signatures.lua]
website:
  favicon: images/icon.svg
  open-graph: {image: /images/card.png}
  twitter-card: {image: /images/card.png}
  navbar:
    left: [{text: Labs, href: labs/look.ipynb}]
metadata-files: [nbdev.yml, sidebar.yml]
'''
SIDEBAR = (
    'website:\n  sidebar:\n    contents:\n      - index.ipynb\n      - section: Labs\n        '
    'contents: [labs/look.ipynb]\n      - 01_keep.ipynb\n'
)
HOME = 'https://example.invalid/small'


def md(s):
    return dict(cell_type='markdown', metadata={}, source=s)


def code(s, *outputs):
    return dict(cell_type='code', metadata={}, source=s, outputs=list(outputs))


def data(**kinds):
    return dict(
        output_type='execute_result',
        metadata={},
        data={
            k.replace('__', '/').replace('_plus_', '+').replace('_dot_', '.').replace('_', '-'): v
            for k, v in kinds.items()
        },
    )


def said(s, name='stdout'):
    return dict(output_type='stream', name=name, text=[s])


def front(title, out, about='What it is'):
    return dict(
        cell_type='raw',
        metadata={},
        source=f"---\ntitle: {title}\ndescription: '{about}'\noutput-file: {out}\n\n---\n\n",
    )


def raw(html):
    "HTML as tools/process_pages.py gives it to quarto"
    return data(text__markdown=f'~~~~~{{=html}}\n{html}\n~~~~~')


FIGURE = '<div class="figure"><script type="application/json">{"data":[]}</script></div>'


def write(f, cells):
    f.parent.mkdir(exist_ok=True)
    f.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


def read(f):
    return json.loads(f.read_text())['cells']


def add(f, *cells):
    write(f, read(f) + list(cells))


@pytest.fixture
def small(tmp_path):
    "Three pages that link to each other"
    files = {
        '_quarto.yml': CONFIG,
        'nbdev.yml': f'website:\n  title: small\n  site-url: {HOME}\n  repo-url: {HOME}\n',
        'sidebar.yml': SIDEBAR,
        'theme.scss': '/*-- scss:defaults --*/\n',
        'dark.scss': '/*-- scss:rules --*/\n',
        'styles.css': '',
        'figures.html': '',
        'signatures.lua': '',
        'images/icon.svg': '',
        'images/card.png': '',
    }
    for n, t in files.items():
        (tmp_path / n).parent.mkdir(exist_ok=True)
        (tmp_path / n).write_text(t)
    write(
        tmp_path / 'index.ipynb',
        [
            front('Small', 'index.html'),
            md(
                'See [keep](01_keep.ipynb#the-same-again-1) and [the lab](labs/look.ipynb), '
                '`[not](a_link.ipynb)`.\n\n```\n[nor](this.ipynb)\n```\n\n![card](images/card.png) '
                '[out](https://example.com/x)'
            ),
        ],
    )
    write(
        tmp_path / '01_keep.ipynb',
        [
            front('Keep', 'keep.html'),
            md(
                '## The same, again\n\n## The same, *again*\n\n[up](#the-same-again) '
                '[full](index.ipynb)'
            ),
            code(
                "#| echo: false\n#| output: asis\nshow_doc(Keep)",
                data(
                    text__markdown=(
                        f'[source]({HOME}/blob/main/keep.py#L1)\n\n### Keep\n\n*What stays*'
                    ),
                    text__plain='Keep',
                ),
            ),
            md(f'[`Keep.cut`]({HOME}/keep.html#keep.cut) and [`Keep`]({HOME}/keep.html#keep)'),
            code('x = 1'),
            code('y = f(x)\ny.update(x)'),
            code('print(x)', said('1\n')),
        ],
    )
    write(
        tmp_path / 'labs' / 'look.ipynb',
        [
            front('Look', 'look.html'),
            md('[back](../01_keep.ipynb#keep)'),
            code('fig', raw(FIGURE)),
        ],
    )
    return tmp_path


def test_a_site_without_fault_passes(small):
    assert site.check(small) == []


# --- one fault each: where it is planted, and a part of the one sentence that names it ---


def edit(name, a, b):
    def do(s):
        t = (s / name).read_text()
        assert a in t
        (s / name).write_text(t.replace(a, b, 1))

    return do


def gone(name):
    return lambda s: (s / name).unlink()


def keep(*cells):
    return lambda s: add(s / '01_keep.ipynb', *cells)


def prose(t):
    return keep(md(t))


def output(o, source='f()'):
    return keep(code(source, o))


FAULTS = dict(
    broken_yaml=(
        edit('sidebar.yml', 'contents: [', 'contents: [' * 2),
        'sidebar.yml is no valid YAML',
    ),
    key_twice=(
        edit('_quarto.yml', '  type: website\n', '  type: website\n  type: book\n'),
        "'type' stands twice in one mapping, in line 3",
    ),
    metadata_file_missing=(gone('nbdev.yml'), 'nbdev.yml is not there'),
    theme_file_missing=(gone('dark.scss'), 'theme.dark names dark.scss, which is not there'),
    css_missing=(gone('styles.css'), 'format.html.css names styles.css, which is not there'),
    include_missing=(gone('figures.html'), 'include-after-body names figures.html'),
    filter_missing=(gone('signatures.lua'), 'format.html.filters names signatures.lua'),
    favicon_missing=(gone('images/icon.svg'), 'website.favicon names images/icon.svg'),
    theme_unknown=(
        edit('_quarto.yml', '[cosmo, theme.scss]', '[cosmos, theme.scss]'),
        'cosmos, which is neither a theme',
    ),
    theme_without_layer=(
        lambda s: (s / 'theme.scss').write_text('$a: 1;'),
        'theme.scss has no line like',
    ),
    resources_empty=(
        edit('_quarto.yml', '[images/*]', '[images/*, pictures/*]'),
        'pictures/*, which matches nothing',
    ),
    card_not_published=(
        edit('_quarto.yml', '[images/*]', '[images/*.svg]'),
        'which project.resources does not publish',
    ),
    card_relative=(
        edit('_quarto.yml', 'open-graph: {image: /', 'open-graph: {image: '),
        'without a slash in front',
    ),
    card_missing=(
        edit('_quarto.yml', '  twitter-card: {image: /images/card.png}\n', ''),
        'website.twitter-card names no image',
    ),
    no_address=(edit('nbdev.yml', f'  site-url: {HOME}\n', ''), 'site-url is missing'),
    navbar_link=(
        edit('_quarto.yml', 'labs/look.ipynb', 'labs/lock.ipynb'),
        'navbar.left.href names labs/lock.ipynb, which is not there',
    ),
    sidebar_page_missing=(
        edit(
            'sidebar.yml',
            '      - 01_keep.ipynb\n',
            '      - 01_keep.ipynb\n      - 02_gone.ipynb\n',
        ),
        'sidebar.contents names 02_gone.ipynb, which is not there',
    ),
    page_not_in_sidebar=(
        edit('sidebar.yml', '      - 01_keep.ipynb\n', ''),
        '01_keep.ipynb is not in the sidebar',
    ),
    page_twice_in_sidebar=(
        edit('sidebar.yml', '      - 01_keep.ipynb\n', '      - 01_keep.ipynb\n' * 2),
        'names 01_keep.ipynb 2 times',
    ),
    no_title=(edit('01_keep.ipynb', 'title: Keep', 'author: me'), '01_keep.ipynb has no title'),
    no_description=(
        edit('01_keep.ipynb', "'What it is'", "''"),
        '01_keep.ipynb has no description',
    ),
    no_front_matter=(lambda s: write(s / 'index.ipynb', [md('Words')]), 'index.ipynb has no'),
    two_pages_one_file=(
        lambda s: (
            write(s / '99_keep.ipynb', [front('Keep too', 'keep.html')]),
            edit('sidebar.yml', '      - 01_keep', '      - 99_keep.ipynb\n      - 01_keep')(s),
        ),
        '01_keep.ipynb and 99_keep.ipynb both become keep.html',
    ),
    link_to_missing_page=(
        prose('[a](02_gone.ipynb)'),
        'links to 02_gone.ipynb, which is not on the site',
    ),
    link_out_of_the_site=(
        prose('[a](../results/run.json)'),
        'links to ../results/run.json, which is not on the site',
    ),
    link_from_a_folder=(
        lambda s: add(s / 'labs' / 'look.ipynb', md('[a](01_keep.ipynb)')),
        'labs/look.ipynb links to 01_keep.ipynb',
    ),
    link_in_html=(output(raw('<a href="gone.html">x</a>')), 'links to gone.html'),
    link_in_a_link=(
        prose(f'[[`Keep`]({HOME}/keep.html#keep) again](index.ipynb)'),
        'has a link inside a link',
    ),
    link_in_a_link_of_a_table=(
        output(data(text__markdown=f'| a |\n|:--|\n| [[`Keep`]({HOME}/keep.html)](index.ipynb) |')),
        'has a link inside a link',
    ),
    source_of_another_module=(
        prose(f'[source]({HOME}/blob/main/small/losses.py#L1){{target="_blank"}}'),
        'links the source of small/losses.py, which is not its module',
    ),
    sidebar_anchor_missing=(
        edit(
            'sidebar.yml',
            '      - 01_keep.ipynb\n',
            '      - 01_keep.ipynb\n      - {text: Cut, href: 01_keep.ipynb#cut}\n',
        ),
        'The sidebar names 01_keep.ipynb#cut, which is not there',
    ),
    link_in_an_output=(
        output(data(text__markdown='| a |\n|:--|\n| [x](gone.ipynb) |', text__plain='x')),
        'links to gone.ipynb',
    ),
    link_by_reference=(prose('[a][b]\n\n[b]: gone.ipynb'), 'links to gone.ipynb'),
    own_address_wrong=(prose(f'[a]({HOME}/gone.html)'), f'links to {HOME}/gone.html'),
    anchor_missing=(prose('[a](index.ipynb#nowhere)'), 'but index.ipynb has no anchor #nowhere'),
    anchor_here_missing=(
        prose('[a](#the-same-again-2)'),
        'but 01_keep.ipynb has no anchor #the-same-again-2',
    ),
    anchor_of_own_address=(prose(f'[a]({HOME}/keep.html#other.cut)'), 'has no anchor #other.cut'),
    image_missing=(prose('![a](images/none.png)'), 'links to images/none.png'),
    attachment_missing=(
        prose('![a](attachment:none.png)'),
        'shows attachment:none.png, which no cell holds',
    ),
    value_without_output=(keep(code('z = 1\nz')), 'no output stored for the cell "z = 1"'),
    print_without_output=(
        keep(code('print(1)\nx = 2')),
        'no output stored for the cell "print(1)"',
    ),
    class_without_output=(
        keep(code('#| label: x\nTable(rows)')),
        'no output stored for the cell "Table(rows)"',
    ),
    lab_without_figure=(
        lambda s: write(
            s / 'labs' / 'look.ipynb', [front('Look', 'look.html'), code('print(1)', said('1'))]
        ),
        'labs/look.ipynb shows no figure',
    ),
    error=(
        output(dict(output_type='error', ename='KeyError', evalue='x', traceback=[])),
        'holds an error, KeyError',
    ),
    stderr=(output(said('Downloading', 'stderr')), 'holds what went to stderr'),
    warning=(output(said('x.py:1: UserWarning: old')), "holds 'UserWarning'"),
    traceback=(output(said('Traceback (most recent call last):')), 'Traceback'),
    private_path=(output(said('saved in /home/me/runs')), 'holds a private path, /home/me/runs'),
    address=(output(said('<function f at 0x7f01aa22bb33>')), 'holds an address in memory'),
    dead_widget=(
        output(
            data(
                application__vnd_dot_jupyter_dot_widget_view_plus_json=dict(model_id='a1'),
                text__plain='w',
            )
        ),
        'is a live widget',
    ),
    only_plotly_json=(
        output(data(application__vnd_dot_plotly_dot_v1_plus_json={})),
        'has only application/vnd.plotly.v1+json, which quarto does not show',
    ),
    only_a_repr=(output(data(text__plain='FigureWidget({\n')), 'shows only how an object prints'),
    html=(output(data(text__html='<b>x</b>')), 'is html, for which quarto loads scripts'),
    picture_without_words=(
        output(data(image__png='aGk=', text__plain='<PIL.Image.Image image mode=RGB>')),
        'is a picture without words',
    ),
    trace_not_in_the_bundle=(
        output(raw(FIGURE.replace('[]', '[{"type":"surface"}]'))),
        'draws surface, which is not in the bundle',
    ),
    another_host=(
        output(raw('<script src="https://example.com/x.js"></script>')),
        'asks https://example.com/x.js, another host',
    ),
)

# what these break breaks more
KNOCK_ON = {
    'broken_yaml',
    'key_twice',
    'metadata_file_missing',
    'no_address',
    'no_front_matter',
    'navbar_link',
    'two_pages_one_file',
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_planted_fault_is_named_and_nothing_else(small, name):
    plant, sentence = FAULTS[name]
    plant(small)
    wrong = site.check(small)
    assert any(sentence in w for w in wrong), wrong
    assert name in KNOCK_ON or all(sentence in w for w in wrong), wrong
    assert all(w.endswith('.') and '\n' not in w for w in wrong), wrong


def test_what_is_no_fault(small):
    "Things that look like faults and are none"
    add(
        small / '01_keep.ipynb',
        code('#| eval: false\nprint(1)'),
        code('#| output: false\nx'),
        code('x;'),
        code('None'),
        code('f(x)'),
        code('model.train()'),
        code('for x in y:\n    print(x)'),
        code('fig', raw(FIGURE), dict(output_type='execute_result', data={}, metadata={})),
        md(
            '`Warning: /home/me` and 2 [brackets] (apart), [mail](mailto:a@b.c), '
            '<https://example.com>'
        ),
    )
    assert site.check(small) == []


def test_a_widget_with_its_state_is_alive(small):
    nb = json.loads((small / '01_keep.ipynb').read_text())
    nb['cells'].append(
        code('w', data(application__vnd_dot_jupyter_dot_widget_view_plus_json=dict(model_id='a1')))
    )
    nb['metadata']['widgets'] = {site.STATE: dict(state=dict(a1={}))}
    (small / '01_keep.ipynb').write_text(json.dumps(nb))
    assert not [w for w in site.check(small) if 'live widget' in w]


@pytest.mark.parametrize(
    'heading,anchor',
    [
        ('As numbers', 'as-numbers'),
        ('What is it? `Keep`', 'what-is-it-keep'),
        ('layer_shares', 'layer_shares'),
        ('3. Cut & distil', 'cut-distil'),
        ('Keep.from_json', 'keep.from_json'),
        ('[Losses](losses/03_mimicking.ipynb) again', 'losses-again'),
        ('Über 25 %', 'über-25'),
        ('42', 'section'),
    ],
)
def test_anchors_are_pandocs(heading, anchor):
    assert site.slug(heading) == anchor


def test_the_shell_hears_of_it(small, monkeypatch, capsys):
    monkeypatch.setattr(site, 'process', lambda root, to: None)
    assert site.main(['--out', str(small)]) == 0 and '3 pages' in capsys.readouterr().out
    (small / 'styles.css').unlink()
    assert (
        site.main(['--out', str(small)]) == 1
        and 'styles.css, which is not there.' in capsys.readouterr().out
    )


# --- what belongs to this site alone ---


def test_the_social_card():
    head = (ROOT / 'nbs/images/card.png').read_bytes()
    assert struct.unpack('>II', head[16:24]) == (1200, 630) and len(head) < 200_000


def test_the_card_can_be_drawn_again():
    spec = importlib.util.spec_from_file_location('tools_card', ROOT / 'tools' / 'card.py')
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    assert card.card().size == (1200, 630)


def test_links_to_the_source_are_the_settings(built):
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT / 'settings.ini')
    cfg = site.read_config(built, [])
    assert (
        [o['href'] for o in cfg['website']['navbar']['right']]
        == [ini['DEFAULT']['git_url']]
        == [cfg['website']['repo-url']]
    )


def test_the_palette_is_defined_for_both_themes():
    look = {
        n: (ROOT / 'nbs' / n).read_text()
        for n in ('theme.scss', 'light.scss', 'dark.scss', 'styles.css', 'figures.html')
    }
    used = set(
        re.findall(r"(?:var\(|')(--(?!bs-)[a-z]+)", look['styles.css'] + look['figures.html'])
    )
    assert used and used <= set(re.findall(r'^\s*(--[a-z]+):', look['theme.scss'], flags=re.M))

    def colours(n):
        return set(re.findall(r'^\$([\w-]+):', look[n], flags=re.M))

    assert {
        'body-bg',
        'body-color',
        'link-color',
        'code-block-bg',
        'navbar-bg',
        'navbar-fg',
    } <= colours('light.scss') & colours('dark.scss')
    assert all(t.count('{') == t.count('}') for n, t in look.items() if n != 'figures.html')


def test_the_index_of_names_is_complete():
    listed = ''.join(
        json.dumps(c.get('outputs'))
        for c in json.loads((ROOT / 'nbs/api.ipynb').read_text())['cells']
    )
    names = {
        n
        for p in (ROOT / 'tinyclip').rglob('*.py')
        if p.stem[0] != '_'
        for m in re.findall(r'^__all__ = \[(.*?)\]', p.read_text(), flags=re.M | re.S)
        for n in re.findall(r"'(\w+)'", m)
    }
    missing = sorted(n for n in names if f'[{n}](' not in listed)
    assert not missing, f'nbs/api.ipynb does not list {missing}; run: make refresh NB=nbs/api.ipynb'


def test_the_trouble_page_has_every_sentence(built):
    page = site.Page(built, built / 'tutorials/when_something_fails.ipynb')
    shown = '\n'.join(page.markdown)
    for words in ('holds no cache of teacher answers', 'leave nothing of the … steps of a stage'):
        assert words in shown
    assert len(re.findall(r'^- ', shown, flags=re.M)) > 400


def test_what_stands_beside_the_pages(built):
    told = (built / 'llms.txt').read_text(encoding='utf-8')
    pages = site.pages_of(built)
    assert told.startswith('# tinyclip\n') and told.count('\n- [') == len(pages)
    copies = {p.name for p in (built / 'notebooks').rglob('*.ipynb')}
    assert copies == {
        p.name for f in ('labs', 'tutorials') for p in (ROOT / 'nbs' / f).glob('*.ipynb')
    } - {'index.ipynb'}
    assert 'plotly.js v' in (built / 'plotly.min.js').read_text(encoding='utf-8')[:300]


# --- in a browser: what the processed pages allow without quarto, and the rendered site with it ---

WIDTHS = 1280, 780, 390


@pytest.fixture(scope='module')
def browser():
    if CHROMIUM is None:
        pytest.skip('no chromium on PATH: apt-get install chromium')
    pytest.importorskip('playwright', reason='pip install playwright (without its browsers)')
    with chromium() as b:
        yield b


def outside(page, home):
    "What a page asked other hosts for"
    return [u for u in page.asked if not u.startswith((home, 'data:', 'blob:'))]


@pytest.mark.parametrize('wide', WIDTHS)
def test_figures_are_drawn_and_none_of_their_texts_lies_on_another(built, browser, wide):
    wrong = {}
    names = [
        p.name for p in (site.Page(built, f) for f in site.pages_of(built)) if FIGURE[:19] in p.html
    ]
    with served(built) as home, tab(browser, wide) as page:  # one, which keeps plotly
        for name in names:
            page.said.clear()
            page.asked.clear()
            page.goto(f'{home}/{drawn_page(built, name)}')
            page.wait_for_function(DRAWN)
            said = page.evaluate(TEXTS) + page.said + outside(page, home)
            if said:
                wrong[name] = said
    assert len(names) > 15 and not wrong, json.dumps(wrong, indent=1, ensure_ascii=False)


def test_the_slider_follows_and_pause_is_silent(built, browser):
    out = drawn_page(built, 'index.ipynb')
    with served(built) as home, visit(browser, f'{home}/{out}') as page:
        page.wait_for_function(DRAWN)
        before, paused = play(page)
        assert paused['active'] != before['active'] and paused['label'] != before['label']
        assert paused['active'] < paused['steps'] and not page.said


def test_without_plotly_there_is_a_picture(built, browser):
    with served(built) as home:
        address = f'{home}/{drawn_page(built, "index.ipynb")}'
        with visit(browser, address, plotly='**/plotly.min.js') as page:
            page.wait_for_selector('.still img')
            assert page.get_attribute('.still img', 'alt')
            assert page.evaluate("() => document.querySelector('.still img').naturalWidth") > 100


def test_figures_take_the_colours_of_both_themes(built, browser):
    with served(built) as home:
        address = f'{home}/{drawn_page(built, "index.ipynb")}'
        for dark, ink in ((False, 'rgb(30, 39, 53)'), (True, 'rgb(216, 221, 230)')):
            with visit(browser, address, dark=dark) as page:
                page.wait_for_function(DRAWN)
                look = "() => getComputedStyle(document.querySelector('.xtick text')).fill"
                assert page.evaluate(look) == ink


RENDERED = [  # a page of each kind
    'index.ipynb',
    'api.ipynb',
    'losses/03_mimicking.ipynb',
    'labs/index.ipynb',
    'labs/live_masks.ipynb',
    'labs/before_training.ipynb',
    'explain/results.ipynb',
    'explain/paper_to_code.ipynb',
    'tutorials/when_something_fails.ipynb',
]


@pytest.fixture(scope='module')
def rendered(built, tmp_path_factory):
    "Some pages as quarto makes them"
    if not shutil.which('quarto'):
        pytest.skip('no quarto on PATH: get it from quarto.org')
    to = tmp_path_factory.mktemp('rendered') / '_proc'
    shutil.copytree(built, to, ignore=shutil.ignore_patterns('*.drawn.html'))
    for name in RENDERED:
        done = subprocess.run(
            ['quarto', 'render', name, '--no-cache'], cwd=to, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return to / '_docs'


@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('wide', [1280, 390])
def test_rendered_pages(rendered, built, browser, wide, dark):
    wrong = {}
    with served(rendered) as home:
        for name in RENDERED:
            out = site.Page(built, built / name).out
            with visit(browser, f'{home}/{out}', wide, dark) as page:
                page.wait_for_function(DRAWN)
                page.wait_for_timeout(500)
                said = page.evaluate(TEXTS) + page.said + outside(page, home)
                said += page.evaluate(CUT)
                said += page.evaluate(SOURCES, out.removesuffix('.html').removesuffix('/index'))
                wider = page.evaluate('() => document.documentElement.scrollWidth')
                said += [f'{wider} pixels wide'] if wider > wide else []
                for what in ('.cell-output pre', 'main p', '.nav-page a', 'pre.sourceCode span.co'):
                    ratio, words = page.evaluate(CONTRAST, what)
                    said += [f'{what}: {words!r} has contrast {ratio:.2f}'] if ratio < 4.5 else []
                if page.evaluate(PLAYER):
                    before, paused = play(page)
                    said += ['the slider stands still'] if paused == before else []
                    said += page.said
                if said:
                    wrong[name] = said
    assert not wrong, json.dumps(wrong, indent=1, ensure_ascii=False)


WEIGHT = 1_000_000  # Bytes of the first page, packed


def tool(name):
    "A script of tools/ as a module"
    spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_page_is_light_and_asks_nobody_else(rendered, browser):
    tool('small_plotly').main(rendered)
    with served(rendered) as home:
        first = tool('weigh').weigh(browser, home, 'index.html')
    assert first['hosts'] == 0, first
    if 'cartesian' not in (rendered / 'plotly.min.js').read_text(encoding='utf-8')[:300]:
        pytest.skip('npm, or its registry, is not there: the site keeps the whole plotly')
    assert first['gzip'] < WEIGHT, first


def test_a_table_is_as_wide_as_what_is_in_it_and_words_stand_at_its_left(rendered, browser):
    with served(rendered) as home, visit(browser, f'{home}/index.html') as page:
        assert not page.locator('main colgroup').count()
        cells = page.locator('td[style*="right"]').all_inner_texts()
    assert cells and all(re.match(r'[^\w]*\d', c) for c in cells if c.strip()), cells


def test_labs_stand_side_by_side(rendered, browser):
    with served(rendered) as home, visit(browser, f'{home}/labs/index.html') as page:
        boxes = [a.bounding_box() for a in page.locator('.gallery a').all()]
        assert len(boxes) == 7 and boxes[0]['y'] == boxes[1]['y'] < boxes[-1]['y']
        seen = "() => [...document.querySelectorAll('.gallery img')].map(i => i.naturalWidth)"
        assert page.evaluate(seen) == [560] * 7
        assert all(page.locator('.gallery img').evaluate_all('l => l.map(i => i.alt)'))


def test_code_wraps_where_it_is_meant_to(rendered, browser):
    "On a phone: a line goes on further in than it began, and a short command stands on one"
    with served(rendered) as home, visit(browser, f'{home}/losses/mimicking.html', 390) as page:
        lines = page.locator('pre > code.sourceCode > span').evaluate_all(
            'ls => ls.map(l => [l.textContent.search(/\\S/), parseFloat(l.style.paddingLeft)])'
        )
        broken = page.locator('main p code.brief').evaluate_all(
            'cs => cs.filter(c => c.getClientRects().length > 1).map(c => c.textContent)'
        )
    assert len(lines) > 100 and not broken, broken
    assert all(inset == min(begins, 8) + 4 for begins, inset in lines if begins >= 0)


def test_options_of_the_command_line_keep_their_hyphens(rendered):
    page = (rendered / 'tutorials/when_something_fails.html').read_text(encoding='utf-8')
    assert '--calibrate' in page and not re.search(r'–[a-z]', page)
