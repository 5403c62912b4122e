"""Inherited against random start on real photographs: the CIFAR-10 teacher, students of about half its tower parameters, 3 seeds.

    python benchmarks/cifar10.py --shared ../shared          # writes results/cifar10-half/run.json
"""
import argparse, json, statistics
from pathlib import Path
from tinyclip.cli import main
from tinyclip.core import Table, record_run
from tinyclip.events import read_events

STARTS = {'random start':['--random-start'], 'inherited start':[]}
SHAPE = ['--image-width', '0.667', '--text-depth', '0.5']

def one(shared, start, seed, steps, work):
    "Train one student through the command line; its result"
    out = work/f'{start.replace(" ", "-")}-{seed}'
    if not (out/'result.json').exists():
        code = main(['distill', '--teacher', f'{shared}/teachers/cifar10', '--data', f'{shared}/data/cifar10/train-*.tar', '--eval-data', f'{shared}/data/cifar10/val-0000.tar',
                     *SHAPE, *STARTS[start], '--steps', str(steps), '--batch-size', '128', '--lr', '5e-4', '--seed', str(seed), '--out', str(out), '--eval-every', str(steps//3)])
        if code: raise SystemExit(code)
    return json.loads((out/'result.json').read_text())

def table(runs):
    "Mean, spread and every seed"
    rows = Table()
    for start in STARTS:
        top1 = [r['evaluation']['top1'] for r in runs if r['start']==start]
        rows.append({'start':start, 'top-1 mean':f'{100*statistics.mean(top1):.1f} %', 'sd':f'{100*statistics.stdev(top1):.1f}', 'each seed':' '.join(f'{100*t:.1f}' for t in top1)})
    return rows

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--shared', default='../shared'); p.add_argument('--steps', type=int, default=150); p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--work', type=Path, default=Path('runs/cifar10-half'))
    a = p.parse_args()
    runs = [dict(start=s, seed=n, **{k:v for k,v in one(a.shared, s, n, a.steps, a.work).items() if k in ('evaluation', 'seconds', 'pairs_per_s', 'losses')}) for n in a.seeds for s in STARTS]
    recipe = dict(teacher='cifar10 (72.0 % top-1 on the same 2,000 photographs)', data='20,000 CIFAR-10 training photographs', shape=SHAPE, steps=a.steps, batch_size=128, lr=5e-4, objective='affinity')
    first = read_events(a.work/f'random-start-{a.seeds[0]}', 'config')[0]['environment']
    print(table(runs), record_run('cifar10-half', recipe, runs, a.seeds, where=first))
