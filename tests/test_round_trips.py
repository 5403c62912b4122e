"""From a student to whatever its users have, in a fresh process, and back: logits on real
photographs"""

import subprocess
import sys

import open_clip
import pytest
import torch

from tinyclip.data.pairs import labelled
from tinyclip.inheritance import inherit
from tinyclip.keep import choose, manual
from tinyclip.zoo import load, save
from tinyclip.zoo.onnx import OnnxCLIP, to_onnx
from tinyclip.zoo.to_transformers import to_transformers
from tinyclip.zoo.vocabulary import shorten

NAMES = ['aeroplane', 'car', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'lorry']
TEXTS = [f'a photo of a {n}.' for n in NAMES]


@pytest.fixture(scope='module')
def photographs():
    "64 photographs, the teacher and its tokenizer"
    from conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip('no ../shared beside the project: this test needs its photographs and teacher')
    teacher, preprocess, tokenizer = load(SHARED / 'teachers' / 'cifar10')
    return (
        next(iter(labelled(f'{SHARED}/data/cifar10/val-0000.tar', preprocess, 64)))[0],
        teacher,
        tokenizer,
    )


def students(teacher):
    keep = {f'image.layers.{i}.heads': 5 for i in range(8)} | {
        'image.layers.0.heads': 2,
        'image.layers.1.heads': [],
        'image.layers.3.ffn': 300,
        'text.layers.1.ffn': [],
        'image.width': 160,
    }
    return dict(
        uniform=inherit(teacher, manual(teacher, image_width=0.5, text_depth=0.5)),
        slim=inherit(teacher, choose(teacher, keep)),
    )


@torch.no_grad()
def scores(model, pixels, tokens):
    return (
        model.logit_scale.exp()
        * model.encode_image(pixels, normalize=True)
        @ model.encode_text(tokens, normalize=True).T
    )


def near(got, want, tolerance):
    assert (got - want).abs().max() <= tolerance * want.abs().max()


LOADERS = {
    'uniform': (
        "import sys; sys.modules['tinyclip'] = None; import open_clip; model = "
        "open_clip.create_model('local-dir:'+folder).eval(); words = "
        "open_clip.get_tokenizer('local-dir:'+folder)"
    ),
    'slim': "from tinyclip.zoo.loading import load; model,_,words = load(folder)",
}


@pytest.mark.parametrize('kind', LOADERS)
def test_a_folder_in_a_fresh_process(photographs, tmp_path, kind):
    "A uniform student by plain open_clip, without this package; a slim one by our loader"
    pixels, teacher, tokenizer = photographs
    student = students(teacher)[kind]
    want = scores(student, pixels, tokenizer(TEXTS))
    save(student, tmp_path / 'student')
    torch.save(pixels, tmp_path / 'pixels.pt')
    program = f'''
import torch
folder = r"{tmp_path / 'student'}"
{LOADERS[kind]}
pixels = torch.load(r"{tmp_path / 'pixels.pt'}")
with torch.no_grad(): image,text,scale = model(pixels, words({TEXTS!r}))
torch.save(scale*image@text.T, r"{tmp_path / 'scores.pt'}")'''
    r = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert not r.returncode, r.stderr[-2000:]
    near(torch.load(tmp_path / 'scores.pt'), want, 1e-5)


@pytest.mark.parametrize('form', ['clip', 'slim'])
@pytest.mark.parametrize('kind', LOADERS)
def test_through_everything(photographs, tmp_path, kind, form):
    "Fewer tokens, then transformers, back, a folder, ONNX: one after the other"
    pytest.importorskip('transformers')
    pytest.importorskip('onnxruntime')
    pixels, teacher, tokenizer = photographs
    student = students(teacher)[kind]
    want = scores(student, pixels, tokenizer(TEXTS))
    short, words = shorten(student, TEXTS)
    assert short.vocab_size < 600
    near(scores(short, pixels, words(TEXTS)), want, 1e-6)
    told = to_transformers(short, tmp_path / 'hub', form=form)
    back = load(tmp_path / 'hub')
    near(scores(back.model, pixels, back.tokenizer(TEXTS)), want, 1e-5)
    if form == 'slim':  # nothing was padded: the same weights, names and all
        there, here = short.state_dict(), back.model.state_dict()
        assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)
    again = load(save(back.model, tmp_path / 'folder'))
    assert again.tokenizer(TEXTS).tolist() == words(TEXTS).tolist()
    to_onnx(again.model, tmp_path / 'onnx')
    near(scores(OnnxCLIP(tmp_path / 'onnx'), pixels, again.tokenizer(TEXTS)), want, 1e-4)
    # what a user of the files alone would take
    reader = open_clip.SimpleTokenizer(
        bpe_path=str(tmp_path / 'onnx' / 'bpe.txt.gz'), context_length=again.model.context_length
    )
    assert reader(TEXTS).tolist() == words(TEXTS).tolist()
    assert told['form'] == form
