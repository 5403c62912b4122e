"""A shorter vocabulary: the same tokens and features for covered texts, some tokens for every
other, and files that others read"""

import copy
import gzip
import json
import pickle
import tarfile

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, default_bpe

from tinyclip.core import TinyclipError
from tinyclip.data.shapes import Shapes
from tinyclip.inheritance import build, inherit
from tinyclip.keep import Keep, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.towers import layout
from tinyclip.towers.architecture import architecture
from tinyclip.zoo.vocabulary import (
    MOST,
    ShortTokenizer,
    check_merges,
    coverage,
    merges_used,
    read_merges,
    select_rows,
    shorten,
    table_sizes,
    tokenizer_of,
    vocab_and_merges,
)

quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
few = settings(quick, max_examples=12)
some = settings(quick, max_examples=30)
CORPUS = [
    'A dog runs across the grass.',
    'two children playing on a beach at sunset',
    "It's a man's bike!",
    'Ein Café in Zürich',
    '3 cats & 12 dogs',
    'a photo of a 😀',
    '日本語の本',
]
full = SimpleTokenizer(context_length=16)
short = ShortTokenizer(merges_used(CORPUS, full), 16)

words = st.sampled_from(sorted({w for t in CORPUS for w in t.split()}))
texts = st.one_of(
    st.text(max_size=60),
    st.lists(words, max_size=40).map(' '.join),
    st.text('aehlrst 😀é!', max_size=300),
    st.just('x' * 1200),
)


def pieces(tokenizer, text):
    return [tokenizer.decoder[i] for i in tokenizer.encode(text)]


class Heard(dict):
    "Ranks that remember which pairs open_clip's own loop found among them, and so joined"

    def __contains__(self, pair):
        if found := super().__contains__(pair):
            self.pairs.add(pair)
        return found


def joined(texts, tokenizer):
    "The merges that open_clip applies, overheard"
    spy = copy.copy(tokenizer)
    spy.cache = {}
    spy.bpe_ranks = Heard(tokenizer.bpe_ranks)
    spy.bpe_ranks.pairs = set()
    for t in texts:
        spy.encode(t)
    return sorted(spy.bpe_ranks.pairs, key=tokenizer.bpe_ranks.get)


# --- the tokenizer


@some
@given(st.lists(texts, min_size=1, max_size=4))
def test_the_merges_are_those_that_open_clip_applies(corpus):
    assert merges_used(corpus, full) == joined(corpus, full)


@some
@given(st.lists(texts, min_size=1, max_size=3))
def test_what_is_covered_keeps_its_tokens(corpus):
    own = ShortTokenizer(merges_used(corpus, full), 16)
    for t in corpus:
        assert pieces(own, t) == pieces(full, t)
    assert torch.equal(own(corpus).argmax(1), full(corpus).argmax(1))
    assert coverage(corpus, own, full)['same'] == 1


@quick
@given(texts)
@example('')
@example('<end_of_text> and <start_of_text>')
@example('\x00\x7f\u200b\ufeff')
def test_every_text_has_tokens(text):
    ids = short.encode(text)
    assert ''.join(pieces(short, text)) == ''.join(pieces(full, text))
    assert short.decode(ids) == full.decode(full.encode(text))
    assert all(0 <= i < short.vocab_size for i in ids)
    row = short(text)[0]
    n = min(len(ids) + 2, 16)
    assert row.shape == (16,) and row.dtype == torch.long
    assert row[0] == short.sot_token_id and row[n - 1] == short.eot_token_id and not row[n:].any()
    assert row[1 : n - 1].tolist() == ids[: n - 2]
    assert short(text, context_length=5).shape == (1, 5)


def test_places_of_the_tokens():
    assert (
        short.vocab_size
        == 512 + len(short.merges) + 2
        == len(short.encoder)
        == len(set(short.decoder))
    )
    # so the number that fills up is still that of '!'
    assert list(short.encoder)[:512] == list(full.encoder)[:512]
    assert (short.sot_token_id, short.eot_token_id) == (short.vocab_size - 2, short.vocab_size - 1)
    ranks = [full.bpe_ranks[m] for m in short.merges]
    assert ranks == sorted(ranks)


def test_all_merges_are_clip_and_none_are_bytes():
    everything = ShortTokenizer(full.bpe_ranks)
    nothing = ShortTokenizer([])
    assert everything.encoder == full.encoder and everything.bpe_ranks == full.bpe_ranks
    assert pieces(nothing, 'abc') == ['a', 'b', 'c</w>'] and nothing.vocab_size == 514
    assert merges_used(['日'], nothing) == []


def test_least_counts_applications():
    corpus = ['star star star', 'starry']
    counts = {
        m: sum(m in joined([w], full) for t in corpus for w in t.split())
        for m in joined(corpus, full)
    }
    assert len(set(counts.values())) > 1
    for least in (1, 2, 3, 4, 5):
        kept = merges_used(corpus, full, least)
        assert kept == [m for m, n in counts.items() if n >= least]
        ShortTokenizer(kept)  # sound: a part applies at least as often as its whole


def test_texts_are_read_once_and_one_at_a_time():
    seen = []

    def stream():
        for t in CORPUS:
            seen.append(t)
            yield t

    assert merges_used(stream(), full) == list(short.merges) and seen == CORPUS


@few
@given(st.lists(texts, min_size=1, max_size=2))
def test_shortening_a_tokenizer_twice(corpus):
    twice = merges_used(corpus, short)
    assert set(twice) <= set(short.merges) and twice == joined(corpus, short)
    own = ShortTokenizer(twice)
    for t in corpus:
        assert pieces(own, t) == pieces(short, t)


def test_it_travels_to_workers():
    again = pickle.loads(pickle.dumps(short))
    assert torch.equal(again(CORPUS), short(CORPUS)) and again.merges == short.merges


@pytest.mark.parametrize(
    'texts,says',
    [
        ('a dog', 'one string'),
        ([], 'no texts'),
        (['a', 3], 'Text 2 is a int'),
        ([b'a'], 'Text 1 is a bytes'),
    ],
)
def test_odd_corpora_are_refused(texts, says):
    with pytest.raises(TinyclipError, match=says):
        merges_used(texts, full)
    with pytest.raises(TinyclipError, match=says):
        coverage(texts, short, full)


def test_odd_tokenizers_are_refused():
    for t in (
        SimpleTokenizer(clean='canonicalize'),
        SimpleTokenizer(additional_special_tokens=['<x>']),
        SimpleTokenizer(reduction_mask='simple'),
    ):
        with pytest.raises(TinyclipError, match='of its own'):
            merges_used(['a'], t)
    with pytest.raises(TinyclipError, match='is a function'):
        merges_used(['a'], open_clip.tokenize)


# --- files


@few
@given(st.lists(texts, min_size=1, max_size=3))
def test_open_clip_reads_the_file(tmp_path_factory, corpus):
    own = ShortTokenizer(merges_used(corpus, full), 16)
    path = own.save(tmp_path_factory.mktemp('bpe') / 'deep' / 'bpe.txt.gz')
    theirs = SimpleTokenizer(bpe_path=str(path), context_length=16)
    assert theirs.encoder == own.encoder and theirs.vocab_size == own.vocab_size
    assert torch.equal(theirs([*corpus, *CORPUS]), own([*corpus, *CORPUS]))
    assert ShortTokenizer.from_file(path, 16).merges == own.merges
    first = path.read_bytes()
    assert own.save(path).read_bytes() == first  # the same bytes at any time


def test_files_of_others(tmp_path):
    # CLIP's own, which holds more merges than CLIP uses
    assert ShortTokenizer.from_file(default_bpe()).encoder == full.encoder
    plain = tmp_path / 'merges.txt'  # transformers' form: plain, with a line end at the end
    plain.write_text('#version: 0.2\n' + '\n'.join(vocab_and_merges(short.merges)[1]) + '\n')
    assert ShortTokenizer.from_file(plain).merges == short.merges


@pytest.mark.parametrize(
    'merges,says',
    [
        ([('a',)], 'has 1 pieces'),
        (['abc'], 'has 3 pieces'),
        ([('th', 'e')], "joins 'th'"),
        ([('t', 'h'), ('t', 'h')], 'a second time'),
        ([('a</w>', 'b'), ('b', '日')], "joins '日'"),
        ([('a', 'b c')], "joins 'b c'"),
        ([('a', 'b')] * (MOST + 1), 'are more than'),
    ],
)
def test_merges_that_no_bpe_learns(merges, says):
    with pytest.raises(TinyclipError, match=says):
        check_merges(merges)


def test_only_our_error_comes_out_of_damaged_files(tmp_path):
    path = short.save(tmp_path / 'bpe.gz')
    rng = torch.Generator().manual_seed(0)
    good = path.read_bytes()
    plain = gzip.decompress(path.read_bytes())

    def draw(n):
        return int(torch.randint(n, (1,), generator=rng))

    def damaged(raw):
        raw = bytearray(raw)
        if draw(2):
            return bytes(raw[: draw(len(raw))])
        for _ in range(1 + draw(3)):
            raw[draw(len(raw))] ^= 1 << draw(8)
        return bytes(raw)

    refused = 0
    for i in range(400):
        path.write_bytes(damaged(good) if i % 2 else damaged(plain))
        try:
            assert set(ShortTokenizer.from_file(path)('a dog')[0].tolist())  # what is let in, works
        except TinyclipError:
            refused += 1
    assert refused > 200
    path.write_bytes(gzip.compress(bytes(2**25)))  # unpacks to 32 MB
    with pytest.raises(TinyclipError, match='unpacks to more than'):
        read_merges(path)
    path.write_bytes(b'x\n' + b'a b\n' * 2)  # twice the same
    with pytest.raises(TinyclipError, match='second time'):
        read_merges(path)
    for odd in (tmp_path, tmp_path / 'none'):
        with pytest.raises(TinyclipError, match='no BPE file'):
            read_merges(odd)
    with pytest.raises(TinyclipError, match='is a folder'):
        short.save(tmp_path)


# --- models


def clip(custom=False, rows=49408, seed=0, **text):
    torch.manual_seed(seed)
    return build(
        dict(
            embed_dim=12,
            custom_text=custom,
            vision_cfg=dict(image_size=16, layers=2, width=32, patch_size=8, head_width=8),
            text_cfg=dict(context_length=16, vocab_size=rows, width=16, heads=2, layers=2) | text,
        )
    ).eval()


def slim(custom):
    "A student with slim blocks in both towers, one of them without heads"
    teacher = clip(custom)
    k = manual(teacher)
    odd = {a: list(range(n)) for a, n in layout(teacher).sizes.items()} | {
        'text.layers.0.heads': [1],
        'text.layers.1.ffn': list(range(9)),
        'image.layers.0.heads': [],
        'text.width': list(range(3, 14)),
    }
    return inherit(teacher, Keep(k.sizes, odd))


KINDS = dict(
    flat=lambda: clip(),
    custom=lambda: clip(True),
    slim=lambda: slim(False),
    slim_custom=lambda: slim(True),
    not_causal=lambda: clip(no_causal_mask=True),
    at_eos=lambda: clip(pool_type='eos', eos_id=49407),
    at_eos_custom=lambda: clip(True, pool_type='eos', eos_id=49407),
    last=lambda: clip(True, pool_type='last'),
    half=lambda: clip().to(torch.bfloat16),
    resnet=lambda: resnet(),
)


def resnet():
    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=32, layers=[1, 1, 1, 1], width=8, head_width=8),
        text_cfg=dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1),
    ).eval()


def image(model):
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(
        next(model.parameters()).dtype
    )


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_features_stay_bit_for_bit(kind):
    model = KINDS[kind]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    student, own = shorten(model, CORPUS)
    assert own.merges == short.merges == student.merges and own.context_length == 16
    long = CORPUS + [' '.join(CORPUS)]  # longer than the context
    assert len(own.encode(long[-1])) > 16
    assert torch.equal(student.encode_text(own(long)), model.encode_text(full(long)))
    assert torch.equal(student.encode_image(image(model)), model.encode_image(image(model)))
    # the teacher is left alone
    assert model.state_dict().keys() == before.keys() and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )
    assert architecture(model)['text_cfg']['vocab_size'] == 49408 and not hasattr(model, 'merges')
    assert student.encode_text(own(['never heard of, ₿ 🦖'])).isfinite().all()


@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'half'])
def test_the_architecture_says_so(kind):
    student, own = shorten(KINDS[kind](), CORPUS)
    cfg = architecture(student)
    assert cfg['text_cfg']['vocab_size'] == own.vocab_size == student.vocab_size
    again = build(json.loads(json.dumps(cfg))).eval()
    again.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(again.encode_text(own(CORPUS)), student.encode_text(own(CORPUS)))


def test_what_belongs_to_a_model_comes_along():
    model = slim(True).requires_grad_(False).train()
    model.visual.preprocess_cfg = dict(size=16, mean=(0.1, 0.2, 0.3))
    model.output_dict = True
    student, own = shorten(model, CORPUS)
    assert (
        student.keep == model.keep
        and student.visual.preprocess_cfg == model.visual.preprocess_cfg
        and student.output_dict is True
    )
    assert all(p.requires_grad for p in student.parameters()) and not student.training
    student.encode_text(own(CORPUS)).sum().backward()  # a student is there to be trained
    assert student.text.token_embedding.weight.grad.abs().sum() > 0
    assert model.text.token_embedding.weight.grad is None


def test_shortening_twice_and_by_another_tokenizer():
    model = clip(True)
    once, own = shorten(model, CORPUS)
    twice, less = shorten(once, CORPUS[:2])
    direct, same = shorten(model, CORPUS[:2])
    assert less.merges == same.merges == twice.merges and less.vocab_size < own.vocab_size
    assert all(torch.equal(v, direct.state_dict()[k]) for k, v in twice.state_dict().items())
    assert tokenizer_of(once).merges == own.merges and tokenizer_of(once, own) is own
    with pytest.raises(TinyclipError, match='The model has no token'):
        select_rows(twice, own)
    with pytest.raises(TinyclipError, match='are not the 49408 tokens'):
        shorten(once, CORPUS, full)
    other = ShortTokenizer(merges_used(['horse ' * 9], full)[:1] + [('x', 'q'), ('x', 'j')])
    padded = ShortTokenizer([*less.merges[:-1], ('x', 'q')])  # as many tokens, but others
    with pytest.raises(TinyclipError, match='they are not'):
        tokenizer_of(twice, padded)
    with pytest.raises(TinyclipError, match="no token 'xq'"):
        select_rows(model, other)


def test_a_tokenizer_from_a_file_tells_what_the_rows_are(tmp_path):
    once, own = shorten(clip(), CORPUS)
    own.save(tmp_path / 'bpe.gz')
    del once.merges  # as open_clip would load it
    with pytest.raises(TinyclipError, match='pass the one that belongs'):
        shorten(once, CORPUS[:1])
    twice, less = shorten(once, CORPUS[:1], SimpleTokenizer(bpe_path=str(tmp_path / 'bpe.gz')))
    assert (
        torch.equal(
            twice.token_embedding.weight, shorten(clip(), CORPUS[:1])[0].token_embedding.weight
        )
        and less.context_length == 16
    )


def test_it_composes_with_inheritance():
    model = clip()
    keep = manual(model, text_depth=0.5, image_width=0.5)
    a, own = shorten(inherit(model, keep), CORPUS)
    b = inherit(select_rows(model, own), keep)
    assert architecture(a) == architecture(b) and a.keep == b.keep
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@torch.no_grad()
def test_it_composes_with_masks():
    model = clip()
    student, own = shorten(model, CORPUS)
    long = MaskedCLIP(model).eval()
    masked = MaskedCLIP(student).eval()
    masked.log_alpha.copy_(
        torch.randn(len(masked.log_alpha), generator=torch.Generator().manual_seed(3)) * 4
    )
    long.log_alpha.copy_(masked.log_alpha)
    z = masked.encode_text(own(CORPUS))
    assert torch.equal(z, long.encode_text(full(CORPUS)))
    cut = masked.cut().eval()
    assert (
        layout(cut).sizes['text.width'] < 16
        and architecture(cut)['text_cfg']['vocab_size'] == own.vocab_size
    )
    torch.testing.assert_close(
        cut.encode_text(own(CORPUS)), z, atol=1e-5 * z.abs().max().item(), rtol=0
    )
    with pytest.raises(TinyclipError, match='still has its masks'):
        shorten(masked, CORPUS)
    late, _ = shorten(long.cut(), CORPUS)
    assert torch.equal(late.eval().encode_text(own(CORPUS)), cut.encode_text(own(CORPUS)))


def test_models_that_cannot_be_shortened():
    own = clip()
    own.tokenizer_cfg = dict(hf_tokenizer_name='bert-base-uncased')
    with pytest.raises(TinyclipError, match=r'tokenizer \(bert-base-uncased\): pass it'):
        shorten(own, CORPUS)
    with pytest.raises(TinyclipError, match='has 32 rows, but they are not the 49408'):
        shorten(clip(rows=32), CORPUS)
    with pytest.raises(TinyclipError, match='Linear is not an open_clip CLIP'):
        shorten(torch.nn.Linear(2, 2), CORPUS)


def test_sizes():
    model = clip()
    student, own = shorten(model, CORPUS)
    a, b = table_sizes({'before': model, 'after': student})
    assert (a['tokens'], b['tokens']) == (49408, own.vocab_size) and a['towers'] == b['towers']
    gone = (49408 - own.vocab_size) * 16
    assert (
        sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in student.parameters())
        == gone
    )
    assert float(a['MB']) - float(b['MB']) == pytest.approx(gone * 4 / 1e6, abs=0.11)


# --- transformers

ODD = [
    '',
    'don\'t we\'ll I\'VE',
    'Ünïcödé ß İstanbul',
    '😀😃 👨‍👩‍👧 🇩🇪',
    '日本語 한국어 العربية हिन्दी',
    '١٢٣ ½ ² 1234',
    '!!! ... --- ?!',
    'a\tb\nc  d',
    'ﬁ ﬀ Å Å e\u0301',
    'x' * 300,
    '\u200b\u00a0 nbsp',
    '<b>html</b> &amp;',
    '₿ 𝔘𝔫𝔦 🦖',
]


def theirs(tmp_path, merges):
    "transformers' tokenizer, from its files"
    transformers = pytest.importorskip('transformers')
    vocab, lines = vocab_and_merges(merges)
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab, ensure_ascii=False))
    (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *lines]) + '\n')
    return transformers.CLIPTokenizer.from_pretrained(tmp_path)


def agree(hf, own, texts):
    cleaned = [own.clean_fn(t) for t in texts]  # ftfy and HTML are open_clip's alone
    got = hf(cleaned)['input_ids']
    return [
        t for t, a in zip(cleaned, got) if a != [own.sot_token_id, *own.encode(t), own.eot_token_id]
    ]


def test_transformers_reads_the_same_tokens(tmp_path):
    own = ShortTokenizer(merges_used(Shapes('train').captions(range(500)) + CORPUS, full))
    hf = theirs(tmp_path, own.merges)
    assert (
        len(hf) == own.vocab_size
        and hf.eos_token_id == own.eot_token_id
        and hf.bos_token_id == own.sot_token_id
    )
    assert not agree(hf, own, ODD + CORPUS + Shapes('train').captions(range(500)))
    assert hf.decode(own.encode('two children playing')) == 'two children playing'


def test_transformers_files_of_all_of_clip():
    "The published vocab.json of CLIP, by its known places"
    vocab, lines = vocab_and_merges(full.bpe_ranks)
    assert (
        len(vocab),
        vocab['!'],
        vocab['!</w>'],
        vocab['<|startoftext|>'],
        vocab['<|endoftext|>'],
    ) == (49408, 0, 256, 49406, 49407)
    assert (vocab['a</w>'], vocab['photo</w>'], vocab['cat</w>']) == (320, 1125, 2368) and lines[
        :2
    ] == ['i n', 't h']


# --- real captions


def flickr(shared, pattern):
    files = sorted((shared / 'data/flickr8k').glob(pattern))
    if not files:
        pytest.skip('no Flickr8k captions in ../shared/data')
    out = []
    for f in files:
        with tarfile.open(f) as t:
            out += [
                c
                for m in t
                if m.name.endswith('.json')
                for c in json.load(t.extractfile(m))['captions']
            ]
    return out


@torch.no_grad()
def test_real_captions(shared, tmp_path):
    from tinyclip.zoo import load

    if not (shared / 'teachers/cifar10').is_dir():
        pytest.skip('no teacher in ../shared/teachers')
    train = flickr(shared, 'train-*.tar')
    val = flickr(shared, 'val-*.tar')
    model, _, tokenizer = load(shared / 'teachers/cifar10')
    student, own = shorten(model, train, tokenizer)
    assert coverage(train[::10], own, tokenizer)['same'] == 1
    new = coverage(val, own, tokenizer)
    assert (
        0.9 < new['same'] < 1
        and new['tokens_before'] <= new['tokens_after'] < 1.02 * new['tokens_before']
    )
    sample = train[::100]
    assert torch.equal(student.encode_text(own(sample)), model.encode_text(tokenizer(sample)))
    assert own.vocab_size < 49408 / 4
    rare = ShortTokenizer(merges_used(train, tokenizer, least=5), 16)
    r = coverage(val, rare, tokenizer)
    assert rare.vocab_size < 0.6 * own.vocab_size and 0.7 < r['same'] < new['same']
    print(
        f'Flickr8k: {own.vocab_size} tokens, val {new}; least=5: {rare.vocab_size} tokens, val {r}'
    )
    assert not agree(theirs(tmp_path, own.merges), own, train[::5] + val + ODD)
