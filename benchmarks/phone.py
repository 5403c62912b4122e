"""Exports for phones beside torch and ONNX: answers that changed, size, and time for one image.

    make phone                                              # LiteRT has an environment of its own
    .venv-phone/bin/python benchmarks/phone.py --shared ../shared  # writes results/phone/run.json

The models are the CIFAR-10 teacher and untrained students of half its size, reconstructed from 400
photographs that each seed draws anew. A time is the processor's, of one thread on this machine,
which is no phone: files take turns, one image at a time, and a ratio is the median of neighbours'.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tinyclip.core import Table, record_run
from tinyclip.data import open_pairs, transforms
from tinyclip.data.pairs import labelled
from tinyclip.evaluate import prompts
from tinyclip.inheritance import inherit
from tinyclip.keep import keep_for_size
from tinyclip.reconstruction import reconstruct
from tinyclip.zoo import load
from tinyclip.zoo.formats import FORMATS
from tinyclip.zoo.onnx import Tower, float_copy

SHARE, PHOTOGRAPHS, REPEATS = 0.5, 400, 200


def models(shared, seeds):
    "Names and loaded models"
    loaded = load(f'{shared}/teachers/cifar10')
    yield 'teacher', None, loaded
    train = transforms(loaded.model)[0]
    for seed in seeds:
        shards = f'{shared}/data/cifar10/train-*.tar'
        pairs = open_pairs(shards, train, loaded.tokenizer, 50, seed=seed)
        student = inherit(loaded.model, keep_for_size(loaded.model, SHARE))
        student = reconstruct(student, loaded.model, pairs, PHOTOGRAPHS, progress=False)
        yield 'student', seed, loaded._replace(model=student.eval())


def forms(loaded, folder):
    "Every form of a model: name -> (model, bytes)"
    found = {'torch': (loaded.model, 4 * sum(p.numel() for p in loaded.model.parameters()))}
    for name in ('onnx', 'litert'):
        f = FORMATS[name]
        f.write(loaded, folder / name, int8=True)
        for form in f.forms(folder / name):
            found[form] = f.open(folder / name, form).model, f.size(folder / name, form)
    return found


@torch.no_grad()
def answers(model, pixels, tokens):
    "The class of every picture"
    encode = model.encode_image, model.encode_text
    image, text = (f(x, normalize=True) for f, x in zip(encode, (pixels, tokens)))
    return (image @ text.T).argmax(1)


@torch.no_grad()
def ratios(found, pixels):
    "Time of one image as a share of torch's, in turns"
    asked = {n: m.encode_image for n, (m, _) in found.items()}
    asked['torch'] = Tower(float_copy(found['torch'][0]), 'image')
    times = {n: [] for n in asked}
    for i in range(REPEATS):
        for n, f in asked.items():
            x, began = pixels[i : i + 1], time.process_time()
            f(x)
            times[n].append(time.process_time() - began)
    return {n: statistics.median(map(np.divide, t, times['torch'])) for n, t in times.items()}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--shared', default='../shared')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a = p.parse_args()
    torch.set_num_threads(1)
    rows = Table()
    for name, seed, loaded in models(a.shared, a.seeds):
        data = labelled(f'{a.shared}/data/cifar10/val-0000.tar', loaded.preprocess, 250)
        pixels, labels = map(torch.cat, zip(*data))
        tokens = loaded.tokenizer([prompts(c, 'simple')[0] for c in data.classnames])
        with tempfile.TemporaryDirectory() as folder:
            found = forms(loaded, Path(folder))
            times = ratios(found, pixels)
            said = {n: answers(m, pixels, tokens) for n, (m, _) in found.items()}
        for form, (_, size) in found.items():
            top1 = (said[form] == labels).float().mean().item()
            changed = (said[form] != said['torch']).float().mean().item()
            row = dict(model=name, seed=seed, form=form, MB=size / 1e6, top1=top1, changed=changed)
            rows.append(row | dict(time=times[form]))
    recipe = dict(share=SHARE, photographs=PHOTOGRAPHS, repeats=REPEATS, threads=1)
    print(rows, record_run('phone', recipe, rows, a.seeds))


if __name__ == '__main__':
    main()
