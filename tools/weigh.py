"""What a visitor's browser loads: requests, bytes as servers pack them (gzip), other hosts.

    python tools/weigh.py _docs        # the rendered site; writes results/site/run.json

Needs chromium on PATH and playwright. Every page is opened with nothing cached, and left alone
until it asks for nothing more.
"""

import gzip
import sys
from argparse import ArgumentParser
from pathlib import Path

from tinyclip.core import Table, record_run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests'))
from browser import chromium
from pages import served, visit

PAGES = 'index.html', 'losses/mimicking.html', 'labs/live_masks.html', 'api.html'
# the first page before its figures became data that one small plotly from this site draws: MathJax,
# jquery, require.js and the whole plotly came from three other hosts
BEFORE = dict(page='index.html', requests=28, gzip=2_766_000, hosts=3)
PACKED = '.html', '.css', '.js', '.json', '.svg', '.txt', '.mjs'


def packed(url: str, body: bytes) -> int:
    "Bytes on the way: text is packed, pictures and fonts are already"
    path = url.partition('?')[0].partition('#')[0]
    text = path.endswith((*PACKED, '/'))
    return len(gzip.compress(body, 6)) if text else len(body)


def weigh(browser, home: str, page: str) -> dict:
    "What one page loads"
    with visit(browser, 'about:blank') as tab:
        got = []
        tab.on('response', lambda r: got.append(r))
        tab.goto(f'{home}/{page}', wait_until='networkidle')
        own = [r for r in got if r.url.startswith(home)]
        hosts = {r.url.split('/')[2] for r in got if r.url.startswith('http')} - {
            home.removeprefix('http://')
        }
        size = sum(packed(r.url, r.body()) for r in own)
    return dict(page=page, requests=len(own), gzip=size, hosts=len(hosts))


if __name__ == '__main__':
    p = ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('site', type=Path, help='the rendered site')
    a = p.parse_args()
    with chromium() as browser, served(a.site) as home:
        rows = [weigh(browser, home, page) for page in PAGES]
    print(Table(rows))
    record_run('site', dict(pages=PAGES, packed='gzip 6'), dict(before=BEFORE, now=rows))
