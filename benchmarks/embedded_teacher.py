"""Train the teacher that comes with the package, from scratch, and record how good it is.

    python benchmarks/embedded_teacher.py                    # writes runs/teacher and results/embedded-teacher/run.json
"""
import argparse, json
from pathlib import Path
from tinyclip.core import record_run, write_json
from tinyclip.demo import TEACHER, TEACHER_RECIPE, train_teacher
from tinyclip.events import read_events

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=2200); p.add_argument('--work', type=Path, default=Path('runs/teacher')); p.add_argument('--resume', action='store_true')
    a = p.parse_args()
    run,final = Path(f'{a.work}-run'), Path(f'{a.work}-run')/'final.json'
    if not final.exists(): write_json(final, train_teacher(a.work, a.steps, resume=a.resume))
    metrics = json.loads(final.read_text())
    print(metrics, record_run('embedded-teacher', dict(model=TEACHER, steps=a.steps, batch_size=144, **TEACHER_RECIPE), metrics, [0], where=read_events(run, 'config')[0]['environment']))
