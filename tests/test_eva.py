"Eva as a family: PE-Core, EVA-01 and EVA-02 cut, masked, saved, reconstructed, scored, exported"

import copy
import functools
import warnings

import open_clip
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_trunks import (
    TEXT,
    check_composed,
    check_fresh,
    check_masked,
    check_onnx,
    check_whole,
    equal,
    features,
    off,
    pictures,
)
from timm.models import eva as timm_eva

from tinyclip.core import TinyclipError
from tinyclip.evaluate.redundancy import layer_features, similarity
from tinyclip.inheritance import inherit
from tinyclip.keep import Keep, choose, keep_for_size, manual
from tinyclip.masking import MaskedCLIP, MethodModule, mask_groups
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import scored, unit_scores
from tinyclip.sparsity import Sparsity, uniform_shape, zeros_for
from tinyclip.towers import ParamCount, layout
from tinyclip.towers.architecture import architecture, build, config
from tinyclip.towers.eva import EvaHeads

SMALL = dict(embed_dim=48, depth=3, num_heads=3, img_size=32, patch_size=16)
NAMES = {  # the name in timm, how it pools, and what makes it small
    'pe': ('vit_pe_core_tiny_patch16_384', 'map', dict(SMALL, attn_pool_num_heads=6)),
    'eva01': ('eva_giant_patch14_224', 'token', dict(SMALL, mlp_ratio=2)),
    'eva02': ('eva02_base_patch16_clip_224', 'token', SMALL),
    'eva02_post': ('eva02_enormous_patch14_clip_224', 'token', dict(SMALL, mlp_ratio=2)),
}
# two that open_clip does not list: packed gates; layer scales and no class token
NAMES['packed'] = ('eva02_tiny_patch14_224', 'token', SMALL)
NAMES['scaled'] = ('vit_medium_patch16_rope_reg1_gap_256', 'avg', SMALL)
REAL = {
    n: c for n in open_clip.list_models() if 'timm_model_name' in (c := config(n)['vision_cfg'])
}
REAL = [n for n, c in REAL.items() if c['timm_model_name'].startswith(('eva', 'vit_pe'))]
twins = pytest.mark.parametrize('kind', NAMES)
few = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def twin(kind, seed=0):
    "A small CLIP of random weights, far from where they start; do not change it"
    name, pool, own = NAMES[kind]
    vision = dict(image_size=32, timm_model_name=name, timm_pool=pool, timm_proj=None)
    slim = dict(trunk=copy.deepcopy(own))
    torch.manual_seed(seed)
    cfg = dict(embed_dim=12, vision_cfg=vision, text_cfg=TEXT, custom_text=True, tinyclip_cfg=slim)
    model = build(cfg).eval()
    for n, p in model.visual.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, max(p[0].numel(), 4) ** -0.5)
        else:
            scale = n.endswith('weight') or 'gamma' in n
            torch.nn.init.normal_(p, 1.0 if scale else 0.0, 0.3)
    return model


def uneven(model):
    "A keep with a layer less, and layers that differ; of one no heads are left, of one no neurons"
    axes = {
        'image.width': range(3, 40),
        'image.layers': [0, 2],
        'image.layers.0.heads': [0, 2],
        'image.layers.0.ffn': [],
        'image.layers.2.heads': [],
        'image.layers.2.ffn': range(5, 50),
    }
    return choose(model, axes)


def pairs(model, n=64):
    g = torch.Generator().manual_seed(3)
    return [(pictures(model, n, seed=3), torch.randint(1, 31, (n, 6), generator=g))]


@twins
def test_keeping_everything_is_the_identity(kind):
    check_whole(twin(kind))


@twins
@few
@given(st.data())
def test_twice_is_composed_and_no_shape_is_unknown(kind, data):
    model = twin(kind)
    second = check_composed(model, data)
    size = ParamCount(layout(model))
    counts = {a: len(second.keep[a]) for a in second.keep.sizes}
    gone = {i for i in range(3) if i not in second.keep['image.layers']}
    if not gone:
        assert size.count(counts)['image'] == sum(p.numel() for p in second.visual.parameters())


KINDS = [('heads', 'ffn', 'width'), ('heads', 'ffn', 'width', 'attention', 'mlp'), ('heads',)]


@twins
@few
@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.booleans(), st.sampled_from([0.3, 1, 3]))
def test_masked_is_cut(kind, seed, kinds, hard, mean):
    check_masked(twin(kind), kinds, hard, seed, mean)


@twins
def test_closed_heads_and_neurons_leave_the_norms_inside(kind):
    "As many as all but one close: the norms over them count the open one alone"
    masked = MaskedCLIP(twin(kind), hard=True).eval()
    for left in (0, 1):
        branches = {g: n - left for g, n in masked.groups.items() if 'image.layers' in g}
        zeros = dict.fromkeys(masked.groups, 0) | branches
        weights = {f'model.{k}': v for k, v in masked.fold(masked.values(zeros)).items()}
        call, x = MethodModule(masked.clip, 'encode_image'), pictures(masked.clip)
        with torch.no_grad():
            got = torch.func.functional_call(call, weights, (x,))
        assert off(got, masked.cut(zeros)) < 1e-5


@twins
def test_gradients_reach_masks_and_are_recomputed(kind):
    torch.manual_seed(0)
    masked = MaskedCLIP(twin(kind)).train()
    image = pictures(twin(kind), 4)

    def gradients():
        torch.manual_seed(1)
        masked.zero_grad()
        masked.encode_image(image).square().mean().backward()
        return {n: p.grad.clone() for n, p in masked.named_parameters() if p.grad is not None}

    plain = gradients()
    groups = masked.by_group(plain['probe'])
    assert set(mask_groups(twin(kind))) == set(groups)
    assert all(a.abs().sum() > 0 for g, a in groups.items() if g.startswith('image.'))
    masked.set_grad_checkpointing()
    again = gradients()
    for n, g in plain.items():
        assert (again[n] - g).abs().max() <= 1e-4 * g.abs().max() + 1e-7, n


@twins
def test_a_goal_is_met_exactly(kind):
    torch.manual_seed(0)
    masked = MaskedCLIP(twin(kind)).eval()
    masked.log_alpha.data.normal_(2, 1)
    student = masked.cut(zeros_for(masked, 0.5, ('image',)))
    n = sum(p.numel() for p in student.visual.parameters())
    assert abs(n / masked.size.whole['image'] - 0.5) < 0.02
    assert features(Sparsity(MaskedCLIP(twin(kind)), 0.6).cut()).isfinite().all()


def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    "Unequal layers and branches that are gone, bit-equal"
    check_fresh({k: inherit(twin(k), uneven(twin(k))) for k in NAMES}, tmp_path)


@twins
def test_even_students_are_timms_own(kind):
    "Two of three heads, two thirds of the width: `sizes` has no layer, and no attention is slim"
    student = inherit(twin(kind), manual(twin(kind), image_width=2 / 3))
    own = architecture(student)['tinyclip_cfg']['trunk']
    assert own['embed_dim'] == 32 and own['num_heads'] == 2
    assert not any(isinstance(m, EvaHeads) for m in student.modules())
    assert set(own.get('sizes', {})) <= {'image.pool.query'}  # which no cut makes smaller
    assert load_state(student)


def load_state(student):
    again = build(architecture(student))
    again.load_state_dict(student.state_dict())
    return torch.equal(features(again.eval()), features(student))


@twins
def test_rules(kind):
    model = twin(kind)
    student = inherit(model, keep_for_size(model, 0.6))
    whole, left = (ParamCount(layout(m)).whole for m in (model, student))
    assert 0.5 < sum(left.values()) / sum(whole.values()) < 0.7
    shape = uniform_shape(MaskedCLIP(model), 'image', 0.6)
    assert shape['image.width'] % 16 == 0


@twins
def test_reconstruction(kind):
    "Of all that is kept nothing changes; what is cut comes nearer to the teacher"
    model = twin(kind)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same = reconstruct(inherit(model, manual(model)), model, pairs(model), progress=False)
        assert {r['damping'] for r in same.reconstruction} == {None} and equal(same, model)
        for keep in (manual(model, image_width=2 / 3), uneven(model)):
            student = inherit(model, keep)
            better = reconstruct(student, model, pairs(model, 256), progress=False)
            assert off(better, model) < off(student, model)
            assert all(r['after'] <= r['before'] for r in better.reconstruction)


def doubled(kind):
    "A teacher with every neuron twice"
    model = copy.deepcopy(twin(kind))
    with torch.no_grad():
        for b in model.visual.trunk.blocks:
            n = b.mlp.fc2.in_features
            firsts = [m for m in b.mlp.children() if isinstance(m, torch.nn.Linear)][:-1]
            inner = [b.mlp.norm] if hasattr(b.mlp.norm, 'weight') else []
            for p in (p for m in firsts + inner for p in (m.weight, m.bias)):
                for part in p.split(n):
                    part[n // 2 :] = part[: n // 2]
    return model, [f'image.layers.{i}.ffn' for i in range(3)]


@twins
def test_what_can_be_made_up_for_is_made_up_for(kind):
    "Cut to one neuron of each pair, it is the teacher again"
    model, axes = doubled(kind)
    sizes = layout(model).sizes
    student = inherit(model, Keep(sizes, {a: range(sizes[a] // 2) for a in axes}))
    again = reconstruct(student, model, pairs(model, 256), progress=False)
    assert off(student, model) > 0.05 and off(again, model) < 1e-3


@twins
def test_scores_know_what_can_be_made_up_for(kind):
    "One neuron of each pair costs nothing"
    model, axes = doubled(kind)
    found = unit_scores(model, pairs(model, 256), samples=256, progress=False)
    for a in axes:
        lost = found.lost[a] / found.lost[a][-1]
        half = len(lost) // 2
        assert lost[half - 1] < 1e-2 < lost[half + half // 2]


@twins
@pytest.mark.parametrize('by', ['reconstruction', 'fisher', 'activation'])
def test_scores(kind, by):
    model = twin(kind)
    keep = scored(model, pairs(model), 0.6, by=by, samples=64, progress=False)
    student = inherit(model, keep)
    counts = [sum(p.numel() for p in m.visual.parameters()) for m in (student, model)]
    assert abs(counts[0] / counts[1] - 0.6) < 0.02
    assert features(student).isfinite().all()


def test_redundancy_sees_the_layers():
    model = twin('eva02')
    found = layer_features(model, pairs(model), 'image')
    assert similarity(found).shape == (4, 4)


@pytest.mark.parametrize('kind, even', [*((k, False) for k in NAMES), ('pe', True)])
def test_onnx_gives_the_same(kind, even, tmp_path):
    model = twin(kind)
    student = inherit(model, manual(model, 2 / 3) if even else uneven(model))
    check_onnx(student, tmp_path)


@pytest.mark.parametrize('name', [n for n in REAL if n.endswith(('g-14', 'B-16', 'E-14', '384'))])
def test_architectures_are_inherited_and_masked(name):
    "At full size, without weights; all of them: results/architectures"
    with torch.device('meta'):
        model = build(dict(embed_dim=64, vision_cfg=config(name)['vision_cfg'], text_cfg=TEXT))
        assert 'tinyclip_cfg' not in architecture(model)
        student = inherit(model, manual(model, image_width=0.5))
        sizes = architecture(student)['tinyclip_cfg']['trunk'].get('sizes', {})
        assert set(sizes) <= {'image.pool.query'} or name == 'PE-Core-T-16-384'  # 1.5 of 3 heads
        assert MaskedCLIP(model).groups


@pytest.mark.parametrize(
    'why, settings',
    [
        ('shares keys', dict(attn_type='rope', qkv_fused=False, num_kv_heads=1)),
        ('angles of its own', dict(use_rot_pos_emb=True, rope_type='mixed')),
        ('pictures of any size', dict(dynamic_img_size=True)),
        ('normalises by RmsNorm', dict(norm_layer=timm.layers.RmsNorm)),
    ],
)
def test_refusals(why, settings):
    model = copy.deepcopy(twin('eva01'))
    own = dict(SMALL, num_classes=12, global_pool='token') | settings
    model.visual.trunk = timm_eva.Eva(**own)
    with pytest.raises(TinyclipError, match=why):
        layout(model)
