"Against recorded outputs of the released TinyCLIP code: pytest tests/test_reference.py --vectors DIR"
import json, re
import pytest, torch
from safetensors.torch import load_file
from tinyclip.inheritance import build, inherit
from tinyclip.losses import affinity_mimicking, contrastive

def relative(got, want): return ((got-want).norm()/want.norm()).item()

@pytest.mark.parametrize('case', range(5))
def test_affinity(vectors, case):
    v = load_file(vectors/f'affinity_{case}.safetensors')
    s_scale,t_scale = v['student_scale'].item(), v['teacher_scale'].item()
    image,text = (v[f'student_{n}'].clone().requires_grad_() for n in ('image', 'text'))
    i2t,t2i = affinity_mimicking(image, text, v['teacher_image'], v['teacher_text'], s_scale, t_scale)
    (i2t+t2i).backward()
    ours = dict(i2t=i2t, t2i=t2i, contrastive=contrastive(image, text, s_scale), grad_student_image=image.grad, grad_student_text=text.grad)
    for name,got in ours.items():
        assert got.dtype==torch.float64
        assert relative(got.detach().reshape(v[name].shape), v[name]) <= 1e-6, name


def strip(state):
    "Names of the released code to open_clip's"
    return {re.sub(r'^_(image_encoder|text_encoder|logit_scale)\.', '', k):v for k,v in state.items()}

@pytest.mark.parametrize('case', range(4))
def test_manual(vectors, case):
    cfg = json.loads((vectors/'meta.json').read_text())['manual'][case]
    teacher_state, student_state = (strip(load_file(vectors/f'manual_{case}_{n}.safetensors')) for n in ('teacher', 'student'))
    io = load_file(vectors/f'manual_{case}_io.safetensors')
    teacher = build(cfg['teacher']).eval()
    teacher.load_state_dict(teacher_state)
    student = inherit(teacher, cfg['student'])
    got = student.state_dict()
    assert got.keys() == student_state.keys()
    for name in got: assert torch.equal(got[name], student_state[name]), name
    for model,who in ((teacher, 'teacher'), (student, 'student')):
        with torch.no_grad(): ours = dict(image=model.encode_image(io['image']), text=model.encode_text(io['text']))
        for kind,f in ours.items():
            want = io[f'{who}_{kind}_features']
            assert (f-want).abs().max() <= 1e-5*want.abs().max(), (who, kind)
