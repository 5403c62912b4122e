"""timm's ViT as a family, and what pools by attention: cut, masked, scored, saved, reconstructed,
exported"""

import warnings

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_trunks import (
    FLAT,
    TEXT,
    check_composed,
    check_fresh,
    check_onnx,
    check_whole,
    configuration,
    equal,
    features,
    off,
    pictures,
    twin,
)

from tinyclip.core import TinyclipError
from tinyclip.evaluate.redundancy import layer_features
from tinyclip.inheritance import inherit, reinitialized
from tinyclip.keep import Keep, choose, keep_for_size, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import MEASURES, scored, unit_scores
from tinyclip.sparsity import Sparsity
from tinyclip.towers import ParamCount, layout
from tinyclip.towers.architecture import architecture, build, config
from tinyclip.zoo import load, save

kinds = pytest.mark.parametrize('kind', FLAT)
few = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
LISTED = {  # one of open_clip's list for every trunk and head
    tuple(config(n)['vision_cfg'].get(k) for k in ('timm_model_name', 'timm_pool', 'timm_proj')): n
    for n in open_clip.list_models()
    if (config(n)['vision_cfg'].get('timm_model_name') or '').startswith(('vit_', 'vitamin_'))
}
LISTED = [n for k, n in LISTED.items() if not k[0].startswith(('vit_relpos', 'vit_pe'))]


def pairs(model, n=48):
    texts = torch.randint(1, 31, (n, 6), generator=torch.Generator().manual_seed(0))
    return list(zip(pictures(model, n).split(16), texts.split(16)))


def share(model, of_the_rest):
    "A share of the image tower of which the convolutions before the blocks, which stay, are a part"
    whole = ParamCount(layout(model)).whole['image']
    stem = sum(p.numel() for p in model.visual.trunk.patch_embed.parameters())
    fixed = stem if hasattr(model.visual.trunk.patch_embed, 'backbone') else 0
    return (fixed + of_the_rest * (whole - fixed)) / whole


@kinds
def test_keeping_everything_is_the_identity(kind):
    check_whole(twin(kind))


@kinds
@few
@given(st.data())
def test_twice_is_composed_and_no_shape_is_unknown(kind, data):
    check_composed(twin(kind), data)


@kinds
@few
@given(seed=st.integers(0, 999), mean=st.sampled_from([-1.0, 0.0, 2.0]))
def test_masked_is_cut(kind, seed, mean):
    torch.manual_seed(seed)
    masked = MaskedCLIP(twin(kind)).eval()
    masked.log_alpha.data.normal_(mean, 3)
    small = masked.cut()
    assert off(masked, small) < 1e-5
    axes = [a for a in small.keep.axes if a.startswith('image')]
    assert any(len(small.keep[a]) < masked.layout.sizes[a] for a in axes)


@kinds
def test_masks_learn_in_every_group(kind):
    "Also with gradient checkpointing, which recomputes the same"
    grads = []
    for checkpointing in (False, True):
        masked = MaskedCLIP(twin(kind), start=0.0).train()
        masked.set_grad_checkpointing(checkpointing)
        image, text = pairs(masked.clip, 16)[0]
        with masked.one_draw():
            masked.noise.fill_(0.5)  # no mask is at its limit
            out = masked(image, text)
        (out[0] @ out[1].T).square().sum().backward()
        grads.append(masked.log_alpha.grad)
        groups = masked.by_group(masked.log_alpha.grad)
        assert all(g.abs().sum() > 0 for n, g in groups.items() if n.startswith('image'))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


@kinds
def test_masks_come_to_a_share(kind):
    student = Sparsity(MaskedCLIP(twin(kind)), share(twin(kind), 0.7)).cut().eval()
    assert features(student).isfinite().all()


def uneven(model):
    "A student without the first layer, one head in a layer and no neurons in the last"
    sizes, last = layout(model).sizes, layout(model).sizes['image.layers'] - 1
    axes = {'image.layers': range(1, last + 1), 'image.width': range(0, sizes['image.width'], 2)}
    axes |= {f'image.layers.{last}.ffn': [], 'image.layers.1.heads': [1]}
    axes |= {a: [0, 2] for a in ('image.pool.heads',) if a in sizes}
    return inherit(model, Keep(sizes, axes))


def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    "Whole, halved and uneven students of all kinds, bit-equal, in one process"
    students = {}
    for kind in FLAT:
        model = twin(kind)
        forms = dict(whole=model, half=inherit(model, manual(model, 0.5)), uneven=uneven(model))
        students |= {f'{kind}-{form}': student for form, student in forms.items()}
    check_fresh(students, tmp_path)


@kinds
def test_reconstruction(kind):
    "Of all that is kept nothing changes; what is cut comes nearer to the teacher"
    model = twin(kind)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same = reconstruct(inherit(model, manual(model)), model, pairs(model), progress=False)
        assert equal(same, model)
        assert {r['damping'] for r in same.reconstruction} == {None}
        student = uneven(model)
        better = reconstruct(student, model, pairs(model), progress=False)
    assert all(r['after'] <= r['before'] for r in better.reconstruction)
    x = pictures(model, 48)
    with torch.no_grad():
        want, cut, fitted = (m.encode_image(x) for m in (model, student, better))
    assert (fitted - want).norm() < (cut - want).norm()


@kinds
def test_linear_combinations_are_restored(kind):
    """Neurons and heads whose outputs others give too are cut, and the student gives what the
    teacher gave"""
    model = inherit(twin(kind), manual(twin(kind)))
    b = model.visual.trunk.blocks[1]
    first = [n for n in ('fc1', 'w0', 'w1') if hasattr(b.mlp, n)]
    with torch.no_grad():
        for n in first:
            m = getattr(b.mlp, n)
            m.weight[5], m.bias[5] = m.weight[3], m.bias[3]
        hd, inner = b.attn.head_dim, b.attn.proj.in_features
        for rows in (b.attn.qkv.weight, b.attn.qkv.bias):
            for i in range(3 if rows is not None else 0):
                rows[i * inner + hd : i * inner + 2 * hd] = rows[i * inner : i * inner + hd]
    sizes = layout(model).sizes
    gone = {'image.layers.1.ffn': 5, 'image.layers.1.heads': 1}
    keep = Keep(sizes, {a: [i for i in range(sizes[a]) if i != j] for a, j in gone.items()})
    student = inherit(model, keep)
    better = reconstruct(student, model, pairs(model, 96), progress=False)
    assert off(student, model) > 1e-3 and off(better, model) < 1e-3


@kinds
@pytest.mark.parametrize('by', MEASURES)
def test_scores(kind, by):
    "Every unit has its place, and the size is met"
    model = twin(kind)
    scores = unit_scores(model, pairs(model), by, progress=False)
    sizes = layout(model).sizes
    own = {a for a in sizes if a.startswith('image') and a.endswith(('width', 'heads', 'ffn'))}
    assert {a for a in scores.order if a.startswith('image')} == own
    assert all(sorted(scores.order[a]) == list(range(sizes[a])) for a in own)
    part = dict(image=share(model, 0.7), text=0.7)
    student = inherit(model, scores.keep(part))
    whole, left = (ParamCount(layout(m)).whole for m in (model, student))
    assert left['image'] == pytest.approx(part['image'] * whole['image'], rel=0.03)
    assert features(student).isfinite().all()


def test_a_dead_head_of_the_pooling_goes_first():
    model = inherit(twin('siglip'), manual(twin('siglip')))
    pool = model.visual.trunk.attn_pool
    with torch.no_grad():
        pool.proj.weight[:, 4:8] = 0
        pool.mlp.fc2.weight[:, 7] = 0
    scores = unit_scores(model, pairs(model), progress=False)
    assert scores.order['image.pool.heads'][0] == 1 and scores.order['image.pool.ffn'][0] == 7
    assert scores.lost['image.pool.heads'][0] < 1e-12
    keep = scored(model, pairs(model), 0.1, progress=False)
    assert len(keep['image.pool.heads']) >= 1 and len(keep['image.pool.ffn']) >= 1


@kinds
def test_the_rule_at_a_size_and_by_shares(kind):
    model = twin(kind)
    part = share(model, 0.7)
    student = inherit(model, keep_for_size(model, part))
    whole, left = (sum(ParamCount(layout(m)).whole.values()) for m in (model, student))
    assert left == pytest.approx(part * whole, rel=0.03)
    half = inherit(model, manual(model, image_width=0.5, image_depth=0.5))
    trunk = architecture(half)['tinyclip_cfg']['trunk']
    if kind not in ('mobileclip_b', 'vitamin'):  # a stem that timm does not build to size
        assert set(trunk.get('sizes', {})) <= {
            'embed', 'image.head.ffn', 'image.pool.query', 'image.pool.ffn'
        }  # fmt: skip
    assert features(half).isfinite().all()


def test_the_query_of_a_pooling_stays():
    "Whatever the width, so that its heads ask what they asked"
    model = twin('siglip')
    student = inherit(model, manual(model, image_width=0.5))
    a, b = (m.visual.trunk.attn_pool for m in (model, student))
    assert torch.equal(a.latent, b.latent) and torch.equal(a.q(a.latent)[..., :8], b.q(b.latent))


@kinds
def test_features_of_layers(kind):
    model = twin(kind)
    found = layer_features(model, [pictures(model, 4)], 'image')
    assert len(found) == len(model.visual.trunk.blocks) + 1


@pytest.mark.parametrize(
    'kind,form', [('siglip', 'whole'), ('siglip', 'half'), *((k, 'uneven') for k in FLAT)]
)
def test_onnx_gives_the_same(kind, form, tmp_path):
    "The text tower is an ordinary one"
    model = twin(kind)
    forms = dict(whole=lambda m: m, half=lambda m: inherit(m, manual(m, 0.5)), uneven=uneven)
    student = forms[form](model)
    check_onnx(student, tmp_path)


@kinds
def test_random_weights_of_a_cut_student(kind):
    student = inherit(twin(kind), manual(twin(kind), image_width=0.5))
    new = reinitialized(student)
    assert architecture(new) == architecture(student) and not equal(new, student)


@pytest.mark.parametrize('name', LISTED)
def test_every_architecture_lays_out(name):
    "What open_clip lists needs no entry of tinyclip"
    vision, dim = config(name)['vision_cfg'], config(name)['embed_dim']
    with torch.device('meta'):
        model = build(dict(embed_dim=dim, vision_cfg=vision, text_cfg=TEXT, custom_text=True))
    l, cfg = layout(model), architecture(model)
    assert 'tinyclip_cfg' not in cfg and l.families['image'].unmaskable == ''
    assert cfg['vision_cfg'].get('timm_drop_path', 0) == (vision.get('timm_drop_path') or 0)


def test_another_picture_size_is_said():
    "timm's position table has a row per patch"
    vision = dict(timm_model_name='vit_tiny_patch16_224', timm_pool='token', image_size=224)
    cfg = dict(embed_dim=8, vision_cfg=vision, text_cfg=TEXT, custom_text=True)
    model = build(cfg).eval()
    model.visual.set_input_size(96)
    held = architecture(model)
    assert held['tinyclip_cfg']['trunk']['img_size'] == 96
    again = build(held).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(features(again), features(model))


def test_drop_rates_of_a_student_are_the_teachers():
    vision = dict(
        timm_model_name='test_vit', timm_drop_path=0.1, patch_dropout=0.25, image_size=160
    )
    model = build(dict(embed_dim=8, vision_cfg=vision, text_cfg=TEXT, custom_text=True))
    cfg = architecture(inherit(model, manual(model, 0.5)))['vision_cfg']
    assert (cfg['timm_drop_path'], cfg['patch_dropout']) == (0.1, 0.25)


def test_files_say_what_they_hold(tmp_path):
    save(twin('siglip'), tmp_path / 'f')
    assert equal(load(tmp_path / 'f').model, twin('siglip'))
    plain = dict(timm_model_name='test_vit3', timm_pool='map', timm_proj='none', image_size=160)
    model = build(dict(embed_dim=96, vision_cfg=plain, text_cfg=TEXT, custom_text=True))
    save(model, tmp_path / 'p')
    assert 'tinyclip_cfg' not in architecture(load(tmp_path / 'p').model)


def test_refusals():
    cfg = configuration('siglip')
    cfg['tinyclip_cfg']['trunk']['sizes'] = {'image.layers.9.heads': 1}
    with pytest.raises(TinyclipError, match='image.layers.9.heads'):
        build(cfg)
    model = twin('siglip')
    with pytest.raises(TinyclipError, match='keep at least one'):
        inherit(model, Keep(layout(model).sizes, {'image.pool.heads': []}))
    with pytest.raises(TinyclipError, match="Did you mean 'image.pool.query'"):
        choose(model, {'image.pool.queries': 2})
