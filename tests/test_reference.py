"""Against recorded outputs of the released TinyCLIP code: pytest tests/test_reference.py
--vectors DIR"""

import json
import re

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyclip.inheritance import inherit
from tinyclip.losses import affinity_mimicking, contrastive
from tinyclip.masking import MaskedCLIP
from tinyclip.masks import (
    LagrangianConstraint,
    eval_masks,
    hard_concrete,
    keep_prob,
    soft_values,
    target_share,
)
from tinyclip.towers.architecture import build
from tinyclip.zoo import load, save


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize('case', range(5))
def test_affinity(vectors, case):
    v = load_file(vectors / f'affinity_{case}.safetensors')
    s_scale = v['student_scale'].item()
    t_scale = v['teacher_scale'].item()
    image, text = (v[f'student_{n}'].clone().requires_grad_() for n in ('image', 'text'))
    i2t, t2i = affinity_mimicking(
        image, text, v['teacher_image'], v['teacher_text'], s_scale, t_scale
    )
    (i2t + t2i).backward()
    ours = dict(
        i2t=i2t,
        t2i=t2i,
        contrastive=contrastive(image, text, s_scale),
        grad_student_image=image.grad,
        grad_student_text=text.grad,
    )
    for name, got in ours.items():
        assert got.dtype == torch.float64
        assert relative(got.detach().reshape(v[name].shape), v[name]) <= 1e-6, name


def strip(state):
    "Names of the released code to open_clip's"
    return {
        re.sub(r'^_(image_encoder|text_encoder|logit_scale)\.', '', k): v for k, v in state.items()
    }


@pytest.mark.parametrize('case', range(4))
def test_manual(vectors, case):
    cfg = json.loads((vectors / 'meta.json').read_text())['manual'][case]
    teacher_state, student_state = (
        strip(load_file(vectors / f'manual_{case}_{n}.safetensors')) for n in ('teacher', 'student')
    )
    io = load_file(vectors / f'manual_{case}_io.safetensors')
    teacher = build(cfg['teacher']).eval()
    teacher.load_state_dict(teacher_state)
    student = inherit(teacher, cfg['student'])
    got = student.state_dict()
    assert got.keys() == student_state.keys()
    for name in got:
        assert torch.equal(got[name], student_state[name]), name
    for model, who in ((teacher, 'teacher'), (student, 'student')):
        with torch.no_grad():
            ours = dict(image=model.encode_image(io['image']), text=model.encode_text(io['text']))
        for kind, f in ours.items():
            want = io[f'{who}_{kind}_features']
            assert (f - want).abs().max() <= 1e-5 * want.abs().max(), (who, kind)


KINDS = ('hidden', 'heads', 'intermediate')


def released_count(width, heads, ffn):
    """Expected and prunable parameters as the released TinyCLIP code counts them: matrices of the
    blocks, and biases as if every head owned an equal part of them"""
    (w,), (layers, h), f = width.shape, heads.shape, ffn.shape[1]
    head = (4 * w * w + 4 * w) // h
    return (
        width.sum() * heads.sum() * head / w + 2 * width.sum() * ffn.sum(),
        layers * head * h + layers * (2 * w * f + w + f),
    )


@pytest.mark.parametrize('case', range(4))
def test_hard_concrete(vectors, case):
    cfg = json.loads((vectors / 'meta.json').read_text())['l0'][case]
    v = load_file(vectors / f'l0_{case}.safetensors')
    log_alpha = {k: v[f'{k}_loga'].clone().requires_grad_() for k in KINDS}
    chance = {k: keep_prob(a) for k, a in log_alpha.items()}
    expected, prunable = released_count(*(chance[k] for k in KINDS))
    done = cfg['step'] / cfg['lagrangian_warmup'] if cfg['lagrangian_warmup'] else 1.0
    target = target_share(done, 1 - cfg['start_sparsity'], 1 - cfg['target_sparsity'], warmup=1.0)
    constraint = LagrangianConstraint(1, 'one-sided')
    assert (
        constraint.linear.item() == v['lambda_1'].item()
        and constraint.quadratic.item() == v['lambda_2'].item()
    )
    penalty = constraint((expected / prunable)[None], target)
    penalty.backward()

    def whole(k):
        return torch.cat(
            [eval_masks(a) for a in log_alpha[k].detach().view(-1, log_alpha[k].shape[-1])]
        )

    ours = dict(
        expected_params=expected,
        expected_sparsity=1 - expected / prunable,
        lagrangian=penalty,
        target_sparsity=torch.tensor(1 - target),
        sample_heads=hard_concrete(log_alpha['heads'], v['u_heads']),
    )
    for k in KINDS:
        ours |= {
            f'p_open_{k}': chance[k],
            f'grad_{k}': log_alpha[k].grad,
            f'eval_{k}_z': whole(k),
            f'soft_{k}_z': soft_values(log_alpha[k]),
        }
    assert prunable == v['prunable'].item()
    for name, got in ours.items():
        got, want = got.detach().reshape(v[name].shape), v[name]
        assert (got - want).norm() <= 1e-5 * want.norm(), name  # also where all of it is zero


def masked_clip(vectors, case):
    "The recorded dense model with the recorded log alphas"
    cfg = json.loads((vectors / 'meta.json').read_text())['masked'][case]
    model = build(cfg).eval()
    model.load_state_dict(strip(load_file(vectors / f'masked_{case}_dense.safetensors')))
    masked = MaskedCLIP(model).eval()
    recorded = load_file(vectors / f'masked_{case}_loga.safetensors')
    for name, part in masked.by_group(masked.log_alpha.data).items():
        tower, *rest = name.split('.')
        v = recorded[
            f"{tower}_{dict(heads='heads', ffn='intermediate', width='hidden')[rest[-1]]}_loga"
        ]
        part.copy_(v[int(rest[1])] if len(rest) > 1 else v)
    return masked


@pytest.mark.parametrize('case', range(3))
def test_masked(vectors, case):
    masked = masked_clip(vectors, case)
    io = load_file(vectors / f'masked_{case}_io.safetensors')
    z = load_file(vectors / f'masked_{case}_z.safetensors')
    assert torch.allclose(
        masked.values()['image.layers.1.ffn'], z['image_intermediate_z'][1].flatten(), atol=1e-7
    )
    cut = masked.cut()
    if case == 2:
        assert 'image.layers.0.heads' in cut.keep.axes and not cut.keep['image.layers.0.heads']
    for kind in ('image', 'text'):
        with torch.no_grad():
            ours, dense = (getattr(m, f'encode_{kind}')(io[kind]) for m in (masked, cut))
        want = io[f'masked_{kind}_features']
        assert relative(ours, want) <= 1e-4, kind
        assert (dense - ours).abs().max() <= 1e-5 * ours.abs().max(), kind
        assert relative(io[f'pruned_{kind}_features'], want) > 0.01, (
            'the released cut is another model; ours is not'
        )


# --- the released layouts, through zoo.load
ENCODERS = dict(visual='_image_encoder.', logit='_logit_scale.')


def under(state, form):
    "The recorded names in another released layout"
    plain = strip({k: v for k, v in state.items() if 'without_ddp' not in k})

    def tower(k):
        return ENCODERS.get(k.split('.')[0].split('_')[0], '_text_encoder.')

    if form == 'as recorded':
        return state
    if form == 'plain':
        return plain
    if form == 'module.':
        return {f'module.{k}': v for k, v in plain.items()}
    if form == '_image_encoder.':
        return {tower(k) + k: v for k, v in plain.items()}
    if form == '_image_encoder.module.':
        return {f'{tower(k)}module.{k}': v for k, v in plain.items()}
    if form == '_logit_scale.module.module.':
        return {
            f'{tower(k)}module.{"module." if "logit" in k else ""}{k}': v for k, v in plain.items()
        }
    if form == 'without_ddp only':
        return {
            (tower(k)[1:-1] + '_without_ddp.' if 'logit' not in k else '_logit_scale.') + k: v
            for k, v in plain.items()
        }
    if form == 'module._image_encoder. and duplicates':
        return {f'module.{tower(k)}{k}': v for k, v in plain.items()} | {
            f'module.{tower(k)[1:-1]}_without_ddp.{k}': v.clone()
            for k, v in plain.items()
            if 'logit' not in k
        }


FORMS = [
    'as recorded',
    'plain',
    'module.',
    '_image_encoder.',
    '_image_encoder.module.',
    '_logit_scale.module.module.',
    'without_ddp only',
    'module._image_encoder. and duplicates',
]
FILES = {
    'safetensors': lambda state, path: save_file(state, path),
    'bare.pt': lambda state, path: torch.save(state, path),
    'checkpoint.pt': lambda state, path: torch.save(
        dict(
            epoch=32,
            name='x',
            state_dict=state,
            optimizer=dict(state={}, param_groups=[dict(lr=1e-3, params=[0])]),
        ),
        path,
    ),
}


def same_features(model, io, who):
    for kind in ('image', 'text'):
        with torch.no_grad():
            ours = getattr(model, f'encode_{kind}')(io[kind])
        want = io[f'{who}_{kind}_features']
        assert (ours - want).abs().max() <= 1e-5 * want.abs().max(), kind


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('case', range(3))
def test_pruned_through_the_zoo(vectors, tmp_path, case, form):
    """The released pruned checkpoints are another model than the masked one; as they stand, we
    load just that model"""
    cfg = json.loads((vectors / 'meta.json').read_text())['masked'][case]
    io = load_file(vectors / f'masked_{case}_io.safetensors')
    state = under(load_file(vectors / f'masked_{case}_pruned.safetensors'), form)
    for name, write in FILES.items():
        path = tmp_path / f'x.{name}'
        write(state, path)
        same_features(load(path, config=cfg).model, io, 'pruned')


@pytest.mark.parametrize('form', FORMS[1:])
@pytest.mark.parametrize('case', range(4))
def test_manual_through_the_zoo(vectors, tmp_path, case, form):
    cfg = json.loads((vectors / 'meta.json').read_text())['manual'][case]
    io = load_file(vectors / f'manual_{case}_io.safetensors')
    for who in ('teacher', 'student'):
        state = under(load_file(vectors / f'manual_{case}_{who}.safetensors'), form)
        for name, write in FILES.items():
            write(state, tmp_path / f'{who}.{name}')
            same_features(load(tmp_path / f'{who}.{name}', config=cfg[who]).model, io, who)


def test_pruned_by_the_name_of_what_it_was_cut_from(vectors, tmp_path, architectures):
    "ARCHITECTURE:FILE, and a folder that save writes from it, in one go"
    cfg = json.loads((vectors / 'meta.json').read_text())['masked'][2]
    io = load_file(vectors / 'masked_2_io.safetensors')
    (tmp_path / 'Recorded.json').write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path / 'Recorded.json')
    model = load(f"Recorded:{vectors / 'masked_2_pruned.safetensors'}").model
    same_features(model, io, 'pruned')
    same_features(load(save(model, tmp_path / 'student')).model, io, 'pruned')
