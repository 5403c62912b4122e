"""Train the teacher that comes with the package once more, from scratch and in one go, and record how good it becomes.

    python benchmarks/embedded_teacher.py                    # writes runs/teacher and results/embedded-teacher-again/run.json

The shipped weights were made in three stretches, which `results/embedded-teacher/run.json` lists.
"""

import argparse
from pathlib import Path

from tinyclip.core import record_run
from tinyclip.lab.demo import TEACHER, TEACHER_RECIPE, train_teacher

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
            dict(model=TEACHER, steps=a.steps, batch_size=144, **TEACHER_RECIPE),
            metrics,
            [0],
        ),
    )
