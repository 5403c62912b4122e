"""What the released configurations cost beside ViT-B/32: counted, and timed in turns within one
run. Weights are random; nothing here depends on them.

    python benchmarks/released_sizes.py  # writes results/released-sizes/run.json
                                         # (with a GPU: results/released-sizes-cuda)
"""

import argparse
import json
from pathlib import Path

import torch

import tinyclip
from tinyclip.core import Table, human, native_bf16, record_run, seed_everything
from tinyclip.evaluate.cost import baseline, profile

REFERENCE = 'ViT-B-32'


def manual():
    "Names of the six configurations with manual inheritance, as the published table has them"
    facts = json.loads((Path(tinyclip.__file__).parent / 'assets' / 'released.json').read_text())
    return [f['config'] for f in facts if f['config']]


def measure(names, batch, precision, device, repeats):
    "A row per model, the reference first"
    models = {n: baseline(n, device) for n in (REFERENCE, *names)}
    return [
        dict(model=n, precision=precision) | r
        for n, r in profile(models, batch, precision, REFERENCE, repeats).items()
    ]


def readable(r):
    "A row as a person reads it"
    return {k: r[k] for k in ('model', 'precision')} | {
        k: human(float(r[k])) if r[k] is not None else ''
        for k in (
            'towers_parameters',
            'total_parameters',
            'total_macs',
            'images_per_s',
            'texts_per_s',
            'pairs_per_s',
            'speed',
            'spread',
            'peak_memory',
        )
    }


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        '--batch', type=int, help='images and texts per batch (default: 8, with a GPU 256)'
    )
    p.add_argument('--repeats', type=int, default=9)
    p.add_argument('--root', default='results', help='the ledger')
    a = p.parse_args()
    gpu = torch.cuda.is_available()
    device, batch = ('cuda', a.batch or 256) if gpu else ('cpu', a.batch or 8)
    precisions = ['fp32'] + ['bf16'] * native_bf16(device)
    seed_everything(0)
    rows = [
        r
        for precision in precisions
        for r in measure(manual(), batch, precision, device, a.repeats)
    ]
    print(Table(map(readable, rows)))
    recipe = dict(
        reference=REFERENCE,
        batch_size=batch,
        repeats=a.repeats,
        warm_up=2,
        precisions=precisions,
        threads=1,
        clock='events' if gpu else 'processor time',
        speed='median of the ratios of rounds',
    )
    print(record_run('released-sizes' + ('-cuda' if gpu else ''), recipe, rows, [0], root=a.root))
