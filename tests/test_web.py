"""Exports for browsers against torch on the same pictures: in onnxruntime and, where they are
there, in transformers.js and in the page itself."""

import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import threading
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, LIMIT, ROOT, chromium, until
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

for package in ('onnx', 'onnxscript', 'onnxruntime', 'transformers'):
    pytest.importorskip(package, reason=f'{package} is optional: pip install \'tinyclip[export]\'')

from hub import tiny

from tinyclip.core import TinyclipError
from tinyclip.data.shapes import Shapes
from tinyclip.inheritance import inherit
from tinyclip.keep import choose
from tinyclip.zoo import load, web
from tinyclip.zoo.folders import Loaded
from tinyclip.zoo.formats import FORMATS, open_model
from tinyclip.zoo.vocabulary import shorten

TEXTS = [
    'a small red star at the top left',
    "It's a BIG  blue hoop, in the lower-right corner!",
    'one of so many words that the context cannot hold them all and the end is lost on the way',
]
NODE = shutil.which('node')
ASK = Path(__file__).parent / 'web' / 'transformers_js.cjs'
PIXELS = ASK.with_name('pixels.mjs')
FOUND = NODE and subprocess.run(
    [NODE, '-p', "require.resolve('@huggingface/transformers')"], capture_output=True, text=True
)
with_node = pytest.mark.skipif(
    not FOUND or FOUND.returncode != 0,
    reason='no node with @huggingface/transformers: npm install it and name its node_modules in '
    'NODE_PATH',
)
with_chromium = pytest.mark.skipif(
    CHROMIUM is None or not importlib.util.find_spec('playwright'),
    reason='no chromium on PATH, or no playwright',
)


def runtime() -> str:
    "A folder with the page's packages, named by NODE_PATH"
    for folder in os.environ.get('NODE_PATH', '').split(os.pathsep):
        try:
            web.check_runtime(folder or 'nowhere')
        except TinyclipError:
            continue
        return folder
    return 'none'


@pytest.fixture(scope='module')
def slim():
    "A slim student of the small teacher, with a short token table"
    loaded = load('shapes-teacher')
    keep = {
        'image.layers.0.heads': [],
        'image.layers.1.ffn': 100,
        'image.layers.3.heads': [0, 2],
        'text.layers.2.heads': [0],
    }
    model = inherit(loaded.model, choose(loaded.model, keep))
    model, tokenizer = shorten(model, TEXTS[:2])
    return Loaded(model, loaded.preprocess, tokenizer)


@pytest.fixture(scope='module')
def folder(slim, tmp_path_factory):
    "Its export, with the page where that can be had"
    folder = tmp_path_factory.mktemp('web') / 'slim'
    FORMATS['web'].write(slim, folder, runtime=runtime())
    return folder


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "Pictures as files, of the model's size and larger, upright and wide: drawn ones and noise"
    folder = tmp_path_factory.mktemp('pictures')
    drawn = Shapes('heldout', n=3)
    pictures = [drawn[i][0] for i in range(3)]
    noise = np.random.default_rng(0).integers(0, 256, (90, 131, 3), np.uint8)
    pictures += [
        Image.fromarray(noise),
        Image.fromarray(noise.transpose(1, 0, 2)).resize((60, 201)),
    ]
    for i, p in enumerate(pictures):
        p.save(folder / f'{i}.png')
    return sorted(map(str, folder.iterdir()))


def rows_of(loaded, pictures):
    "Rows of pictures and of `TEXTS` in torch"
    pixels = torch.stack([loaded.preprocess(Image.open(p)) for p in pictures])
    with torch.no_grad():
        image = loaded.model.encode_image(pixels, normalize=True)
        return image, loaded.model.encode_text(loaded.tokenizer(TEXTS), normalize=True)


def logits(loaded, image, text):
    return loaded.model.logit_scale.exp().detach() * image @ text.T


def near(a, b, tol):
    off = ((a - b).abs().max() / b.abs().max()).item()
    assert off <= tol, off


def test_every_form_opens_by_its_name_and_reads_texts_of_its_own(folder, slim):
    drawn = Shapes('heldout', n=4)
    pixels = torch.stack([slim.preprocess(drawn[i][0]) for i in range(4)])
    with torch.no_grad():
        want = slim.model.encode_image(pixels, normalize=True)
        words = slim.model.encode_text(slim.tokenizer(TEXTS), normalize=True)
    for name, tolerance in (('', 1e-4), (':fp16', 5e-3), (':q8', 0.1)):
        opened = open_model(f'{folder}{name}')
        assert opened.tokenizer(TEXTS).tolist() == slim.tokenizer(TEXTS).tolist()
        near(opened.model.encode_image(pixels), want, tolerance)
        near(opened.model.encode_text(opened.tokenizer(TEXTS)), words, tolerance)


def test_a_siglip_has_its_bias_in_the_graph_and_its_own_kind(tmp_path):
    model = tiny(init_logit_scale=1.0, init_logit_bias=-3.0)
    rows = web.to_web(shorten(model, TEXTS)[0], tmp_path / 'out', runtime='none')
    assert all(r['difference'] <= 1e-4 for r in rows if r['weights'] == 'float32')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['model_type'] == 'siglip'
    held = json.loads((tmp_path / 'out' / web.WEB_CONFIG).read_text())
    assert held['logit_bias'] == model.logit_bias.item()
    assert held['image']['output'] == 'pooler_output'


def test_a_runtime_that_cannot_be_had_is_refused_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(web.shutil, 'which', lambda name: None)
    with pytest.raises(TinyclipError, match='npm is not on PATH.*--runtime none'):
        FORMATS['web'].check({})
    with pytest.raises(TinyclipError, match='does not hold transformers.web.min.js'):
        FORMATS['web'].check(dict(runtime=str(tmp_path)))
    (tmp_path / 'transformers.web.min.js').write_text('another')
    with pytest.raises(TinyclipError, match='is not that of @huggingface/transformers'):
        FORMATS['web'].check(dict(runtime=str(tmp_path)))
    FORMATS['web'].check(dict(runtime='none'))


def test_pixels_that_transformers_js_cannot_make_are_refused(slim, tmp_path):
    model = tiny()
    model.visual.preprocess_cfg = dict(size=(32, 32), resize_mode='longest')
    with pytest.raises(TinyclipError, match='longest'):
        web.to_web(model, tmp_path / 'out', runtime='none')
    assert not (tmp_path / 'out').exists()


@pytest.mark.skipif(NODE is None, reason='no node on PATH')
@pytest.mark.parametrize('mode, interpolation', [('shortest', 'bicubic'), ('squash', 'bilinear')])
def test_the_page_makes_the_pixels_that_the_transform_makes(mode, interpolation, tmp_path):
    look: Any = dict(size=(48, 48), mean=(0.48, 0.45, 0.4), std=(0.27, 0.26, 0.25))
    look |= dict(resize_mode=mode, interpolation=interpolation)
    transform = image_transform_v2(PreprocessCfg(**look), is_train=False)
    asked, want = [], []
    for width, height in [(48, 48), (131, 90), (90, 131), (60, 201), (30, 40), (49, 600)]:
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        picture = Image.fromarray(noise)
        want.append(transform(picture))
        bits = b64encode(picture.convert('RGBA').tobytes()).decode()
        asked.append(dict(settings=look, width=width, height=height, rgba=bits))
    lines = (web.PAGE / 'worker.js').read_text().splitlines()
    worker, request = tmp_path / 'worker.mjs', tmp_path / 'request.json'
    worker.write_text('\n'.join(l for l in lines if not l.startswith('import ')))
    request.write_text(json.dumps(asked))
    command = [str(NODE), str(PIXELS), worker.as_uri(), str(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    level = 1 / 255 / 0.26
    for got, pixels in zip(json.loads(done.stdout), want, strict=True):
        off = (torch.tensor(got).view_as(pixels) - pixels).abs()
        assert off.mean() <= level  # versions of Pillow round in their own order
        assert off.max() < 1e-5 or pixels is not want[0]  # of the model's size: no resize


@with_node
@pytest.mark.parametrize('dtype, tolerance', [('fp32', 1e-4), ('fp16', 5e-3), ('q8', 0.1)])
def test_transformers_js_gives_what_torch_gives(
    dtype, tolerance, folder, slim, photographs, tmp_path
):
    own = photographs[:3]  # of the model's size: larger ones it resizes in its own way
    request = dict(folder=str(folder), dtype=dtype, images=own, texts=TEXTS)
    (tmp_path / 'request.json').write_text(json.dumps(request))
    done = subprocess.run(
        [str(NODE), str(ASK), str(tmp_path / 'request.json')],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    want = logits(slim, *rows_of(slim, own))
    near(torch.tensor(said['logits']), want, tolerance)
    if dtype == 'fp32':
        assert torch.allclose(torch.tensor(said['scores']), want.softmax(1), atol=1e-4)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served():
    "Function from a folder to its address"
    servers = []

    def serve(folder):
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}/'

    yield serve
    for s in servers:
        s.shutdown()
        s.server_close()


ROWS = """async ([texts, pictures]) => {
    const {Clip} = await import('./clip.js')
    const clip = await (await Clip.about(new URL('.', location.href))).load('fp32')
    const found = {text: (await clip.texts(texts)).map(r => [...r]), image: []}
    for (const p of pictures) {
        const bytes = Uint8Array.from(atob(p), c => c.charCodeAt(0))
        found.image.push([...await clip.picture(new Blob([bytes]))])
    }
    return found
}"""


@with_chromium
def test_the_page_gives_what_torch_gives_and_asks_nobody_else(folder, slim, served, photographs):
    if not (folder / 'index.html').exists():
        pytest.skip('no packages for the page: name a node_modules that holds them in NODE_PATH')
    address = served(folder)
    complaints, asked = [], set()
    with chromium() as browser:
        page = browser.new_page(viewport=dict(width=390, height=844))
        page.set_default_timeout(1000 * LIMIT)
        page.on('pageerror', lambda e: complaints.append(str(e)))
        page.on('console', lambda m: complaints.append(m.text))
        page.on('request', lambda r: asked.add(r.url.partition('?')[0]))
        page.goto(f'{address}?dtype=fp32')
        page.wait_for_selector('#load:enabled')
        assert 'MB of model' in page.inner_text('#size')
        page.click('#load')
        page.wait_for_selector('#ready:not([hidden]), #said:not(:empty)')
        assert page.inner_text('#running').startswith('32 bit')
        page.fill('#words', '\n'.join(TEXTS[:2]))
        page.fill('#template', '{}')
        page.set_input_files('#file', photographs[0])
        page.wait_for_selector('#answers li:nth-child(2)')
        image, text = rows_of(slim, photographs)
        best = int(logits(slim, image, text)[0, :2].argmax())
        assert page.inner_text('#answers li:first-child').startswith(TEXTS[best])
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        pictures = [b64encode(Path(p).read_bytes()).decode() for p in photographs]
        found = page.evaluate(ROWS, [TEXTS, pictures])
    near(torch.tensor(found['text']), text, 1e-4)
    near(torch.tensor(found['image'][:3]), image[:3], 1e-4)
    near(torch.tensor(found['image']), image, 2e-2)  # Pillow rounds in its own order
    assert not complaints
    assert all(u.startswith((address, 'blob:', 'data:')) for u in asked)


@with_chromium
def test_the_page_try_it_shows_an_answer_of_each_model(folder, served, photographs, tmp_path):
    if not (folder / 'index.html').exists():
        pytest.skip('no packages for the page: name a node_modules that holds them in NODE_PATH')
    for name in ('clip.js', 'worker.js'):
        shutil.copy(folder / name, tmp_path)
    shutil.copy(ROOT / 'tools' / 'try_it.html', tmp_path / 'index.html')
    (tmp_path / 'runtime').symlink_to(folder / 'runtime')
    for name in ('one', 'two'):
        (tmp_path / name).symlink_to(folder)
    shutil.copy(photographs[0], tmp_path / 'picture.png')
    entries = [dict(name=n, folder=n, parameters='1 k', top1=0.5) for n in ('one', 'two')]
    picture = dict(file='picture.png', caption=TEXTS[0], near=[TEXTS[1]])
    held = dict(models=entries, runtime=1000, asked=2, pictures=[picture])
    (tmp_path / 'models.json').write_text(json.dumps(held))
    complaints = []
    with chromium() as browser:
        page = browser.new_page(viewport=dict(width=390, height=844))
        page.set_default_timeout(1000 * LIMIT)
        page.on('pageerror', lambda e: complaints.append(str(e)))
        page.on('console', lambda m: complaints.append(m.text))
        page.goto(served(tmp_path))
        page.click('#load:enabled')
        page.wait_for_selector('#answers section:nth-child(2) li:nth-child(2)')
        assert page.inner_text('#about') == f'Drawn as: {TEXTS[0]}.'
        box = page.locator('#paper').bounding_box()
        before = page.inner_text('#answers')
        page.click('#clear')
        page.mouse.move(box['x'] + 40, box['y'] + 40)
        page.mouse.down()
        page.mouse.move(box['x'] + 160, box['y'] + 90, steps=4)
        page.mouse.up()
        until(lambda: page.inner_text('#answers') != before)
        assert page.inner_text('#about') == ''
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
    assert not complaints
