"""The demo over several seeds: what inheritance is worth on the embedded set.

    python benchmarks/demo_seeds.py                          # writes results/demo/run.json
"""
import argparse, json, statistics
from pathlib import Path
from tinyclip.core import Table, record_run
from tinyclip.demo import IMAGE_WIDTH, RECIPE, TEXT_DEPTH, run

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=150); p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2]); p.add_argument('--work', type=Path, default=Path('runs/demo'))
    a = p.parse_args()
    rows,where = [],None
    for seed in a.seeds:
        done = a.work/str(seed)/'results.json'
        if not done.exists(): run(a.work/str(seed), a.steps, seed)
        saved = json.loads(done.read_text())
        rows += [dict(seed=seed, **r) for r in saved['rows']]
        where = where or {k:saved[k] for k in ('commit', 'device', 'torch', 'python')}
    models = list(dict.fromkeys(r['model'] for r in rows))
    pick = lambda m,k: [r[k] for r in rows if r['model']==m]
    spread = lambda v: f'{100*statistics.mean(v):.1f} % (sd {100*statistics.stdev(v):.1f})' if len(v)>1 else f'{100*v[0]:.1f} %'
    print(Table({'model':m, 'held-out top-1':spread(pick(m, 'top1')), 'image-to-text R@1':spread(pick(m, 'i2t_r1'))} for m in models))
    print(record_run('demo', dict(steps=a.steps, image_width=IMAGE_WIDTH, text_depth=TEXT_DEPTH, **RECIPE), rows, a.seeds, where=where))
