"""What masks cost: a training step of a masked CLIP against the same step of the plain one, side by
side.

    python benchmarks/masked_step.py     # writes results/masked-step/run.json
                                         # (with a GPU: results/masked-step-cuda)
"""

import argparse
import copy
import statistics
import time

import open_clip
import torch

from tinyclip.core import Table, autocast, record_run, seed_everything
from tinyclip.evaluate.cost import inputs
from tinyclip.losses import Objective
from tinyclip.masking import MaskedCLIP
from tinyclip.sparsity import Sparsity
from tinyclip.train.engine import make_optimizer
from tinyclip.train.step import features


def trainer(model, penalty, batch, precision, device, compiled):
    "A function that does one training step"
    opt = make_optimizer(model, 0.2, penalty=penalty)
    for g in opt.param_groups:
        g['lr'] = g['lr'] or 1e-5
    run = torch.compile(model) if compiled else model
    objective = Objective('contrastive')

    def step():
        with autocast(device, precision):
            loss = objective(features(run, *batch))['loss']
        if penalty:
            loss = loss + penalty(0.5)
        loss.backward()
        ok = torch.isfinite(loss.detach())
        if penalty:
            penalty.before_step(ok)
        opt.step()
        opt.zero_grad()
        if penalty:
            penalty.after_step(ok)
        if device == 'cuda':
            torch.cuda.synchronize()

    return step


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(name, n, precision, device, rounds, compiled):
    "Medians over alternating steps, and their ratio"
    seed_everything(0)
    plain = open_clip.create_model(name).to(device).train()
    masked = MaskedCLIP(copy.deepcopy(plain)).to(device).train()
    batch = inputs(plain, n)
    steps = [
        trainer(plain, None, batch, precision, device, compiled),
        trainer(masked, Sparsity(masked, 0.5), batch, precision, device, compiled),
    ]
    for s in steps:
        s()
        s()
    times = [[seconds(s) for s in steps] for _ in range(rounds)]
    a, b = (statistics.median(t) for t in zip(*times))
    return dict(
        model=name,
        batch=n,
        precision=precision,
        compiled=compiled,
        plain_s=round(a, 4),
        masked_s=round(b, 4),
        ratio=round(statistics.median(y / x for x, y in times), 3),
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--model', default='ViT-B-32')
    p.add_argument('--rounds', type=int, default=9)
    a = p.parse_args()
    gpu = torch.cuda.is_available()
    cases = (
        [(n, 'bf16', c) for n in (256, 1024) for c in (False, True)]
        if gpu
        else [(16, 'fp32', False)]
    )
    rows = Table(
        measure(a.model, n, precision, 'cuda' if gpu else 'cpu', a.rounds, c)
        for n, precision, c in cases
    )
    print(rows)
    print(
        record_run(
            'masked-step' + ('-cuda' if gpu else ''),
            dict(
                model=a.model,
                rounds=a.rounds,
                objective='contrastive',
                optimizer='AdamW, fused',
                threads=torch.get_num_threads(),
            ),
            list(rows),
            [0],
        )
    )
