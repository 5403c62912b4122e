"""The run that the first page of the website replays: the embedded teacher down to a quarter, by
rule and by masks, one seed.

    python benchmarks/landing.py         # writes results/landing: run.json and both event logs
"""

import argparse
import shutil
from pathlib import Path

from tinyclip.comparison import Comparison, by_masks, by_rule
from tinyclip.core import environment, record_run
from tinyclip.lab.demo import BATCH, MASKS, RECIPE
from tinyclip.lab.setup import lab_setup
from tinyclip.live import new_folder
from tinyclip.train.history import read_log

if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--share', type=float, default=0.25)
    p.add_argument('--steps', type=int, default=200)
    p.add_argument('--mask-steps', type=int, default=40)
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    b = lab_setup(batch_size=BATCH, n=1280, seed=a.seed, device='cpu')
    where = environment()
    ways = dict(
        manual=by_rule(a.share, a.steps),
        automatic=by_masks(a.share, a.steps, a.mask_steps, masks=MASKS),
    )
    folder = new_folder('runs/landing')
    contest = Comparison(
        ways,
        b.teacher,
        b.pairs,
        folder,
        share=a.share,
        seed=a.seed,
        evaluate=b.evaluate,
        evaluate_every=20,
        log_every=2,
        device='cpu',
        **RECIPE,
    )
    table = contest.fit()
    print(table)
    record_run(
        'landing',
        vars(a) | dict(batch=BATCH, **RECIPE, masks=MASKS),
        list(table),
        [a.seed],
        where=where,
    )
    for log in folder.rglob('events.jsonl'):
        to = Path('results/landing') / log.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, to)
    print(len(read_log('results/landing')), 'events')
