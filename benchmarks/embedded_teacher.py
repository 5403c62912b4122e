"""Train the teacher that comes with the package once more, from scratch and in one go, and record
how good it becomes.

    python benchmarks/embedded_teacher.py  # writes runs/teacher and
                                           # results/embedded-teacher-again/run.json

The shipped weights were made in three stretches, which `results/embedded-teacher/run.json` lists.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from tinyclip.core import record_run, seed_everything
from tinyclip.data.pairs import Batch
from tinyclip.data.shapes import SHAPES, Shapes, combinations, hashed, normalise, trained
from tinyclip.distill import Distiller
from tinyclip.inheritance import build
from tinyclip.lab.demo import examine
from tinyclip.zoo.folders import finish, save
from tinyclip.zoo.loading import load

TEACHER = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=48, layers=6, width=128, head_width=16, patch_size=12),
    text_cfg=dict(context_length=16, vocab_size=49408, width=64, heads=4, layers=6),
)
RECIPE = dict(objective='contrastive', lr=1e-3, weight_decay=0.2, warmup=0.05, scale='fixed')


class Neighbours:
    """Training pairs in rounds of all trained combinations, those that differ only in shape side
    by side"""

    def __init__(
        self,
        tokenizer,  # CLIP's
        batch_size: int = 144,  # Must divide 576, the number of trained combinations
        seed: int = 0,  # Of pictures, captions and order
    ):
        self.shapes = Shapes('train', seed=seed)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self):
        return len(trained) // self.batch_size

    def order(self, e):
        index = np.arange(e * len(trained), (e + 1) * len(trained))
        names = [combinations[label] for label in self.shapes.labels(index)]
        # the same thing as a circle
        group = [combinations.index((colour, SHAPES[0], *rest)) for colour, _, *rest in names]
        return index[np.argsort(hashed(self.seed, e, group), kind='stable')]

    def epoch(self, e, start=0):
        order = self.order(e)
        for i in range(start, len(self)):
            part = order[i * self.batch_size : (i + 1) * self.batch_size]
            images, captions, _ = self.shapes.batch(part)
            yield Batch(normalise(images), self.tokenizer(captions))


def train_teacher(
    folder,  # The model's folder; checkpoints and the event log go into `<folder>-run`
    steps: int = 3000,  # About half an hour on two cores
    batch_size: int = 144,  # Pairs per step
    seed: int = 0,  # Of the start and of the pictures
    start=None,  # A model folder to begin with; None for random weights
    resume: bool = False,  # Go on with an interrupted run
    cfg=TEACHER,  # Of a model that starts with random weights
) -> dict:  # What `examine` says, and `seconds`
    """Train a teacher like the embedded one and save it in half precision, with zeros for tokens
    it never saw"""
    seed_everything(seed)
    model, preprocess, tokenizer = load(start) if start else finish(build(cfg), cfg, {})
    model.logit_scale.data.fill_(math.log(1 / 0.07))  # CLIP's own start value, and it stays
    table = model.token_embedding.weight.detach().clone()
    d = Distiller(
        model,
        None,
        Neighbours(tokenizer, batch_size, seed),
        **RECIPE,
        seed=seed,
        folder=f'{folder}-run',
        save_every=200,
        device='cpu',
        evaluate=lambda m: examine(m, preprocess, tokenizer, n=256, templates=['{}']),
        evaluate_every=200,
    )
    r = d.fit(steps, resume)
    if not start:  # a start has its zeros already, and knows words that a short run may not meet
        weight = model.token_embedding.weight
        with torch.no_grad():
            weight[(weight == table).all(1)] = 0  # no gradient, no decay: as they were
    save(model, folder, dtype=torch.float16)
    return examine(load(folder).model, preprocess, tokenizer) | dict(seconds=r.seconds)


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--steps', type=int, default=3000)
    p.add_argument('--work', type=Path, default=Path('runs/teacher'))
    p.add_argument('--resume', action='store_true')
    a = p.parse_args()
    metrics = train_teacher(a.work, a.steps, resume=a.resume)
    print(
        metrics,
        record_run(
            'embedded-teacher-again',
            dict(model=TEACHER, steps=a.steps, batch_size=144, **RECIPE),
            metrics,
            [0],
        ),
    )
