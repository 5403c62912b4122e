"README.md out of nbs/index.ipynb: prose as it is, code fenced, stored text outputs below it"

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def text(s):
    return ''.join(s)


def shown(cell) -> str:
    "A code cell as Markdown; hidden cells vanish"
    source = text(cell['source'])
    if re.match(r'#\|\s*(hide|default_exp|echo: false)', source):
        body = [] if 'echo: false' not in source else None
    else:
        body = [f'```python\n{source}\n```']
    if body == []:
        return ''
    if still := re.search(r'^# readme: (.+)$', source, re.M):
        return still[1]  # a picture in place of a figure that only the site can show
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data:
            out = text(data['text/markdown'])
        elif o.get('text') or 'text/plain' in data:
            out = f"```\n{text(o.get('text') or data['text/plain']).rstrip()}\n```"
        else:
            continue
        body = [*(body or []), out]
    return '\n\n'.join(body or [])


def readme() -> str:
    "The whole page"
    cells = json.loads((ROOT / 'nbs' / 'index.ipynb').read_text(encoding='utf-8'))['cells']
    # What begins so says something of a figure that only the site can show
    cells = [c for c in cells if not text(c['source']).startswith('<!-- site -->')]
    parts = [text(c['source']) if c['cell_type'] == 'markdown' else shown(c) for c in cells]
    page = '\n\n'.join(p.strip() for p in parts if p.strip())
    # Links between pages, seen from the repository's top
    page = re.sub(r'\]\((?!https?:|#)([\w/]+\.(?:ipynb|png)(?:#[\w-]+)?)\)', r'](nbs/\1)', page)
    return f'<!-- made from nbs/index.ipynb by tools/readme.py -->\n\n{page}\n'


if __name__ == '__main__':
    if '--print' in sys.argv:
        print(readme(), end='')
    else:
        (ROOT / 'README.md').write_text(readme(), encoding='utf-8')
