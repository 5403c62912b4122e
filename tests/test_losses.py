"Losses against open_clip's own; over several processes: test_processes"
import pytest, torch
from open_clip.loss import ClipLoss, DistillClipLoss
from torch.nn import functional as F
from tinyclip.losses import LOSSES, Features, Objective, affinity_mimicking, contrastive, uni_modal

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
