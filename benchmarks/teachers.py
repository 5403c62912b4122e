"""The impact of the teacher (TinyCLIP's ablation of the same name): students of a quarter inherit
from one teacher, by the rule, and learn from another.

    python benchmarks/teachers.py  # writes results/teachers/run.json

Drawn pictures and the recipe of benchmarks/methods.py, all students at its learning rate.
*Embedded* is the teacher that comes with the package; *weaker* has its structure and a fraction of
its training; *other* is a wider transformer with smaller patches and fewer layers, trained for a
while. The last two are trained here, and all are kept below runs/ with the finished rows.
"""

import argparse
import time
from itertools import product
from pathlib import Path

import embedded_teacher
from methods import SHAPES, row_of, same_recipe

from tinyclip.core import Table, record_run, seed_everything
from tinyclip.data import open_pairs
from tinyclip.data.shapes import Shapes
from tinyclip.distill import Distiller
from tinyclip.evaluate.cost import parameters
from tinyclip.inheritance import inherit, reinitialized
from tinyclip.keep import keep_for_size
from tinyclip.lab.demo import examine
from tinyclip.zoo import load

SHARE = 0.25
OTHER = dict(
    embed_dim=96,
    vision_cfg=dict(image_size=48, layers=4, width=192, head_width=32, patch_size=8),
    text_cfg=dict(context_length=16, vocab_size=49408, width=96, heads=6, layers=3),
)
TRAINED = dict(weaker=(embedded_teacher.TEACHER, 400), other=(OTHER, 1200))  # config, steps
SETTINGS = dict(objective='affinity', weight_decay=0.1, warmup=0.1, device='cpu', progress=False)
STARTS, TEACHERS = ('embedded', 'weaker', 'random'), ('embedded', 'weaker', 'other')


def teacher(name, work):
    "A teacher with its transform and tokenizer, trained where it has not been yet"
    if name not in TRAINED:
        return load('shapes-teacher')
    folder = work / name
    if not (folder / 'open_clip_config.json').exists():
        cfg, steps = TRAINED[name]
        embedded_teacher.train_teacher(folder, steps, cfg=cfg)
    return load(folder)


def one(found, start, learns_from, seed):
    "A row"
    began = time.process_time()
    seed_everything(seed)
    model, preprocess, tokenizer = found['embedded' if start == 'random' else start]
    student = inherit(model, keep_for_size(model, SHARE))
    if start == 'random':
        student = reinitialized(student)
    pairs = open_pairs(
        Shapes('train', seed=seed + 1), preprocess, tokenizer, SHAPES['batch'], seed=seed
    )
    job = Distiller(
        student, found[learns_from].model, pairs, lr=SHAPES['lr'], seed=seed, **SETTINGS
    )
    student = job.fit(SHAPES['steps']).student
    row = dict(start=start, teacher=learns_from, seed=seed, seconds=time.process_time() - began)
    return row | examine(student.eval(), preprocess, tokenizer)


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--work', type=Path, default=Path('runs/teachers'))
    a = p.parse_args()
    recipe = dict(SHAPES, share=SHARE, settings=SETTINGS, trained=TRAINED)
    same_recipe(a.work, recipe)
    found = {name: teacher(name, a.work) for name in TEACHERS}
    about = {
        name: examine(*loaded) | dict(towers=parameters(loaded.model)['towers'])
        for name, loaded in found.items()
    }
    print(Table(dict(teacher=name) | row for name, row in about.items()), flush=True)
    rows = []
    for seed, start, learns_from in product(a.seeds, STARTS, TEACHERS):
        place = a.work / f'{start}-{learns_from}-{seed}'
        rows.append(row_of(place, lambda: one(found, start, learns_from, seed)))
        said = 'start', 'teacher', 'seed', 'top1', 'seconds'
        print({k: rows[-1][k] for k in said}, flush=True)
    print(record_run('teachers', recipe | dict(teachers=about), rows, a.seeds))
