"""What the page *Which CLIPs* says of open_clip's architectures is true: some
small ones of different kinds are built, cut and masked again"""

import importlib.util
import json
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
SMALL = (
    'MobileCLIP2-S0',
    'PE-Core-T-16-384',
    'RN50',
    'ViT-B-32-SigLIP2-256',
    'coca_base',
    'mt5-base-ViT-B-32',
    'swin_base_patch4_window7_224',
)


def test_every_architecture_is_recorded():
    names = {r['architecture'] for r in RECORDED['rows']}
    assert names >= {n for n in open_clip.list_models() if not n.startswith('TinyCLIP-')}
    assert sum(r['inherit'] for r in RECORDED['rows']) > 135
    assert sum(r['masks'] for r in RECORDED['rows']) > 120


def test_every_architecture_that_is_inherited_has_two_kinds_of_towers_that_were_exported():
    exports = json.loads((ROOT / 'results' / 'exports' / 'run.json').read_text())['metrics']
    for r in RECORDED['rows']:
        towers = [e for e in exports if r['architecture'] in e['architectures']]
        assert sorted(e['tower'] for e in towers) == ['image', 'text'] * r['inherit']
        assert all(e['onnx'] is not None and e['onnx'] < 1e-4 for e in towers)
    assert sum(e['litert'] is None for e in exports) == 1  # the encoder of NLLB


@pytest.mark.parametrize('name', SMALL)
def test_what_is_recorded_is_true(name):
    recorded = next(r for r in RECORDED['rows'] if r['architecture'] == name)
    found = bench.row(name)
    assert found.pop('why').keys() == recorded['why'].keys()  # sentences may be worded anew
    assert found == {k: v for k, v in recorded.items() if k != 'why'}
