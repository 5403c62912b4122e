"""What the demo takes with bfloat16 units and without them: `tinyclip demo` as anybody runs it,
then with oneDNN and torch told that the CPU has AVX2 only.

    python benchmarks/demo.py            # writes results/demo/run.json

On one thread, by the processor's time: what else runs on the machine does not count. The clock's
time is recorded beside it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tinyclip.core import Table, environment, record_run
from tinyclip.lab.demo import BATCH, MASKS, RECIPE, STEPS
from tinyclip.train.events import read_events

# what a CPU without AVX-512 and AMX can do
PLAIN = dict(ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2')


def spent():
    "Processor seconds of all children that ended"
    r = resource.getrusage(resource.RUSAGE_CHILDREN)
    return r.ru_utime + r.ru_stime


def demo(machine, env, steps, seed):
    "One demo in a process of its own: seconds, and a row per model"
    env = os.environ | dict(OMP_NUM_THREADS='1') | env
    with tempfile.TemporaryDirectory() as d:
        before, start = spent(), time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                '-m',
                'tinyclip',
                'demo',
                '--folder',
                f'{d}/demo',
                '--steps',
                str(steps),
                '--seed',
                str(seed),
            ],
            env=env,
            check=True,
        )
        took = dict(
            processor_s=round(spent() - before, 1), clock_s=round(time.perf_counter() - start, 1)
        )
        rows = json.loads(Path(f'{d}/demo/results.json').read_text())['rows']
        # accelerate's word for it
        precision = read_events(f'{d}/demo/runs/manual')[0]['precision'].replace('no', 'fp32')
    return [
        dict(
            machine=machine,
            precision=precision,
            **took,
            **{k: r[k] for k in ('model', 'towers', 'macs', 'top1', 'i2t_r1', 'speed', 'spread')},
        )
        for r in rows
    ]


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--steps', type=int, default=STEPS)
    p.add_argument('--seed', type=int, default=0)
    a, where = p.parse_args(), environment()
    rows = demo('as it is', {}, a.steps, a.seed) + demo('AVX2 only', PLAIN, a.steps, a.seed)
    print(Table(rows))
    print(
        record_run(
            'demo',
            dict(steps=a.steps, batch=BATCH, **RECIPE, masks=MASKS, threads=1, plain=PLAIN),
            rows,
            [a.seed],
            where=where,
        )
    )
