"Losses against open_clip's own; over several processes: test_processes"

import pytest
import torch
from open_clip.loss import ClipLoss, DistillClipLoss
from torch.nn import functional as F

from tinyclip.losses import LOSSES, Features, Objective, affinity_mimicking, contrastive, uni_modal


def unit(*shape, seed):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        dim=-1,
    )


def test_half_of_ours_is_open_clips():
    s = [unit(9, 6, seed=i) for i in (0, 1)]
    t = [unit(9, 6, seed=i) for i in (2, 3)]
    theirs = DistillClipLoss()(
        s[0], s[1], torch.tensor(20.0), t[0], t[1], torch.tensor(50.0), output_dict=True
    )
    torch.testing.assert_close(
        sum(affinity_mimicking(*s, *t, 20.0, 50.0)) / 2, theirs['distill_loss']
    )
    torch.testing.assert_close(contrastive(*s, 20.0), ClipLoss()(s[0], s[1], torch.tensor(20.0)))


def test_uni_modal_leaves_the_diagonal_out():
    s = [unit(6, 5, seed=i) for i in (0, 1)]
    t = [unit(6, 3, seed=i) for i in (2, 3)]

    def brute(x, scale):
        return (
            (scale * (x @ x.T)).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).softmax(1)
        )

    for got, a, b in zip(uni_modal(*s, *t, 9.0, 4.0), s, t):
        torch.testing.assert_close(
            got, -torch.xlogy(brute(b, 4.0), brute(a, 9.0) + torch.eye(6)).sum(1).mean()
        )


# targets of the other have no gradient, which finite differences cannot know: test_later_losses
@pytest.mark.parametrize('name', [n for n in LOSSES if n != 'cross_relational'])
def test_gradient_is_the_slope(name):
    s = [unit(5, 4, seed=i) for i in (0, 1)]
    t = [unit(5, 4, seed=i) for i in (2, 3)]
    objective = Objective(name, student_scale=5.0, teacher_scale=5.0)
    assert torch.autograd.gradcheck(
        lambda x: objective(Features(x, s[1], 5.0, -2.0), Features(*t, 5.0, -3.0))['loss'],
        s[0].requires_grad_(),
    )
