"""One batch on 1, 2 and 4 processes: the same loss and gradient, and what sharing it costs. On
CPUs, over gloo, a thread each.

    python benchmarks/scaling.py         # writes results/scaling/run.json

The batch is split, features are gathered, gradients are averaged by DDP. Loss and gradient are
those of the first step; `differ` is against one process that holds its tables whole, relative to
the norm. Seconds are the processor's, summed over the processes: where 4 of them share 2 cores,
time on the wall says nothing. `overhead` is how much more of them a step takes than in one process
with the same tables.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from tinyclip.core import Table, record_run, seed_everything
from tinyclip.data import open_pairs
from tinyclip.data.shapes import Shapes
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import Objective
from tinyclip.train.engine import Engine, make_accelerator
from tinyclip.zoo import load

LOSSES = ['affinity', 'contrastive']


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def steps(a, tile, teacher, batch):
    "Loss, gradient, and median seconds of the processor and of the wall for a step of this process"
    student = inherit(teacher, manual(teacher, image_width=0.5, text_depth=0.5))
    engine = Engine(
        student,
        teacher,
        Objective(LOSSES, student_scale='own', tile=tile),
        make_accelerator('fp32', 'cpu'),
        clip_norm=None,
    )
    seen = {}

    def look(*_):
        seen.setdefault(
            'gradient',
            torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]),
        )

    hook = engine.adamw.register_step_pre_hook(look)
    out = engine.backward(batch)
    engine.update(out, 1e-5)
    loss = out['loss'].item()
    hook.remove()
    times = []
    for _ in range(a.rounds):
        wall, own = time.perf_counter(), time.process_time()
        engine.update(engine.backward(batch), 1e-5)
        times.append((time.process_time() - own, time.perf_counter() - wall))
    return dict(
        loss=loss, gradient=seen['gradient'], seconds=[statistics.median(t) for t in zip(*times)]
    )


def worker(rank, world, port, a, folder):
    "One process of `world`, with its part of the batch: all settings, into a file"
    torch.set_num_threads(1)
    seed_everything(0)
    teacher, preprocess, tokenizer = load('shapes-teacher')
    batch = next(open_pairs(Shapes('train'), preprocess, tokenizer, a.batch).epoch(0))
    own = slice(a.batch * rank // world, a.batch * (rank + 1) // world)
    batch = batch._replace(image=batch.image[own], text=batch.text[own])
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
        )
    torch.save(
        [steps(a, tile, teacher, batch) for tile in a.tiles], Path(folder) / f'{world}-{rank}.pt'
    )
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--batch', type=int, default=512, help='pairs of all processes together')
    p.add_argument('--tile', type=int, default=32)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--processes', type=int, nargs='+', default=[1, 2, 4])
    p.add_argument('--root', default='results', help='the ledger')
    a = p.parse_args()
    a.tiles = [None, a.tile]
    rows = []
    os.environ['OMP_NUM_THREADS'] = '1'  # before the processes start
    with tempfile.TemporaryDirectory() as folder:
        for world in a.processes:
            mp.spawn(worker, (world, free_port(), a, folder), nprocs=world)
            ranks = [torch.load(Path(folder) / f'{world}-{r}.pt') for r in range(world)]
            if world == a.processes[0]:
                alone = ranks[0]
            for i, tile in enumerate(a.tiles):
                mine = [r[i] for r in ranks]
                first = alone[0]
                base = alone[i]['seconds'][0]
                apart = max(
                    ((r['gradient'] - first['gradient']).norm() / first['gradient'].norm()).item()
                    for r in mine
                )
                cpu = sum(r['seconds'][0] for r in mine)
                rows.append(
                    dict(
                        processes=world,
                        tables='whole' if tile is None else f'tiles of {tile}',
                        loss=mine[0]['loss'],
                        loss_differs=max(abs(r['loss'] - first['loss']) for r in mine)
                        / first['loss'],
                        gradient=mine[0]['gradient'].norm().item(),
                        gradient_differs=apart,
                        cpu_s=round(cpu, 3),
                        wall_s=round(max(r['seconds'][1] for r in mine), 3),
                        overhead=round(cpu / base - 1, 3),
                    )
                )
            print(Table(rows[-len(a.tiles) :]), flush=True)
    if max(max(r['loss_differs'], r['gradient_differs']) for r in rows) > 1e-5:
        raise SystemExit(
            'Several processes do not compute what one does: see loss_differs and gradient_differs.'
        )
    recipe = dict(
        teacher='shapes-teacher',
        student='half of the image channels and text layers',
        objective=' + '.join(LOSSES),
        precision='fp32',
        batch=a.batch,
        rounds=a.rounds,
        threads=1,
        clock='processor',
    )
    print(record_run('scaling', recipe, rows, [0], root=a.root))
