"""Every way to a small CLIP at every budget: what is inherited, how it is chosen, whether it is
reconstructed, and how long it is trained. All of them see the same pairs, each with the learning
rate that is best for it: the same grid, on photographs that are kept from training.

    # the learning rates, the table, the losses: finished rows are kept below runs/ and not repeated
    python benchmarks/budgets.py cifar10 rates --shared ../shared
    python benchmarks/budgets.py cifar10 table --shared ../shared
    python benchmarks/budgets.py cifar10 loss-rates --shared ../shared
    python benchmarks/budgets.py cifar10 losses --shared ../shared

    # writes results/budgets-cifar10/run.json from the rows that are there
    python benchmarks/budgets.py cifar10 record

The drawn pictures (shapes) take the rates that were chosen on CIFAR-10.
"""

import argparse
import json
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from methods import row_of

from tinyclip.core import Table, record_run, seed_everything, write_json
from tinyclip.data import open_pairs, transforms
from tinyclip.data.cache import write_cache
from tinyclip.data.cached import cached_pairs
from tinyclip.data.pairs import labelled
from tinyclip.data.shapes import Shapes
from tinyclip.distill import Distiller
from tinyclip.evaluate import zero_shot
from tinyclip.inheritance import inherit, reinitialized
from tinyclip.keep import Keep, keep_for_size
from tinyclip.lab.demo import examine
from tinyclip.masking import MaskedCLIP
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import scored, unit_scores
from tinyclip.sparsity import Sparsity
from tinyclip.stages import SHORT
from tinyclip.towers import TOWERS
from tinyclip.zoo import load, save

BATCH = 64
SHARES = 0.5, 0.25, 0.1
BUDGETS = 0, 40, 120, 480
RATES = 1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3
MASK_STEPS = {40: 30, 120: 30, 480: 60}  # of the budget
WEIGHTS_LR = 3e-4  # in mask phases
PAPER = dict(form='two-sided', lr=0.1, warmup=0.7)
SETTINGS = dict(weight_decay=0.1, warmup=0.1, device='cpu', precision='fp32', progress=False)


class Task(NamedTuple):
    "A teacher, what it is compressed with, and how a student is examined"

    teacher: object
    pairs: object  # seed -> pairs to train on, with the teacher's features where they are stored
    calibration: object  # seed -> pairs to reconstruct from
    samples: int  # of these
    held_out: object  # student -> numbers, on pictures for choosing
    test: object  # student -> numbers
    tokenizer: object = None  # for the folders of models that need it there


def cifar10(a) -> Task:
    "Photographs of ten classes; the last shard of the training part is for choosing"
    teacher, preprocess, tokenizer = load(f'{a.shared}/teachers/cifar10')
    train, data = transforms(teacher)[0], f'{a.shared}/data/cifar10'
    shards = f'{data}/train-000{{0..6}}.tar'
    write_cache(shards, teacher, train, tokenizer, a.work / 'cache', views=2, precision='fp32')

    def classify(file, m):
        return zero_shot(m, tokenizer, labelled(f'{data}/{file}', preprocess, 250))

    return Task(
        teacher,
        lambda seed: cached_pairs(
            shards, a.work / 'cache', train, tokenizer, BATCH, teacher=teacher, seed=seed
        ),
        lambda seed: open_pairs(shards, train, tokenizer, 50, seed=seed),
        400,
        partial(classify, 'train-0007.tar'),
        partial(classify, 'val-0000.tar'),
    )


def shapes(a) -> Task:
    "Drawn pictures, new ones in every step"
    teacher, preprocess, tokenizer = load('shapes-teacher')

    def pairs(n, seed):
        return open_pairs(Shapes('train', seed=seed + 1), preprocess, tokenizer, n, seed=seed)

    def examined(m):
        return examine(m, preprocess, tokenizer, n=1280)

    return Task(teacher, partial(pairs, BATCH), partial(pairs, 50), 1000, examined, examined)


class Way(NamedTuple):
    "How a student begins"

    chosen: str  # by the `rule`, by `masks`, by `scores`, ...
    reconstructed: bool = False
    fresh: bool = False  # random weights
    masks: dict | None = None  # settings of a mask phase


WAYS = {
    'random': Way('rule', fresh=True),
    'manual': Way('rule'),
    'automatic (paper)': Way('masks', masks=PAPER),
    'automatic': Way('masks', masks=SHORT),
    'manual, reconstructed': Way('rule', True),
    'automatic, reconstructed': Way('masks', True, masks=SHORT),
    'automatic (paper), reconstructed': Way('masks', True, masks=PAPER),
    'scores': Way('scores'),
    'scores, reconstructed': Way('scores', True),
    'masks from scores, reconstructed': Way('masks', True, masks=SHORT | dict(scored=True)),
}


@torch.no_grad()
def start_from_scores(masked, task, seed):
    "Begin every log alpha by the rank of what is lost with its unit, per parameter saved: 1 to 5"
    pairs = task.calibration(seed)
    lost = unit_scores(task.teacher, pairs, samples=task.samples, seed=seed, progress=False).units()
    whole, sizes = sum(masked.size.count({}).values()), masked.size.sizes
    each = {a: whole - sum(masked.size.count({a: sizes[a] - 1}).values()) for a in masked.groups}
    for tower in TOWERS:
        axes = [a for a in masked.groups if a.startswith(tower)]
        ranks = torch.cat([lost[a] / each[a] for a in axes]).argsort().argsort().float()
        parts = (1 + 4 * ranks / len(ranks)).split([sizes[a] for a in axes])
        for a, part in zip(axes, parts):
            masked.by_group(masked.log_alpha)[a].copy_(part)


def masked_keep(task, masks, share, seed, steps):
    "What masks keep after their phase, and the student that they cut"
    masks = dict(masks)
    own = {k: masks.pop(k) for k in ('kinds', 'start', 'hard') if k in masks}
    from_scores = masks.pop('scored', False)
    masked = MaskedCLIP(task.teacher, **own).float()
    if from_scores:
        start_from_scores(masked, task, seed)
    penalty = Sparsity(masked, share, **masks)
    job = Distiller(
        masked,
        task.teacher,
        task.pairs(1000 + seed),
        penalty=penalty,
        lr=WEIGHTS_LR,
        schedule='constant',
        seed=seed,
        **SETTINGS,
    )
    job.fit(steps)
    return penalty.cut()


def made_once(task, place, make):
    "A student that rows with other budgets and rates share, and the processor time it took"
    began = time.process_time()
    if not (place / 'seconds.json').exists():
        student = make()
        save(student, place / 'student', tokenizer=task.tokenizer)
        write_json(place / 'seconds.json', time.process_time() - began)
    return load(place / 'student').model, json.loads((place / 'seconds.json').read_text())


def chosen_by_scores(task, share, seed):
    "What scores keep, inherited"
    pairs = task.calibration(seed)
    keep = scored(task.teacher, pairs, share, samples=task.samples, progress=False)
    return inherit(task.teacher, keep)


def begin(task, a, name, share, seed, budget):
    "An untrained student, the steps that are left of the budget, and processor time spent before"
    way, left, before = WAYS[name], budget, 0.0
    if way.masks:
        steps = MASK_STEPS[budget]
        kind = 'scored' if 'scored' in way.masks else way.masks['form']
        place = a.work / 'masks' / f'{kind}-{share}-{seed}-{steps}'
        student, before = made_once(
            task, place, lambda: masked_keep(task, way.masks, share, seed, steps)
        )
        left -= steps
    elif way.chosen == 'scores':
        place = a.work / 'scores' / f'{share}-{seed}'
        student, before = made_once(task, place, lambda: chosen_by_scores(task, share, seed))
    else:
        student = inherit(task.teacher, keep_for_size(task.teacher, share))
    if way.reconstructed:
        keep = Keep(student.keep.sizes, student.keep.axes)  # hard
        student = inherit(task.teacher, keep)
        pairs = task.calibration(seed)
        student = reconstruct(student, task.teacher, pairs, task.samples, progress=False)
    if way.fresh:
        seed_everything(seed)
        student = reinitialized(student)
    return student, left, before


def train(task, student, steps, seed, lr, objective='affinity'):
    "Distil for some steps"
    settings = dict(SETTINGS, objective=objective, lr=lr, seed=seed)
    return Distiller(student, task.teacher, task.pairs(seed), **settings).fit(steps).student


def one(task, a, name, share, seed, budget, lr, test, **how):
    "A row: one student, from nothing to its examination"
    began = time.process_time()
    student, left, before = begin(task, a, name, share, seed, budget)
    inherited = before + time.process_time() - began
    began = time.process_time()
    if left:
        student = train(task, student, left, seed, lr, **how)
    seconds = inherited + time.process_time() - began
    samples = budget * BATCH + task.samples * WAYS[name].reconstructed
    row = dict(method=name, share=share, seed=seed, budget=budget, lr=lr, objective='affinity')
    cost = dict(samples=samples, seconds=seconds, seconds_inherited=inherited)
    return row | how | cost | test(student.eval())


# %% Which rows there are


def rows(a, task, part, cells):
    "Rows of a part, those made now included"
    for cell in cells:
        name = '-'.join(map(told, cell.values()))
        test = task.held_out if part.endswith('rates') else task.test
        yield row_of(a.work / part / name, lambda cell=cell: one(task, a, test=test, **cell))


def named(v):
    "A value, in words"
    return ' + '.join(v) if isinstance(v, list) else str(v)


def told(v):
    "A value, in the name of a folder"
    return named(v).replace(' + ', '+').replace(' ', '_')


def rate_cells(a):
    "One share and one budget; a seed that the table does not use"
    for name, lr in product(a.ways, a.rates):
        yield dict(name=name, share=0.25, seed=100, budget=120, lr=lr)


def best_rates(a, part='rates', by='method'):
    "The rate with the highest accuracy on the photographs kept for it, by method or by objective"
    found = {}
    for file in sorted((a.work.parent / 'cifar10' / part).glob('*/row.json')):
        row = json.loads(file.read_text())
        found.setdefault(named(row[by]), []).append((row['top1'], row['lr']))
    return {name: max(each)[1] for name, each in found.items()}


def table_cells(a):
    "All methods and shares, the cheap budgets first"
    rates = best_rates(a)
    rates['masks from scores, reconstructed'] = rates.get('automatic, reconstructed')
    for budget, seed, share, name in product(a.budgets, a.seeds, a.shares, a.ways):
        if budget or not WAYS[name].masks:
            yield dict(name=name, share=share, seed=seed, budget=budget, lr=rates[name])


LOSSES = (
    'affinity',
    ['affinity', 'contrastive'],
    'feature',
    ['affinity', 'feature'],
    ['affinity', 'uni_modal'],
    ['affinity', 'interactive_contrastive'],
    ['affinity', 'cross_relational'],
    'repulsive',
)


BEST = dict(name='scores, reconstructed', share=0.25)


def loss_rate_cells(a):
    """The best inheritance, with each loss and rate. Recorded are the three lowest rates, and the
    fourth of the losses that were best at the third"""
    for objective, lr in product(LOSSES, a.rates):
        yield BEST | dict(seed=100, budget=120, lr=lr, objective=objective)


def loss_cells(a):
    "The best inheritance, with each loss at its rate"
    rates = best_rates(a, 'loss-rates', 'objective')
    if missing := [named(o) for o in LOSSES if named(o) not in rates]:
        raise SystemExit(f'No rate has been chosen for {missing}: run the part loss-rates first.')
    for seed, objective in product(a.seeds, LOSSES):
        lr = rates[named(objective)]
        yield BEST | dict(seed=seed, budget=120, lr=lr, objective=objective)


def table(found):
    "Means and spreads: a row per share and method, a column per budget"
    out = Table()
    for share, name in dict.fromkeys((r['share'], r['method']) for r in found):
        row = dict(share=f'{share:.0%}', method=name)
        for budget in BUDGETS:
            same = [
                100 * r['top1']
                for r in found
                if (r['share'], r['method'], r['budget']) == (share, name, budget)
            ]
            spread = f' +- {statistics.stdev(same):.1f}' if len(same) > 1 else ''
            row[f'{budget} steps'] = f'{statistics.mean(same):.1f}{spread}' if same else ''
        out.append(row)
    return out


def record(a):
    "Write what is there into results/"
    parts = {
        part: [json.loads(f.read_text()) for f in sorted((a.work / part).glob('*/row.json'))]
        for part in ('rates', 'table', 'loss-rates', 'losses')
    }
    recipe = dict(
        batch_size=BATCH,
        rates=RATES,
        chosen=best_rates(a),
        chosen_by_loss=best_rates(a, 'loss-rates', 'objective'),
        mask_steps={str(k): v for k, v in MASK_STEPS.items()},
        weights_lr=WEIGHTS_LR,
        masks=dict(SHORT),
        paper=PAPER,
        settings=SETTINGS,
        teacher=json.loads((a.work / 'teacher.json').read_text()),
        commits=sorted({r['commit'] for rows in parts.values() for r in rows}),
    )
    print(table(parts['table']), record_run(f'budgets-{a.data}', recipe, parts, a.seeds))


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('data', choices=['shapes', 'cifar10'])
    p.add_argument('part', choices=['rates', 'table', 'loss-rates', 'losses', 'record'])
    p.add_argument('--shared', default='../shared')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--shares', type=float, nargs='+', default=SHARES)
    p.add_argument('--budgets', type=int, nargs='+', default=BUDGETS)
    p.add_argument('--rates', type=float, nargs='+', default=RATES)
    p.add_argument('--ways', nargs='+', choices=[*WAYS], default=[*WAYS])
    p.add_argument('--work', type=Path, default=Path('runs/budgets'))
    a = p.parse_args()
    a.work = a.work / a.data
    if a.part == 'record':
        return record(a)
    task = dict(cifar10=cifar10, shapes=shapes)[a.data](a)
    if not (a.work / 'teacher.json').exists():
        write_json(a.work / 'teacher.json', task.test(task.teacher))
    parts = {
        'rates': rate_cells,
        'table': table_cells,
        'loss-rates': loss_rate_cells,
        'losses': loss_cells,
    }
    cells = parts[a.part](a)
    for row in rows(a, task, a.part, cells):
        said = 'method', 'share', 'seed', 'budget', 'lr', 'objective', 'top1', 'seconds'
        print({k: row[k] for k in said}, flush=True)


if __name__ == '__main__':
    main()
