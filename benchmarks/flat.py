"""Memory over a run: resident memory of all its processes while a tiny student is distilled from
shards, with and without loader workers.

    python benchmarks/flat.py            # writes results/flat/run.json

Two sums over the processes, every few steps of twenty epochs, so that workers start and end twenty
times: what the system calls resident, and of it what the run itself wrote (anonymous and shared
memory, a page that two processes share counted half for each; no libraries' code).
A quarter of the pictures cannot be read. Needs Linux.
"""

import argparse
import io
import re
import statistics
import tarfile
import tempfile
import warnings
from pathlib import Path

import open_clip
import psutil
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from tinyclip.core import Table, record_run, seed_everything
from tinyclip.data import open_pairs
from tinyclip.distill import Distiller

SIZE, CONTEXT, SHARDS = 32, 16, 8


def write(folder, n):
    "Noise of many sizes as JPEG, every fourth cut off; one caption each"
    rng = torch.Generator().manual_seed(0)
    for s in range(SHARDS):
        with tarfile.open(folder / f'{s:04}.tar', 'w') as tar:
            for i in range(s, n, SHARDS):
                pixels = torch.randint(
                    0, 256, (40 + i % 50, 40 + i % 70, 3), generator=rng, dtype=torch.uint8
                )
                Image.fromarray(pixels.numpy()).save(b := io.BytesIO(), 'JPEG')
                for ext, data in (
                    ('jpg', b.getvalue()[: 500 if i // SHARDS % 4 == 3 else None]),
                    ('txt', f'picture number {i}'.encode()),
                ):
                    info = tarfile.TarInfo(f'{i:06}.{ext}')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def clip():
    text = dict(context_length=CONTEXT, vocab_size=49408, width=32, heads=2, layers=1)
    return open_clip.CLIP(
        32, dict(image_size=SIZE, layers=1, width=32, head_width=16, patch_size=16), text
    )


def held():
    "Processes, MB resident, MB written: of this process and all that it started"
    rss = 0
    own = 0
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    for p in processes:
        try:
            maps = dict(
                re.findall(r'(\w+): +(\d+) kB', Path(f'/proc/{p.pid}/smaps_rollup').read_text())
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        rss += int(maps['Rss'])
        own += int(maps['Pss_Anon']) + int(maps['Pss_Shmem'])
    return len(processes), round(rss / 1024, 1), round(own / 1024, 1)


def run(folder, workers, steps, batch, every):
    """(step, processes, MB resident, MB written) every so many steps, and how many samples were
    skipped"""
    seed_everything(0)
    pairs = open_pairs(
        str(folder / '*.tar'),
        image_transform_v2(PreprocessCfg(size=SIZE), is_train=True),
        open_clip.SimpleTokenizer(context_length=CONTEXT),
        batch,
        workers=workers,
    )
    seen = []

    def look(e):
        return seen.append((e['step'], *held())) if e['event'] == 'log' else None

    Distiller(
        clip(),
        clip(),
        pairs,
        objective=['affinity', 'contrastive'],
        device='cpu',
        precision='fp32',
        log_every=every,
        listeners=[look],
        progress=False,
    ).fit(steps)
    return seen, sum(pairs.skipped.values())


def summary(seen, skipped, workers, steps):
    "Medians early and late, where as many processes are alive"
    n = max(p for _, p, *_ in seen)

    def part(a, b, i):
        return statistics.median(
            row[i] for row in seen if a * steps < row[0] <= b * steps and row[1] == n
        )

    row = dict(workers=workers, steps=steps, processes=n, skipped=skipped)
    for i, name in ((2, 'resident'), (3, 'written')):
        early, late = part(0.2, 0.4, i), part(0.8, 1, i)
        row |= {
            f'{name}_early_MB': early,
            f'{name}_late_MB': late,
            f'{name}_growth': round(late / early - 1, 4),
        }
    return row


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--steps', type=int, default=1000)
    p.add_argument('--batch', type=int, default=16)
    p.add_argument('--epoch', type=int, default=50, help='steps per epoch')
    p.add_argument('--every', type=int, default=10)
    a = p.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    rows, curves = [], {}
    with tempfile.TemporaryDirectory() as d:
        write(Path(d), a.epoch * a.batch * 4 // 3 + SHARDS)
        for workers in (0, 2):
            seen, skipped = run(Path(d), workers, a.steps, a.batch, a.every)
            rows.append(summary(seen, skipped, workers, a.steps))
            curves[str(workers)] = seen
            print(Table(rows[-1:]), flush=True)
    recipe = dict(
        steps=a.steps,
        batch=a.batch,
        steps_per_epoch=a.epoch,
        every=a.every,
        size=SIZE,
        shards=SHARDS,
        objective='affinity, contrastive',
        threads=1,
        early='steps 200-400',
        late='steps 800-1000',
    )
    print(record_run('flat', recipe, dict(rows=rows, curves=curves), [0]))
