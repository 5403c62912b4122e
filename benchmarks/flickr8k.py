"""Contrastive training from scratch on 6,000 photographs with five captions each, no teacher;
retrieval on 1,000 others.

    python benchmarks/flickr8k.py --shared ../shared     # writes results/flickr8k-scratch/run.json
"""

import argparse
import json
from pathlib import Path

from tinyclip.cli.main import main
from tinyclip.core import Table, record_run, write_json
from tinyclip.train.events import read_events

CFG = dict(
    embed_dim=128,
    vision_cfg=dict(image_size=64, layers=4, width=128, head_width=32, patch_size=16),
    text_cfg=dict(context_length=24, vocab_size=49408, width=128, heads=4, layers=2),
)

if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--shared', default='../shared')
    p.add_argument('--steps', type=int, default=400)
    p.add_argument('--work', type=Path, default=Path('runs/flickr8k-scratch'))
    a = p.parse_args()
    write_json(a.work / 'cfg.json', CFG)
    code = main(
        [
            'distill',
            '--student',
            str(a.work / 'cfg.json'),
            '--data',
            f'{a.shared}/data/flickr8k/train-*.tar',
            '--eval-data',
            f'{a.shared}/data/flickr8k/val-0000.tar',
            '--steps',
            str(a.steps),
            '--batch-size',
            '128',
            '--lr',
            '1e-3',
            '--warmup',
            '.1',
            '--out',
            str(a.work / 'run'),
            '--eval-every',
            str(a.steps // 4),
        ]
    )
    if code:
        raise SystemExit(code)
    r = json.loads((a.work / 'run' / 'result.json').read_text())
    chance = {
        f'{d}_r{k}': (1 - (1 - k / 5000) ** 5 if d == 'i2t' else k / 1000)
        for d in ('i2t', 't2i')
        for k in (1, 5, 10)
    }
    print(
        Table(
            [
                dict(what='student', **{k: r['evaluation'][k] for k in chance}),
                dict(what='chance', **chance),
            ]
        )
    )
    print(
        record_run(
            'flickr8k-scratch',
            dict(student=CFG, objective='contrastive', steps=a.steps, batch_size=128, lr=1e-3),
            dict(evaluation=r['evaluation'], chance=chance, seconds=r['seconds']),
            [0],
            where=read_events(a.work / 'run', 'config')[0]['environment'],
        )
    )
