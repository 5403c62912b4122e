"ConvNeXt and FastViT as families: cut, saved, reconstructed, exported"

import warnings

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_trunks import (
    TEXT,
    TWINS,
    check_composed,
    check_fresh,
    check_onnx,
    check_whole,
    equal,
    features,
    off,
    pictures,
    twin,
)
from timm.utils import reparameterize_model

from tinyclip.core import TinyclipError
from tinyclip.inheritance import inherit, reinitialized
from tinyclip.keep import choose, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.reconstruction import reconstruct
from tinyclip.towers import layout
from tinyclip.towers.architecture import architecture, build, config
from tinyclip.zoo import load, save

OWN = [f for f in TWINS if f.startswith(('convnext', 'fastvit'))]
families = pytest.mark.parametrize('family', TWINS)
own = pytest.mark.parametrize('family', OWN)
few = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
LISTED = [
    n
    for n in open_clip.list_models()
    if config(n)['vision_cfg'].get('timm_model_name', '').startswith(('convnext', 'fastvit'))
    or isinstance(config(n)['vision_cfg'].get('layers'), list)
]


@families
def test_keeping_everything_is_the_identity(family):
    check_whole(twin(family))


@families
@few
@given(st.data())
def test_twice_is_composed_and_no_shape_is_unknown(family, data):
    check_composed(twin(family), data)


def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    "Random cuts of all families, bit-equal, in one process"
    students = {}
    for family in TWINS:
        model = twin(family)
        axes = [a for a in layout(model).sizes if a.endswith(('.ffn', '.heads'))]
        own = {a: 0.6 for a in axes if '.layers.0.' in a}
        students[family] = inherit(model, choose(model, own) if own else manual(model, 0.5))
    check_fresh(students, tmp_path)


@pytest.mark.parametrize('family', [f for f in OWN if f != 'fastvit_five'])  # of one unit
def test_manual_students_need_no_sizes(family):
    "Half of the width is what timm's own lists say"
    student = inherit(twin(family), manual(twin(family), image_width=0.5))
    trunk = architecture(student)['tinyclip_cfg']['trunk']
    assert set(trunk.get('sizes', {})) <= {'image.head.ffn', *squeezes(student)}
    assert features(student).isfinite().all()


def squeezes(model):
    return [a for a in layout(model).sizes if a.endswith('.squeeze')]


@own
def test_reconstruction(family):
    model, g = twin(family), torch.Generator().manual_seed(0)
    texts = torch.randint(1, 31, (48, 6), generator=g)
    pairs = list(zip(pictures(model, 48).split(16), texts.split(16)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same = reconstruct(inherit(model, manual(model)), model, pairs, progress=False)
        assert equal(same, model)
        assert {r['damping'] for r in same.reconstruction} == {None}
        student = inherit(model, manual(model, image_width=0.5))
        new = reconstruct(student, model, pairs, progress=False)
    assert not equal(new, student) and all(t.isfinite().all() for t in new.state_dict().values())
    assert all(r['after'] <= r['before'] for r in new.reconstruction)


def test_branches_add_up_before_and_after_a_cut():
    "A student in training form, added up, gives what it gave"
    model = twin('fastvit')
    for keep in (manual(model), manual(model, image_width=0.5), manual(model, image_width=0.75)):
        student = inherit(model, keep)
        merged = reparameterize_model(student)
        assert off(merged, student) < 1e-4
        assert architecture(merged)['tinyclip_cfg']['trunk']['inference_mode']
        again = inherit(merged, manual(merged))
        assert equal(again, merged)


@pytest.mark.parametrize('name', LISTED)
def test_every_architecture_lays_out(name):
    with torch.device('meta'):
        vision = config(name)['vision_cfg']
        model = build(dict(embed_dim=64, vision_cfg=vision, text_cfg=TEXT, custom_text=True))
    l = layout(model)
    cfg = architecture(model)
    assert 'tinyclip_cfg' not in cfg and l.families['image'].unmaskable == ''
    assert cfg['vision_cfg'].get('timm_drop_path', 0) == (vision.get('timm_drop_path') or 0)


def test_drop_path_of_a_named_student_is_the_teachers():
    vision = dict(timm_model_name='convnext_atto', timm_drop_path=0.1, image_size=32)
    cfg = dict(embed_dim=8, vision_cfg=vision, text_cfg=TEXT, custom_text=True)
    teacher = build(cfg)
    student = inherit(teacher, cfg)
    assert equal(student, teacher)
    assert architecture(student)['vision_cfg']['timm_drop_path'] == 0.1


@own
def test_random_weights_of_a_cut_student(family):
    student = inherit(twin(family), manual(twin(family), image_width=0.5))
    torch.manual_seed(0)
    new = reinitialized(student)
    assert architecture(new) == architecture(student) and not equal(new, student)


def test_version_2_is_refused():
    vision = dict(timm_model_name='convnextv2_atto', image_size=32)
    model = build(dict(embed_dim=8, vision_cfg=vision, text_cfg=TEXT, custom_text=True))
    with pytest.raises(TinyclipError, match='version 2'):
        layout(model)


@pytest.mark.parametrize('family', ['convnext_mlp', 'fastvit'])
def test_onnx_gives_the_same(family, tmp_path):
    "Of a student with unequal layers; the text tower is an ordinary one"
    torch.manual_seed(0)
    masked = MaskedCLIP(twin(family)).eval()
    masked.log_alpha.data.normal_(1, 2)
    student = masked.cut()
    check_onnx(student, tmp_path)


def test_unknown_sizes_are_refused():
    cfg = architecture(twin('convnext'))
    cfg['tinyclip_cfg']['trunk']['sizes'] = {'image.stages.9.width': 3}
    with pytest.raises(TinyclipError, match='image.stages.9.width'):
        build(cfg)


def test_load_says_what_it_is(tmp_path):
    save(twin('fastvit'), tmp_path / 'f')
    assert equal(load(tmp_path / 'f').model, twin('fastvit'))
