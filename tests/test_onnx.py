"Exports give what torch gives, in a process without torch too; half an export is never loaded."

import importlib.util
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

for _m in ('onnx', 'onnxruntime', 'onnxscript'):
    if importlib.util.find_spec(_m) is None:
        pytest.skip(
            f"{_m} is not installed: pip install 'tinyclip[export]'", allow_module_level=True
        )

from tinyclip.core import TinyclipError
from tinyclip.inheritance import build, inherit
from tinyclip.keep import choose
from tinyclip.masking import MaskedCLIP
from tinyclip.zoo import load
from tinyclip.zoo import onnx as X
from tinyclip.zoo.onnx import OnnxCLIP, onnx_report, to_onnx
from tinyclip.zoo.vocabulary import shorten

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'
TEXT = dict(context_length=12, vocab_size=300, width=48, heads=3, layers=1)
VIT = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=32, layers=1, width=64, patch_size=8, head_width=16),
    text_cfg=TEXT,
)


def relative(got, want):
    return (
        np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(np.asarray(want)).max()
    ).item()


def tiny(**cfg):
    torch.manual_seed(0)
    return build(VIT | cfg).eval()


def texts(n, vocab=300, eos=None):
    "Texts of different lengths; nothing of tinyclip"
    t = torch.zeros(n, 12, dtype=torch.long)
    for i in range(n):
        end = 2 + 3 * i % 9
        t[i, :end] = torch.arange(end) * 17 % (vocab - 50) + 20
        t[i, end] = vocab - 1 if eos is None else eos
    return t


# Real photographs


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    "A real teacher, its export with int8, photographs as uint8 with labels, class names"
    data = SHARED / 'data' / 'cifar10'
    if not (data / 'val-0000.tar').is_file() or not (SHARED / 'teachers' / 'cifar10').is_dir():
        pytest.skip('no ../shared beside the project: this test needs its photographs and teacher')
    model, preprocess, tokenizer = load(SHARED / 'teachers' / 'cifar10')
    images, labels = {}, {}
    with tarfile.open(data / 'val-0000.tar') as tar:
        for m in tar:
            key, _, kind = m.name.rpartition('.')
            if len(labels) >= 520 and key not in labels:
                break
            raw = tar.extractfile(m).read()
            if kind == 'jpg':
                images[key] = np.asarray(Image.open(io.BytesIO(raw)).convert('RGB'))
            if kind == 'cls':
                labels[key] = int(raw)
    keys = sorted(set(images) & set(labels))
    names = (data / 'classnames.txt').read_text().split('\n')[:10]
    folder = tmp_path_factory.mktemp('onnx') / 'cifar'
    rows = to_onnx(model, folder, int8=True)
    return dict(
        model=model.float(),
        preprocess=preprocess,
        tokenizer=tokenizer,
        folder=folder,
        rows=rows,
        names=names,
        photos=np.stack([images[k] for k in keys]),
        labels=np.array([labels[k] for k in keys]),
    )


def pixels(photos, config):
    "Preprocessing of photographs that have the right size: plain arithmetic"
    mean, std = (np.array(config['image'][k], dtype=np.float32) for k in ('mean', 'std'))
    return ((photos.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)


def prompts(cifar):
    return cifar['tokenizer']([f'a photo of a {n}.' for n in cifar['names']])


def test_photographs_give_what_torch_gives(cifar):
    onnx, model = OnnxCLIP(cifar['folder']), cifar['model']
    x = torch.stack([cifar['preprocess'](Image.fromarray(p)) for p in cifar['photos'][:130]])
    # the configuration says how to prepare an image
    assert relative(pixels(cifar['photos'][:130], onnx.config), x) < 1e-5
    with torch.no_grad():
        for n in (1, 2, 5, 130):
            assert (
                relative(onnx.encode_image(x[:n]), model.encode_image(x[:n], normalize=True))
                <= 1e-4
            )
        t = prompts(cifar)
        for n in (1, 2, 5, 10):
            assert (
                relative(onnx.encode_text(t[:n]), model.encode_text(t[:n], normalize=True)) <= 1e-4
            )
        for got, want in zip(onnx(x[:4], t), model(x[:4], t)):
            assert relative(got, want) <= 1e-4
    assert not np.allclose(onnx.encode_image(x[:1]), onnx.encode_image(x[1:2]), atol=1e-2)


FRESH = '''
import json, sys, numpy as np, onnxruntime as ort
folder = sys.argv[1]
config = json.load(open(folder + '/onnx_config.json'))
mean, std = (np.array(config['image'][k], dtype=np.float32) for k in ('mean', 'std'))
pixels = ((np.load(sys.argv[2]).astype(np.float32)/255 - mean)/std).transpose(0, 3, 1, 2)
def run(kind, x):
    session = ort.InferenceSession(folder + '/' + kind + '.onnx')
    return session.run([config[kind]['output']], {config[kind]['input']: x})[0]
np.save(sys.argv[4], config['logit_scale']*run('image', pixels)@run('text', np.load(sys.argv[3])).T)
assert not {'torch', 'tinyclip', 'onnx'} & {m.split('.')[0] for m in sys.modules}
meta = ort.InferenceSession(folder + '/image.onnx').get_modelmeta().custom_metadata_map
assert json.loads(meta['image'])['mean'] == config['image']['mean']
assert json.loads(meta['logit_scale']) == config['logit_scale']
'''


def test_a_process_without_torch(cifar, tmp_path):
    t = prompts(cifar)
    for name, a in (('photos', cifar['photos'][:7]), ('ids', t.numpy())):
        np.save(tmp_path / f'{name}.npy', a)
    r = subprocess.run(
        [
            sys.executable,
            '-c',
            FRESH,
            cifar['folder'],
            *(tmp_path / f'{n}.npy' for n in ('photos', 'ids', 'out')),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert r.returncode == 0, r.stderr
    x = torch.stack([cifar['preprocess'](Image.fromarray(p)) for p in cifar['photos'][:7]])
    with torch.no_grad():
        want = cifar['model'].get_logits(x, t)[0]
    assert relative(np.load(tmp_path / 'out.npy'), want) <= 1e-4


def test_eight_bits(cifar):
    folder, y = cifar['folder'], cifar['labels']
    x = pixels(cifar['photos'], json.loads((folder / 'onnx_config.json').read_text()))
    assert len(x) >= 500
    both = {q: OnnxCLIP(folder, int8=q) for q in (False, True)}
    feature = {
        q: [
            np.concatenate([m.encode_image(x[i : i + 64]) for i in range(0, len(x), 64)]),
            m.encode_text(prompts(cifar)).numpy(),
        ]
        for q, m in both.items()
    }
    top1 = {q: ((i @ t.T).argmax(1) == y).mean() for q, (i, t) in feature.items()}
    assert top1[False] > 0.65  # chance is 0.1
    assert abs(top1[True] - top1[False]) <= 0.03
    for a, b in zip(feature[False], feature[True]):
        assert relative(b, a) > 1e-3  # eight bits are not what float32 is
        assert (a * b).sum(1).min() > 0.995
    size = {p.name: p.stat().st_size for p in folder.glob('*.onnx')}
    for k in ('image', 'text'):
        assert size[f'{k}.int8.onnx'] < 0.35 * size[f'{k}.onnx']
    n = 128
    batches = list(zip(torch.from_numpy(x[:n]).split(64), torch.from_numpy(y[:n]).split(64)))
    report = {
        r['model']: r
        for r in onnx_report(cifar['model'], folder, cifar['tokenizer'], batches, cifar['names'])
    }
    assert report['onnx']['n'] == n
    for name, q in (('onnx', False), ('onnx int8', True)):
        assert report[name]['top1'] == pytest.approx(
            ((feature[q][0][:n] @ feature[q][1].T).argmax(1) == y[:n]).mean(), abs=1e-9
        )
    assert abs(report['torch']['top1'] - report['onnx']['top1']) <= 1 / n


def test_what_it_reports_is_what_it_is(cifar):
    by = {r['file']: r for r in cifar['rows']}
    assert list(by) == ['image.onnx', 'image.int8.onnx', 'text.onnx', 'text.int8.onnx']
    for k in ('image', 'text'):
        assert saturated(cifar['folder'] / f'{k}.int8.onnx') == []
    for n, r in by.items():
        assert (
            r['MB'] * 1e6 == (cifar['folder'] / n).stat().st_size
            and r['cosine'] > 0.99
            and (r['difference'] < 1e-4) == ('int8' not in n)
        )
    json.dumps(cifar['rows'])
    assert '1.000000' in repr(cifar['rows'])
    for f in cifar['folder'].iterdir():
        raw = f.read_bytes()
        assert not [
            w
            for w in (str(ROOT), 'site-packages', 'open_clip/', '.py', str(Path.home()) + '/')
            if w.encode() in raw
        ], f.name


# Processors without VNNI


def without_vnni(a, w):
    """Activations (n,k) of 8 bits times signed weights (k,m), as such a processor does it: two
    neighbours are added in 16 bits, which saturate"""
    even = np.zeros((len(w) % 2, w.shape[1]), int)
    a = np.concatenate([a, np.zeros((len(a), len(even)), int)], 1)
    w = np.concatenate([w.astype(int), even])
    pairs = a[:, ::2, None] * w[::2] + a[:, 1::2, None] * w[1::2]
    return pairs.clip(-(2**15), 2**15 - 1).sum(1)


def products(path):
    "Operator and weights (k,m) of every product in 8 bits"
    import onnx

    graph = onnx.load(str(path)).graph
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    found = [
        (n.op_type, held[n.input[1]])
        for n in graph.node
        if n.op_type.endswith('Integer') and n.input[1] in held
    ]
    return [(op, w.reshape(len(w), -1).T if op == 'ConvInteger' else w) for op, w in found]


def saturated(path):
    """Which of them such a processor gets wrong; it has no saturating instruction for unsigned
    weights, and widens them"""

    def wrong(w):
        # of some columns
        worst = (
            255
            * np.concatenate([w.T > 0, w.T < 0])[np.linspace(0, 2 * w.shape[1] - 1, 16).astype(int)]
        )
        a = np.concatenate(
            [
                np.random.default_rng(0).integers(0, 256, (4, len(w))),
                np.full((1, len(w)), 255),
                worst,
            ]
        )
        return (
            not np.array_equal(without_vnni(a, w), a @ w.astype(int))
            or 2 * 255 * abs(w.astype(int)).max() > 2**15 - 1
        )

    found = products(path)
    assert found and {w.dtype for _, w in found} <= {np.dtype('int8'), np.dtype('uint8')}
    return [op for op, w in found if w.dtype == np.int8 and wrong(w)]


def test_every_kind_of_product_holds_without_vnni(tmp_path, monkeypatch):
    import onnx
    from onnxruntime import quantization as q

    make, g = onnx.helper, np.random.default_rng(0)
    weights = dict(first=(8, 3, 3, 3), second=(16, 8, 3, 3), gemm=(16, 33), matrix=(33, 20))
    steps = [
        ('Conv', 'x', 'first', {}),
        ('Conv', 'h0', 'second', {}),
        ('GlobalAveragePool', 'h1', None, {}),
        ('Flatten', 'h2', None, {}),
        ('Gemm', 'h3', 'gemm', {}),
        ('MatMul', 'h4', 'matrix', {}),
    ]
    nodes = [
        make.make_node(op, [x] + [w] * (w is not None), [f'h{i}'], f'{op}{i}', **k)
        for i, (op, x, w, k) in enumerate(steps)
    ]

    def value(name, shape):
        return make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = make.make_graph(
        nodes,
        'g',
        [value('x', ['n', 3, 16, 16])],
        [value('h5', ['n', 20])],
        [
            onnx.numpy_helper.from_array(g.normal(size=s).astype(np.float32), n)
            for n, s in weights.items()
        ],
    )
    onnx.save(
        make.make_model(graph, opset_imports=[make.make_opsetid('', 20)], ir_version=10),
        tmp_path / 'a.onnx',
    )
    assert [op for op, _ in products(X.quantise(tmp_path / 'a.onnx', tmp_path / 'b.onnx'))] == [
        'ConvInteger',
        'MatMulInteger',
        'MatMulInteger',
    ]
    assert (
        saturated(tmp_path / 'b.onnx') == []
        and X.weight_bits(tmp_path / 'b.onnx') == '7 bit and 8 bit unsigned'
    )
    real = q.quantize_dynamic  # and as it would be with all 8 bits, it is seen
    monkeypatch.setattr(
        q,
        'quantize_dynamic',
        lambda *a, **k: real(*a, **k | dict(reduce_range=False, weight_type=q.QuantType.QInt8)),
    )
    assert (
        saturated(X.quantise(tmp_path / 'a.onnx', tmp_path / 'c.onnx'))
        == ['ConvInteger', 'MatMulInteger', 'MatMulInteger']
        and X.weight_bits(tmp_path / 'c.onnx') == '8 bit'
    )


# Every kind of tower


def timm(name, size, **trunk):
    cfg = dict(
        embed_dim=24,
        vision_cfg=dict(timm_model_name=name, timm_pool='avg', timm_proj='linear', image_size=size),
        text_cfg=TEXT,
    )
    return build(cfg | dict(tinyclip_cfg=dict(trunk=trunk))).eval()


def slim():
    m = tiny(vision_cfg=VIT['vision_cfg'] | dict(layers=2), text_cfg=TEXT | dict(layers=3))
    return inherit(
        m,
        choose(
            m,
            {
                'image.layers.0.heads': [],
                'image.layers.1.ffn': [],
                'text.layers.0.heads': [1],
                'text.layers.1.ffn': 20,
                'text.layers.2.heads': [],
                'text.layers.2.ffn': [],
            },
        ),
    )


KINDS = dict(
    slim=slim,
    custom=lambda: tiny(
        custom_text=True,
        quick_gelu=True,
        init_logit_bias=-3.0,
        vision_cfg=VIT['vision_cfg'] | dict(pool_type='avg', ls_init_value=0.1),
        text_cfg=TEXT | dict(pool_type='eos', eos_id=7, proj_bias=True),
    ),
    resnet=lambda: tiny(
        vision_cfg=dict(image_size=32, layers=[1, 1, 1, 1], width=16, patch_size=None)
    ),
    davit=lambda: timm(
        'davit_tiny', 64, embed_dims=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4]
    ),
    tinyvit=lambda: timm(
        'tiny_vit_5m_224',
        64,
        embed_dims=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 3, 4],
    ),
)


def one_tower(model, folder):
    "The image tower alone: the text tower is an ordinary one, and tracing takes seconds"
    x = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.encode_image(x, normalize=True)
    f = X.export_tower(X.float_copy(model), 'image', x, folder / 'a.onnx')
    for n in (1, 2, 5):
        assert relative(X.run_rows(X.session(f), x[:n]), want[:n]) <= 1e-4
    assert 1e-4 < relative(X.run_rows(X.session(X.quantise(f, folder / 'b.onnx')), x), want) < 0.3
    assert (folder / 'b.onnx').stat().st_size < 0.8 * f.stat().st_size
    assert saturated(folder / 'b.onnx') == []
    # tracing left nothing in the model
    assert torch.equal(model.eval().encode_image(x, normalize=True), want)


@pytest.mark.parametrize('kind', KINDS)
def test_every_tower(kind, tmp_path):
    model = KINDS[kind]()
    if kind in ('davit', 'tinyvit'):
        return one_tower(model, tmp_path)
    rows = to_onnx(model, tmp_path / 'm', int8=True, opset=20 if kind == 'slim' else X.OPSET)
    onnx = OnnxCLIP(tmp_path / 'm')
    eight = OnnxCLIP(tmp_path / 'm', int8=True)
    torch.manual_seed(1)
    x = torch.randn(5, 3, *onnx.visual.image_size)
    t = texts(5, eos=7 if kind == 'custom' else None)
    with torch.no_grad():
        image = model.encode_image(x, normalize=True)
        text = model.encode_text(t, normalize=True)
    for n in (1, 2, 5):
        assert (
            relative(onnx.encode_image(x[:n]), image[:n]) <= 1e-4
            and relative(onnx.encode_text(t[:n]), text[:n]) <= 1e-4
        )
    assert (
        1e-4 < relative(eight.encode_image(x), image) < 0.2
        and 1e-4 < relative(eight.encode_text(t), text) < 0.2
    )
    assert [r['file'] for r in rows if r['difference'] > 1e-4] == [
        'image.int8.onnx',
        'text.int8.onnx',
    ]
    assert [r['weights'] for r in rows] == [
        'float32',
        '7 bit and 8 bit unsigned' if kind == 'resnet' else '7 bit',
        'float32',
        '7 bit',
    ]
    for tower in ('image', 'text'):
        # right on processors without VNNI, too
        assert saturated(tmp_path / 'm' / f'{tower}.int8.onnx') == []
    assert (onnx.logit_bias is None) == (kind != 'custom') and (
        kind != 'custom' or onnx.logit_bias == -3
    )
    if kind == 'resnet':
        # convolutions too
        assert (tmp_path / 'm' / 'image.int8.onnx').stat().st_size < 0.4 * (
            tmp_path / 'm' / 'image.onnx'
        ).stat().st_size


def test_a_shortened_vocabulary(tmp_path):
    import open_clip

    model, short = shorten(
        tiny(text_cfg=TEXT | dict(vocab_size=49408)), ['a photo of a cat', 'a photo of a dog']
    )
    to_onnx(
        model, tmp_path / 'm', short, texts=short(['a photo of a cat', 'something else']), int8=True
    )
    onnx = OnnxCLIP(tmp_path / 'm')
    # without our code
    again = open_clip.SimpleTokenizer(
        bpe_path=str(tmp_path / 'm' / onnx.config['tokenizer']), context_length=12
    )
    t = again(['a photo of a dog', 'zebra 123'])
    assert (
        torch.equal(t, short(['a photo of a dog', 'zebra 123']))
        and onnx.vocab_size == short.vocab_size < 1000
    )
    with torch.no_grad():
        assert relative(onnx.encode_text(t), model.encode_text(t, normalize=True)) <= 1e-4
    with pytest.raises(TinyclipError, match='use the tokenizer of this model'):
        onnx.encode_text(open_clip.get_tokenizer('', context_length=12)(['a dog']))


def test_weights_beside_a_file_that_would_be_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(X, 'ONE_FILE', 200_000)
    model = tiny()
    rows = {r['file']: r for r in to_onnx(model, tmp_path / 'm', int8=True)}
    assert (tmp_path / 'm' / 'image.onnx.data').stat().st_size > 200_000 and rows['image.onnx'][
        'MB'
    ] > 0.2
    shutil.move(tmp_path / 'm', tmp_path / 'elsewhere')
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (
            relative(
                OnnxCLIP(tmp_path / 'elsewhere').encode_image(x),
                model.encode_image(x, normalize=True),
            )
            <= 1e-4
        )
    OnnxCLIP(tmp_path / 'elsewhere', int8=True)
    os.truncate(tmp_path / 'elsewhere' / 'image.onnx.data', 1000)
    with pytest.raises(TinyclipError, match='another size'):
        OnnxCLIP(tmp_path / 'elsewhere')


# The model passed in


def test_the_model_stays_as_it_was_and_nothing_is_said(tmp_path, capfd, recwarn):
    model = tiny().half().train()
    model.visual.eval()
    model.logit_scale.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def how():
        return (
            [m.training for m in model.modules()],
            [(p.dtype, p.requires_grad, p.device) for p in model.parameters()],
            logging.root.manager.disable,
            torch.is_grad_enabled(),
        )

    was = how()
    to_onnx(model, tmp_path / 'm', int8=True)
    assert capfd.readouterr() == ('', '') and not recwarn.list
    assert how() == was and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (
            relative(
                OnnxCLIP(tmp_path / 'm').encode_image(x),
                X.float_copy(model).encode_image(x, normalize=True),
            )
            <= 1e-4
        )


# Half an export


def features(folder):
    return OnnxCLIP(folder).encode_image(np.ones((1, 3, 32, 32), dtype=np.float32))


def test_an_export_that_differs_is_not_written(tmp_path, monkeypatch):
    model, real = tiny(), X.export_tower

    def wrong(m, kind, *a, **k):
        if kind == 'image':
            m.visual.proj.data[0, 0] += 1e-2
        return real(m, kind, *a, **k)

    monkeypatch.setattr(X, 'export_tower', wrong)
    with pytest.raises(TinyclipError, match='image tower differs from torch by'):
        to_onnx(model, tmp_path / 'm')
    monkeypatch.undo()
    model.visual.conv1.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(TinyclipError, match='not finite'):
        to_onnx(model, tmp_path / 'm')
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp('old') / 'm'
    to_onnx(tiny(), folder, int8=True)
    return folder


def test_an_error_in_the_middle(old, tmp_path, monkeypatch):
    folder = shutil.copytree(old, tmp_path / 'old')
    (folder / 'of_the_user.txt').write_text('mine')
    names = sorted(p.name for p in folder.iterdir())
    before = features(folder)

    def dies(m, kind, x, path, *a):  # the first tower is written, the second is not
        if kind == 'text':
            raise KeyboardInterrupt
        shutil.copy(old / 'image.onnx', path)

    monkeypatch.setattr(X, 'export_tower', dies)
    for f in (folder, tmp_path / 'new'):
        with pytest.raises(KeyboardInterrupt):
            to_onnx(tiny(), f)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ['old']
        and sorted(p.name for p in folder.iterdir()) == names
    )
    assert np.array_equal(features(folder), before)  # the old one is whole
    monkeypatch.undo()
    torch.manual_seed(3)
    to_onnx(build(VIT), folder)
    assert not np.allclose(features(folder), before, atol=1e-3)
    # no 8-bit files of another model
    assert sorted(p.name for p in folder.iterdir()) == [
        'image.onnx',
        'of_the_user.txt',
        'onnx_config.json',
        'text.onnx',
    ]


KILLED = '''
import json, os, shutil, signal, sys
import tinyclip.zoo.onnx as X
from tinyclip.inheritance import build
assert not {'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules) # asked for when needed
import torch
folder, old, cfg, at = sys.argv[1:]
die, real, moved = lambda *a: os.kill(os.getpid(), signal.SIGKILL), os.replace, []
def replace(a, b):
    if os.path.dirname(b)==folder: moved.append(b)
    die() if len(moved)==2 else real(a, b)
if at=='moving': os.replace = replace
else: X.save_tokenizer = die # all is written but the configuration
# tracing takes seconds
X.export_tower = lambda m, kind, x, path, *a: shutil.copy(f'{old}/{kind}.onnx', path)
torch.manual_seed(0)
X.to_onnx(build(json.loads(cfg)), folder)
'''


@pytest.mark.parametrize('at', ['moving', 'writing'])
def test_killed(at, old, tmp_path):
    folder = tmp_path / 'm'
    if at == 'moving':
        shutil.copytree(old, folder)
    r = subprocess.run(
        [sys.executable, '-c', KILLED, folder, old, json.dumps(VIT), at],
        capture_output=True,
        text=True,
    )
    assert r.returncode == -signal.SIGKILL, r.stderr
    left = [p for p in tmp_path.rglob('*.tmp') if p.is_dir()]
    assert left and folder.exists() == (at == 'moving')
    for p in (folder, *left):
        with pytest.raises(TinyclipError, match='no finished export|is missing'):
            OnnxCLIP(p)


# Sentences


def test_damaged_files(old, tmp_path):
    def harmed(name, harm):
        harm(folder := shutil.copytree(old, tmp_path / name))
        return lambda: OnnxCLIP(folder)

    def flip(folder):
        raw = bytearray((folder / 'text.onnx').read_bytes())
        raw[:64] = bytes(64)
        (folder / 'text.onnx').write_bytes(raw)

    def rewrite(change):
        def f(folder):
            c = json.loads((folder / 'onnx_config.json').read_text())
            change(c)
            (folder / 'onnx_config.json').write_text(json.dumps(c))

        return f

    cases = [
        ('a', lambda f: os.truncate(f / 'image.onnx', 5000), 'another size'),
        ('b', lambda f: (f / 'text.onnx').unlink(), 'missing'),
        ('c', flip, 'onnxruntime cannot read'),
        ('d', lambda f: (f / 'onnx_config.json').write_text('{"a":'), 'not valid JSON'),
        ('e', lambda f: (f / 'onnx_config.json').write_text('[]'), 'holds no JSON object'),
        ('f', rewrite(lambda c: c['image'].pop('size')), "says nothing about 'size'"),
        ('g', rewrite(lambda c: c.update(files={'../old/image.onnx': 1})), 'missing'),
    ]
    for name, harm, said in cases:
        with pytest.raises(TinyclipError, match=said):
            harmed(name, harm)()


def test_a_missing_package_is_named(monkeypatch, tmp_path, old):
    for name in ('onnxscript', 'onnx', 'onnxruntime'):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            TinyclipError, match=rf"needs the package {name}.*pip install 'tinyclip\[export\]'"
        ):
            to_onnx(tiny(), tmp_path / 'm')
        if name != 'onnxruntime':
            OnnxCLIP(old)  # running needs less than exporting
        monkeypatch.undo()
    assert not (tmp_path / 'm').exists()


def test_bad_input_is_refused_in_a_sentence(tmp_path, old):
    model = tiny()
    for said, f in (
        ('still has its masks', lambda: to_onnx(MaskedCLIP(model), tmp_path / 'm')),
        ('OnnxCLIP is not an open_clip CLIP', lambda: to_onnx(OnnxCLIP(old), tmp_path / 'm')),
        ('choose 18 to 25', lambda: to_onnx(model, tmp_path / 'm', opset=99)),
        (
            'images must be floats',
            lambda: to_onnx(model, tmp_path / 'm', images=torch.ones(2, 3, 32, 32).long()),
        ),
        (
            'texts must be integers of shape',
            lambda: to_onnx(model, tmp_path / 'm', texts=torch.ones(2, 13).long()),
        ),
        ('not str', lambda: to_onnx(model, tmp_path / 'm', texts='a cat')),
        ('images must be', lambda: OnnxCLIP(old).encode_image(torch.zeros(0, 3, 32, 32))),
        ('provider', lambda: OnnxCLIP(old, providers=['Abacus'])),
        ('no images', lambda: onnx_report(model, old, None, [])),
        ('is missing', lambda: onnx_report(model, tmp_path / 'none', None, [1])),
    ):
        with pytest.raises(TinyclipError, match=said):
            f()
    assert not (tmp_path / 'm').exists()


def test_what_the_exporter_cannot_do_is_said(tmp_path):
    class Odd(torch.nn.Module):
        image_size, patch_size = (32, 32), None

        def forward(self, x):
            return x.mean((2, 3)).repeat(1, 8) * (2.0 if x.sum().item() > 0 else 3.0)

    model = tiny()
    model.visual = Odd()
    with pytest.raises(TinyclipError, match='image tower cannot be exported to ONNX'):
        to_onnx(model, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()
