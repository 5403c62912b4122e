"""A batch of texts is cut behind the longest one: the same features and gradients wherever that is
done, and nothing is done elsewhere."""

import copy
from itertools import product
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch

from tinyclip.data.cache import encode_views, teacher_fingerprint
from tinyclip.evaluate.cost import macs
from tinyclip.evaluate.zeroshot import class_embeddings, retrieval
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import Objective
from tinyclip.masking import MaskedCLIP
from tinyclip.towers import TEXT
from tinyclip.towers.architecture import build
from tinyclip.towers.short_texts import (
    accept_short,
    encode_text,
    refuse_short,
    shorten_texts,
    takes_short,
)
from tinyclip.train.engine import Engine, cut_texts, make_accelerator
from tinyclip.zoo.vocabulary import shorten

END = 299
TINY = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=16, layers=1, width=64, patch_size=8, head_width=16),
    text_cfg=dict(context_length=21, vocab_size=300, width=48, heads=3, layers=2),
)


def clip(apart=False, **text):
    torch.manual_seed(0)
    cfg = TINY | dict(text_cfg=TINY['text_cfg'] | text)
    return build(cfg | dict(custom_text=True) if apart else cfg).eval()


def slim(apart):
    teacher = clip(apart)
    return inherit(teacher, manual(teacher, text_width=0.5, text_depth=0.5))


def masked(apart):
    m = MaskedCLIP(clip(apart), ('heads', 'ffn', 'width'))
    with torch.no_grad():
        m.log_alpha.add_(torch.randn(len(m.log_alpha), generator=torch.Generator().manual_seed(1)))
    return m.eval()


def hugging(**options):
    "A text tower of Hugging Face with random weights"
    transformers = pytest.importorskip('transformers')
    from open_clip.hf_model import HFTextEncoder

    kind = options.pop('kind', 'Bert')
    config = getattr(transformers, f'{kind}Config')(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=options.pop('pad', 0),
    )
    m = open_clip.CustomTextCLIP(**TINY)
    torch.manual_seed(0)
    m.text = HFTextEncoder('', 24, config=config, proj_type='linear', pretrained=False, **options)
    return m.eval()


def texts(*ends, vocab=300, length=21):
    "Random words, an end at each place, zeros behind it"
    g = torch.Generator().manual_seed(0)
    t = torch.randint(1, vocab - 2, (len(ends), length), generator=g)
    places = torch.arange(length)
    ends = torch.tensor(ends)[:, None]
    return t.masked_fill(places > ends, 0).masked_fill(places == ends, vocab - 1)


def whole(model, text):
    "As open_clip encodes texts, all of their tokens"
    return type(model).encode_text(model, text)


TOWERS = dict(
    flat=lambda: clip(),
    apart=lambda: clip(True),
    flat_eos=lambda: clip(pool_type='eos', eos_id=END),
    apart_eos=lambda: clip(True, pool_type='eos', eos_id=END),
    slim=lambda: slim(False),
    slim_apart=lambda: slim(True),
    masked=lambda: masked(False),
    masked_apart=lambda: masked(True),
    bert_mean=lambda: hugging(pooler_type='mean_pooler'),
    bert_cls=lambda: hugging(pooler_type='cls_pooler'),
    bert_first=lambda: hugging(pooler_type='cls_last_hidden_state_pooler'),
    roberta=lambda: hugging(kind='Roberta', pad=1),
)
every = pytest.mark.parametrize('tower', TOWERS)
BATCHES = dict(
    short=(texts(2, 3, 5), 8),
    one_long=(texts(1, 9, 3), 16),
    full=(texts(4, 20), 21),
    empty=(texts(1), 8),
)


@every
@pytest.mark.parametrize('batch', BATCHES)
def test_features_and_gradients_are_the_same(tower, batch):
    model = TOWERS[tower]()
    text, length = BATCHES[batch]
    if tower == 'roberta':
        text = text.masked_fill(text == 0, 1)
    opened = accept_short(model)
    short = shorten_texts(text, model)
    assert short.shape == (len(text), length)
    assert text.shape[1] == length or short.shape[1] < text.shape[1]
    found = []
    for t in (text, short):
        model.zero_grad()
        f = model.encode_text(t)
        (f * torch.linspace(-1, 1, f.shape[1])).sum().backward()
        found.append([f.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for a, b in zip(*found):
        assert (a - b).abs().max() <= 2e-6 * max(1, a.abs().max())
    if opened:
        refuse_short(model)
        assert torch.equal(found[0][0], model.encode_text(text))


@pytest.mark.parametrize('pool', ['argmax', 'eos'])
@pytest.mark.parametrize('apart', [False, True])
def test_the_end_is_where_the_tower_finds_it(apart, pool):
    "Captions without an end mark, and numbers behind the end"
    model = clip(apart, pool_type=pool, eos_id=END)
    text = texts(3, 6, 2)
    text[:, 7:] = 5  # behind the end, something is written
    text[2, 2] = 4  # no end: the highest number, or the first place where no mark is found
    text[2, 5] = 200
    text[1, 12] = END  # a second one does not count
    got = encode_text(model, text)
    assert torch.allclose(got, whole(model, text), atol=1e-6)
    ends = {'argmax': [3, 6, 5], 'eos': [3, 6, 0]}[pool]
    tower = model.text if apart else model
    assert (TEXT.counted(tower, text).sum(1) - 1).tolist() == ends
    accept_short(model)
    assert shorten_texts(text, model).shape[1] == 8


LEFT_ALONE = dict(
    last=lambda: clip(pool_type='last'),
    first=lambda: clip(pool_type='first'),
    no_causal_mask=lambda: clip(True, no_causal_mask=True),
    class_token=lambda: open_clip.CustomTextCLIP(
        **TINY | dict(text_cfg=TINY['text_cfg'] | dict(embed_cls=True))
    ).eval(),
    siglip=lambda: clip(True, no_causal_mask=True, pool_type='last', proj_bias=True),
    bert_max=lambda: hugging(pooler_type='max_pooler'),
)


@pytest.mark.parametrize('tower', LEFT_ALONE)
def test_other_towers_get_all_tokens(tower):
    model, text, seen = LEFT_ALONE[tower](), texts(2, 4), []
    assert not accept_short(model) and not takes_short(model)
    assert shorten_texts(text, model) is text
    assert shorten_texts(text, open_clips := clip(), model) is text and not takes_short(open_clips)
    encode = model.encode_text
    model.encode_text = lambda t: seen.append(t.shape[1]) or encode(t)
    try:
        encode_text(model, text)
    except TypeError:  # open_clip's maximum over tokens asks for another mask
        assert tower == 'bert_max'
    except RuntimeError:
        assert tower == 'bert_max'
    assert seen == [21]


def test_of_no_token_at_all_a_mean_is_asked_as_before():
    model = hugging(pooler_type='cls_pooler')
    text = texts(3, 2)
    text[1] = 0
    assert shorten_texts(text, model).shape == text.shape
    assert torch.equal(encode_text(model, text), model.encode_text(text))


def test_models_with_an_own_encoder_are_asked_as_they_are():
    class Own(open_clip.CLIP):
        def encode_text(self, text, normalize=False):
            assert text.shape[1] == 21
            return super().encode_text(text, normalize)

    model = Own(**TINY).eval()
    assert not accept_short(model)
    assert torch.equal(encode_text(model, texts(2)), model.encode_text(texts(2)))


def test_a_model_is_left_as_it_was():
    for apart in (False, True):
        model = clip(apart)
        before, print_ = dict(vars(model)), teacher_fingerprint(model)
        encode_text(model, texts(2))
        assert vars(model) == before
        again = copy.deepcopy(model)
        accept_short(again)
        twin = copy.deepcopy(again)
        assert not accept_short(twin)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
            for p in again.parameters():
                p.zero_()
        assert encode_text(twin, texts(2)).abs().max() > 0  # its own weights, not its original's
        assert teacher_fingerprint(model) == print_  # stored answers stay usable
        assert macs(model) == macs(twin)  # of the full context


def test_masks_do_not_change_with_the_length():
    for apart in (False, True):
        model, text = masked(apart).train(), texts(2, 4)
        image = torch.randn(2, 3, 16, 16)
        found = []
        for t in (text, shorten_texts(text, model)):
            torch.manual_seed(3)
            found.append(model(image, t)[1])
        assert found[1].shape and shorten_texts(text, model).shape[1] == 8
        assert torch.allclose(*found, atol=1e-6)
        student = model.eval().cut()
        assert torch.allclose(encode_text(student, text), encode_text(model, text), atol=1e-5)
        assert 'encode_text' not in vars(student)


def test_a_shorter_vocabulary_renumbers_the_end():
    torch.manual_seed(0)
    text = dict(context_length=21, vocab_size=49408, width=48, heads=3, layers=1)
    tokenizer = open_clip.SimpleTokenizer(context_length=21)
    for pool in (dict(), dict(pool_type='eos', eos_id=49407)):
        model = build(TINY | dict(text_cfg=text | pool)).eval()
        small, own = shorten(model, ['a dog on a beach', 'two cats'], tokenizer)
        captions = ['two dogs', 'a zebra', '']
        assert torch.allclose(
            encode_text(small, own(captions)), small.encode_text(own(captions)), atol=1e-6
        )
        accept_short(small)
        assert shorten_texts(own(['two cats', '']), small).shape[1] == 8


# Training, evaluation, stored answers


class Batch(NamedTuple):
    image: torch.Tensor
    text: torch.Tensor


def lengths(model, seen):
    "Note how long the texts are that reach the token table"
    table = (model.text if hasattr(model, 'text') else model).token_embedding
    table.register_forward_pre_hook(lambda m, x: seen.append(x[0].shape[1]))
    return model


def trained(student, teacher, text, **settings):
    "Losses of three steps"
    batch = Batch(torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), text)
    objective = Objective(['affinity', 'contrastive'])
    engine = Engine(student, teacher, objective, make_accelerator('fp32', 'cpu'), **settings)
    torch.manual_seed(1)
    losses = []
    for _ in range(3):
        out = engine.backward(batch, watch=True)
        engine.update(out, 1e-3)
        losses.append([out[k].item() for k in ('loss', 'affinity', 'r1')])
    engine.release()
    return losses


@pytest.mark.parametrize(
    'kind, settings',
    [
        *product(['flat', 'apart', 'masked', 'masked_apart'], [{}, dict(chunk_size=2)]),
        # a trace takes a minute where there are masks
        *product(['flat', 'masked_apart'], [dict(compile='eager')]),
    ],
)
def test_training_gives_the_same_numbers(kind, settings, monkeypatch):
    text, found = texts(2, 4, 5, 1, 3, 6), []
    for cut in (False, True):
        if not cut:
            monkeypatch.setattr('tinyclip.train.engine.shorten_texts', lambda t, *models: t)
        else:
            monkeypatch.undo()
        seen = []
        teacher, student = clip('apart' in kind), TOWERS[kind]()
        lengths(teacher, seen)
        lengths(student, seen)
        found.append(trained(student, teacher, text, **settings))
        if not settings.get('compile'):
            assert set(seen) == ({8} if cut else {21})
        for m in (teacher, student):
            assert 'encode_text' not in vars(m)
    assert np.allclose(*found, rtol=2e-4, atol=1e-5)


def test_both_models_must_take_short_texts():
    seen, text = [], texts(2, 4, 5, 1, 3, 6)
    trained(lengths(clip(), seen), clip(pool_type='last'), text)
    assert set(seen) == {21}


def test_evaluation_and_stored_answers_are_the_same():
    torch.manual_seed(0)
    text = dict(context_length=21, width=48, heads=3, layers=1)
    model = build(TINY | dict(text_cfg=text)).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=21)
    names = ['dog', 'cat', 'a house on a hill beside the sea']
    seen = []
    got = class_embeddings(lengths(model, seen), tokenizer, names[:2])
    want = whole(model, tokenizer([f'a photo of a {n}.' for n in names[:2]]))
    assert seen[0] == 8
    assert torch.allclose(got, torch.nn.functional.normalize(want, dim=1), atol=1e-6)
    image, tokens = torch.randn(3, 3, 16, 16), tokenizer(names)
    batches = [(image, tokens, torch.arange(3))]
    with torch.no_grad():
        stored = encode_views(model, image[:, None], tokens, size=2)[1]
        assert torch.allclose(
            stored, torch.nn.functional.normalize(whole(model, tokens), dim=1), atol=1e-6
        )
    scores = retrieval(model, batches)
    model.encode_text = lambda t, normalize: torch.nn.functional.normalize(whole(model, t), dim=1)
    assert scores == retrieval(model, batches)


def test_texts_elsewhere_are_not_asked():
    "Their length would be waited for, at every step"
    text = torch.ones(4, 77, dtype=torch.long, device='meta')
    assert cut_texts(Batch(torch.ones(4, 3, 8, 8), text), clip(), clip()).text is text
