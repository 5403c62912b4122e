"""What the page *Which CLIPs* says of open_clip's architectures is true: one of each kind of towers
is built, cut and masked again"""

import importlib.util
import json
import logging
from pathlib import Path

import open_clip
import pytest

pytest.importorskip(
    'transformers', reason="transformers is optional: pip install 'tinyclip[export]'"
)

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('arch', ROOT / 'benchmarks' / 'architectures.py')
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
RECORDED = json.loads((ROOT / 'results' / 'architectures' / 'run.json').read_text())['metrics']
# the first of every pair of towers: the others differ in sizes
FIRST = {(r['image'], r['text']): r['architecture'] for r in reversed(RECORDED['rows'])}


def test_every_architecture_is_recorded():
    assert {r['architecture'] for r in RECORDED['rows']} == set(open_clip.list_models())


@pytest.mark.parametrize('name', sorted(FIRST.values()))
def test_what_is_recorded_is_true(name):
    logging.disable(logging.WARNING)
    recorded = next(r for r in RECORDED['rows'] if r['architecture'] == name)
    assert json.loads(json.dumps(bench.row(name))) == recorded
