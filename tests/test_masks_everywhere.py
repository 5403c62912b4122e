"Masks on image towers with stages: what is masked is what is cut"

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_trunks import TWINS, off, pictures, twin

from tinyclip.core import TinyclipError
from tinyclip.keep import manual
from tinyclip.masking import MaskedCLIP, mask_groups
from tinyclip.sparsity import Goal, Sparsity, uniform_shape, zeros_for
from tinyclip.towers import layout

families = pytest.mark.parametrize('family', TWINS)
few = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = [('heads', 'ffn', 'width'), ('heads', 'ffn', 'width', 'attention', 'mlp'), ('width',)]


@families
@few
@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.booleans(), st.sampled_from([0.3, 1, 3]))
def test_masked_equals_cut(family, seed, kinds, hard, mean):
    torch.manual_seed(seed)
    masked = MaskedCLIP(twin(family), kinds, hard=hard).eval()
    masked.log_alpha.data.normal_(mean, 2)
    student = masked.cut()
    assert off(masked, student) < 1e-5
    assert off(masked, twin(family)) > 1e-3


@families
def test_masks_reach_every_kind_of_place(family):
    "Every channel, head and neuron has a mask, and closing any group changes the features"
    model = twin(family)
    groups = mask_groups(model)
    axes = [a for a in layout(model).sizes if a != 'embed' and not a.endswith('.layers')]
    assert set(groups) == set(axes)
    masked = MaskedCLIP(model, hard=True).eval()
    whole = masked.encode_image(pictures(model)).detach()
    assert off(whole, model) < 1e-5
    for g in groups:
        zeros = dict.fromkeys(groups, 0) | {g: max(1, groups[g] // 2)}
        with torch.no_grad():
            masked.log_alpha.normal_()
            out = masked.run('encode_image', pictures(model))
            w = masked.fold(masked.values(zeros))
            names = {f'model.{k}': v for k, v in w.items()}
            out = torch.func.functional_call(Encode(masked.clip), names, (pictures(model),))
        if g.startswith('image.'):
            assert off(out, whole) > 1e-6, g


class Encode(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.encode_image(x)


@families
def test_gradients_reach_masks_and_weights(family):
    torch.manual_seed(0)
    masked = MaskedCLIP(twin(family)).train()
    image = pictures(twin(family), 4)
    plain = gradients(masked, image)
    groups = masked.by_group(plain['log_alpha'])
    assert not [g for g, a in groups.items() if g.startswith('image.') and not a.abs().sum() > 0]
    masked.set_grad_checkpointing()
    again = gradients(masked, image)
    for n, g in plain.items():
        assert (again[n] - g).abs().max() <= 1e-4 * g.abs().max() + 1e-7, n


def gradients(masked, image):
    torch.manual_seed(1)
    masked.zero_grad()
    masked.encode_image(image).square().mean().backward()
    return {n: p.grad.clone() for n, p in masked.named_parameters() if p.grad is not None}


@families
def test_a_goal_is_met_exactly(family):
    "Half of the parameters, as counted by the masks and in the student"
    torch.manual_seed(0)
    masked = MaskedCLIP(twin(family)).eval()
    masked.log_alpha.data.normal_(2, 1)
    student = masked.cut(zeros_for(masked, 0.5, ('image',)))
    n = sum(p.numel() for p in student.visual.parameters())
    assert abs(n / masked.size.whole['image'] - 0.5) < 0.02
    counts = {a: len(student.keep[a]) for a in student.keep.sizes}
    assert masked.size.count(counts)['image'] == n


def test_a_mask_phase_runs():
    masked = MaskedCLIP(twin('fastvit'))
    penalty = Sparsity(masked, 0.7)
    assert penalty is not None and Goal(masked, 0.7).zeros()


def test_what_has_no_uniform_shape_is_refused():
    masked = MaskedCLIP(twin('convnext'))
    with pytest.raises(TinyclipError, match='no one uniform shape'):
        uniform_shape(masked, 'image', 0.5)
    assert manual(twin('convnext'), image_width=0.5)
