"""What watching costs: the same steps with and without the live dashboard, taking turns inside one
run in a real Jupyter kernel.

    python benchmarks/dashboard.py       # writes results/dashboard/run.json
"""

import argparse
import json
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from jupyter_client.manager import start_new_kernel

from tinyclip.core import Table, record_run
from tinyclip.data import open_pairs
from tinyclip.data.shapes import Shapes
from tinyclip.distill import Distiller
from tinyclip.live import Dashboard
from tinyclip.live.background import Background
from tinyclip.masking import MaskedCLIP
from tinyclip.sparsity import Sparsity
from tinyclip.zoo import load

# (dashboard, log_every); 'nothing' changes nothing: the noise
KINDS = dict(off=(False, 10), nothing=(False, 10), watched=(True, 10), every_step=(True, 1))
BLOCK = 10  # steps


class Turns:
    "Listens to a run: switches the dashboard every `BLOCK` steps and takes the time of every block"

    def __init__(self, job, rounds):
        self.job = job
        self.order = list(KINDS) * rounds
        self.on = threading.Event()
        self.times = []
        self.n = 0
        self.mark = None

    def __call__(self, event):
        pass

    def before_step(self):
        if self.n % BLOCK == 0:
            now, i = time.perf_counter(), self.n // BLOCK
            if self.mark:
                self.times.append(now - self.mark)
            if i < len(self.order):
                shown, every = KINDS[self.order[i]]
                self.job.config = replace(self.job.config, log_every=every)
                self.on.set() if shown else self.on.clear()
            self.mark = time.perf_counter()
        self.n += 1


def inside(batch, rounds):
    "In the kernel: one run, and the seconds of its blocks"
    teacher, preprocess, tokenizer = load('shapes-teacher')
    masked = MaskedCLIP(teacher, hard=True)
    job = Distiller(
        masked,
        teacher,
        open_pairs(Shapes('train'), preprocess, tokenizer, batch),
        penalty=Sparsity(masked, 0.5, form='projected', lr=0.1),
        lr=3e-4,
    )
    turns = Turns(job, rounds)
    job.listeners = [turns]
    run = Background(job, len(turns.order) * BLOCK + 1)
    dashboard = Dashboard(run, 'widgets', 3)
    dashboard._ipython_display_()
    update, updates = dashboard.update, []

    def counted():
        if not turns.on.is_set():
            return
        start = time.thread_time()
        update()
        updates.append(time.thread_time() - start)

    dashboard.update = counted
    dashboard.start()
    run.result()
    print(
        json.dumps(
            dict(
                times=turns.times,
                order=turns.order,
                updates=len(updates),
                update_ms=1000 * statistics.median(updates),
            )
        )
    )


def in_a_kernel(code):
    "What `code` prints in a fresh Jupyter kernel"
    manager, client = start_new_kernel()
    said = []

    def hear(m):
        if m['msg_type'] == 'stream':
            said.append(m['content']['text'])
        if m['msg_type'] == 'error':
            raise RuntimeError('\n'.join(m['content']['traceback']))

    try:
        client.execute_interactive(code, output_hook=hear, timeout=3600)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return ''.join(said)


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--rounds', type=int, default=12)
    a = p.parse_args()
    here = str(Path(__file__).resolve().parent)
    told = json.loads(
        in_a_kernel(
            f'import sys; sys.path.insert(0, {here!r})\nfrom dashboard import '
            f'inside\ninside({a.batch}, {a.rounds})'
        )
        .strip()
        .splitlines()[-1]
    )
    # the first round warms up
    rounds = [
        dict(zip(KINDS, told['times'][i : i + len(KINDS)]))
        for i in range(len(KINDS), len(told['times']), len(KINDS))
    ]
    ratios = {k: [r[k] / r['off'] for r in rounds] for k in KINDS if k != 'off'}
    rows = Table(
        dict(
            kind=k,
            dashboard=KINDS[k][0],
            log_every=KINDS[k][1],
            ratio=round(statistics.median(v), 4),
            quarter=round(statistics.quantiles(v, n=4)[0], 4),
            three_quarters=round(statistics.quantiles(v, n=4)[2], 4),
        )
        for k, v in ratios.items()
    )
    print(rows)
    recipe = dict(
        batch=a.batch,
        rounds=len(rounds),
        block=BLOCK,
        updates_per_s=3,
        step_ms=round(1000 * statistics.median(r['off'] for r in rounds) / BLOCK, 1),
        threads=torch.get_num_threads(),
    )
    print(
        record_run(
            'dashboard',
            recipe,
            dict(rows=list(rows), update_ms=round(told['update_ms'], 2), updates=told['updates']),
            [0],
        )
    )
