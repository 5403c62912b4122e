"""What makes a short mask phase work: the paper's constraint and the released one, with and without
feeling, projection and hard masks.

    python benchmarks/mask_phase.py      # writes results/mask-phase/run.json

Drawn pictures, half of the tower parameters, the recipe of benchmarks/methods.py, which must have
been run: its automatic student is the last row.
"""

import argparse
import json
from pathlib import Path

import methods

from tinyclip.core import environment, record_run
from tinyclip.stages import SHORT, Stage

MASK_STEPS = 40
FULL = 'projected, feeling, hard'
PAPER = dict(form='two-sided', lr=30 / MASK_STEPS)  # as far as the paper's 3,000 steps at 0.01
VARIANTS = {
    'two-sided, as the paper': PAPER,
    'one-sided, as the released code': PAPER | dict(form='one-sided'),
    'two-sided, feeling, hard': {**SHORT, **PAPER, 'form': 'two-sided'},
    'projected': dict(form='projected', lr=0.1, warmup=0.7),
    'projected, feeling': {**SHORT, 'hard': False},
    'projected, feeling, hard; 80 mask steps': SHORT,
    FULL: SHORT,
}

if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--work', type=Path, default=Path('runs/mask-phase'))
    a = p.parse_args()
    methods.same_recipe(a.work, dict(methods.SHAPES, mask_steps=MASK_STEPS, variants=VARIANTS))
    setting = argparse.Namespace(**methods.SHAPES)
    total = methods.SHAPES['steps']
    task, where, runs = methods.shapes(None), environment(), []
    for seed in a.seeds:
        for name, masks in VARIANTS.items():
            mask_steps = 80 if '80' in name else MASK_STEPS
            place = (
                methods.finished('0.5-automatic', seed)
                if name == FULL
                else a.work / f'{"-".join(name.replace(",", "").replace(";", "").split())}-{seed}'
            )
            row = methods.row_of(
                place,
                lambda: methods.one(
                    task,
                    [Stage(0.5, mask_steps, total - mask_steps)],
                    0.5,
                    seed,
                    setting,
                    place,
                    masks,
                ),
            )
            reached = json.loads((place / 'stage-1/cut/stage.json').read_text())['masks_reached'][
                'towers'
            ]
            runs.append(
                {k: v for k, v in row.items() if k != 'keep'}
                | dict(share=0.5, method=name, seed=seed, masks_reached=reached)
            )
            print(
                {k: runs[-1][k] for k in ('method', 'seed', 'masks_reached', 'top1', 'seconds')},
                flush=True,
            )
    print(
        methods.table(runs),
        record_run(
            'mask-phase',
            dict(
                data='shapes', share=0.5, mask_steps=MASK_STEPS, **methods.SHAPES, variants=VARIANTS
            ),
            runs,
            a.seeds,
            where=where,
        ),
    )
