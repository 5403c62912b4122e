"What `import tinyclip` gives, what it does not import, and what it does for open_clip"

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinyclip

ROOT = Path(__file__).parent.parent


def run(code, *path):
    "Run code in a process of its own; what it prints"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, (*path, ROOT))))
    made = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert made.returncode == 0, made.stderr[-2000:]
    return made.stdout.strip()


# The dozen names


def seen_by_editors():
    "name -> module, of the imports that only type checkers read"
    tree = ast.parse((ROOT / 'tinyclip' / '__init__.py').read_text())
    block = next(o for o in tree.body if isinstance(o, ast.If))
    return {a.name: o.module for o in block.body for a in o.names}


def test_editors_see_what_users_get():
    assert seen_by_editors() == tinyclip._HOMES
    assert sorted(tinyclip.__all__) == sorted(tinyclip._HOMES)


@pytest.mark.parametrize('name', tinyclip.__all__)
def test_a_name_is_what_its_module_defines(name):
    home = __import__(f'tinyclip.{tinyclip._HOMES[name]}', fromlist=[name])
    assert getattr(tinyclip, name) is getattr(home, name)
    assert getattr(tinyclip, name).__doc__ and name in dir(tinyclip)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'tinyclip' has no attribute 'distil'"):
        _ = tinyclip.distil
    with pytest.raises(ImportError):
        exec('from tinyclip.zoo import laod')


def test_import_is_light():
    heavy = "{'torch', 'open_clip', 'numpy', 'transformers', 'plotly'} & set(sys.modules)"
    assert run(f'import sys, tinyclip, tinyclip.zoo; print({heavy})') == 'set()'


def test_a_notebook_has_all_names_at_once():
    "Tab asks every name for its type; in a notebook nobody sees that it waits for torch"
    stand_ins = (
        'import sys, types\n'
        f'for name, home in {tinyclip._HOMES}.items():\n'
        "    m = sys.modules.setdefault('tinyclip.' + home, types.ModuleType(home))\n"
        '    setattr(m, name, home)\n'
    )
    names = 'import tinyclip; print({*tinyclip.__all__} & vars(tinyclip).keys())'
    notebook = "sys.modules['ipykernel'] = types.ModuleType('ipykernel')\n"
    assert run(stand_ins + names) == 'set()'
    assert ast.literal_eval(run(stand_ins + notebook + names)) == {*tinyclip.__all__}


# The configurations of TinyCLIP are known to open_clip, whichever is imported first

KNOWN = "any(n.startswith('TinyCLIP') for n in open_clip.list_models())"


@pytest.mark.parametrize('order', ['tinyclip, open_clip', 'open_clip, tinyclip'])
def test_open_clip_knows_the_configurations(order):
    assert run(f'import {order}\nprint({KNOWN})') == 'True'


@pytest.fixture
def stand_in(tmp_path):
    "A package with open_clip's way to hold configurations, but without torch"
    folder = tmp_path / 'open_clip'
    folder.mkdir()
    (folder / '__init__.py').write_text(
        'from .early import *\nfrom .factory import add_model_config, list_models\n'
        'from .late import *\n'
    )
    (folder / 'early.py').write_text('import os\nif os.environ.get("EARLY"): raise OSError\n')
    (folder / 'late.py').write_text('import os\nif os.environ.get("LATE"): raise OSError\n')
    (folder / 'factory.py').write_text(
        'import time\n_paths = []\ntime.sleep(.2)\n'
        'def add_model_config(path): _paths.append(path)\n'
        'def list_models(): return [p.stem for o in _paths for p in o.glob("*.json")]\n'
    )
    return tmp_path


FAIL = """import os, tinyclip
os.environ[{0!r}] = '1'
try: import open_clip
except OSError: del os.environ[{0!r}]
import open_clip"""

ORDERS = {
    'tinyclip first': 'import tinyclip, open_clip',
    'open_clip first': 'import open_clip, tinyclip',
    'only the factory': 'import tinyclip, open_clip.factory',
    'a name of it': 'import tinyclip\nfrom open_clip import list_models\nimport open_clip',
    'a first import that fails early': FAIL.format('EARLY'),
    'a first import that fails late': FAIL.format('LATE'),
    'open_clip again': 'import importlib, tinyclip, open_clip\nimportlib.reload(open_clip)',
    'the factory again': 'import importlib, tinyclip, open_clip.factory\n'
    'importlib.reload(open_clip.factory)\nimportlib.reload(open_clip)',
    'tinyclip again': 'import importlib, tinyclip\nimportlib.reload(tinyclip)\nimport open_clip',
    'all anew': 'import sys, tinyclip, open_clip\n'
    '[sys.modules.pop(n) for n in list(sys.modules) if n.startswith("open_clip")]\n'
    'import open_clip',
    'tinyclip while another thread is at it': 'import sys, threading, time\n'
    't = threading.Thread(target=__import__, args=["open_clip"])\nt.start()\n'
    'while "open_clip.factory" not in sys.modules: time.sleep(.001)\n'
    'import tinyclip\nassert "_paths" in vars(sys.modules["open_clip.factory"])\n'
    'import open_clip\nassert open_clip.list_models()\nt.join()',
    'many threads': 'import threading, tinyclip\n'
    'ts = [threading.Thread(target=__import__, args=["open_clip"]) for _ in range(8)]\n'
    '[t.start() for t in ts]\n[t.join() for t in ts]\nimport open_clip',
}


@pytest.mark.parametrize('order', ORDERS)
def test_every_order_of_imports(order, stand_in):
    loader = "type(sys.modules['open_clip.factory'].__loader__).__name__"
    code = f'{ORDERS[order]}\nimport sys\nprint({KNOWN}, {loader})'
    assert run(code, stand_in) == 'True SourceFileLoader'


def test_open_clip_alone_is_left_alone(stand_in):
    assert run(f'import open_clip\nprint({KNOWN})', stand_in) == 'False'
