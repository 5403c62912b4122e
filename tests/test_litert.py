"""Exports for phones against torch: every family's tower, in LiteRT's interpreter"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip('litert_torch', reason='LiteRT has an environment of its own: make phone')

import test_eva
import test_hugging_towers as hugging
from hub import tiny
from small_trunks import twin
from test_onnx import slim

from tinyclip.cli.main import main
from tinyclip.core import TinyclipError
from tinyclip.inheritance import inherit
from tinyclip.keep import choose
from tinyclip.zoo import litert as X
from tinyclip.zoo import load, save
from tinyclip.zoo.formats import open_model
from tinyclip.zoo.litert import LiteRTCLIP, to_litert
from tinyclip.zoo.onnx import float_copy, rows_of, sample_inputs
from tinyclip.zoo.vocabulary import shorten

STAGES = 'resnet', 'convnext', 'convnext_mlp', 'fastvit', 'fastvit_merged'
FLAT = 'siglip', 'medium', 'mobileclip_b', 'vitamin'
EVA = 'pe', 'eva02', 'eva02_post'


def near(got, want, tolerance):
    off = abs(np.asarray(got) - np.asarray(want)).max() / abs(np.asarray(want)).max()
    assert off <= tolerance, off


def one_tower(model, kind, folder):
    "A tower in 32 and in 8 bits, against torch; eight bits are not torch by chance"
    m = float_copy(model)
    x = sample_inputs(m)[kind == 'text']
    want = rows_of(m, kind, x)
    x = x.int() if kind == 'text' else x
    path = X.write_tower(m, kind, x, folder / 'a.tflite')
    near(X.Program(path, kind)(x.numpy()), want, 1e-4)
    small = X.quantise(path, folder / 'b.tflite')
    eight = X.Program(small, kind)(x.numpy())
    near(eight, want, 0.2)
    assert abs(eight - want).max() > 1e-5
    assert small.stat().st_size < path.stat().st_size


@pytest.mark.parametrize('family', STAGES + FLAT)
def test_every_image_tower(family, tmp_path):
    one_tower(twin(family), 'image', tmp_path)


@pytest.mark.parametrize('kind', EVA)
def test_every_image_tower_of_eva(kind, tmp_path):
    one_tower(test_eva.twin(kind), 'image', tmp_path)


@pytest.mark.parametrize('kind', [k for k in hugging.TOWERS if k != 'nllb'])
def test_every_text_tower_of_hugging_face(kind, tmp_path):
    one_tower(load(hugging.folder_of(tmp_path, kind)).model, 'text', tmp_path)


@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
    "An uneven student with a short token table, its tokenizer, and its export"
    folder = tmp_path_factory.mktemp('litert')
    loaded = load('shapes-teacher')
    keep = {'image.layers.0.heads': [], 'image.layers.1.ffn': 100, 'text.layers.2.heads': [0]}
    model = inherit(loaded.model, choose(loaded.model, keep))
    model, tokenizer = shorten(model, ['a small red star', 'a blue hoop'], loaded.tokenizer)
    save(model, folder / 'student', tokenizer=tokenizer)
    rows = to_litert(model, folder / 'phone', tokenizer, int8=True)
    return model.eval(), tokenizer, folder, rows


def test_an_uneven_student(uneven):
    model, tokenizer, folder, rows = uneven
    assert [r['weights'] for r in rows] == ['float32', '8 bit'] * 2
    assert [r['difference'] <= 1e-4 for r in rows] == [True, False] * 2
    ids = tokenizer(['a small red star', 'a blue hoop', 'a word that was not kept'])
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    for name, tolerance in (('', 1e-4), (':int8', 0.15)):
        opened = open_model(f'{folder / "phone"}{name}')
        assert torch.equal(opened.tokenizer(['a blue hoop']), tokenizer(['a blue hoop']))
        near(opened.model.encode_image(pixels), want[0], tolerance)
        near(opened.model.encode_text(ids), want[1], tolerance)


def test_every_pooling_and_a_bias(tmp_path):
    model = tiny(
        custom_text=True, init_logit_bias=-3.0, text=dict(pool_type='eos', eos_id=7, proj_bias=True)
    )
    to_litert(model, tmp_path / 'm')
    back = LiteRTCLIP(tmp_path / 'm')
    assert back.logit_bias == model.logit_bias
    _, ids = sample_inputs(model, 4)
    with torch.no_grad():
        near(back.encode_text(ids), model.eval().encode_text(ids, normalize=True), 1e-4)


def test_layers_without_heads_and_neurons(tmp_path):
    to_litert(slim(), tmp_path / 'm')  # compared inside


ALONE = """
import json, sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter

folder = sys.argv[1]
config = json.load(open(f'{folder}/litert_config.json'))
run = Interpreter(f'{folder}/image.tflite').get_signature_runner()
h, w = config['image']['size']
x = np.linspace(-1, 1, 3 * h * w, dtype=np.float32).reshape(1, 3, h, w)
row = run(pixel_values=x)['image_embeds'][0]
assert 'torch' not in sys.modules and 'tinyclip' not in sys.modules
print(json.dumps(row.tolist()))
"""


def test_a_process_without_torch(uneven):
    model, _, folder, _ = uneven
    done = subprocess.run(
        [sys.executable, '-c', ALONE, str(folder / 'phone')],
        capture_output=True,
        text=True,
        check=True,
    )
    x = torch.linspace(-1, 1, 3 * 48 * 48).reshape(1, 3, 48, 48)
    with torch.no_grad():
        want = model.encode_image(x, normalize=True)[0]
    near(json.loads(done.stdout.splitlines()[-1]), want, 1e-4)


def test_the_command_line_exports_and_evaluates(uneven, tmp_path, capsys):
    _, _, folder, _ = uneven
    out = str(tmp_path / 'phone')
    data = ['--data', 'shapes', '--templates', '{}', '--json']
    main(['export', str(folder / 'student'), '--to', 'litert', '--int8', '--out', out, *data])
    said = json.loads(capsys.readouterr().out)
    torch_row, whole, eight = said['rows']
    assert [r['form'] for r in said['rows']] == ['torch', 'litert', 'litert, 8 bit']
    assert whole['difference'] < 1e-4 < eight['difference']
    assert whole['top1'] == torch_row['top1'] and eight['MB'] < 0.4 * whole['MB']
    main(['eval', f'{out}:int8', *data])
    (again,) = json.loads(capsys.readouterr().out)['rows']
    assert again['top1'] == eight['top1']


def test_what_cannot_be_converted_is_said_and_an_older_export_stays(tmp_path):
    to_litert(tiny(), tmp_path / 'm')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'm').iterdir()}
    (tmp_path / 'nllb').mkdir()
    loaded = load(hugging.folder_of(tmp_path / 'nllb', 'nllb'))
    with pytest.raises(TinyclipError, match='text tower cannot be exported to LiteRT .*onnx'):
        to_litert(loaded.model, tmp_path / 'm', loaded.tokenizer)
    assert {p.name: p.read_bytes() for p in (tmp_path / 'm').iterdir()} == before


def test_an_export_that_differs_is_not_written(tmp_path, monkeypatch):
    run = X.Program.__call__
    monkeypatch.setattr(X.Program, '__call__', lambda self, x: run(self, x) * 1.001)
    with pytest.raises(TinyclipError, match='image tower differs from torch'):
        to_litert(tiny(), tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def test_damaged_and_missing_files(uneven, tmp_path):
    to_litert(tiny(), tmp_path / 'm')
    with pytest.raises(TinyclipError, match='no 8-bit files'):
        LiteRTCLIP(tmp_path / 'm', int8=True)
    image = tmp_path / 'm' / 'image.tflite'
    image.write_bytes(b'0' * image.stat().st_size)
    with pytest.raises(TinyclipError, match='LiteRT cannot read .*export it again'):
        LiteRTCLIP(tmp_path / 'm')
    image.unlink()
    with pytest.raises(TinyclipError, match='is missing or has another size'):
        LiteRTCLIP(tmp_path / 'm')


def test_bad_input(uneven):
    model = LiteRTCLIP(uneven[2] / 'phone')
    for said, x in (
        ('shape .n, 16.', torch.ones(2, 15).long()),
        ('Tokens must be numbers from 0', torch.full((1, 16), 10**6)),
        ('integers', torch.ones(2, 16)),
    ):
        with pytest.raises(TinyclipError, match=said):
            model.encode_text(x)
