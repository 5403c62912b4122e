"""Shorter token tables for tokenizers of Hugging Face: the same tokens and features for covered
texts, some tokens for every other, and files that others read"""

import copy
import functools
import json
import subprocess
import sys
import tempfile

import open_clip
import pytest
import torch

transformers = pytest.importorskip(
    'transformers', reason="transformers is optional: pip install 'tinyclip[export]'"
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

from tinyclip.cli.main import main
from tinyclip.core import TinyclipError
from tinyclip.data.subwords import (
    KINDS,
    Bpe,
    Unigram,
    WordPiece,
    numbers_of,
    read_state,
    shortened,
)
from tinyclip.data.transforms import vocabulary
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.towers import TEXT as TEXT_FAMILY
from tinyclip.zoo import load, save
from tinyclip.zoo.vocabulary import coverage, shorten, table_sizes, tokenizer_of

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
few = settings(quick, max_examples=12)
CORPUS = [
    'A dog runs across the grass.',
    'two children playing on a beach at sunset',
    "It's a man's bike!",
    'Ein Café in Zürich',
    '3 cats & 12 dogs, stars and starfish',
    'a photo of a cat',
    '日本語の本',
    'runs running runner <mark> sunny sun',
]
words = st.sampled_from(sorted({w for t in CORPUS for w in t.split()}))
pieces = st.text('aehlrstun ué', min_size=1, max_size=12)
phrases = st.lists(st.one_of(words, pieces), min_size=1, max_size=12).map(' '.join)
texts = st.one_of(
    phrases,
    st.text(st.characters(exclude_categories=['Cs']), max_size=40),
    st.text('aehlrst 😀é!日<>_', max_size=80),
)


# --- tokenizers of all kinds, trained on the few texts above

NAMES = dict(pad_token='<pad>', eos_token='</s>', bos_token='<s>', unk_token='<unk>')
BYTES = [f'<0x{b:02X}>' for b in range(256)]
SPECIAL = ['<s>', '<pad>', '</s>', '<unk>']


def ends(own, form='template'):
    "What is put around a text"
    first, last = ((n, own.token_to_id(n)) for n in ('<s>', '</s>'))
    if form == 'roberta':
        return processors.RobertaProcessing(last, first)
    if form == 'bert':
        return processors.BertProcessing(last, first)
    if form == 'last':
        return processors.TemplateProcessing(single='$A </s>', special_tokens=[last])
    return processors.TemplateProcessing(
        single='<s> $A </s>', pair='<s> $A </s> $B </s>', special_tokens=[first, last]
    )


def trained(model, trainer, form='template', mark=True, **steps):
    own = Tokenizer(model)
    for name, step in steps.items():
        setattr(own, name, step)
    own.train_from_iterator(CORPUS * 3, trainer)
    own.post_processor = ends(own, form)
    if mark:
        own.add_tokens([AddedToken('<mark>', normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **NAMES)


def bpe(size=400, special=SPECIAL, form='template', mark=True, steps=None, **model):
    marks = {
        k: v for k, v in model.items() if k in ('continuing_subword_prefix', 'end_of_word_suffix')
    }
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False, **marks
    )
    steps = steps or dict(pre_tokenizer=pre.Whitespace())
    return trained(models.BPE(unk_token='<unk>', **model), trainer, form, mark, **steps)


def gemma():
    "As in a SigLIP 2: spaces are letters, unknown letters bytes, all ways to a token merges"
    steps = dict(normalizer=normalizers.Replace(' ', '▁'), pre_tokenizer=pre.Split('▁', 'isolated'))
    special = ['<pad>', '</s>', '<s>', '<unk>', '<mask>']
    own = json.loads(
        bpe(300, special, steps=steps, mark=False, byte_fallback=True)._tokenizer.to_str()
    )
    vocab = [*special, *BYTES, *(t for t in own['model']['vocab'] if t not in special)]
    vocab += [f'▁{t}' for t in vocab if t.isalpha() and len(t) > 1]
    ids = {t: i for i, t in enumerate(vocab)}
    ways = [(t[:i], t[i:]) for t in vocab for i in range(1, len(t))]
    merges = [w for w in ways if all(p in ids for p in w) and ''.join(w) not in BYTES]
    fast = transformers.GemmaTokenizer(
        vocab=ids, merges=merges, eos_token='</s>', bos_token='<s>', padding_side='right'
    )
    fast._tokenizer.post_processor = ends(fast._tokenizer, 'last')
    return fast


def byte_level():
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre.ByteLevel.alphabet(),
        ),
        'roberta',
        pre_tokenizer=pre.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )


def unigram(byte_fallback=False, form='template'):
    "Unigram; with `byte_fallback` its bytes have tokens"
    fast = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=160, special_tokens=SPECIAL, unk_token='<unk>', show_progress=False
        ),
        form,
        pre_tokenizer=pre.Metaspace(),
        decoder=decoders.Metaspace(),
    )
    if not byte_fallback:
        return fast
    state = json.loads(fast._tokenizer.to_str())
    state['model']['byte_fallback'] = True
    state['model']['vocab'] += [[b, -20.0] for b in BYTES]
    state['added_tokens'] = [
        t | dict(id=len(state['model']['vocab'])) if t['content'] == '<mark>' else t
        for t in state['added_tokens']
    ]
    own = Tokenizer.from_str(json.dumps(state))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **NAMES)


def wordpiece(form='bert'):
    return trained(
        models.WordPiece(unk_token='<unk>'),
        trainers.WordPieceTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False),
        form,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


MADE = {
    'gemma': gemma,
    'bytes': byte_level,
    'prefix': lambda: bpe(continuing_subword_prefix='##'),
    'suffix': lambda: bpe(end_of_word_suffix='</w>', form='roberta'),
    'ignore_merges': lambda: bpe(ignore_merges=True),
    'unigram': unigram,
    'unigram, bytes': lambda: unigram(True, 'last'),
    'wordpiece': wordpiece,
}
kinds = pytest.mark.parametrize('kind', [*MADE])


@functools.cache
def made(kind, context=16, clean='whitespace'):
    "open_clip's tokenizer of a kind"
    with tempfile.TemporaryDirectory() as d:
        MADE[kind]().save_pretrained(d)
        return HFTokenizer(d, context_length=context, clean=clean)


def shorts(kind, corpus):
    return shortened(made(kind), corpus)


def tokens(tokenizer, text):
    return tokenizer.tokenizer.convert_ids_to_tokens(numbers_of(tokenizer, [text])[0])


def unknown(tokenizer, text):
    return tokens(tokenizer, text).count('<unk>')


# --- the tokenizers


@kinds
@few
@given(corpus=st.lists(texts, min_size=1, max_size=4))
def test_what_is_covered_keeps_its_tokens(kind, corpus):
    full = made(kind)
    short, rows = shorts(kind, corpus)
    for was, now in zip(numbers_of(full, corpus), numbers_of(short, corpus)):
        assert [rows[i] for i in now] == was
    assert len(rows) == len(set(rows)) == len(short.tokenizer) and rows == sorted(rows)
    held = short.tokenizer.get_vocab()
    old = full.tokenizer.get_vocab()
    assert {t: rows[i] for t, i in held.items()} == {t: old[t] for t in held}
    padded, cut = short(corpus), full(corpus)
    assert torch.equal(torch.tensor(rows)[padded], cut)


@pytest.fixture(scope='module', params=[*MADE])
def one(request):
    "(tokenizer, shortened to three texts)"
    return made(request.param), shorts(request.param, CORPUS[:3])[0]


@quick
@given(text=texts)
@example(text='')
@example(text='😀 日本語 <s> <mark> <pad>')
@example(text='<0x41>\x00\u200b')
def test_every_text_has_tokens(one, text):
    full, short = one
    assert unknown(short, text) == unknown(full, text)
    assert short([text]).shape == (1, 16) and int(short([text]).max()) < len(short.tokenizer)
    if not unknown(full, text):
        letters = KINDS[read_state(full)['model']['type']](read_state(full)['model']).spelt
        spelt = [[c for t in tokens(each, text) for c in letters(t)] for each in (short, full)]
        assert spelt[0] == spelt[1]


def test_they_become_shorter(one):
    full, short = one
    assert len(short.tokenizer) < len(full.tokenizer)
    assert short.tokenizer.all_special_tokens == full.tokenizer.all_special_tokens
    more = short.tokenizer.pad_token, short.tokenizer.padding_side, short.clean_fn
    assert more == (full.tokenizer.pad_token, full.tokenizer.padding_side, full.clean_fn)


@kinds
def test_the_file_is_read_by_others(kind, tmp_path):
    short, _ = shorts(kind, CORPUS)
    short.save_pretrained(str(tmp_path))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    bare = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    bare.no_padding()
    bare.no_truncation()
    seen = [*CORPUS, 'what nobody wrote: zebra 😀', '']
    want = numbers_of(short, seen)
    assert auto(seen).input_ids == want
    assert [e.ids for e in bare.encode_batch(seen)] == want
    assert type(auto) is type(short.tokenizer)
    config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    assert 'added_tokens_decoder' not in config
    again = HFTokenizer(str(tmp_path), context_length=16)
    assert vocabulary(again) == vocabulary(short) != vocabulary(made(kind))


def test_its_class_stays_where_that_reads_the_file():
    assert type(shorts('gemma', CORPUS)[0].tokenizer) is transformers.GemmaTokenizer


@kinds
def test_shortening_composes(kind):
    first, rows = shorts(kind, CORPUS[:5])
    again, fewer = shortened(first, CORPUS[:2])
    once, same = shorts(kind, CORPUS[:2])
    assert [rows[i] for i in fewer] == same
    assert again.tokenizer.get_vocab() == once.tokenizer.get_vocab()
    nothing, all_rows = shortened(once, CORPUS[:2])
    assert all_rows == list(range(len(once.tokenizer)))


@kinds
def test_least_counts_uses(kind):
    full = made(kind)
    corpus = ['children children children sunset'] * 2
    every, rows = shortened(full, corpus)
    often, fewer = shortened(full, corpus, least=3)
    most, fewest = shortened(full, corpus, least=10**6)
    assert set(fewest) <= set(fewer) <= set(rows)
    assert tokens(often, 'children children') == tokens(full, 'children children')
    assert len(fewest) < len(rows)


@few
@given(corpus=st.lists(phrases, min_size=1, max_size=3))
def test_the_merges_are_those_that_apply(corpus):
    "The tokens that stay are those that a merge made, overheard in a BPE of one's own"
    full = made('suffix')
    model = Bpe(read_state(full)['model'])
    seen = set()
    for text in corpus:
        for word, _ in full.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
            symbols = [*word[:-1], word[-1] + '</w>']
            if any(s not in model.ids for s in symbols):
                return
            while pairs := [p for p in zip(symbols, symbols[1:]) if p in model.ranks]:
                pair = min(pairs, key=model.ranks.get)
                i = [*zip(symbols, symbols[1:])].index(pair)
                symbols[i : i + 2] = [''.join(pair)]
                seen.add(''.join(pair))
    _, rows = shortened(full, corpus)
    names = {i: t for t, i in full.tokenizer.get_vocab().items()}
    always = model.alphabet() | {'<s>', '</s>', '<pad>', '<unk>', '<mark>'}
    assert {names[i] for i in rows} - always == seen - always


def test_unknown_letters_of_unigram(tmp_path):
    "Unknown letters cost ten more than the least likely piece, so that piece stays"
    vocab = [['<unk>', 0.0], ['<pad>', 0.0], ['x', -4.0], ['y', -10.0], ['b', -3.0], ['a', -5.0]]
    vocab += [['xyb', -1.0], ['b☕', -20.0], ['aa', -26.0], ['xx', -6.0]]
    own = Tokenizer(models.Unigram([tuple(p) for p in vocab], unk_id=0))
    names = dict(unk_token='<unk>', pad_token='<pad>')
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names)
    fast.save_pretrained(tmp_path)
    full = HFTokenizer(str(tmp_path), context_length=8)
    # 34 for these three; 37 for `xyb` and the unknown `☕`, but 31 without `aa`
    assert tokens(full, 'xyb☕') == ['x', 'y', 'b☕']
    short, _ = shortened(full, ['xyb☕', 'xyb'])
    assert tokens(short, 'xyb☕') == ['x', 'y', 'b☕'] and tokens(short, 'xx') == ['x', 'x']
    assert Unigram(dict(vocab=vocab, unk_id=0)).alphabet() >= {'<unk>', 'b☕', 'aa'}


def test_bytes_stay_though_letters_spell_them():
    letters = [*'<>0123456789ABCDEFx', 'ab']
    vocab = {t: i for i, t in enumerate([*letters, *BYTES])}
    model = dict(vocab=vocab, merges=[], byte_fallback=True)
    assert Bpe(model).alphabet() == {*letters, *BYTES}
    assert Bpe(model | dict(byte_fallback=False)).alphabet() == {*letters}


def test_pieces_that_nothing_spells():
    model = WordPiece(
        dict(vocab={'a': 0, '##b': 1, '##bc': 2, 'ab': 3}, continuing_subword_prefix='##')
    )
    assert model.alphabet() == {'a', '##b', '##bc'}


def test_a_corpus_is_read_once():
    short, rows = shorts('gemma', iter(CORPUS))
    assert rows == shorts('gemma', CORPUS)[1]


# --- the models

VISION = dict(image_size=32, layers=1, width=16, head_width=8, patch_size=16)
TEXT = dict(context_length=16, width=32, heads=2, layers=2)
SIGLIP = TEXT | dict(
    no_causal_mask=True, proj_bias=True, pool_type='last', norm_kwargs=dict(eps=1e-6)
)


def eos_last(kind):
    "A tokenizer of which the end has the highest number, for a CLIP that looks for that"
    fast = MADE[kind]()
    state = json.loads(fast._tokenizer.to_str())
    model = state['model']
    order = sorted(model['vocab'], key=lambda t: (t == '</s>', model['vocab'][t]))
    model['vocab'] = {t: i for i, t in enumerate(order)}
    state['added_tokens'] = [
        t | dict(id=model['vocab'][t['content']]) for t in state['added_tokens']
    ]
    state['added_tokens'].sort(key=lambda t: t['id'])
    own = Tokenizer.from_str(json.dumps(state | dict(post_processor=None)))
    own.post_processor = ends(own)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **NAMES)


MADE['eos last'] = lambda: eos_last('prefix without mark')
MADE['prefix without mark'] = lambda: bpe(continuing_subword_prefix='##', mark=False)


def clip(pool, kind, **text):
    "An open_clip model with its own text transformer"
    tokenizer = made(kind, clean='canonicalize')
    rows = len(tokenizer.tokenizer)
    ids = tokenizer.tokenizer
    cfg = (SIGLIP if pool == 'last' else TEXT) | dict(vocab_size=rows, pool_type=pool)
    if pool == 'eos':
        cfg |= dict(eos_id=ids.eos_token_id)
    torch.manual_seed(1)
    kw = dict(init_logit_bias=-10.0) if pool == 'last' else {}
    return open_clip.CustomTextCLIP(24, VISION, cfg | text, **kw).eval(), tokenizer


def hugging(config, kind, pooler='mean_pooler', proj='linear'):
    "An open_clip model with a text tower of transformers"
    tokenizer = made(kind)
    ids = tokenizer.tokenizer
    with tempfile.TemporaryDirectory() as d:
        config(vocab_size=len(ids), pad_token_id=ids.pad_token_id).save_pretrained(d)
        torch.manual_seed(1)
        text = HFTextEncoder(d, 24, None, pooler, proj, pretrained=False)
    model = open_clip.CustomTextCLIP(24, VISION, TEXT | dict(vocab_size=len(ids)))
    model.text = text
    model.vocab_size, model.context_length = len(ids), 16
    return model.eval(), tokenizer


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def mt5(**kw):
    one = transformers.MT5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, **kw)
    return one


def nllb(**kw):
    sides = [f'{s}_{k}' for s in ('encoder', 'decoder') for k in ('layers', 'attention_heads')]
    more = dict.fromkeys(sides, 2) | dict(encoder_ffn_dim=64, decoder_ffn_dim=64)
    return transformers.M2M100Config(d_model=32, **more, **kw)


MADE['pad late'] = lambda: pad_late('wordpiece')


def pad_late(kind):
    "A tokenizer of which the padding has a high number"
    fast = MADE[kind]()
    fast.pad_token = '<mark>'
    return fast


def towers():
    return {
        'siglip2': lambda: clip('last', 'gemma'),
        'siglip': lambda: clip('last', 'unigram, bytes'),
        'clipa': lambda: clip('last', 'wordpiece'),
        'worldwide': lambda: clip('eos', 'unigram'),
        'argmax': lambda: clip('argmax', 'eos last'),
        'class token': lambda: clip('last', 'bytes', embed_cls=True, pad_id=1),
        'roberta': lambda: hugging(
            functools.partial(transformers.RobertaConfig, max_position_embeddings=40, **SMALL),
            'bytes',
        ),
        'xlm-roberta': lambda: hugging(
            functools.partial(transformers.XLMRobertaConfig, max_position_embeddings=40, **SMALL),
            'unigram',
            proj='mlp',
        ),
        'bert': lambda: hugging(
            functools.partial(transformers.BertConfig, max_position_embeddings=40, **SMALL),
            'wordpiece',
            'cls_pooler',
        ),
        'bert, padding late': lambda: hugging(
            functools.partial(transformers.BertConfig, max_position_embeddings=40, **SMALL),
            'pad late',
        ),
        'roberta, padding late': lambda: hugging(
            functools.partial(transformers.RobertaConfig, max_position_embeddings=400, **SMALL),
            'pad late',
        ),
        'mt5': lambda: hugging(mt5, 'unigram, bytes'),
        'nllb': lambda: hugging(nllb, 'prefix', 'cls_pooler'),
    }


each_tower = pytest.mark.parametrize('tower', towers())


@torch.no_grad()
def features(model, tokenizer, corpus):
    return model.encode_text(tokenizer(corpus))


@each_tower
@settings(few, max_examples=3)
@given(corpus=st.lists(texts, min_size=1, max_size=3))
def test_features_of_covered_texts_are_the_same_bits(tower, corpus):
    model, tokenizer = towers()[tower]()
    before = copy.deepcopy(model.state_dict())
    student, short = shorten(model, corpus, tokenizer)
    assert torch.equal(features(student, short, corpus), features(model, tokenizer, corpus))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sizes = table_sizes(dict(before=model, after=student))
    assert [r['tokens'] for r in sizes] == [len(t.tokenizer) for t in (tokenizer, short)]
    assert student.vocab_size == student.text.vocab_size == len(short.tokenizer)
    tokenizer_of(student, short)
    assert coverage(corpus, short, tokenizer)['same'] == 1


FRESH = """
import sys, torch
from open_clip import get_tokenizer
from tinyclip.zoo import load
texts = torch.load(f'{sys.argv[1]}/texts')
for name in sys.argv[2:]:
    model, _, tokenizer = load(name)
    theirs = get_tokenizer(f'local-dir:{name}')
    assert torch.equal(theirs(texts), tokenizer(texts))
    with torch.no_grad():
        torch.save(model.encode_text(tokenizer(texts)), f'{name}/features')
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    seen = [*CORPUS[:3], 'zebra 😀', '']
    torch.save(seen, tmp_path / 'texts')
    want = {}
    for tower, make in towers().items():
        model, tokenizer = make()
        student, short = shorten(model, CORPUS[:3], tokenizer)
        folder = save(student, tmp_path / tower, tokenizer=short)
        want[folder] = features(student, short, seen)
        held = json.loads((folder / 'open_clip_config.json').read_text())
        assert held['model_cfg']['text_cfg']['hf_tokenizer_name'] == '.'
    command = [sys.executable, '-c', FRESH, str(tmp_path), *map(str, want)]
    subprocess.run(command, check=True, timeout=300)
    for folder, features_there in want.items():
        assert torch.equal(torch.load(folder / 'features'), features_there), folder.name


@each_tower
def test_saved_and_loaded(tower, tmp_path):
    model, tokenizer = towers()[tower]()
    student, short = shorten(model, CORPUS[:3], tokenizer)
    save(student, tmp_path, tokenizer=short)
    again, _, own = load(tmp_path)
    seen = [*CORPUS[:3], 'zebra 😀', '']
    assert torch.equal(features(again, own, seen), features(student, short, seen))
    assert torch.equal(features(again, own, CORPUS[:3]), features(model, tokenizer, CORPUS[:3]))
    twice, shorter = shorten(again, CORPUS[:2], own)  # from what was loaded
    assert torch.equal(features(twice, shorter, CORPUS[:2]), features(model, tokenizer, CORPUS[:2]))


@pytest.mark.parametrize('tower', ['siglip2', 'xlm-roberta'])
def test_shortening_and_cutting_commute(tower, tmp_path):
    model, tokenizer = towers()[tower]()
    keep = manual(model, text_depth=0.5)
    a, short = shorten(inherit(model, keep), CORPUS[:3], tokenizer)
    student = inherit(shorten(model, CORPUS[:3], tokenizer)[0], keep)
    for k, v in a.state_dict().items():
        assert torch.equal(v, student.state_dict()[k]), k
    save(student, tmp_path, tokenizer=short)  # it knows the tokenizer that it came with
    again, _, own = load(tmp_path)
    assert torch.equal(features(again, own, CORPUS), features(a, short, CORPUS))


def t5():
    "As in a SigLIP: T5's tokenizer, which brings a hundred tokens that the table has no rows for"
    vocab = [['<pad>', 0.0], ['</s>', 0.0], ['<unk>', 0.0], ['▁', -2.0]]
    own = json.loads(unigram()._tokenizer.to_str())['model']['vocab']
    vocab += [p for p in own if p[0] not in [*SPECIAL, '▁']]
    return transformers.T5Tokenizer(vocab=[tuple(p) for p in vocab], extra_ids=100)


MADE['t5'] = t5


def test_tokens_of_t5_that_have_no_rows(tmp_path):
    rows = made('t5').tokenizer.vocab_size
    model, tokenizer = clip('last', 't5', vocab_size=rows)
    assert len(tokenizer.tokenizer) == rows + 100
    student, short = shorten(model, CORPUS[:3], tokenizer)
    assert student.vocab_size == len(short.tokenizer) < rows
    assert torch.equal(features(student, short, CORPUS[:3]), features(model, tokenizer, CORPUS[:3]))
    save(student, tmp_path, tokenizer=short)
    again, _, own = load(tmp_path)
    seen = [*CORPUS, 'a <extra_id_3> gap']
    assert torch.equal(features(again, own, seen), features(student, short, seen))
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == student.vocab_size


def test_tokens_of_t5_that_have_rows():
    model, tokenizer = clip('last', 't5')
    student, short = shorten(model, CORPUS[:3], tokenizer)
    assert '<extra_id_99>' in short.tokenizer.get_vocab()
    assert torch.equal(features(student, short, CORPUS[:3]), features(model, tokenizer, CORPUS[:3]))


# --- the ways out


def test_the_command_line_shortens(tmp_path, capsys):
    model, tokenizer = clip('last', 'gemma')
    save(model, tmp_path / 'm', tokenizer=tokenizer)
    (tmp_path / 'texts.txt').write_text('\n'.join(CORPUS[:3]))
    out = tmp_path / 'short'
    texts = f'--texts={tmp_path}/texts.txt'
    command = [
        'export',
        str(tmp_path / 'm'),
        '--to',
        'open_clip',
        '--out',
        str(out),
        texts,
        '--json',
    ]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)['vocabulary']
    small, _, own = load(out)
    assert said['same'] == 1 and said['of'] == len(tokenizer.tokenizer)
    assert said['tokens'] == small.vocab_size == len(own.tokenizer) < said['of']
    assert torch.equal(features(small, own, CORPUS[:3]), features(model, tokenizer, CORPUS[:3]))


@pytest.mark.parametrize('kind', ['gemma', 'wordpiece', 'unigram, bytes', 'bytes'])
def test_browsers_read_it(kind, tmp_path):
    "The tokenizer of an export for browsers, as the library of browsers reads it"
    pytest.importorskip('onnx')
    from tinyclip.zoo.web import text_rules, write_tokenizer

    model, tokenizer = clip('last', kind)
    student, short = shorten(model, CORPUS[:3], tokenizer)
    web = write_tokenizer(student, short, tmp_path, text_rules(short))
    assert torch.equal(web(CORPUS[:7]), short(CORPUS[:7]))


# --- refusals


def refuses(match):
    return pytest.raises(TinyclipError, match=match)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model, tokenizer = clip('last', 'wordpiece')
    student, short = shorten(model, CORPUS[:3], tokenizer)
    other = shorten(model, ['sunset stars'], tokenizer)[1]
    with refuses('This is the tokenizer of another model'):
        shorten(student, CORPUS[:2], other)
    with refuses('the token table has'):
        shorten(student, CORPUS[:2], tokenizer)
    for wrong in (tokenizer, other):
        with refuses('This is not the tokenizer of this model'):
            save(student, tmp_path / 'm', tokenizer=wrong)
    with refuses('pass it as tokenizer='):
        shorten(student, CORPUS[:2])
    with refuses('this one is a SimpleTokenizer'):
        shorten(student, CORPUS[:2], open_clip.SimpleTokenizer())
    assert not (tmp_path / 'm').exists()
    plain, _, _ = load('shapes-teacher')
    with refuses('This is the tokenizer of another model'):
        shorten(plain, CORPUS, tokenizer)


def test_a_vocabulary_larger_than_the_table_is_refused():
    model, tokenizer = clip('last', 'wordpiece', vocab_size=100)
    with refuses(r'\d+ tokens, and the token table has 100 rows'):
        shorten(model, CORPUS, tokenizer)


def test_a_larger_table_loses_what_no_token_names():
    model, tokenizer = clip('last', 'wordpiece', vocab_size=1000)
    student, short = shorten(model, CORPUS, tokenizer)
    assert student.vocab_size == len(short.tokenizer)
    assert torch.equal(features(student, short, CORPUS), features(model, tokenizer, CORPUS))


@pytest.mark.parametrize(
    'corpus, match',
    [([], 'There are no texts'), ('a cat', 'is one string'), (['a', None], 'Text 2 is a NoneType')],
)
def test_texts_that_are_none(corpus, match):
    model, tokenizer = clip('last', 'gemma')
    with refuses(match):
        shorten(model, corpus, tokenizer)


def test_an_end_that_the_tokenizer_does_not_have_is_refused():
    model, tokenizer = clip('eos', 'unigram', eos_id=900, vocab_size=1000)
    with refuses('no token with the number 900'):
        shorten(model, CORPUS, tokenizer)


def test_a_slow_tokenizer_is_refused():
    model, tokenizer = clip('last', 'unigram')
    tokenizer = copy.copy(tokenizer)

    class Slow:
        name_or_path = 'slow'

        def get_vocab(self):
            return {'a': 0}

        def __call__(self, texts, **kw):
            ids = torch.zeros(len(texts), 16, dtype=torch.long)
            return transformers.BatchEncoding(dict(input_ids=ids))

    tokenizer.tokenizer = Slow()
    with refuses('Slow is not a fast tokenizer'):
        shorten(model, CORPUS, tokenizer)


def test_weights_without_their_folder_are_refused(tmp_path):
    model, tokenizer = clip('last', 'gemma')
    student, short = shorten(model, CORPUS, tokenizer)
    save(student, tmp_path, tokenizer=short)
    held = json.loads((tmp_path / 'open_clip_config.json').read_text())
    with refuses('lies in its folder'):
        load(tmp_path / 'open_clip_model.safetensors', config=held)


@pytest.mark.parametrize('cut', [60, 0])
def test_a_damaged_file_is_refused(cut, tmp_path):
    model, tokenizer = clip('last', 'gemma')
    student, short = shorten(model, CORPUS, tokenizer)
    save(student, tmp_path, tokenizer=short)
    path = tmp_path / 'tokenizer.json'
    path.write_bytes(path.read_bytes()[:cut])
    with refuses('tokenizer'):
        load(tmp_path)


def test_files_of_two_models_are_refused(tmp_path):
    model, tokenizer = clip('last', 'gemma')
    student, short = shorten(model, CORPUS, tokenizer)
    save(student, tmp_path, tokenizer=short)
    tokenizer.save_pretrained(str(tmp_path))
    with refuses('not of one model'):
        load(tmp_path)


def test_rows_that_must_stay():
    model, _ = clip('eos', 'unigram')
    with refuses('by its number'):
        TEXT_FAMILY.select_tokens(model.text, [0, 1])
