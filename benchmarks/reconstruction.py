"""Students that were inherited and reconstructed, and never trained: by the paper's rule, with what
recorded masks kept and with what scores keep, calibrated on training pairs and on photographs of
another kind, few and many.

    # writes results/reconstruction-cifar10/run.json; uses what results/methods-cifar10 kept
    python benchmarks/reconstruction.py cifar10 --shared ../shared

    # writes results/reconstruction-shapes/run.json
    python benchmarks/reconstruction.py shapes

Finished rows are kept below runs/ and not repeated.
"""

import argparse
import json
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path

from methods import cifar10, row_of, shapes

from tinyclip.core import Table, record_run
from tinyclip.data import open_pairs, transforms
from tinyclip.inheritance import inherit
from tinyclip.keep import Keep, keep_for_size
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import scored
from tinyclip.zoo import load

USUAL = 400  # pairs
MOST = 1000  # pairs that scores look at


def recorded_keeps(data, share):
    "What the masks of results/methods-* kept, by seed; mask values are not needed"
    rows = json.loads(Path(f'results/methods-{data}/run.json').read_text())['metrics']
    keeps = {
        r['seed']: Keep.from_json(r['keep'])
        for r in rows
        if r['method'] == 'automatic' and r['share'] == share
    }
    return {seed: Keep(k.sizes, k.axes) for seed, k in keeps.items()}


def photographs_of_another_kind(shared, teacher, tokenizer, seed):
    "Flickr8k with its captions, at the teacher's size"
    source = f'{shared}/data/flickr8k/train-*.tar'
    return open_pairs(source, transforms(teacher)[1], tokenizer, 50, seed=seed)


def one(task, keep, pairs, samples, method, share, seed, calibration):
    "Inherit, reconstruct, test; a row"
    teacher, _, test = task
    student = inherit(teacher, keep)
    start = time.process_time()
    new = reconstruct(student, teacher, pairs, samples, progress=False)
    seconds = time.process_time() - start
    seen = new.reconstruction.samples  # a source may have fewer
    row = dict(share=share, method=method, seed=seed, calibration=calibration, samples=seen)
    return row | dict(inherited=test(student)['top1'], seconds=seconds, **test(new))


def one_scored(task, pairs, samples, share, seed, calibration):
    "The same with what scores keep"
    keep = scored(task[0], pairs, share, samples=min(samples, MOST), progress=False)
    return one(task, keep, pairs, samples, 'scores', share, seed, calibration)


def rows_of(task, data, a):
    "All rows, the quick ones first: (name, what makes it)"
    teacher, pairs, _ = task
    kinds = dict(own=pairs)
    if data == 'cifar10':
        tokenizer = load(f'{a.shared}/teachers/cifar10').tokenizer
        kinds['flickr8k'] = lambda seed, n: photographs_of_another_kind(
            a.shared, teacher, tokenizer, seed
        )
    for seed in a.seeds:
        for share in a.shares:
            keeps = dict(
                rule=keep_for_size(teacher, share), masks=recorded_keeps(data, share)[seed]
            )
            for (kind, of), (method, keep) in product(kinds.items(), keeps.items()):
                make = partial(one, task, keep, of(seed, 50), USUAL, method, share, seed, kind)
                yield f'{method}-{share}-{kind}-{USUAL}-{seed}', make
    for n, (kind, of), seed in product(a.samples, kinds.items(), a.seeds):
        share = min(a.shares)
        make = partial(one_scored, task, of(seed, 50), n, share, seed, kind)
        yield f'scores-{share}-{kind}-{n}-{seed}', make


def table(rows):
    "Means and spreads over seeds"
    out, names = Table(), ('share', 'method', 'calibration', 'samples')
    for key in dict.fromkeys(tuple(r[n] for n in names) for r in rows):
        same = [r for r in rows if tuple(r[n] for n in names) == key]
        top1 = [100 * r['top1'] for r in same]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        before = statistics.mean(100 * r['inherited'] for r in same)
        out.append(
            dict(zip(names, key))
            | dict(inherited=f'{before:.1f}', top1=f'{statistics.mean(top1):.1f} +- {spread:.1f}')
        )
    return out


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('data', choices=['shapes', 'cifar10'])
    p.add_argument('--shared', default='../shared')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--shares', type=float, nargs='+', default=[0.5, 0.25])
    p.add_argument('--samples', type=int, nargs='+', default=[50, 100, 200, USUAL, 1000, 10000])
    p.add_argument('--work', type=Path, default=Path('runs/reconstruction'))
    p.add_argument('--record', action='store_true', help='only what is there')
    a = p.parse_args()
    task = dict(cifar10=cifar10, shapes=shapes)[a.data](a.shared)
    rows = []
    for name, make in rows_of(task, a.data, a):
        place = a.work / a.data / name
        if a.record and not (place / 'row.json').exists():
            continue
        rows.append(row_of(place, make))
        print(rows[-1], flush=True)
    recipe = dict(data=a.data, samples=a.samples, batch_size=50, teacher=task[2](task[0]))
    recipe |= dict(commits=sorted({r['commit'] for r in rows}))
    print(table(rows), record_run(f'reconstruction-{a.data}', recipe, rows, a.seeds))
