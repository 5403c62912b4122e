"""Students in transformers: what comes out is computed by transformers' own classes, in
processes that know nothing of this package."""

import ast
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

transformers = pytest.importorskip(
    'transformers', reason="transformers is optional: pip install 'tinyclip[export]'"
)
import open_clip
from hub import CAPTIONS, compare, processor_of, refuse, same, shake, short, theirs, tiny
from safetensors.torch import load_file

from tinyclip.core import TinyclipError
from tinyclip.inheritance import build, inherit
from tinyclip.keep import choose, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.towers.architecture import architecture
from tinyclip.zoo import from_transformers as from_huggingface
from tinyclip.zoo import load
from tinyclip.zoo import to_transformers as huggingface
from tinyclip.zoo.even_layers import describe, fit, obstacle
from tinyclip.zoo.folders import finish, preprocess_cfg
from tinyclip.zoo.from_transformers import from_transformers
from tinyclip.zoo.processors import processor as own_processor
from tinyclip.zoo.to_transformers import FILES, to_transformers
from tinyclip.zoo.vocabulary import shorten, tokenizer_of

# ---- photographs, in a process without this package and without open_clip

ALONE = """import sys, torch
sys.modules['tinyclip'] = sys.modules['open_clip'] = None
from transformers import AutoModel, CLIPModel, CLIPProcessor
where,*folders = sys.argv[1:]
held = torch.load(where+'/in.pt', weights_only=False)
for folder in folders:
    own = dict(trust_remote_code=True) if folder.endswith('own') else {}
    model = (AutoModel if own else CLIPModel).from_pretrained(folder, **own)
    processor = CLIPProcessor.from_pretrained(folder, backend='pil', **own)
    inputs = processor(**held, return_tensors='pt', padding=True, truncation=True)
    with torch.no_grad(): out = model(**inputs)
    logits = out.logits_per_image
    found = dict(logits=logits, probs=logits.softmax(dim=1), pixels=inputs['pixel_values'])
    torch.save(found, folder+'.pt')
print(sorted(m for m in ('tinyclip', 'open_clip') if sys.modules.get(m)))"""


def photographs(shared, kind, n):
    with tarfile.open(shared / 'data' / kind / 'val-0000.tar') as tar:
        files = [m for m in tar if m.name.endswith('.jpg')][:n]
        return [Image.open(io.BytesIO(tar.extractfile(m).read())).convert('RGB') for m in files]


def test_logits_of_photographs_without_our_package(shared, tmp_path):
    teacher, preprocess, tokenizer = load(shared / 'teachers' / 'cifar10')
    torch.manual_seed(0)
    masked = MaskedCLIP(teacher)
    masked.log_alpha.data.normal_(0.5, 2)
    even = inherit(teacher, manual(teacher, image_width=0.5, text_depth=0.5))
    uneven = inherit(
        teacher,
        choose(
            teacher,
            {
                'image.layers.1.heads': 2,
                'image.layers.3.heads': [],
                'image.layers.2.ffn': 77,
                'text.layers.1.ffn': [],
                'text.layers.2.heads': 1,
            },
        ),
    )
    models = {
        'teacher': teacher,
        'even': even,
        'even_own': even,
        'uneven': uneven,
        'uneven_own': uneven,
        'learned_own': masked.cut(),
    }
    names = (shared / 'data' / 'cifar10' / 'classnames.txt').read_text().split('\n')[:10]
    images = photographs(shared, 'cifar10', 40) + photographs(shared, 'flickr8k', 20)
    texts = [f'a photo of a {n}.' for n in names]
    models['short'] = shorten(uneven, texts)[0]
    for n, m in models.items():
        assert to_transformers(m, tmp_path / n, form='slim' if n.endswith('own') else 'clip')[
            'form'
        ] == ('slim' if n.endswith('own') else 'clip')
    torch.save(dict(text=texts, images=images), tmp_path / 'in.pt')
    run = subprocess.run(
        [sys.executable, '-c', ALONE, str(tmp_path), *(str(tmp_path / n) for n in models)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | dict(HF_MODULES_CACHE=str(tmp_path / 'modules'), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'),
    )
    assert run.returncode == 0 and run.stdout.strip() == '[]', run.stderr[-2000:]
    pixels = torch.stack([preprocess(i) for i in images])
    for n, m in models.items():
        with torch.no_grad():
            i = m.encode_image(pixels, normalize=True)
            t = m.encode_text(tokenizer_of(m)(texts), normalize=True)
            want = m.logit_scale.exp() * i @ t.T
        got = torch.load(tmp_path / f'{n}.pt')
        assert torch.equal(got['pixels'], pixels), n
        same(got['logits'], want)
        assert (got['probs'].sum(1) - 1).abs().max() < 1e-5


def test_the_torchvision_backend_stays_within_two_steps(shared):
    "What a user gets who does not ask for backend='pil'; the crop is even here, see below"
    teacher, preprocess, _ = load('shapes-teacher')
    processor = own_processor(teacher)
    images = photographs(shared, 'flickr8k', 30)
    d = processor(images=images, return_tensors='pt')['pixel_values'] - torch.stack(
        [preprocess(i) for i in images]
    )
    steps = (d * torch.tensor(preprocess_cfg(teacher)['std']).view(3, 1, 1) * 255).abs()
    assert steps.max() < 2.01 and steps.mean() < 0.1


@pytest.mark.parametrize(
    'mode,interpolation', [('shortest', 'bicubic'), ('shortest', 'bilinear'), ('squash', 'bicubic')]
)
def test_images_are_prepared_as_open_clip_does(shared, mode, interpolation, tmp_path):
    model = short(tiny())
    model.visual.preprocess_cfg = dict(
        resize_mode=mode, interpolation=interpolation, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    model.visual.image_mean = (0.5, 0.4, 0.3)
    model.visual.image_std = (0.2, 0.3, 0.4)
    to_transformers(model, tmp_path / 'm')
    # to 32: even margins
    images = [
        im.crop((0, 0, 128, h))
        for im, h in zip(photographs(shared, 'flickr8k', 4), (64, 96, 112, 128))
    ]
    again = from_transformers(tmp_path / 'm')
    want = torch.stack([again.preprocess(i) for i in images])
    assert {k: preprocess_cfg(again.model)[k] for k in ('resize_mode', 'interpolation')} == dict(
        resize_mode=mode, interpolation=interpolation
    )
    got = processor_of(tmp_path / 'm')(images=images, return_tensors='pt')['pixel_values']
    assert torch.equal(got, want)
    if mode == 'shortest':  # an odd margin: the crop of transformers lies a pixel to the left
        odd = images[3].crop((0, 0, 128, 80))
        got = processor_of(tmp_path / 'm')(images=odd, return_tensors='pt')['pixel_values'][0]
        assert torch.equal(got[..., 1:], again.preprocess(odd)[..., :-1])
    assert torch.equal(
        want,
        torch.stack(
            [
                finish(model, architecture(model), preprocess_cfg(model)).preprocess(i)
                for i in images
            ]
        ),
    )


def test_captions_of_people_have_the_same_tokens(shared):
    model, _, tokenizer = load('shapes-teacher')
    with tarfile.open(shared / 'data' / 'flickr8k' / 'val-0000.tar') as tar:
        texts = [
            c
            for m in tar
            if m.name.endswith('.json')
            for c in json.loads(tar.extractfile(m).read())['captions']
        ][:1500]
    ids = own_processor(model).tokenizer(
        texts, padding='max_length', truncation=True, return_tensors='pt'
    )['input_ids']
    ours = tokenizer(texts)
    assert (ours.argmax(1) == 15).any()  # some are cut off
    ours[torch.arange(16) > ours.argmax(1)[:, None]] = 49407  # padding is another
    assert torch.equal(ids, ours)


# ---- students of every shape


@pytest.mark.parametrize('seed', range(8))
def test_random_students(seed, tmp_path):
    draw = torch.Generator().manual_seed(seed)

    def pick(*o):
        return o[torch.randint(len(o), (), generator=draw)]

    size = pick(16, 32)
    extra = pick(
        {},
        dict(ls_init_value=0.3),
        dict(norm_kwargs=dict(eps=1e-3)),
        dict(act_kwargs=dict(approximate='tanh')),
    )
    teacher = tiny(
        seed,
        dict(width=128, head_width=size) | extra,
        dict(width=64, heads=64 // size) | extra,
        **({} if 'act_kwargs' in extra else dict(quick_gelu=pick(True, False))),
    )
    what = {f'{t}.width': pick(24, 40, 48, 64) for t in ('image', 'text')}
    for t, heads, ffn in (('image', 128 // size, 512), ('text', 64 // size, 256)):
        for i in range(3):
            h = int(torch.randint(0, heads + 1, (), generator=draw))
            f = pick(0, 1, 17, ffn)
            what |= {f'{t}.layers.{i}.heads': list(range(h)), f'{t}.layers.{i}.ffn': list(range(f))}
    # shaken: so that the biases of branches that are gone differ from zero
    student = shake(short(inherit(teacher, choose(teacher, what))))
    for form in ('auto', 'slim'):
        out = to_transformers(student, tmp_path / form, form=form)
        assert out['form'] == 'slim' or out['stored'] >= sum(
            v.numel() for k, v in student.state_dict().items() if 'gamma' not in k
        )
        compare(student, tmp_path / form, out['form'])
    again = from_transformers(tmp_path / 'slim').model
    assert architecture(again) == architecture(student)
    assert all(
        torch.equal(v, student.state_dict()[k]) for k, v in again.state_dict().items()
    ) and len(again.state_dict()) == len(student.state_dict())


def test_both_forms_occur_among_random_students():
    "8 heads of 16 do not fit into a width of 40, 2 do"
    teacher = tiny(vision=dict(width=128))
    assert 'do not fit' in obstacle(
        describe(inherit(teacher, choose(teacher, {'image.width': 40})))
    )
    fits = inherit(teacher, choose(teacher, {'image.width': 40, 'image.layers.*.heads': 2}))
    assert obstacle(describe(fits)) == '' and fit(describe(fits)['vision']) == (
        2,
        20,
        512,
    )


def test_padding_stretches_the_head_size(tmp_path):
    teacher = tiny(vision=dict(width=128))
    student = short(
        inherit(teacher, choose(teacher, {'image.width': 40, 'image.layers.*.heads': 2}))
    )
    out = to_transformers(student, tmp_path / 'm')
    compare(student, tmp_path / 'm', 'clip')
    grown = out['stored'] - out['parameters']
    # per layer four matrices of 40x40 for 40x32; and the biases of queries, keys, values
    assert grown == 3 * 4 * (40 * 40 - 40 * 32) - 3 * 3 * (32 - 40)


@pytest.mark.parametrize(
    'change',
    [
        dict(vision=dict(pool_type='avg')),
        dict(vision=dict(pool_type='avg', final_ln_after_pool=True)),
        dict(vision=dict(no_ln_pre=True)),
        dict(text=dict(proj_bias=True)),
        dict(vision=dict(image_size=[32, 48])),
        dict(vision=dict(ls_init_value=0.1, pool_type='avg'), text=dict(ls_init_value=0.2)),
    ],
    ids=str,
)
def test_what_only_the_own_form_can_hold(change, tmp_path):
    model = short(tiny(**change))
    if 'image_size' in change.get('vision', {}):
        model.visual.preprocess_cfg = dict(resize_mode='squash')
    with pytest.raises(TinyclipError, match="cannot be a CLIPModel.*form='slim'"):
        to_transformers(model, tmp_path / 'no', form='clip')
    assert not (tmp_path / 'no').exists()
    out = to_transformers(model, tmp_path / 'm')
    assert out['form'] == 'slim' and out['why']
    compare(model, tmp_path / 'm', 'slim')
    again = from_transformers(tmp_path / 'm').model
    assert architecture(again) == architecture(model) and all(
        torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items()
    )


@pytest.mark.parametrize(
    'change',
    [
        dict(),
        dict(quick_gelu=True),
        dict(custom_text=True),
        dict(nonscalar_logit_scale=True),
        dict(text=dict(pool_type='eos', eos_id=49407)),
        dict(vision=dict(layers=1, mlp_ratio=2.3), text=dict(layers=2)),
    ],
    ids=str,
)
def test_plain_models_there_and_back_bit_for_bit(change, tmp_path):
    model = short(tiny(**change)) if change else tiny()
    assert to_transformers(model, tmp_path / 'm')['form'] == 'clip'
    compare(model, tmp_path / 'm', 'clip')
    again, _, tokenizer = from_transformers(tmp_path / 'm')
    want = {
        k.removeprefix('text.'): v.reshape(()) if k == 'logit_scale' else v
        for k, v in model.state_dict().items()
    }
    got = again.state_dict()
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)
    assert torch.equal(tokenizer(CAPTIONS), tokenizer_of(model)(CAPTIONS))
    assert change or torch.equal(
        tokenizer(CAPTIONS), open_clip.get_tokenizer('', context_length=16)(CAPTIONS)
    )


def test_shortened_vocabulary_there_and_back(tmp_path):
    model, tokenizer = shorten(tiny(), CAPTIONS)
    for form in ('clip', 'slim'):
        to_transformers(model, tmp_path / form, form=form)
        compare(model, tmp_path / form, form, tokenizer)
        again, _, tok = from_transformers(tmp_path / form)
        odd = CAPTIONS + ['never seen: Ünïcödé 42 🙂']
        assert again.merges == model.merges and torch.equal(tok(odd), tokenizer(odd))
        ids = processor_of(tmp_path / form).tokenizer(odd, truncation=True)['input_ids']
        assert ids == [t[: t.argmax() + 1].tolist() for t in tokenizer(odd)]
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_half_precision_is_stored_as_asked(tmp_path):
    model = short(tiny())
    for form in ('clip', 'slim'):
        to_transformers(model, tmp_path / form, form=form, dtype=torch.float16)
        assert {v.dtype for v in load_file(tmp_path / form / 'model.safetensors').values()} == {
            torch.float16
        }
        assert theirs(tmp_path / form, form)[0].logit_scale.dtype == torch.float16
        state = from_transformers(tmp_path / form).model.state_dict()
        assert all(torch.equal(v, model.state_dict()[k].half().float()) for k, v in state.items())


def test_the_own_form_trains_saves_and_masks(tmp_path):
    model = short(tiny())
    to_transformers(model, tmp_path / 'm', form='slim')
    own, processor = theirs(tmp_path / 'm', 'slim')
    inputs = processor(text=CAPTIONS[:4], return_tensors='pt', padding=True, truncation=True)
    out = own(pixel_values=torch.randn(4, 3, 32, 32), return_loss=True, **inputs)
    out.loss.backward()
    assert all(p.grad is not None for p in own.parameters())
    assert len(own(pixel_values=torch.randn(4, 3, 32, 32), return_dict=False, **inputs)) == 6
    with pytest.raises(ValueError, match='truncation=True'):
        own.get_text_features(torch.ones(1, 40, dtype=torch.long))
    with pytest.raises(ValueError, match=r'takes \(32, 32\)'):
        own.get_image_features(torch.ones(1, 3, 40, 40))
    own.save_pretrained(str(tmp_path / 'again'))
    cfg = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert cfg['model_type'] == 'tinyclip' and 'vision' in cfg
    for n in FILES[6:]:
        if (tmp_path / 'm' / n).exists():
            (tmp_path / 'again' / n).write_bytes((tmp_path / 'm' / n).read_bytes())
    assert all(
        torch.equal(v, model.state_dict()[k])
        for k, v in from_transformers(tmp_path / 'again').model.state_dict().items()
    )


# ---- all or nothing


def test_saving_twice_replaces_the_model_and_nothing_else(tmp_path):
    first = short(tiny(0, vision=dict(pool_type='avg')))
    second = short(tiny(1))
    to_transformers(first, tmp_path / 'm')
    assert (tmp_path / 'm' / 'modeling_tinyclip.py').exists()
    (tmp_path / 'm' / 'README.md').write_text('mine')
    to_transformers(second, tmp_path / 'm')
    to_transformers(second, tmp_path / 'm')
    assert (tmp_path / 'm' / 'README.md').read_text() == 'mine' and not (
        tmp_path / 'm' / 'modeling_tinyclip.py'
    ).exists()
    compare(second, tmp_path / 'm', 'clip')
    assert [p.name for p in tmp_path.iterdir()] == ['m']


@pytest.mark.parametrize('stop', [0, 2, 4, 5])
def test_an_interrupted_export_is_no_model(stop, tmp_path, monkeypatch):
    old, new = short(tiny(0)), short(tiny(1))
    to_transformers(old, tmp_path / 'm')
    calls, move = [], Path.replace

    def replace(self, to):
        calls.append(to)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return move(self, to)

    with monkeypatch.context() as m:
        m.setattr(Path, 'replace', replace)
        if stop < 5:
            with pytest.raises(KeyboardInterrupt):
                to_transformers(new, tmp_path / 'm')
        else:
            to_transformers(new, tmp_path / 'm')
    assert [p.name for p in tmp_path.iterdir()] == ['m']
    if stop < 5:
        with pytest.raises(TinyclipError, match='config.json is missing|no weights'):
            from_transformers(tmp_path / 'm')
        with pytest.raises(OSError):
            transformers.CLIPModel.from_pretrained(str(tmp_path / 'm'))
    else:
        compare(new, tmp_path / 'm', 'clip')


def test_a_failure_while_writing_leaves_the_old_model(tmp_path, monkeypatch):
    old, new = short(tiny(0)), short(tiny(1))
    to_transformers(old, tmp_path / 'm')

    def fail(*a, **k):
        raise OSError('disk full')

    monkeypatch.setattr(huggingface, 'save_file', fail)
    for folder in ('m', 'fresh'):
        with pytest.raises(OSError):
            to_transformers(new, tmp_path / folder)
    assert [p.name for p in tmp_path.iterdir()] == ['m']
    compare(old, tmp_path / 'm', 'clip')


def test_a_killed_export_leaves_no_model(tmp_path):
    code = (
        "import os, sys, torch\nfrom tinyclip.zoo import to_transformers as huggingface; from "
        "tinyclip.zoo import loading as zoo\nhuggingface.clip_config = lambda *a: "
        "os._exit(9)\nhuggingface.to_transformers(zoo.load('shapes-teacher').model, sys.argv[1])"
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code, str(tmp_path / 'm')], cwd=Path(__file__).parent.parent
        ).returncode
        == 9
    )
    assert not (tmp_path / 'm').exists() and all(
        p.name[0] == '.' and p.name.endswith('.tmp') for p in tmp_path.iterdir()
    )


# ---- sentences


def test_what_cannot_be_exported_says_why(tmp_path):
    refuse('logit_bias', to_transformers, tiny(init_logit_bias=-10.0), tmp_path / 'm')
    refuse('causal', to_transformers, tiny(text=dict(no_causal_mask=True)), tmp_path / 'm')
    refuse("pools by 'last'", to_transformers, tiny(text=dict(pool_type='last')), tmp_path / 'm')
    refuse(
        'ModifiedResNet',
        to_transformers,
        build(
            dict(
                embed_dim=32,
                vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None),
                text_cfg=dict(context_length=8, vocab_size=49408, width=32, heads=2, layers=1),
            )
        ),
        tmp_path / 'm',
    )
    refuse(
        'The model has 100 tokens', to_transformers, tiny(text=dict(vocab_size=100)), tmp_path / 'm'
    )
    refuse('cut it', to_transformers, MaskedCLIP(tiny()), tmp_path / 'm')
    refuse('not an open_clip CLIP', to_transformers, torch.nn.Linear(2, 2), tmp_path / 'm')
    own = tiny()
    own.tokenizer_cfg = dict(hf_tokenizer_name='some/tokenizer')
    refuse('tokenizer of its own', to_transformers, own, tmp_path / 'm')
    longest = short(tiny())
    longest.visual.preprocess_cfg = dict(resize_mode='longest')
    refuse("resize_mode='longest'", to_transformers, longest, tmp_path / 'm')
    refuse(
        'squares only',
        to_transformers,
        short(tiny(vision=dict(image_size=[32, 48]))),
        tmp_path / 'm',
    )
    refuse("Did you mean 'slim'", to_transformers, longest, tmp_path / 'm', form='slimm')
    (tmp_path / 'file').write_text('')
    for path in ('file', 'file/m'):
        refuse('is a file', to_transformers, short(tiny()), tmp_path / path)
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_without_transformers(tmp_path, monkeypatch):
    model = short(tiny())
    to_transformers(model, tmp_path / 'm')
    monkeypatch.setitem(sys.modules, 'transformers', None)
    refuse(r"pip install 'tinyclip\[export\]'", to_transformers, model, tmp_path / 'n')
    # reading needs nothing
    assert architecture(from_transformers(tmp_path / 'm').model) == architecture(model)


@pytest.mark.parametrize('module', [huggingface, from_huggingface], ids=lambda m: m.__name__)
def test_transformers_is_not_imported_with_the_module(module):
    body = ast.parse(Path(module.__file__).read_text()).body
    names = {a.name for o in body if isinstance(o, ast.Import) for a in o.names}
    assert (
        names
        and 'transformers' not in names
        and not [
            o for o in body if isinstance(o, ast.ImportFrom) and o.module.startswith('transformers')
        ]
    )
