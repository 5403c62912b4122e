"""Ways to store 8-bit weights, on this processor and as if it had no VNNI: errors, answers that
changed, speed.

    python benchmarks/methods.py cifar10 --shared ../shared      # first: makes the students
    python benchmarks/int8.py --shared ../shared                 # writes results/int8/run.json

Towers are those of tests/test_onnx.py with random weights, the CIFAR-10 teacher and its students of
half the size. Files are run in processes with onnxruntime alone; `no_vnni.c`, which is compiled
here, hides from one of them what the processor has beyond AVX2. Errors are shares of the largest
feature of the float32 file. Speeds are of trained towers, ratios to that file, in turns, on one
thread and by the processor's time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime.quantization as q
import torch

from tinyclip.core import Table, record_run
from tinyclip.data.pairs import labelled
from tinyclip.evaluate import prompts
from tinyclip.zoo import load
from tinyclip.zoo import onnx as X

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))
from test_onnx import KINDS, texts

# of matrices
WAYS = {
    'float32': None,
    '8 bit': dict(reduce_range=False),
    '7 bit': dict(reduce_range=True),
    '8 bit unsigned': dict(reduce_range=False, weight_type=q.QuantType.QUInt8),
}

ASK = '''
import json, statistics, sys, time
import numpy as np, onnxruntime as ort
folder, out, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
rows, speed = {}, {}


def run(s, x):
    return s.run(None, {s.get_inputs()[0].name: x})[0]


for tower, ways in json.load(open(folder + '/towers.json')).items():
    x = np.load(f'{folder}/{tower}.npy')
    sessions = {w: ort.InferenceSession(f'{folder}/{tower}.{w}.onnx', options) for w in ways}
    for w, s in sessions.items():
        parts = [run(s, x[i : i + 250]) for i in range(0, len(x), 250)]
        rows[f'{tower}.{w}'] = np.concatenate(parts)
    times = {w: [] for w in ways}
    for _ in range(repeats):
        for w, s in sessions.items():
            start = time.thread_time()
            run(s, x[:32])
            times[w].append(time.thread_time() - start)
    if repeats:
        speed[tower] = {
            w: statistics.median(a / b for a, b in zip(times['float32'], t))
            for w, t in times.items()
        }
np.savez(out, **rows)
json.dump(speed, open(out + '.json', 'w'))
'''


def write(name, model, given, folder):
    "The files of both towers in every way, and what they are asked; names of the towers"
    m, full = X.float_copy(model), q.quantize_dynamic
    for kind, x in given.items():
        np.save(folder / f'{name}-{kind}.npy', x.numpy())
        plain = X.export_tower(m, kind, x[:3], folder / f'{name}-{kind}.float32.onnx')
        for way, options in list(WAYS.items())[1:]:

            def as_asked(*a, **k):
                # convolutions are unsigned in every way
                return full(*a, **k | ({} if k['op_types_to_quantize'] == ['Conv'] else options))

            with mock.patch.object(q, 'quantize_dynamic', as_asked):
                X.quantise(
                    plain,
                    folder / f'{name}-{kind}.{way}.onnx',
                    getattr(m, 'text', m).vocab_size if kind == 'text' else 0,
                )
    return [f'{name}-{kind}' for kind in given]


def ask(folder, repeats, **more):
    "Features by tower and way, and speeds"
    out = str(folder / 'out.npz')
    subprocess.run(
        [sys.executable, '-c', ASK, str(folder), out, str(repeats)],
        check=True,
        env=os.environ | more,
    )
    return dict(np.load(out)), json.loads(Path(out + '.json').read_text())


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--shared', default='../shared')
    p.add_argument('--images', type=int, default=1000)
    p.add_argument('--repeats', type=int, default=25)
    p.add_argument('--students', default='runs/methods/cifar10/0.5-automatic-{}/stage-1/student')
    p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2])
    a = p.parse_args()
    torch.set_num_threads(1)
    folder, towers = Path(tempfile.mkdtemp()), []
    for name, make in KINDS.items():
        model = make()
        torch.manual_seed(1)
        size = model.visual.image_size
        given = dict(
            image=torch.randn(5, 3, *(size if isinstance(size, tuple) else (size, size))),
            text=texts(5, eos=7 if name == 'custom' else None),
        )
        towers += write(name, model, given, folder)
    trained = {'teacher': f'{a.shared}/teachers/cifar10'} | {
        f'student {s}': a.students.format(s) for s in a.seeds
    }
    for name, path in trained.items():
        model, preprocess, tokenizer = load(path)
        data = labelled(f'{a.shared}/data/cifar10/val-0000.tar', preprocess, 250)
        pixels = torch.cat([x for x, _ in data])[: a.images]
        towers += write(
            name,
            model,
            dict(image=pixels, text=tokenizer([prompts(c, 'simple')[0] for c in data.classnames])),
            folder,
        )
    (folder / 'towers.json').write_text(json.dumps({t: list(WAYS) for t in towers}))
    hide = str(folder / 'no_vnni.so')
    subprocess.run(
        ['cc', '-O1', '-shared', '-fPIC', '-o', hide, Path(__file__).with_name('no_vnni.c')],
        check=True,
    )
    asked = dict(here=ask(folder, a.repeats)) | {
        'without VNNI': ask(folder, a.repeats, LD_PRELOAD=hide)
    }
    rows, exact, ways = Table(), asked['here'][0], list(WAYS)[1:]
    for where, (got, speed) in asked.items():
        rows.extend(
            dict(
                tower=t,
                weights=w,
                where=where,
                error=X.apart(got[f'{t}.{w}'], exact[f'{t}.float32'])['difference'],
                **(dict(speed=speed[t][w]) if t.startswith(tuple(trained)) else {}),
            )
            for t in towers
            for w in ways
        )

        def answers(name, way):
            return (got[f'{name}-image.{way}'] @ got[f'{name}-text.{way}'].T).argmax(1)

        rows.extend(
            dict(
                model=n,
                weights=w,
                where=where,
                changed=float((answers(n, w) != answers(n, 'float32')).mean()),
            )
            for n in trained
            for w in ways
        )
    for part in ('tower', 'model'):
        print(Table(r for r in rows if part in r), end='\n\n')
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    flags = next(l.split() for l in lines if l.startswith('flags'))
    record_run(
        'int8',
        dict(
            towers='tests/test_onnx.py; CIFAR-10 teacher; students of benchmarks/methods.py',
            n=a.images,
            speed=dict(batch_size=32, repeats=a.repeats, threads=1),
            here=[f for f in ('avx2', 'avx_vnni', 'avx512_vnni', 'amx_int8') if f in flags],
        ),
        rows,
        a.seeds,
    )
