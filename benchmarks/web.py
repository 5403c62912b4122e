"""Answers that change on the way into a browser: a student in torch, its `tinyclip export --to web`
in onnxruntime, and the same files in transformers.js, in 32, 16 and 8 bits.

    npm install @huggingface/transformers@4.3.2   # anywhere; its node_modules in NODE_PATH
    python benchmarks/web.py --shared ../shared   # writes results/web/run.json

Pictures: photographs of CIFAR-10's test set, for its teacher and a student of half that keeps what
could not be made up for, reconstructed from 400 photographs; and drawn ones of combinations that no
training shows, for the three models of the page *Try it*. All have the models' own size, so that no
resize comes in between, and are asked one by one, as in a browser: 8 bit rounds by the range of a
whole batch. *Changed* is the share named otherwise than by torch, *difference* the largest one of
the logits, as a share of the largest. Nothing is timed.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from PIL import Image

from tinyclip.core import Table, record_run
from tinyclip.data import open_pairs
from tinyclip.data.shapes import PROMPTS, Shapes, classnames
from tinyclip.inheritance import inherit
from tinyclip.scores import scored
from tinyclip.zoo import load
from tinyclip.zoo.folders import Loaded
from tinyclip.zoo.formats import FORMATS, open_model
from tinyclip.zoo.vocabulary import shorten
from tinyclip.zoo.web import DTYPES, NPM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
import try_it

ASK = Path(__file__).with_name('web.cjs')
BITS = dict(fp32='float32', fp16='float16', q8='8 bit')
CALIBRATE, SHARE = 400, 0.5
PACKAGE = '@huggingface/transformers'


def photographs(shared: Path, n: int):
    "Models, pictures, labels and texts of CIFAR-10"
    teacher, preprocess, tokenizer = load(shared / 'teachers' / 'cifar10')
    folder = shared / 'data' / 'cifar10'
    pairs = open_pairs(str(folder / 'train-0000.tar'), preprocess, tokenizer, 64)
    quiet = dict(samples=CALIBRATE, progress=False)
    keep = scored(teacher, pairs, share=SHARE, **quiet)
    student = inherit(teacher, keep, calibrate=pairs, **quiet)
    models = {'teacher': teacher, 'half, reconstructed': student}
    pictures, labels = [], []
    with tarfile.open(folder / 'val-0000.tar') as shard:
        for m in shard:
            held = shard.extractfile(m).read()
            if m.name.endswith('.cls'):
                labels.append(int(held))
            elif m.name.endswith(('.png', '.jpg')):
                pictures.append(Image.open(io.BytesIO(held)).convert('RGB'))
    texts = [f'a photo of a {c}.' for c in (folder / 'classnames.txt').read_text().split('\n') if c]
    loaded = {k: Loaded(m, preprocess, tokenizer) for k, m in models.items()}
    return loaded, pictures[:n], labels[:n], texts


def drawings(n: int):
    "The same of the page *Try it*: token tables shortened to what may be asked"
    _, preprocess, tokenizer = load('shapes-teacher')
    words = list(try_it.captions())
    drawn = Shapes('heldout', n=n, seed=99)
    loaded = {}
    for name, model in try_it.models().items():
        model, own = shorten(model, words)
        loaded[f'Try it: {name}'] = Loaded(model, preprocess, own)
    texts = [PROMPTS[0].format(c) for c in classnames]
    return loaded, [drawn[i][0] for i in range(n)], [int(y) for y in drawn.labels(range(n))], texts


@torch.no_grad()
def logits(loaded: Loaded, pictures: list, texts: list, model=None) -> torch.Tensor:
    "Of every picture with every text; `model` has rows of unit length, as an export has"
    model = model or loaded.model
    pixels = torch.stack([loaded.preprocess(p) for p in pictures]).split(1)
    image = torch.cat([model.encode_image(p, normalize=True) for p in pixels])
    text = model.encode_text(loaded.tokenizer(texts), normalize=True)
    return loaded.model.logit_scale.exp() * image @ text.T


@torch.no_grad()
def in_node(loaded: Loaded, folder: Path, dtype: str, pictures: Path, texts: list) -> torch.Tensor:
    "The same from transformers.js"
    names = sorted(map(str, pictures.iterdir()))
    request = pictures.parent / 'request.json'
    request.write_text(json.dumps(dict(folder=str(folder), dtype=dtype, images=names, texts=texts)))
    done = subprocess.run(['node', str(ASK), str(request)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'transformers.js failed: {done.stderr[-2000:]}')
    image, text = (torch.tensor(rows) for rows in json.loads(done.stdout).values())
    return loaded.model.logit_scale.exp() * image @ text.T


def compare(name: str, loaded: Loaded, pictures: list, labels: list, texts: list) -> list:
    "A row for each form and reader"
    rows, scratch = [], Path(tempfile.mkdtemp())
    folder = scratch / 'export'
    FORMATS['web'].write(loaded, folder, runtime='none')
    (scratch / 'pictures').mkdir()
    for i, p in enumerate(pictures):
        p.save(scratch / 'pictures' / f'{i:05}.png')
    want = logits(loaded, pictures, texts)
    right = torch.tensor(labels)

    def row(form, reader, got, size):
        changed = (got.argmax(1) != want.argmax(1)).double().mean().item()
        off = ((got - want).abs().max() / want.abs().max()).item()
        top1 = (got.argmax(1) == right).double().mean().item()
        rows.append(
            dict(
                model=name,
                form=form,
                reader=reader,
                changed=changed,
                difference=off,
                top1=top1,
                bytes=size,
            )
        )

    row('float32', 'torch', want, sum(p.numel() * 4 for p in loaded.model.parameters()))
    for dtype, end in DTYPES.items():
        files = [folder / 'onnx' / f'{kind}_model{end}.onnx' for kind in ('vision', 'text')]
        size = sum(f.stat().st_size for f in files)
        opened = open_model(f'{folder}:{dtype}')
        got = logits(loaded, pictures, texts, opened.model)
        row(BITS[dtype], 'onnxruntime', got, size)
        got = in_node(loaded, folder, dtype, scratch / 'pictures', texts)
        row(BITS[dtype], 'transformers.js', got, size)
    shutil.rmtree(scratch)
    return rows


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--shared', type=Path, default=Path('../shared'))
    p.add_argument('--n', type=int, default=1000, help='pictures of each kind')
    a = p.parse_args()
    if not os.environ.get('NODE_PATH'):
        raise SystemExit(f'Name a node_modules that holds {PACKAGE} in NODE_PATH.')
    rows = []
    for loaded, *asked in (photographs(a.shared, a.n), drawings(a.n)):
        for name, one in loaded.items():
            rows += compare(name, one, *asked)
            print(Table(r for r in rows if r['model'] == name), flush=True)
    record_run(
        'web',
        dict(
            n=a.n,
            share=SHARE,
            calibrate=CALIBRATE,
            photographs='CIFAR-10 test set, 10 texts',
            drawings=f'held-out combinations, {len(classnames)} texts',
            packages=NPM,
        ),
        rows,
        [try_it.SEED],
    )
