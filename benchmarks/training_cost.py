"""How soon each way to a small CLIP is there: samples and processor time until a student reaches
what the random start ends with, and what the manual one ends with.

    # writes results/training-cost-cifar10/run.json; takes the rates that budgets.py has chosen
    python benchmarks/training_cost.py --shared ../shared

Finished runs are kept below runs/ and not repeated.
"""

import argparse
import statistics
import time
from itertools import product
from pathlib import Path

from budgets import BATCH, SETTINGS, WAYS, begin, best_rates, cifar10
from methods import row_of

from tinyclip.core import Table, record_run
from tinyclip.distill import Distiller

STEPS, EVERY, SHARE = 120, 10, 0.25
LEVELS = 'random', 'manual'


class Timed:
    "A test that notes what it found, and whose own processor time can be taken off"

    def __init__(self, test):
        self.test, self.curve, self.seconds = test, [], 0.0

    def __call__(self, model):
        began = time.process_time()
        numbers = self.test(model)
        self.curve.append(numbers['top1'])
        self.seconds += time.process_time() - began
        return numbers


def one(task, a, name, seed, lr):
    "A row: the test after every few steps, from before the first one"
    began = time.process_time()
    student, left, before = begin(task, a, name, SHARE, seed, STEPS)
    inherited = before + time.process_time() - began
    test = Timed(task.test)
    test(student.eval())
    test.seconds, began = 0.0, time.process_time()
    settings = dict(SETTINGS, objective='affinity', lr=lr, seed=seed, evaluate_every=EVERY)
    Distiller(student, task.teacher, task.pairs(seed), evaluate=test, **settings).fit(left)
    each = (time.process_time() - began - test.seconds) / left
    row = dict(method=name, share=SHARE, seed=seed, lr=lr, curve=test.curve)
    return row | dict(
        steps_before=STEPS - left,
        samples_before=task.samples * WAYS[name].reconstructed,
        seconds_before=inherited,
        seconds_per_step=each,
    )


def reached(row, level):
    "Samples and processor seconds when the curve comes to a level; None where it does not"
    point = next((i for i, top1 in enumerate(row['curve']) if top1 >= level), None)
    if point is None:
        return None
    steps = point * EVERY
    samples = row['samples_before'] + (row['steps_before'] + steps) * BATCH
    return samples, row['seconds_before'] + steps * row['seconds_per_step']


def table(rows):
    "Means over seeds; a level is the mean of what a method ends with"
    out = Table()
    for name in dict.fromkeys(r['method'] for r in rows):
        same = [r for r in rows if r['method'] == name]
        line = dict(method=name)
        for of in LEVELS:
            level = statistics.mean(r['curve'][-1] for r in rows if r['method'] == of)
            found = [reached(r, level) for r in same]
            if all(found):
                samples, seconds = (round(statistics.mean(v)) for v in zip(*found))
                line[f'as {of}: samples'], line[f'as {of}: seconds'] = samples, seconds
        out.append(line)
    return out


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--shared', default='../shared')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--ways', nargs='+', choices=[*WAYS], default=[*WAYS])
    p.add_argument('--work', type=Path, default=Path('runs/budgets'))
    a = p.parse_args()
    a.work = a.work / 'cifar10'
    task, rows = cifar10(a), []
    rates = {name: lr for name, lr in best_rates(a).items() if name in a.ways}
    for seed, (name, lr) in product(a.seeds, rates.items()):
        place = a.work / 'curves' / f'{name}-{seed}'.replace(' ', '_')
        row = row_of(place, lambda: one(task, a, name, seed, lr))
        rows.append(row)
        print({k: row[k] for k in ('method', 'seed', 'lr', 'curve')}, flush=True)
    recipe = dict(steps=STEPS, every=EVERY, batch_size=BATCH, share=SHARE, rates=rates)
    recipe |= dict(commits=sorted({r['commit'] for r in rows}))
    found = table(rows)
    metrics = dict(reached=list(found), rows=rows)
    print(found, record_run('training-cost-cifar10', recipe, metrics, a.seeds))
