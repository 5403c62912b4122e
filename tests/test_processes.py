"""Several processes against one: losses and gradients, whole and in chunks, plain and tiled,
with masks, in slices"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from groups import spawn, started
from safetensors.torch import load_file
from test_distill import Batch, Pairs, tiny

from tinyclip.core import rank_and_world_size
from tinyclip.distill import Distiller
from tinyclip.losses import LOSSES, Objective
from tinyclip.masking import MaskedCLIP
from tinyclip.sparsity import Sparsity
from tinyclip.train.checkpoint import checkpoints
from tinyclip.train.engine import Engine, make_accelerator
from tinyclip.train.events import read_events
from tinyclip.train.sharding import full
from tinyclip.zoo import load

N = 24
MIX = dict(affinity=1.0, contrastive=0.5, uni_modal=0.3, feature=0.1)
LATER = dict(feature=1.0, interactive_contrastive=0.5, vertical_relational=0.3, repulsive=0.2)
WAYS = [dict(), dict(chunk_size=5), dict(shard=True), dict(shard=True, chunk_size=3)]


def batch():
    g = torch.Generator().manual_seed(7)
    image = torch.randn(N, 3, 16, 16, generator=g)
    text = torch.randint(1, 62, (N, 8), generator=g)
    text[:, 5] = 63
    return Batch(image, text)


def cases(world):
    "(name, objective, masked, settings of the engine)"
    spec = dict(student_scale=20.0, teacher_scale=20.0)
    for name in LOSSES:
        for tile in (None, 5):
            for way in WAYS[:2]:
                yield f'{name} tile={tile} {way}', Objective(name, tile=tile, **spec), False, way
    for masked in (False, True):
        for tile in (None, 5):
            for way in WAYS:
                yield (
                    f'mix masked={masked} tile={tile} {way}',
                    Objective(MIX, tile=tile, **spec),
                    masked,
                    way,
                )

    for tile in (None, 5):
        for way in WAYS:
            objective = Objective(LATER, tile=tile, **spec).for_run(12, 16)
            yield f'narrow tile={tile} {way}', objective, False, way


def gradients(objective, masked, way):
    "Loss, norm and gradients by name, as the first process sees them"
    rank, world = rank_and_world_size()
    torch.manual_seed(0)
    width = 12 if objective.projection else 16
    student, teacher = tiny(1, layers=2, embed_dim=width), tiny(0)
    if objective.reads_bias:
        for m, bias in ((student, -9.0), (teacher, -7.0)):
            m.logit_bias = torch.nn.Parameter(torch.tensor(bias))
    if masked:
        student = MaskedCLIP(student, start=0.0)
    penalty = Sparsity(student, 0.5) if masked else None
    engine = Engine(
        student, teacher, objective, make_accelerator('fp32', 'cpu'), penalty=penalty, **way
    )
    b = batch()
    own = slice(N // world * rank, N // world * (rank + 1))
    torch.manual_seed(3)
    with student.one_draw() if masked else contextlib.nullcontext():
        out = engine.backward(b._replace(image=b.image[own], text=b.text[own]), True, 0.5)
    grads = {n: full(p.grad) for n, p in student.named_parameters() if p.grad is not None}
    if objective.projection:
        grads |= {f'of {n}': p.grad for n, p in objective.projection.named_parameters()}
    norm = engine.clip([*student.parameters(), *objective.parameters()])
    engine.release()
    return dict(loss=out['loss'], norm=norm, **grads)


def worker(rank, world, port, out):
    started(rank, world, port)
    got = {name: gradients(*case) for name, *case in cases(world)}
    if rank == 0:
        torch.save(got, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def unlike(got, right):
    """What is off by more than 1e-5 of itself (or of a millionth of the whole gradient, where it
    is next to nothing)"""
    floor = 1e-6 * right['norm'].item()
    return {
        k: (got[k] - v).norm().item() / max(v.norm().item(), floor)
        for k, v in right.items()
        if (got[k] - v).norm() > 1e-5 * max(v.norm().item(), floor)
    }


@pytest.mark.parametrize('world', [2, 4])
def test_several_processes_equal_one(world, tmp_path):
    spawn(worker, world, tmp_path / 'got.pt')
    got, one = torch.load(tmp_path / 'got.pt'), {}
    for name, objective, masked, _ in cases(world):
        key = name.split(' {')[0]
        if key not in one:
            one[key] = gradients(objective, masked, {})
        assert got[name].keys() == one[key].keys()
        assert not (bad := unlike(got[name], one[key])), (name, bad)


# --- whole runs: divided among processes, interrupted, launched from a notebook and from a shell


def job(folder=None, rank=0, world=1, student=None, **kw):
    settings = (
        dict(lr=1e-3, log_every=2, device='cpu', precision='fp32', progress=False, folder=folder)
        | kw
    )
    return Distiller(
        tiny(1, layers=2) if student is None else student,
        tiny(0),
        Pairs(8, world=world, rank=rank),
        **settings,
    )


def sharded(rank, world, port, folder):
    "A run in slices, stopped and gone on with; the masked one as well"
    started(rank, world, port)
    seen = []

    def look(m):
        return seen.append((len(list(m.parameters())), next(m.parameters()).device.type)) or dict(
            width=m.visual.proj.shape[0]
        )

    first = job(
        folder / 'run',
        rank,
        world,
        shard=True,
        save_every=3,
        evaluate=look,
        evaluate_every=2,
        chunk_size=1,
    )
    first.fit(6)
    second = job(folder / 'again', rank, world, shard=True, save_every=3, student=tiny(1, layers=2))
    second.listeners = [lambda e: second.stop() if (e['event'], e['step']) == ('log', 4) else None]
    assert not second.fit(6).finished
    done = (
        job(folder / 'again', rank, world, shard=True, student=tiny(2, layers=2))
        .fit(6, resume=True)
        .student
    )
    masked = MaskedCLIP(tiny(1, layers=2), start=0.0)
    penalty = Sparsity(masked, 0.6, form='projected', importance_warmup=0.3)
    job(None, rank, world, student=masked, penalty=penalty, shard=True).fit(6)
    cut = penalty.cut()
    torch.save(
        dict(
            run=first.student.state_dict(),
            again=done.state_dict(),
            masked=masked.state_dict(),
            kind=type(first.student),
            cut=sum(p.numel() for p in cut.parameters()),
            seen=seen,
        ),
        folder / f'{rank}.pt',
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_run_in_slices(tmp_path):
    spawn(sharded, 2, tmp_path)
    a, b = (torch.load(tmp_path / f'{r}.pt', weights_only=False) for r in range(2))
    for k in ('run', 'again', 'masked'):
        # plain tensors, the same everywhere
        assert all(torch.equal(v, b[k][n]) for n, v in a[k].items())
    # stopped and gone on with, not in chunks
    assert (
        sum((v - a['again'][n]).abs().sum().item() for n, v in a['run'].items())
        / sum(v.numel() for v in a['run'].values())
        < 5e-5
    )
    assert a['kind'] is type(tiny()) and a['cut'] == b['cut'] and a['seen'] and not b['seen']
    one = job(student=tiny(1, layers=2)).fit(6).student.state_dict()
    worst = max((v - one[n]).abs().max().item() for n, v in a['run'].items())
    # Adam turns a rounding into a whole step of 1e-3 where a gradient is next to nothing
    assert worst < 6.1e-3
    # nearly all are the same
    assert (
        sum((v - one[n]).abs().sum().item() for n, v in a['run'].items())
        / sum(v.numel() for v in one.values())
        < 5e-5
    )
    kept = [load_file(p / 'student.safetensors') for p in checkpoints(tmp_path / 'run')]
    assert all(torch.equal(v, a['run'][n]) for n, v in kept[-1].items())


def launched(folder):
    rank = int(os.environ['RANK'])
    r = job(folder, rank, 2).fit(4)
    (folder / f'rank-{rank}').write_text(f'{r.steps} {r.losses["loss"]:.4f}')


NOTEBOOK = '''
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
from accelerate import notebook_launcher
from test_processes import launched
notebook_launcher(
    launched, args=(Path({folder!r}),), num_processes=2,
    rdzv_backend='c10d', rdzv_endpoint='127.0.0.1:0')
'''


def test_launched_from_a_notebook(tmp_path):
    code = NOTEBOOK.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    out = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'),
    )
    assert out.returncode == 0, out.stderr[-3000:]
    one = job().fit(4)
    said = [(tmp_path / f'rank-{r}').read_text() for r in range(2)]
    assert (
        said[0] == said[1]
        and said[0].split()[0] == '4'
        and float(said[0].split()[1]) == pytest.approx(one.losses['loss'], rel=1e-3)
    )
    assert [e['step'] for e in read_events(tmp_path, 'log')] == [1, 2, 4]  # written by one process


def test_the_command_line_on_two_processes(tmp_path):
    args = [
        'distill',
        '--teacher',
        'shapes-teacher',
        '--data',
        'shapes',
        '--image-width',
        '.5',
        '--steps',
        '2',
        '--batch-size',
        '16',
        '--chunk-size',
        '8',
        '--device',
        'cpu',
        '--workers',
        '0',
        '--json',
        '--out',
        str(tmp_path / 'run'),
    ]
    out = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            '-m',
            'tinyclip',
            *args,
        ],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    assert out.returncode == 0, out.stderr[-3000:]
    told = [json.loads(l) for l in out.stdout.splitlines() if l.startswith('{')]
    assert len(told) == 1 and told[0]['steps'] == 2  # the first process tells
    assert read_events(tmp_path / 'run', 'config')[0]['processes'] == 2
    assert load(tmp_path / 'run' / 'student').model
