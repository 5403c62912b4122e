"""What a teacher costs a training step, and what is left of that when it answered before: the same
student, the same pairs, live and from a cache.

    python benchmarks/cached_step.py     # writes results/cached-step/run.json
                                         # (with a GPU: results/cached-step-cuda)

Steps take turns, so that other programs disturb all alike. They have their batches in memory;
what reading costs with and without a cache is measured apart, a pass of the loader each.
The students are the teacher with half of its channels, and the teacher's own size.
"""

import argparse
import copy
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from PIL import Image

from tinyclip.core import Table, record_run, seed_everything
from tinyclip.data import open_pairs, transforms
from tinyclip.data.cache import cache_size, embedding_width, write_cache
from tinyclip.data.cached import cached_pairs
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import Objective
from tinyclip.train.engine import Engine, make_accelerator


def write_shard(path, n, size):
    "Pictures of noise with a structure, as JPEG, and captions"
    g = torch.Generator().manual_seed(0)
    with tarfile.open(path, 'w') as tar:
        for i in range(n):
            small = torch.randint(0, 256, (9, 9, 3), generator=g, dtype=torch.uint8).numpy()
            Image.fromarray(small).resize((size, size), Image.BICUBIC).save(
                b := io.BytesIO(), 'JPEG', quality=90
            )
            for ext, data in (
                ('jpg', b.getvalue()),
                ('txt', f'picture number {i} of a set'.encode()),
            ):
                info = tarfile.TarInfo(f'{i:06}.{ext}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def engine(student, teacher, precision, device):
    return Engine(student, teacher, Objective('affinity'), make_accelerator(precision, device))


def learn(engine, batch, lr):
    "One step; returns its loss"
    out = engine.backward(batch)
    engine.update(out, lr)
    return float(out['loss'])


def seconds(f):
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def passes(pairs):
    start, n = time.perf_counter(), 0
    for b in pairs.epoch(0):
        n += len(b.image)
    return (time.perf_counter() - start) / n


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--model', default='ViT-B-32')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--batch', type=int, default=512 if torch.cuda.is_available() else 16)
    p.add_argument('--precision', default='bf16' if torch.cuda.is_available() else 'fp32')
    a = p.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    seed_everything(0)
    teacher = open_clip.create_model(a.model).eval().to(device)
    tokenizer = open_clip.get_tokenizer(a.model)
    preprocess = transforms(teacher)[0]
    rows = Table()
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        (d / 'data').mkdir()
        data = str(d / 'data' / '0000.tar')
        write_shard(data, 2 * a.batch, 256)
        started = time.perf_counter()
        written = write_cache(
            data,
            teacher,
            preprocess,
            tokenizer,
            d / 'cache',
            precision=a.precision,
            batch_size=a.batch,
        )
        writing = time.perf_counter() - started
        assert written['bytes'] == cache_size(data, embedding_width(teacher, tokenizer))
        pairs = dict(
            live=open_pairs(data, preprocess, tokenizer, a.batch),
            cached=cached_pairs(data, d / 'cache', preprocess, tokenizer, a.batch),
        )
        reading = {k: [] for k in pairs}
        for _ in range(3):
            for k, v in pairs.items():
                reading[k].append(passes(v))
        batches = {k: next(v.epoch(0)) for k, v in pairs.items()}
        for name, student in (
            (
                'half the channels',
                inherit(teacher, manual(teacher, image_width=0.5, text_width=0.5)),
            ),
            ("the teacher's size", copy.deepcopy(teacher)),
        ):
            runs = dict(
                live=(
                    engine(copy.deepcopy(student), teacher, a.precision, device),
                    batches['live'],
                ),
                cached=(
                    engine(copy.deepcopy(student), None, a.precision, device),
                    batches['cached'],
                ),
            )
            losses = {k: learn(e, b, 0.0) for k, (e, b) in runs.items()}
            times = [
                {k: seconds(lambda: e.update(e.backward(b), 1e-5)) for k, (e, b) in runs.items()}
                for _ in range(a.rounds + 1)
            ][1:]
            live, cached = (statistics.median(t[k] for t in times) for k in ('live', 'cached'))
            rows.append(
                dict(
                    student=name,
                    live_per_s=round(a.batch / live, 1),
                    cached_per_s=round(a.batch / cached, 1),
                    gain=round(statistics.median(t['live'] / t['cached'] for t in times), 2),
                    loss_differs=float(f"{abs(losses['live'] - losses['cached']):.1e}"),
                )
            )
    print(rows)
    read = {k: round(1000 * statistics.median(v), 3) for k, v in reading.items()}
    more = dict(
        reading_ms_per_pair=read,
        writing_per_s=round(2 * a.batch / writing, 1),
        bytes_per_pair=written['bytes'] / written['samples'],
    )
    print(more)
    print(
        record_run(
            'cached-step' + ('-cuda' if device == 'cuda' else ''),
            dict(
                model=a.model,
                batch=a.batch,
                precision=a.precision,
                rounds=a.rounds,
                objective='affinity',
                dtype='float16',
                threads=torch.get_num_threads(),
            ),
            dict(rows=list(rows), **more),
            [0],
        )
    )
