"Several processes against one: losses and gradients, whole and in chunks, plain and tiled, with masks, in slices"
import contextlib, os, socket
import pytest, torch
import torch.multiprocessing as mp
from test_distill import Batch, tiny
from tinyclip.core import processes
from tinyclip.engine import Engine, make_accelerator
from tinyclip.losses import LOSSES, Objective
from tinyclip.masking import MaskedCLIP
from tinyclip.sharding import full
from tinyclip.sparsity import Sparsity

N = 24
MIX = dict(affinity=1., contrastive=.5, uni_modal=.3, feature=.1)
WAYS = [dict(), dict(chunk_size=5), dict(shard=True), dict(shard=True, chunk_size=3)]

def batch():
    g = torch.Generator().manual_seed(7)
    image,text = torch.randn(N, 3, 16, 16, generator=g), torch.randint(1, 62, (N, 8), generator=g)
    text[:,5] = 63
    return Batch(image, text)

def cases(world):
    "(name, objective, masked, settings of the engine)"
    spec = dict(student_scale=20., teacher_scale=20.)
    for name in LOSSES:
        for tile in (None, 5):
            for way in WAYS[:2]: yield f'{name} tile={tile} {way}', Objective(name, tile=tile, **spec), False, way
    for masked in (False, True):
        for tile in (None, 5):
            for way in WAYS: yield f'mix masked={masked} tile={tile} {way}', Objective(MIX, tile=tile, **spec), masked, way

def gradients(objective, masked, way):
    "Loss, norm and gradients by name, as the first process sees them"
    rank,world = processes()
    torch.manual_seed(0)
    student,teacher = tiny(1, layers=2),tiny(0)
    if masked: student = MaskedCLIP(student, start=0.)
    penalty = Sparsity(student, .5) if masked else None
    engine = Engine(student, teacher, objective, make_accelerator('fp32', 'cpu'), penalty=penalty, **way)
    b,own = batch(),slice(N//world*rank, N//world*(rank+1))
    torch.manual_seed(3)
    with student.one_draw() if masked else contextlib.nullcontext(): out = engine.slopes(b._replace(image=b.image[own], text=b.text[own]), True, .5)
    grads = {n:full(p.grad) for n,p in student.named_parameters() if p.grad is not None}
    norm = engine.clip([p for p in student.parameters()])
    engine.release()
    return dict(loss=out['loss'], norm=norm, **grads)

def started(rank, world, port):
    os.environ |= {k:str(v) for k,v in dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, ACCELERATE_USE_CPU='true').items()}
    torch.set_num_threads(1); make_accelerator('fp32', 'cpu') # joins the processes
    assert processes()==(rank, world)

def worker(rank, world, port, out):
    started(rank, world, port)
    got = {name:gradients(*case) for name,*case in cases(world)}
    if rank==0: torch.save(got, out)
    torch.distributed.barrier(); torch.distributed.destroy_process_group()

def run(f, world, *args):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(f, (world, port, *args), nprocs=world)

def unlike(got, right):
    "What is off by more than 1e-5 of itself (or of a millionth of the whole gradient, where it is next to nothing)"
    floor = 1e-6*right['norm'].item()
    return {k:(got[k]-v).norm().item()/max(v.norm().item(), floor) for k,v in right.items() if (got[k]-v).norm() > 1e-5*max(v.norm().item(), floor)}

@pytest.mark.parametrize('world', [2, 4])
def test_several_processes_equal_one(world, tmp_path):
    run(worker, world, tmp_path/'got.pt')
    got,one = torch.load(tmp_path/'got.pt'),{}
    for name,objective,masked,way in cases(world):
        key = name.split(' {')[0]
        if key not in one: one[key] = gradients(objective, masked, {})
        assert got[name].keys()==one[key].keys()
        assert not (bad := unlike(got[name], one[key])), (name, bad)
