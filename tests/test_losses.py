"Losses against open_clip's own, and over two processes against one"
import os
import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.loss import ClipLoss, DistillClipLoss
from torch.nn import functional as F
from tinyclip.losses import LOSSES, Features, Objective, affinity_mimicking, contrastive, gather, uni_modal

def unit(*shape, seed): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)

def test_half_of_ours_is_open_clips():
    s,t = [unit(9, 6, seed=i) for i in (0, 1)], [unit(9, 6, seed=i) for i in (2, 3)]
    theirs = DistillClipLoss()(s[0], s[1], torch.tensor(20.), t[0], t[1], torch.tensor(50.), output_dict=True)
    torch.testing.assert_close(sum(affinity_mimicking(*s, *t, 20., 50.))/2, theirs['distill_loss'])
    torch.testing.assert_close(contrastive(*s, 20.), ClipLoss()(s[0], s[1], torch.tensor(20.)))

def test_uni_modal_leaves_the_diagonal_out():
    s,t = [unit(6, 5, seed=i) for i in (0, 1)], [unit(6, 3, seed=i) for i in (2, 3)]
    def brute(x, scale): return (scale*(x@x.T)).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).softmax(1)
    for got,a,b in zip(uni_modal(*s, *t, 9., 4.), s, t): torch.testing.assert_close(got, -torch.xlogy(brute(b, 4.), brute(a, 9.) + torch.eye(6)).sum(1).mean())

@pytest.mark.parametrize('name', LOSSES)
def test_gradient_is_the_slope(name):
    s,t = [unit(5, 4, seed=i) for i in (0, 1)], [unit(5, 4, seed=i) for i in (2, 3)]
    objective = Objective(name, student_scale=5., teacher_scale=5.)
    assert torch.autograd.gradcheck(lambda x: objective(Features(x, s[1], 5.), Features(*t, 5.))['loss'], s[0].requires_grad_())

SPEC = dict(affinity=1., contrastive=.5, uni_modal=.3, feature=.1)

def model(): return [torch.nn.Parameter(unit(6, 4, seed=i).float()) for i in (10, 11)] + [torch.nn.Parameter(torch.tensor(2.))]

def loss_and_grads(rows):
    "Loss of the gathered batch, and the gradients of this process"
    x,t = [unit(8, 6, seed=i).float()[rows] for i in (0, 1)], [unit(8, 4, seed=i).float()[rows] for i in (2, 3)]
    w = model()
    student = Features(*(gather(F.normalize(a@p, dim=-1)) for a,p in zip(x, w)), w[2].exp())
    loss = Objective(SPEC)(student, Features(*map(gather, t), 50.))['loss']
    loss.backward()
    return loss.detach(), [p.grad for p in w]

def worker(rank, port, out):
    os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    loss,grads = loss_and_grads(slice(rank*4, rank*4+4))
    for g in grads: dist.all_reduce(g); g /= 2 # what data-parallel training does
    if rank==0: torch.save((loss, grads), out)
    dist.barrier(); dist.destroy_process_group()

def test_two_processes_equal_one(tmp_path):
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(worker, (port, tmp_path/'out.pt'), nprocs=2)
    loss,grads = torch.load(tmp_path/'out.pt')
    one,expected = loss_and_grads(slice(None))
    torch.testing.assert_close(loss, one)
    for g,e in zip(grads, expected): torch.testing.assert_close(g, e)
