"Manual inheritance: the identities on random shapes, and what a user could do wrong"

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyclip.core import TinyclipError
from tinyclip.inheritance import inherit, reinitialized
from tinyclip.keep import Keep, keep_for_config, manual, student_sizes
from tinyclip.towers import layout
from tinyclip.towers.architecture import architecture, build

quick = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def models(draw):
    "A small random CLIP: sizes, activation, layer scale, causal or not, flat or custom text"
    head = draw(st.sampled_from([4, 8]))
    vision = dict(
        image_size=16,
        patch_size=8,
        head_width=head,
        width=head * draw(st.integers(1, 4)),
        layers=draw(st.integers(1, 4)),
        mlp_ratio=draw(st.sampled_from([2.0, 4.0])),
    )
    heads = draw(st.integers(1, 4))
    text = dict(
        context_length=6,
        vocab_size=32,
        heads=heads,
        width=head * heads,
        layers=draw(st.integers(1, 4)),
        no_causal_mask=draw(st.booleans()),
    )
    if draw(st.booleans()):
        vision['ls_init_value'] = text['ls_init_value'] = 0.1
    torch.manual_seed(draw(st.integers(0, 99)))
    return build(
        dict(
            embed_dim=draw(st.integers(2, 9)),
            vision_cfg=vision,
            text_cfg=text,
            quick_gelu=draw(st.booleans()),
            custom_text=draw(st.booleans()),
        )
    ).eval()


def random_keep(draw, model):
    "Any keep that can be cut: heads and neurons of a layer may go altogether"
    axes = {}
    for a, n in layout(model).sizes.items():
        low = 0 if a.endswith(('.heads', '.ffn')) else 1
        axes[a] = sorted(draw(st.sets(st.integers(0, n - 1), min_size=low, max_size=n)))
    return Keep(layout(model).sizes, axes)


def outputs(model):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=g)
    t = torch.randint(1, 31, (3, 6), generator=g)
    with torch.no_grad():
        return model.encode_image(x), model.encode_text(t)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b)))


@quick
@given(models())
def test_keeping_everything_is_the_identity(model):
    assert same(inherit(model, manual(model)), model)


@quick
@given(st.data())
def test_twice_is_the_composed_keep(data):
    model = data.draw(models())
    once = inherit(model, random_keep(data.draw, model))
    twice = inherit(once, random_keep(data.draw, once))
    assert same(twice, inherit(model, twice.keep))
    assert Keep.from_json(twice.keep.to_json()) == twice.keep


@quick
@given(st.data())
def test_the_student_has_the_sizes_of_its_keep(data):
    model = data.draw(models())
    keep = random_keep(data.draw, model)
    student = inherit(model, keep)
    assert layout(student).sizes == student_sizes(keep)
    assert architecture(build(architecture(student))) == architecture(student)
    assert architecture(reinitialized(student)) == architecture(student)
    assert all(f.isfinite().all() for f in outputs(student))


@quick
@given(st.data())
def test_cut_equals_silenced_teacher(data):
    """Dropping heads and neurons is the same as zeroing what they write, also where a branch
    loses all of them and only its bias stays"""
    model = data.draw(models())
    l = layout(model)
    axes = {
        a: sorted(data.draw(st.sets(st.integers(0, n - 1))))
        for a, n in l.sizes.items()
        if a.endswith(('.heads', '.ffn'))
    }
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, dims in l.dims.items():
        for i, d in enumerate(dims):
            if d and d.scaled and d.axis in axes:
                gone = [j for j in range(l.sizes[d.axis]) if j not in axes[d.axis]]
                state[name].index_fill_(
                    i, d.expand(torch.tensor(gone, dtype=torch.long), l.sizes[d.axis]), 0.0
                )
    cut = inherit(model, Keep(l.sizes, axes))
    model.load_state_dict(state)
    for a, b in zip(outputs(cut), outputs(model)):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize('name', [n for n in open_clip.list_models() if n.startswith('TinyCLIP')])
def test_released_configurations_fit_their_teachers(name):
    teacher = 'RN50' if 'ResNet' in name else 'ViT-B-16' if '-16-' in name else 'ViT-B-32'
    cfg = open_clip.get_model_config(teacher)
    cfg.pop('quick_gelu', None)
    with torch.device('meta'):
        big = build(cfg)
        small = open_clip.CLIP(**open_clip.get_model_config(name))
    assert student_sizes(keep_for_config(big, name)) == layout(small).sizes


def test_half_precision_and_grad_survive():
    model = build(
        dict(
            embed_dim=4,
            vision_cfg=dict(image_size=16, patch_size=8, head_width=4, width=8, layers=1),
            text_cfg=dict(context_length=6, vocab_size=32, heads=2, width=8, layers=2),
        )
    )
    student = inherit(model.bfloat16(), manual(model, text_depth=0.5))
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in student.parameters())


def test_the_teacher_is_left_alone():
    model = build(
        dict(
            embed_dim=4,
            vision_cfg=dict(image_size=16, patch_size=8, head_width=4, width=8, layers=1),
            text_cfg=dict(context_length=6, vocab_size=32, heads=2, width=8, layers=2),
        )
    )
    before = outputs(model)
    student = inherit(model, manual(model))
    with torch.no_grad():
        [p.zero_() for p in student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model)))


def test_one_student_config_for_a_wider_model_is_refused():
    model = build(
        dict(
            embed_dim=4,
            vision_cfg=dict(image_size=16, patch_size=8, head_width=4, width=8, layers=1),
            text_cfg=dict(context_length=6, vocab_size=32, heads=2, width=8, layers=2),
        )
    )
    for key, value in (('width', 16), ('layers', 3)):
        wide = architecture(model)
        wide['vision_cfg'][key] = value
        with pytest.raises(TinyclipError, match=f'image.{key}.*cannot be wider or deeper'):
            inherit(model, wide)
