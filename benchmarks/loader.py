"""Pairs per second of processor time: `open_pairs` against open_clip's own loader, on the same
shards with the same transform.

    python benchmarks/loader.py --shared ../shared       # writes results/loader/run.json

The photographs of ../shared have 128 pixels. Three sets are made of them in a temporary folder: as
they are, each enlarged to 1,024 pixels, and mosaics of 64 of them, which hold detail down to the
pixel as a camera's do.
The loaders take turns within one process, a pass over all pairs each; processor time is what
counts, since other programs do not disturb it as much.
"""

import argparse
import gc
import importlib.machinery
import importlib.util
import inspect
import io
import json
import logging
import random
import resource
import statistics
import sys
import tarfile
import tempfile
import time
import types
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms as T

from tinyclip.core import Table, record_run
from tinyclip.data import open_pairs
from tinyclip.data.jpeg import MARGIN, opener
from tinyclip.data.samples import decode

SIZE, EDGE, SHARDS = 224, 1024, 4
TRAIN, VAL = (image_transform_v2(PreprocessCfg(size=SIZE), is_train=t) for t in (True, False))


def theirs():
    """open_clip's function that builds its loader. Its module imports pandas for CSV files only,
    so an empty one does where pandas is not installed"""
    missing = importlib.util.find_spec('pandas') is None
    if missing:
        sys.modules['pandas'] = types.ModuleType('pandas')
        sys.modules['pandas'].__spec__ = importlib.machinery.ModuleSpec('pandas', None)
    try:
        from open_clip_train import data
    finally:
        if missing:
            del sys.modules['pandas']
    if (
        'eof_value' in inspect.signature(data.tar_file_expander).parameters
    ):  # newer webdatasets mark the end of a shard, which open_clip's grouping stumbles over
        data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)
    return data.get_wds_dataset


def encoded(image):
    image.save(b := io.BytesIO(), 'JPEG', quality=90)
    return b.getvalue()


def enlarged(image):
    return image.resize([round(s * EDGE / max(image.size)) for s in image.size], Image.LANCZOS)


def mosaic(images, rng, side=128):
    whole = Image.new('RGB', (EDGE, EDGE))
    for y in range(0, EDGE, side):
        for x in range(0, EDGE, side):
            whole.paste(rng.choice(images), (x, y))
    return whole


def originals(shared, n):
    "The first n photographs with their first captions"
    for path in sorted((Path(shared) / 'data/flickr8k').glob('train-*.tar')):
        with tarfile.open(path) as tar:
            held = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
        for name, data in held.items():
            if not name.endswith('.jpg'):
                continue
            if not n:
                return
            n -= 1
            yield (
                data,
                json.loads(held[name[:-3] + 'json'])['captions'][0]
                if name[:-3] + 'json' in held
                else held[name[:-3] + 'txt'].decode(),
            )


def write(folder, pairs):
    folder.mkdir()
    for s in range(SHARDS):
        with tarfile.open(folder / f'{s:04}.tar', 'w') as tar:
            for i, (image, text) in enumerate(pairs[s::SHARDS]):
                for ext, data in (('jpg', image), ('txt', text.encode())):
                    info = tarfile.TarInfo(f'{s}{i:05}.{ext}')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def ours(folder, n, batch, workers, reduced):
    pairs = open_pairs(
        str(folder / '*.tar'), TRAIN, TOKENIZER, batch, workers=workers, reduced=reduced
    )
    return pairs.epoch(0)


def open_clips(folder, n, batch, workers):
    args = types.SimpleNamespace(
        train_data=f'{folder}/{{0000..{SHARDS - 1:04}}}.tar',
        train_num_samples=n,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    return iter(BUILD(args, TRAIN, True, floor=True, tokenizer=TOKENIZER).dataloader)


def busy():
    return sum(
        resource.getrusage(who)[i]
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for i in (0, 1)
    )


def one_pass(make, *a):
    "Seconds of processor and of wall time per pair"
    gc.collect()
    cpu, wall, seen = busy(), time.perf_counter(), 0
    batches = make(*a)
    for image, _ in batches:
        seen += len(image)
    wall = time.perf_counter() - wall
    del batches
    gc.collect()  # loader processes have ended: their time is known
    return (busy() - cpu) / seen, wall / seen, seen


def differences(folder, n):
    """Grey levels of 255 between the full decoding resized by bicubic and: the reduced decoding,
    another filter"""

    def grey(t):
        return t.transforms[:2]

    def pixels(im, steps):
        return np.asarray(T.Compose(steps)(im), float)

    bilinear = T.Compose(
        [T.Resize(SIZE, interpolation=T.InterpolationMode.BILINEAR), VAL.transforms[1]]
    )
    near, far = [], []
    with tarfile.open(folder / '0000.tar') as tar:
        data = [tar.extractfile(m).read() for m in tar if m.name.endswith('jpg')][:n]
    for d in data:
        full = pixels(decode(d), grey(VAL))
        im, _ = opener(T.Compose(grey(VAL)))(d)
        near.append(np.abs(pixels(im, [VAL.transforms[1]]) - full))
        far.append(np.abs(np.asarray(bilinear(decode(d)), float) - full))
    return {
        f'{k}_{w}': round(float(np.mean([f(v) for v in vs])), 2)
        for k, vs in dict(reduced=near, bilinear=far).items()
        for w, f in dict(mean=np.mean, p99=lambda v: np.percentile(v, 99), most=np.max).items()
    }


def parts(folder, n):
    """Milliseconds of processor time for the decoding alone, at 1/1, 1/2 and 1/8, where next to
    nothing but the entropy decoding is left: that much no reduction saves"""
    with tarfile.open(folder / '0000.tar') as tar:
        data = [tar.extractfile(m).read() for m in tar if m.name.endswith('jpg')][:n]

    def ms(k):
        start = time.process_time()
        for d in data:
            im = Image.open(io.BytesIO(d))
            im.draft(None, (im.width // k, im.height // k))
            im.load()
        return round(1000 * (time.process_time() - start) / len(data), 2)

    return dict(
        kB=round(np.mean([len(d) for d in data]) / 1000),
        **{f'decode_1/{k}_ms': statistics.median(ms(k) for _ in range(3)) for k in (1, 2, 8)},
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--shared', default='../shared')
    p.add_argument('--n', type=int, default=400)
    p.add_argument('--rounds', type=int, default=4)
    p.add_argument('--batch', type=int, default=50)
    a = p.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings('ignore')
    BUILD, TOKENIZER = theirs(), open_clip.SimpleTokenizer()
    kinds = dict(open_clip=(open_clips,), full=(ours, False), reduced=(ours, True))
    rows, pixels, limits = [], [], []
    with tempfile.TemporaryDirectory() as d:
        d, rng = Path(d), random.Random(0)
        small = list(originals(a.shared, 2 * a.n))
        pictures = [decode(b) for b, _ in small]
        write(d / 'small', small)
        write(
            d / 'enlarged',
            [(encoded(enlarged(im)), t) for im, (_, t) in zip(pictures[: a.n], small)],
        )
        write(d / 'mosaic', [(encoded(mosaic(pictures, rng)), t) for _, t in small[: a.n]])
        gc.collect()
        gc.freeze()  # what is here already need not be looked through between passes
        for name, workers in (
            ('small', 0),
            ('enlarged', 0),
            ('mosaic', 0),
            ('small', 2),
            ('enlarged', 2),
        ):
            n, rounds = len(small) if name == 'small' else a.n, []
            for turn in range(a.rounds if not workers else 2):
                order = list(kinds)[turn % 3 :] + list(kinds)[: turn % 3]  # nobody is always first
                rounds.append(
                    {
                        k: one_pass(kinds[k][0], d / name, n, a.batch, workers, *kinds[k][1:])
                        for k in order
                    }
                )
            for k in kinds:
                cpu, wall = (statistics.median(r[k][i] for r in rounds) for i in (0, 1))
                gain = statistics.median(r['open_clip'][0] / r[k][0] for r in rounds)
                rows.append(
                    dict(
                        set=name,
                        workers=workers,
                        loader=k,
                        pairs=rounds[0][k][2],
                        cpu_ms=round(1000 * cpu, 3),
                        per_core_s=round(1 / cpu, 1),
                        wall_per_s=round(1 / wall, 1),
                        gain=round(gain, 2),
                    )
                )
            print(Table(rows[-3:]), flush=True)
        for name in ('enlarged', 'mosaic'):
            pixels.append(dict(set=name, **differences(d / name, 50)))
            limits.append(dict(set=name, **parts(d / name, 50)))
    print(Table(pixels))
    print(Table(limits))
    recipe = dict(
        n=a.n,
        small=len(small),
        rounds=a.rounds,
        batch=a.batch,
        size=SIZE,
        edge=EDGE,
        margin=MARGIN,
        transform='open_clip training: random crop of 0.9 to 1 of the area',
        jpeg_quality=90,
        threads=1,
        open_clip=open_clip.__version__,
        against='open_clip_train.data.get_wds_dataset',
    )
    print(record_run('loader', recipe, dict(rows=rows, pixels=pixels, limits=limits), [0]))
