"""Students chosen by scores, inherited and reconstructed, and never trained: what is left after the
best compensation, and the measures that are usual.

    # writes results/scores-cifar10/run.json
    python benchmarks/scores.py cifar10 --shared ../shared

    # writes results/scores-shapes/run.json
    python benchmarks/scores.py shapes
"""

import argparse
import itertools
import statistics
import time

from methods import cifar10, shapes

from tinyclip.core import Table, record_run
from tinyclip.evaluate.cost import parameters
from tinyclip.inheritance import inherit
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import MEASURES, unit_scores

SAMPLES = dict(cifar10=400, shapes=1000)


def rows_of(task, a):
    "All rows, seed by seed and measure by measure"
    teacher, pairs, test = task
    samples, whole = SAMPLES[a.data], parameters(teacher)['towers']
    for seed in a.seeds:
        batches = itertools.islice(pairs(seed, 50).epoch(0), samples // 50)
        calibration = [tuple(b[:2]) for b in batches]
        for by in a.by:
            start = time.process_time()
            scores = unit_scores(teacher, calibration, by, samples, seed, progress=False)
            scoring = time.process_time() - start
            for share in a.shares:
                start = time.process_time()
                keep = scores.keep(share)
                new = reconstruct(
                    inherit(teacher, keep), teacher, calibration, samples, progress=False
                )
                seconds = time.process_time() - start
                yield dict(
                    share=share,
                    by=by,
                    seed=seed,
                    samples=samples,
                    kept=parameters(new)['towers'] / whole,
                    scoring=scoring,
                    seconds=seconds,
                    keep=keep.to_json(),
                    **test(new),
                )


def table(rows):
    "Means and spreads over seeds"
    out = Table()
    for share, by in dict.fromkeys((r['share'], r['by']) for r in rows):
        same = [r for r in rows if (r['share'], r['by']) == (share, by)]
        top1 = [100 * r['top1'] for r in same]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        out.append(
            dict(share=share, by=by, seeds=len(same))
            | dict(top1=f'{statistics.mean(top1):.1f} +- {spread:.1f}')
        )
    return out


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('data', choices=['shapes', 'cifar10'])
    p.add_argument('--shared', default='../shared')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--shares', type=float, nargs='+', default=[0.5, 0.25, 0.1])
    p.add_argument('--by', nargs='+', choices=MEASURES, default=list(MEASURES))
    a = p.parse_args()
    task = dict(cifar10=cifar10, shapes=shapes)[a.data](a.shared)
    rows = []
    for row in rows_of(task, a):
        rows.append(row)
        print({k: v for k, v in row.items() if k != 'keep'}, flush=True)
    recipe = dict(data=a.data, samples=SAMPLES[a.data], batch_size=50, teacher=task[2](task[0]))
    print(table(rows), record_run(f'scores-{a.data}', recipe, rows, a.seeds))
