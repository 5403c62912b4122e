"Masks on image towers with stages: what is masked is what is cut"

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_trunks import TWINS, check_masked, features, off, pictures, twin

from tinyclip.core import TinyclipError
from tinyclip.evaluate.cost import parameters
from tinyclip.inheritance import inherit
from tinyclip.keep import keep_for_size, manual
from tinyclip.masking import MaskedCLIP, MethodModule, mask_groups
from tinyclip.sparsity import Goal, Sparsity, uniform_shape, zeros_for
from tinyclip.towers import layout

families = pytest.mark.parametrize('family', TWINS)
few = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = [('heads', 'ffn', 'width'), ('heads', 'ffn', 'width', 'attention', 'mlp'), ('width',)]


@families
@few
@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.booleans(), st.sampled_from([0.3, 1, 3]))
def test_masked_equals_cut(family, seed, kinds, hard, mean):
    check_masked(twin(family), kinds, hard, seed, mean)


@families
def test_masks_reach_every_kind_of_place(family):
    "Every channel, head and neuron has a mask, and closing any group changes the features"
    model = twin(family)
    groups = mask_groups(model)
    axes = [a for a in layout(model).sizes if a != 'embed' and not a.endswith('.layers')]
    assert set(groups) == set(axes)
    torch.manual_seed(0)
    masked = MaskedCLIP(model, hard=True).eval()
    masked.log_alpha.data.normal_()
    whole = closing(masked, {})
    assert off(whole, model) < 1e-5
    for g in (g for g in groups if g.startswith('image.')):
        assert off(closing(masked, {g: max(1, groups[g] // 2)}), whole) > 1e-6, g


@torch.no_grad()
def closing(masked, zeros):
    "Image features with so many masks closed, and no others"
    values = masked.values(dict.fromkeys(masked.groups, 0) | zeros)
    weights = {f'model.{k}': v for k, v in masked.fold(values).items()}
    module = MethodModule(masked.clip, 'encode_image')
    return torch.func.functional_call(module, weights, (pictures(masked.clip),))


@families
def test_gradients_reach_masks_and_weights(family):
    torch.manual_seed(0)
    masked = MaskedCLIP(twin(family)).train()
    image = pictures(twin(family), 4)
    plain = gradients(masked, image)
    groups = masked.by_group(plain['probe'])
    image_groups = [a for g, a in groups.items() if g.startswith('image.')]
    assert image_groups and all(a.abs().sum() > 0 for a in image_groups)
    once = {n: b.clone() for n, b in masked.clip.named_buffers()}
    masked.set_grad_checkpointing()
    again = gradients(masked, image)
    for n, g in plain.items():
        assert (again[n] - g).abs().max() <= 1e-4 * g.abs().max() + 1e-7, n
    for n, b in masked.clip.named_buffers():
        assert not n.endswith('tracked') or b == once[n] + 1, n


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
    coarse = family == 'fastvit_five'  # one channel in four of every stage
    assert abs(n / masked.size.whole['image'] - 0.5) < (0.1 if coarse else 0.02)
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


@pytest.mark.parametrize('family', [*TWINS])
@pytest.mark.parametrize('share', [0.8, 0.4])
def test_the_rule_at_a_share(family, share):
    "As exact as a twin with a width of four channels can be, and every width taken part in"
    model = twin(family)
    keep = keep_for_size(model, share)
    student = inherit(model, keep)
    got = parameters(student)['towers'] / parameters(model)['towers']
    assert abs(got - share) < 0.06, got
    widths = [a for a in keep.sizes if a.startswith('image.') and a.endswith('.width')]
    assert all(len(keep[a]) < keep.sizes[a] for a in widths)
    assert features(student).isfinite().all()
