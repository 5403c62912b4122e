"""Weights that people bring: their activation, tokenizer and image constants; files that are
incomplete, larger than what was named, or written under other names"""

import json
import warnings

import numpy as np
import open_clip
import pytest
import torch
from open_clip import pretrained as listed_by_open_clip
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file

from tinyclip.core import TinyclipError
from tinyclip.inheritance import build, inherit
from tinyclip.keep import choose, manual
from tinyclip.towers.architecture import architecture
from tinyclip.zoo import load, save
from tinyclip.zoo import loading as zoo
from tinyclip.zoo.folders import CONFIG, WEIGHTS, preprocess_cfg
from tinyclip.zoo.formats import open_model
from tinyclip.zoo.released import released
from tinyclip.zoo.to_transformers import to_transformers

VISION = dict(image_size=16, layers=3, width=32, head_width=16, patch_size=8)
TEXT = dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=2)
CFG = dict(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT)
RESNET = dict(image_size=32, layers=[1, 1, 1, 1], width=8, head_width=16, patch_size=None)


def trained(cfg, seed=0, make=None, **own):
    "A model whose weights are far enough from zero that activation and heads matter"
    torch.manual_seed(seed)
    model = (make or open_clip.CLIP)(**cfg, **own).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim > 1 and 'embedding' not in n:
                p.mul_(4)
            elif 'logit' not in n:
                p.add_(0.1 * torch.randn_like(p))
    return model


def same(a, b):
    size = a.visual.image_size
    size = size if isinstance(size, tuple) else (size, size)
    torch.manual_seed(1)
    images, texts = torch.randn(2, 3, *size), torch.randint(1, 99, (2, a.context_length))
    with torch.no_grad():
        return all(
            torch.equal(getattr(a, f)(x), getattr(b, f)(x))
            for f, x in (('encode_image', images), ('encode_text', texts))
        )


def heard(f, *args, **options):
    "What a call returns, and the sentences that it says"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        result = f(*args, **options)
    return result, ' '.join(str(w.message) for w in said)


def parted(model, *gone):
    return {k: v for k, v in model.state_dict().items() if not k.startswith(gone)}


@pytest.fixture
def register(tmp_path, monkeypatch, architectures):
    "Adds an architecture to open_clip's, with weights by tag that lie here"
    files = {}
    monkeypatch.setattr(
        open_clip.factory, 'download_pretrained', lambda cfg, **_: str(files[cfg['url']])
    )

    def add(name, cfg, **tags):
        (tmp_path / f'{name}.json').write_text(json.dumps(cfg))
        open_clip.add_model_config(tmp_path / f'{name}.json')
        entries = {}
        for tag, (model, own) in tags.items():
            files[f'{name}/{tag}'] = tmp_path / f'{name}-{tag}.pt'
            if model is not None:
                torch.save(model.state_dict(), files[f'{name}/{tag}'])
            entries[tag] = listed_by_open_clip._pcfg(f'{name}/{tag}', **own)
        monkeypatch.setitem(listed_by_open_clip._PRETRAINED, name, entries)

    return add


# --- Activation
def test_every_listed_name_gets_the_activation_of_its_tag(monkeypatch):
    asked = {}

    def stand_in(arch, pretrained, **options):
        asked[arch, pretrained] = options
        raise OSError('no network')

    monkeypatch.setattr(open_clip, 'create_model', stand_in)
    quick = []
    for arch in open_clip.list_models():
        for tag in open_clip.list_pretrained_tags_by_model(arch):
            with pytest.raises(TinyclipError, match='could not be loaded'):
                heard(zoo.load_named, f'{arch}:{tag}')
            says = open_clip.get_pretrained_cfg(arch, tag).get('quick_gelu', False)
            assert asked[arch, tag]['force_quick_gelu'] == says
            if says and not open_clip.get_model_config(arch).get('quick_gelu'):
                quick.append(f'{arch}:{tag}')
    assert {'ViT-B-32:openai', 'RN50:yfcc15m', 'ViT-H-14:dfn5b'} <= set(quick)


TOWERS = {
    'ViT': (CFG, open_clip.CLIP),
    'ResNet': ({**CFG, 'vision_cfg': RESNET}, open_clip.CLIP),
    'apart': ({**CFG, 'custom_text': True}, open_clip.CustomTextCLIP),
}


@pytest.mark.parametrize('tower', TOWERS)
def test_weights_by_name_keep_their_activation_wherever_they_go(register, tmp_path, tower):
    cfg, make = TOWERS[tower]
    bare = {k: v for k, v in cfg.items() if k != 'custom_text'}
    models = [trained(bare, make=make, quick_gelu=q) for q in (True, False)]
    register('Toy', cfg, quick=(models[0], dict(quick_gelu=True)), plain=(models[1], {}))
    for tag, model in zip(('quick', 'plain'), models, strict=True):
        (loaded, said) = heard(load, f'Toy:{tag}')
        assert ('was trained with QuickGELU' in said) == (tag == 'quick') and 'mismatch' not in said
        assert same(loaded.model, model) and same(heard(open_model, f'Toy:{tag}')[0].model, model)
        whole = inherit(loaded.model, manual(loaded.model))
        assert same(whole, model)
        again = load(save(whole, tmp_path / tag)).model
        assert same(again, model)
        assert architecture(again).get('quick_gelu', False) == (tag == 'quick')


def test_where_a_tag_is_silent_the_architecture_speaks(register):
    model = trained(CFG, quick_gelu=True)
    register('Toy', {**CFG, 'quick_gelu': True}, silent=(model, {}))
    loaded, said = heard(load, 'Toy:silent')
    assert same(loaded.model, model) and not said


def test_bare_files_say_which_activation_is_assumed(register, tmp_path):
    quick, plain = (trained(CFG, quick_gelu=q) for q in (True, False))
    path = tmp_path / 'mine.pt'
    register('Mixed', CFG, one=(None, dict(quick_gelu=True)), two=(None, {}))
    register('Mixed-quickgelu', {**CFG, 'quick_gelu': True}, one=(None, dict(quick_gelu=True)))
    register('Sure', CFG, two=(None, {}))
    register('Unlisted', CFG)
    torch.save(plain.state_dict(), path)
    for name, want in dict(Mixed='GELU (not so in one', Sure='', Unlisted='GELU').items():
        loaded, said = heard(load, f'{name}:{path}')
        assert same(loaded.model, plain)
        assert want in said and bool(want) == bool(said)
    assert 'Mixed-quickgelu means QuickGELU' in heard(load, f'Mixed:{path}')[1]
    torch.save(quick.state_dict(), path)
    for load_it in (
        lambda: load(f'Mixed-quickgelu:{path}'),
        lambda: load(path, config=dict(model_cfg={**CFG, 'quick_gelu': True})),
    ):
        loaded, said = heard(load_it)
        assert same(loaded.model, quick) and not said


@pytest.mark.parametrize('half', [False, True])
def test_state_dict_of_openais_program(tmp_path, half):
    "Three numbers beside the weights, and QuickGELU"
    model = trained(CFG, quick_gelu=True)
    model = model.half() if half else model
    numbers = dict(input_resolution=16, context_length=8, vocab_size=49408)
    state = model.state_dict() | {k: torch.tensor(v) for k, v in numbers.items()}
    torch.save(wrapped(state, 'module.') if half else state, tmp_path / 'x.pt')
    loaded, said = heard(load, tmp_path / 'x.pt', config=CFG)
    assert same(loaded.model, model.float()) and "QuickGELU, since the file has the form" in said
    loaded, said = heard(load, tmp_path / 'x.pt', config={**CFG, 'quick_gelu': False})
    assert not architecture(loaded.model).get('quick_gelu') and 'QuickGELU' not in said


# --- Tokenizer
@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "A Hugging Face tokenizer of its own, in a folder"
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp('words')
    vocab = ['<pad>', '<eos>', '<unk>', 'a', 'A', 'red', 'green', 'blue', 'square', 'circle']
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(
        single='$A <eos>', special_tokens=[('<eos>', 1)]
    )
    marks = dict(pad_token='<pad>', eos_token='<eos>', unk_token='<unk>')
    PreTrainedTokenizerFast(tokenizer_object=t, **marks).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    'own',
    [
        {},
        dict(tokenizer_kwargs=dict(clean='canonicalize')),
        dict(tokenizer_kwargs=dict(clean='lower')),
    ],
    ids=str,
)
@pytest.mark.parametrize('kind', ['whole', 'slim', 'timm'])
def test_a_bare_file_has_the_tokenizer_of_its_configuration(words, tmp_path, kind, own):
    text = TEXT | dict(vocab_size=200, pool_type='eos', eos_id=1)
    cfg = {**CFG, 'text_cfg': text}
    if kind == 'timm':
        cfg['vision_cfg'] = dict(timm_model_name='test_vit', image_size=160, timm_proj='linear')
    model = trained(cfg)
    if kind == 'slim':
        model = inherit(model, choose(model, {'image.layers.0.heads': 1, 'text.layers.1.ffn': 9}))
    torch.save(model.state_dict(), tmp_path / 'x.pt')
    cfg = {**cfg, 'text_cfg': text | dict(hf_tokenizer_name=words, **own)}
    loaded, _ = heard(load, tmp_path / 'x.pt', config=cfg)
    right = HFTokenizer(words, context_length=8, **own.get('tokenizer_kwargs', {}))
    texts = ['A red square.', 'a green circle', 'blue']
    assert torch.equal(loaded.tokenizer(texts), right(texts))
    assert len({tuple(r) for r in loaded.tokenizer(texts).tolist()}) == 3
    again = load(save(loaded.model, tmp_path / 'again', tokenizer=loaded.tokenizer))
    assert torch.equal(again.tokenizer(texts), right(texts))


def test_a_file_of_a_listed_architecture_has_its_tokenizer(words, register, tmp_path):
    text = TEXT | dict(vocab_size=200, hf_tokenizer_name=words)
    model = trained({**CFG, 'text_cfg': TEXT | dict(vocab_size=200)})
    register('Own', {**CFG, 'text_cfg': text}, one=(model, {}))
    torch.save(model.state_dict(), tmp_path / 'x.pt')
    one, other = load('Own:one').tokenizer, load(f'Own:{tmp_path / "x.pt"}').tokenizer
    assert torch.equal(one(['a red b']), other(['a red b']))


# --- Image constants
CONSTANTS = ('mean', 'std', 'interpolation', 'resize_mode')


def test_every_architecture_has_the_constants_of_its_weights_where_they_agree():
    doubtful = []
    for arch in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(arch)
        held = [open_clip.get_pretrained_cfg(arch, t) for t in tags]
        pre, said = zoo.image_constants(arch)
        agree = [k for k in CONSTANTS if held and len({str(c[k]) for c in held}) == 1]
        assert all(pre[k] == held[0][k] for k in agree)
        own = zoo.listed(arch)
        assert (said == '') == (len(agree) == 4 or not held and bool(own))
        if held and said:
            doubtful.append(arch)
    assert 'ViT-L-14' in doubtful and 'MobileCLIP2-S0' not in doubtful


def test_image_constants_of_a_bare_file(register, tmp_path):
    model, path = trained(CFG), tmp_path / 'x.pt'
    torch.save(model.state_dict(), path)
    half, grey = dict(mean=(0.5,) * 3, std=(0.5,) * 3), dict(interpolation='bilinear')
    clip = open_clip.transform.PreprocessCfg()
    register('Agree', CFG, a=(None, half | grey), b=(None, half | grey))
    register('Partly', CFG, a=(None, half | grey), first=(None, half))
    register('None', CFG)
    got, said = heard(load, f'Agree:{path}')
    assert {k: preprocess_cfg(got.model)[k] for k in (*half, *grey)} == half | grey and not said
    got, said = heard(load, f'Partly:{path}')
    assert preprocess_cfg(got.model)['interpolation'] == clip.interpolation
    assert preprocess_cfg(got.model)['mean'] == (0.5,) * 3
    assert 'interpolation bicubic (not so in a)' in said and 'mean' not in said
    for load_it in (lambda: load(f'None:{path}'), lambda: load(path, config=CFG)):
        got, said = heard(load_it)
        assert preprocess_cfg(got.model)['mean'] == clip.mean
        assert "CLIP's own image constants" in said
    whole = dict(model_cfg=CFG, preprocess_cfg=half | dict(resize_mode='squash'))
    got, said = heard(load, path, config=whole)
    assert preprocess_cfg(got.model)['resize_mode'] == 'squash' and 'image constants' not in said
    assert got.preprocess.transforms[-1].mean == (0.5,) * 3


# --- Incomplete files
IMAGE, BLOCKS = 'visual.transformer.resblocks', 'transformer.resblocks'
GONE = {
    'a whole layer': ((f'{IMAGE}.1.',), f'{IMAGE}.1.attn, {IMAGE}.1.mlp are missing'),
    'the last layers': ((f'{IMAGE}.1.', f'{IMAGE}.2.'), 'fewer layers'),
    'an MLP': ((f'{BLOCKS}.0.mlp.', f'{BLOCKS}.0.ln_2.'), f'{BLOCKS}.0.mlp is missing'),
    'attentions': (
        tuple(f'{IMAGE}.{i}.{n}.' for i in (0, 2) for n in ('attn', 'ln_1')),
        f'{IMAGE}.0.attn, {IMAGE}.2.attn are missing',
    ),
}


@pytest.mark.parametrize('what', GONE)
@pytest.mark.parametrize('apart', [False, True])
def test_missing_parts_are_no_cut(tmp_path, what, apart):
    gone, said = GONE[what]
    make = open_clip.CustomTextCLIP if apart else open_clip.CLIP
    model = trained(CFG, make=make)
    if apart:
        gone = tuple(n if n.startswith('visual') else f'text.{n}' for n in gone)
        said = said.replace(f'{BLOCKS}.0.mlp', f'text.{BLOCKS}.0.mlp') if 'MLP' in what else said
    torch.save(parted(model, *gone), tmp_path / 'x.pt')
    with pytest.raises(TinyclipError, match='incomplete') as e:
        load(tmp_path / 'x.pt', config={**CFG, 'custom_text': apart})
    assert said in str(e.value)


def slim():
    model = trained(CFG)
    return inherit(
        model,
        choose(
            model,
            {'image.layers.0.heads': 1, 'image.layers.1.heads': [], 'text.layers.1.ffn': 10},
        ),
    )


def test_what_was_cut_shows_it(tmp_path, monkeypatch):
    student, path = slim(), tmp_path / 'x.pt'
    torch.save(student.state_dict(), path)
    loaded, said = heard(load, path, config=CFG)
    assert same(loaded.model, student) and 'cut away' not in said

    # as the released code writes it: nothing at all is left of the branch
    with torch.no_grad():
        student.visual.transformer.resblocks[1].attn.out_proj.bias.zero_()
    torch.save(parted(student, f'{IMAGE}.1.attn.'), path)
    loaded, said = heard(load, path, config=CFG)
    assert same(loaded.model, student) and f'nothing of {IMAGE}.1.attn; they are taken as' in said

    # a sign in one tower says nothing of the other
    torch.save(parted(student, f'{BLOCKS}.0.', f'{IMAGE}.1.attn.'), path)
    whole_text = inherit(trained(CFG), choose(trained(CFG), {'image.layers.0.heads': 1}))
    torch.save(parted(whole_text, f'{BLOCKS}.0.'), path)
    with pytest.raises(TinyclipError, match=f'{BLOCKS}.0.mlp are missing'):
        heard(load, path, config=CFG)

    # a configuration that says it, and a name that is known
    torch.save(parted(trained(CFG), f'{IMAGE}.1.attn.', f'{IMAGE}.1.ln_1.'), path)
    own = dict(head_dim=16, heads=[2, 0, 2], ffn=[128] * 3)
    says = {**CFG, 'tinyclip_cfg': dict(image=own)}
    assert architecture(heard(load, path, config=says)[0].model)['tinyclip_cfg']['image'] == own
    monkeypatch.setattr(zoo, 'released', lambda: {'x': dict(config=None)})
    assert architecture(heard(load, path, config=CFG)[0].model)['tinyclip_cfg']['image'] == own


# --- Larger than what was named
LARGER = {
    'width': (dict(vision_cfg=VISION | dict(width=48)), 'image.width is 48 there and 32'),
    'other heads': (
        dict(vision_cfg=VISION | dict(width=160, head_width=80)),
        'image.width is 160 there and 32',
    ),
    'layers': (dict(text_cfg=TEXT | dict(layers=3)), 'text.layers is 3 there and 2'),
    'neurons': (dict(text_cfg=TEXT | dict(mlp_ratio=6.0)), 'ffn is 96 there and 64'),
    'embedding': (dict(embed_dim=12), 'embed is 12 there and 8'),
    'tokens': (dict(text_cfg=TEXT | dict(vocab_size=49472)), 'vocab_size is 49472 there'),
}


@pytest.mark.parametrize('what', LARGER)
@pytest.mark.parametrize('apart', [False, True])
def test_a_file_larger_than_its_architecture_was_not_cut_from_it(tmp_path, what, apart):
    change, said = LARGER[what]
    make = open_clip.CustomTextCLIP if apart else open_clip.CLIP
    torch.save(make(**{**CFG, **change}).state_dict(), tmp_path / 'x.pt')
    with pytest.raises(TinyclipError, match='cannot have been cut from') as e:
        load(tmp_path / 'x.pt', config={**CFG, 'custom_text': apart})
    assert said in str(e.value)
    model, _ = heard(load, tmp_path / 'x.pt', config={**CFG, **change, 'custom_text': apart})
    assert model.model.visual.image_size == (16, 16)


def test_a_larger_picture_or_context_is_no_other_architecture(tmp_path):
    own = dict(vision_cfg=VISION | dict(image_size=32), text_cfg=TEXT | dict(context_length=12))
    model = trained({**CFG, **own})
    torch.save(model.state_dict(), tmp_path / 'x.pt')
    assert same(heard(load, tmp_path / 'x.pt', config=CFG)[0].model, model)


# --- Towers of timm
TIMM = [
    (8, dict(timm_model_name='test_vit_relpos', timm_pool='', timm_proj='linear', image_size=160)),
    (
        64,
        dict(timm_model_name='test_vit_relpos', timm_pool='avg', timm_proj='none', image_size=160),
    ),
    (8, dict(timm_model_name='test_resnet', timm_proj='mlp', image_size=160)),
    (
        8,
        dict(timm_model_name='xcit_nano_12_p16_224', timm_pool='token', timm_proj=None),
    ),
]


@pytest.mark.parametrize('dim,vision', TIMM, ids=lambda v: str(v)[20:36])
def test_files_of_timm_towers(tmp_path, dim, vision):
    text = TEXT | dict(no_causal_mask=True, pool_type='last', proj_bias=True)
    cfg = dict(embed_dim=dim, vision_cfg=vision, text_cfg=text)
    model = open_clip.CustomTextCLIP(**cfg, init_logit_bias=-3.0).eval()
    cfg |= dict(init_logit_bias=-10.0, custom_text=True)
    torch.save(model.state_dict(), tmp_path / 'x.pt')
    loaded, _ = heard(load, tmp_path / 'x.pt', config=cfg)
    assert same(loaded.model, model) and loaded.model.logit_bias.item() == -3
    with pytest.raises(TinyclipError, match='can be used as it is, but neither cut nor saved'):
        save(loaded.model, tmp_path / 'folder')
    gone = next(n for n in model.state_dict() if n.startswith('visual.trunk'))
    torch.save(parted(model, gone), tmp_path / 'x.pt')
    with pytest.raises(TinyclipError, match=f'do not fit .*{gone} is missing'):
        load(tmp_path / 'x.pt', config=cfg)


# --- Names
@pytest.mark.parametrize('form', ['file', 'slim file', 'folder'])
@pytest.mark.parametrize('apart', [False, True])
def test_text_towers_flat_and_apart(tmp_path, form, apart):
    "Weights of a CLIP for a CustomTextCLIP, as open_clip renames them, and the other way round"
    make, other = open_clip.CLIP, open_clip.CustomTextCLIP
    make, other = (other, make) if apart else (make, other)
    model = trained(CFG, make=make)
    if form == 'slim file':
        model = inherit(model, choose(model, {'text.layers.0.heads': 1}))
    says = {**CFG, 'custom_text': not apart}
    if form == 'folder':
        folder = save(model, tmp_path / 'x')
        held = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(held | dict(model_cfg=says)))
        got = load(folder).model
    else:
        torch.save(model.state_dict(), tmp_path / 'x.pt')
        got, _ = heard(load, tmp_path / 'x.pt', config=says)
        got = got.model
    assert type(got) is other and same(got, model)
    if form == 'file' and not apart:
        reference = open_clip.CustomTextCLIP(**CFG).eval()
        open_clip.load_checkpoint(reference, str(tmp_path / 'x.pt'))
        assert same(got, reference)


def test_names_of_both_kinds_are_refused(tmp_path):
    state = trained(CFG).state_dict()
    state['text.ln_final.bias'] = state['ln_final.bias'].clone()
    torch.save(state, tmp_path / 'x.pt')
    for apart in (False, True):
        with pytest.raises(TinyclipError, match='do not fit'):
            load(tmp_path / 'x.pt', config={**CFG, 'custom_text': apart})


def test_a_logit_scale_of_one_number_fits_either_form(tmp_path):
    for mine, yours in ((True, False), (False, True)):
        model = trained(CFG, nonscalar_logit_scale=mine)
        torch.save(model.state_dict(), tmp_path / 'x.pt')
        config = {**CFG, 'nonscalar_logit_scale': yours}
        got = heard(load, tmp_path / 'x.pt', config=config)[0].model
        assert got.logit_scale.ndim == yours and got.logit_scale == model.logit_scale


PREFIXES = ['module.', '_orig_mod.', 'model.', 'clip.', 'model._orig_mod.module.']


def wrapped(state, prefix):
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize(
    'kind,prefix',
    [(k, p) for k in ('torch', 'safetensors', 'folder') for p in PREFIXES]
    + [('transformers', p) for p in PREFIXES[::4]],
)
def test_prefixes_are_taken_off_every_kind_of_file(tmp_path, kind, prefix):
    model = trained(CFG, quick_gelu=True)
    path = tmp_path / 'x.safetensors'
    if kind == 'torch':
        path = tmp_path / 'x.pt'
        torch.save(dict(state_dict=wrapped(model.state_dict(), prefix)), path)
    elif kind == 'safetensors':
        save_file(wrapped(model.state_dict(), prefix), path)
    elif kind == 'folder':
        path = save(model, tmp_path / 'folder')
        save_file(wrapped(model.state_dict(), prefix), path / WEIGHTS)
    else:
        from safetensors.torch import load_file

        path = tmp_path / 'hub'
        to_transformers(model, path)
        state = load_file(path / 'model.safetensors')
        (path / 'model.safetensors').unlink()
        torch.save(wrapped(state, prefix), path / 'pytorch_model.bin')
    bare = kind in ('torch', 'safetensors')
    options = dict(config={**CFG, 'quick_gelu': True}) if bare else {}
    loaded, said = heard(load, path, **options)
    assert f'{prefix} was taken off the names' in said
    assert same(loaded.model, model)


@pytest.mark.parametrize(
    'held,said',
    [
        (lambda s: dict(ema=s, epoch=3), 'taken from ema.'),
        (lambda s: dict(model_state_dict=s), 'taken from model_state_dict.'),
        (lambda s: dict(state_dict=dict(model=s)), ''),
        (lambda s: dict(model=dict(s), ema=dict(s)), 'taken from model; ema is there, too'),
        (lambda s: dict(model=dict(name='ViT'), state_dict=s), ''),
        (
            lambda s: dict(model_ema=wrapped(s, 'module.') | dict(n_averaged=torch.tensor(7))),
            'taken from model_ema.',
        ),
    ],
    ids=range(6),
)
def test_containers_of_weights(tmp_path, held, said):
    model = trained(CFG)
    torch.save(held(model.state_dict()), tmp_path / 'x.pt')
    whole = dict(model_cfg={**CFG, 'quick_gelu': False})
    loaded, heard_ = heard(load, tmp_path / 'x.pt', config=whole)
    assert same(loaded.model, model) and said in heard_ and bool(said) == bool(heard_)


@pytest.mark.parametrize(
    'beside,what',
    [
        (np.float64(0.5), 'a NumPy number'),
        (np.arange(3), 'a NumPy number'),
        (__import__('argparse').Namespace(lr=0.1), 'the options of the run'),
        (__import__('pathlib').PurePosixPath('x'), 'a path'),
    ],
    ids=str,
)
def test_what_lies_beside_the_weights_is_named(tmp_path, beside, what):
    torch.save(dict(state_dict=trained(CFG).state_dict(), best=beside), tmp_path / 'x.pt')
    with pytest.raises(TinyclipError, match=f'It probably holds {what}.*save only') as e:
        load(tmp_path / 'x.pt', config=CFG)
    assert 'nothing was run' in str(e.value)


# --- CoCa
def test_of_coca_the_contrastive_part_is_inherited(tmp_path):
    cfg = open_clip.get_model_config('coca_ViT-B-32')
    cfg['embed_dim'] = 16
    cfg['vision_cfg'] |= dict(VISION, attn_pooler_heads=2)
    cfg['text_cfg'] |= TEXT
    cfg['multimodal_cfg'] |= TEXT | dict(attn_pooler_heads=2)
    model = build(cfg).eval()
    torch.save(model.state_dict(), tmp_path / 'x.pt')
    loaded, _ = heard(load, tmp_path / 'x.pt', config=cfg)
    assert type(loaded.model) is type(model) and same(loaded.model, model)
    student = inherit(model, manual(model))
    assert type(student) is open_clip.CustomTextCLIP
    images, texts = torch.randn(2, 3, 16, 16), torch.randint(1, 60, (2, student.context_length))
    with torch.no_grad():
        assert torch.equal(student.encode_image(images), model.encode_image(images, False))
        assert torch.equal(student.encode_text(texts), model.encode_text(texts, False))
    with pytest.warns(UserWarning, match='text_decoder. is not'):
        save(model, tmp_path / 'y')
    assert same(load(tmp_path / 'y').model, student)


def test_released_files_need_no_sentence(tmp_path, monkeypatch):
    name = 'TinyCLIP-auto-ViT-22M-32-Text-10M-LAION400M'
    state = wrapped(slim().state_dict(), 'module.')
    torch.save(dict(state_dict=state), tmp_path / f'{name}.pt')
    fact = released()[name]
    monkeypatch.setattr(zoo, 'released', lambda: {name: fact | dict(config=CFG)})
    loaded, said = heard(load, tmp_path / f'{name}.pt')
    assert same(loaded.model, slim()) and not said
