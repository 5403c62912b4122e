"""Random, manual and automatic inheritance, and one leap against two stages: same source of pairs,
same total of steps, mask steps included.

    # writes results/methods-shapes/run.json
    python benchmarks/methods.py shapes

    # writes results/methods-cifar10/run.json
    python benchmarks/methods.py cifar10 --shared ../shared

Finished runs are kept below runs/ and not repeated.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from tinyclip.core import Table, environment, record_run, seed_everything, write_json
from tinyclip.data import open_pairs, transforms
from tinyclip.data.pairs import labelled
from tinyclip.data.shapes import Shapes
from tinyclip.distill import Distiller
from tinyclip.evaluate import zero_shot
from tinyclip.evaluate.cost import parameters
from tinyclip.inheritance import inherit, reinitialized
from tinyclip.keep import keep_for_size
from tinyclip.lab.demo import examine
from tinyclip.stages import SHORT, Stage, Stages
from tinyclip.zoo import load


def shapes(shared):
    "Teacher, pairs by seed, test"
    teacher, preprocess, tokenizer = load('shapes-teacher')

    def pairs(seed, n):
        return open_pairs(Shapes('train', seed=seed + 1), preprocess, tokenizer, n, seed=seed)

    return teacher, pairs, lambda m: examine(m, preprocess, tokenizer, n=1280)


def cifar10(shared):
    "Teacher, pairs by seed, test"
    teacher, preprocess, tokenizer = load(f'{shared}/teachers/cifar10')

    def pairs(seed, n):
        return open_pairs(
            f'{shared}/data/cifar10/train-*.tar', transforms(teacher)[0], tokenizer, n, seed=seed
        )

    return (
        teacher,
        pairs,
        lambda m: zero_shot(
            m, tokenizer, labelled(f'{shared}/data/cifar10/val-0000.tar', preprocess, 250)
        ),
    )


def plans(share, total, mask_steps):
    "The ways to get to a share"
    leap = [Stage(share, mask_steps, total - mask_steps)]
    half = mask_steps // 2
    staged = [
        Stage(2 * share, half, total // 2 - half),
        Stage(share, half, total - total // 2 - half),
    ]
    return {'random start': 'fresh', 'manual': 'rule', 'automatic': leap} | (
        {'automatic, two stages': staged} if share < 0.4 else {}
    )


def one(task, plan, share, seed, a, folder, masks=SHORT):
    "Train one student; its row"
    teacher, pairs, test = task
    settings = dict(
        objective='affinity', lr=a.lr, weight_decay=0.1, warmup=0.1, device='cpu', progress=False
    )
    start = time.perf_counter()
    if isinstance(plan, str):
        seed_everything(seed)
        student = inherit(teacher, keep_for_size(teacher, share))
        if plan == 'fresh':
            student = reinitialized(student)
        student = (
            Distiller(student, teacher, pairs(seed, a.batch), seed=seed, **settings)
            .fit(a.steps)
            .student
        )
        more = {}
    else:
        Stages(
            teacher,
            pairs(seed, a.batch),
            plan,
            folder,
            masks={**masks, 'weights_lr': a.weights_lr},
            seed=seed,
            save_every=10**6,
            **settings,
        ).fit(resume=True)
        student = load(folder / f'stage-{len(plan)}' / 'student').model
        more = dict(
            keep=(folder / f'stage-{len(plan)}' / 'student' / 'keep.json').read_text(),
            at_cut=test(load(folder / f'stage-{len(plan)}' / 'cut').model),
        )
    towers = parameters(student)['towers'] / parameters(teacher)['towers']
    return dict(kept=towers, seconds=time.perf_counter() - start, **test(student), **more)


def same_recipe(folder, recipe):
    "Rows that lie in `folder` already must come from this recipe"
    file = folder / 'recipe.json'
    if file.exists() and json.loads(file.read_text()) != json.loads(json.dumps(recipe)):
        raise SystemExit(
            f"'{folder}' holds runs of another recipe: {file.read_text()} Give another --work."
        )
    write_json(file, recipe)


def row_of(place, make):
    "The row of a finished run, or of one that is made now"
    if not (place / 'row.json').exists():
        write_json(place / 'row.json', dict(make(), commit=environment()['commit']))
    return json.loads((place / 'row.json').read_text())


# of the drawn pictures, for the benchmarks that vary one thing
SHAPES = dict(steps=200, batch=64, lr=5e-4, weights_lr=3e-4)
FINISHED = Path('runs/methods/shapes')


def finished(name, seed):
    "A row that `python benchmarks/methods.py shapes` has left"
    place = FINISHED / f'{name}-{seed}'
    if not (place / 'row.json').exists():
        raise SystemExit(
            'Run python benchmarks/methods.py shapes first: some of its rows are used here.'
        )
    return place


def table(runs):
    "Mean, spread and every seed"
    rows, of = Table(), lambda r: (r['share'], r['method'])
    for key in dict.fromkeys(map(of, runs)):
        top1 = [r['top1'] for r in runs if of(r) == key]
        rows.append(
            dict(
                share=f'{key[0]:.0%}',
                method=key[1],
                top1=f'{100 * statistics.mean(top1):.1f} %',
                sd=f'{100 * statistics.stdev(top1):.1f}' if len(top1) > 1 else '',
                seeds=' '.join(f'{100 * t:.1f}' for t in top1),
            )
        )
    return rows


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('data', choices=['shapes', 'cifar10'])
    p.add_argument('--shared', default='../shared')
    p.add_argument('--steps', type=int, default=200)
    p.add_argument('--mask-steps', type=int, default=40)
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--lr', type=float, default=5e-4)
    p.add_argument('--weights-lr', type=float, default=3e-4, help='in mask phases')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--shares', type=float, nargs='+', default=[0.5, 0.25])
    p.add_argument('--work', type=Path, default=Path('runs/methods'))
    a = p.parse_args()
    same_recipe(
        a.work / a.data,
        dict(
            steps=a.steps,
            mask_steps=a.mask_steps,
            batch_size=a.batch,
            lr=a.lr,
            weights_lr=a.weights_lr,
            masks=SHORT,
        ),
    )
    task, where, runs = globals()[a.data](a.shared), environment(), []
    for seed in a.seeds:
        for share in a.shares:
            for name, plan in plans(share, a.steps, a.mask_steps).items():
                place = (
                    a.work / a.data / f'{share}-{name.replace(" ", "-").replace(",", "")}-{seed}'
                )
                runs.append(
                    row_of(
                        place,
                        lambda: dict(
                            share=share,
                            method=name,
                            seed=seed,
                            **one(task, plan, share, seed, a, place),
                        ),
                    )
                )
                print(
                    {
                        k: runs[-1][k]
                        for k in ('share', 'method', 'seed', 'kept', 'top1', 'seconds')
                    },
                    flush=True,
                )
    recipe = dict(
        data=a.data,
        steps=a.steps,
        mask_steps=a.mask_steps,
        batch_size=a.batch,
        lr=a.lr,
        weights_lr=a.weights_lr,
        masks=SHORT,
        teacher=task[2](task[0]),
    )
    print(table(runs), record_run(f'methods-{a.data}', recipe, runs, a.seeds, where=where))
