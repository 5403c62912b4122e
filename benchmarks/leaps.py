"""One leap against several stages, at a quarter and at a tenth, and where the steps of a plan are
best spent.

    python benchmarks/leaps.py           # writes results/leaps/run.json

Drawn pictures and the recipe of benchmarks/methods.py, which must have been run: two of the plans
are its own.
"""

import argparse
from pathlib import Path

import methods

from tinyclip.core import environment, record_run
from tinyclip.stages import SHORT, Stage

PLANS = {
    (0.25, 'one leap'): 'automatic',
    (0.25, 'two stages, half of the steps each'): 'automatic-two-stages',
    (0.25, 'two stages, most steps at the end'): [Stage(0.5, 20, 20), Stage(0.25, 20, 140)],
    (0.25, 'three stages, most steps at the end'): [
        Stage(0.75, 10, 10),
        Stage(0.5, 15, 15),
        Stage(0.25, 15, 135),
    ],
    (0.1, 'one leap'): [Stage(0.1, 40, 160)],
    (0.1, 'two stages, most steps at the end'): [Stage(0.4, 20, 20), Stage(0.1, 20, 140)],
}

if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--work', type=Path, default=Path('runs/leaps'))
    a = p.parse_args()
    methods.same_recipe(a.work, dict(methods.SHAPES, masks=SHORT))
    setting = argparse.Namespace(**methods.SHAPES)
    task, where, runs = methods.shapes(None), environment(), []
    for seed in a.seeds:
        for (share, name), plan in PLANS.items():
            place = (
                methods.finished(f'{share}-{plan}', seed)
                if isinstance(plan, str)
                else a.work / f'{share}-{name.replace(" ", "-").replace(",", "")}-{seed}'
            )
            row = methods.row_of(
                place, lambda: methods.one(task, plan, share, seed, setting, place)
            )
            runs.append(
                {k: v for k, v in row.items() if k != 'keep'}
                | dict(share=share, method=name, seed=seed)
            )
            print(
                {k: runs[-1][k] for k in ('share', 'method', 'seed', 'top1', 'seconds')}, flush=True
            )
    plans = {
        f'{s:.0%}: {n}': p if isinstance(p, str) else [vars(o) for o in p]
        for (s, n), p in PLANS.items()
    }
    print(
        methods.table(runs),
        record_run(
            'leaps',
            dict(data='shapes', **methods.SHAPES, masks=SHORT, plans=plans),
            runs,
            a.seeds,
            where=where,
        ),
    )
