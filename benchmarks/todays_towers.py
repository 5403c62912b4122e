"""What compressing a CLIP of today takes, at full size and with random weights: a training step of
the whole teacher, the same step with masks, the cut of half of its parameters where the masks say,
and the step of that student. Each architecture has a process of its own, whose peak is its memory.

    python benchmarks/todays_towers.py  # writes results/todays-towers/run.json
                                        # (with a GPU: results/todays-towers-cuda)

Steps are contrastive, by AdamW, and take no turns with anything: they tell an order of magnitude.
Finished rows are kept below runs/ and not repeated.
"""

import argparse
import logging
import multiprocessing
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from architectures import build
from full_size import peak, timed
from masked_step import trainer
from methods import row_of

from tinyclip.core import Table, record_run, seed_everything
from tinyclip.evaluate.cost import inputs, macs, parameters
from tinyclip.masking import MaskedCLIP
from tinyclip.sparsity import Sparsity

NAMES = (
    'ViT-B-16-SigLIP2',
    'PE-Core-B-16',
    'MobileCLIP2-S0',
    'convnext_base_w',
    'EVA02-B-16',
    'xlm-roberta-base-ViT-B-32',
)
SHARE, STEPS = 0.5, 3


def seconds(device, f):
    "What a function gives; the processor's seconds, or on a GPU the clock's"
    out, wall, cpu = timed(device, f)
    return out, wall if device == 'cuda' else cpu


def step_s(model, penalty, batch, precision, device):
    "Median seconds of a training step, after a first one"
    step = trainer(model.train(), penalty, batch, precision, device, compiled=False)
    return statistics.median([seconds(device, step)[1] for _ in range(1 + STEPS)][1:])


def size(model, when):
    n = parameters(model)
    return {
        f'{when}_towers': n['towers'],
        f'{when}_total': n['total'],
        f'{when}_macs': macs(model)['total'],
    }


def measure(name, n, precision, device):
    "A row"
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
    seed_everything(0)
    clip = build(name, device)
    if hasattr(getattr(clip, 'text', None), 'config'):  # of transformers: it counts positions
        clip.context_length = 77  # as open_clip's tokenizer gives it
    batch = inputs(clip, n)[0], torch.randint(5, 1000, inputs(clip, n)[1].shape, device=device)
    row = dict(architecture=name) | size(clip, 'before')
    row['step_s'] = step_s(clip, None, batch, precision, device)
    masked = MaskedCLIP(clip).to(device)
    penalty = Sparsity(masked, SHARE)
    row |= dict(masks=len(masked.log_alpha))
    row['masked_step_s'] = step_s(masked, penalty, batch, precision, device)
    student, row['cut_s'] = seconds(device, lambda: masked.cut(penalty.goal.zeros()))
    row |= size(student, 'after')
    row['student_step_s'] = step_s(student, None, batch, precision, device)
    return row | dict(gb=peak(device))


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--names', nargs='+', default=NAMES)
    p.add_argument('--batch', type=int, default=8)
    p.add_argument('--precision', default='bf16')
    p.add_argument('--work', type=Path, default=Path('runs/todays-towers'))
    a = p.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows, spawn = Table(), multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for name in a.names:
            asked = name, a.batch, a.precision, device
            place = a.work / '-'.join(map(str, asked))
            rows.append(row_of(place, lambda: pool.submit(measure, *asked).result()))
            print(rows[-1], flush=True)
    recipe = dict(share=SHARE, batch_size=a.batch, precision=a.precision, steps=STEPS)
    recipe |= dict(threads=torch.get_num_threads(), weights='random')
    print(rows, record_run('todays-towers' + '-cuda' * (device == 'cuda'), recipe, list(rows), [0]))
