"Evaluation against brute force, against open_clip, and with bad input"

import copy

import open_clip
import pytest
import torch
from open_clip.model import convert_weights_to_lp
from torch.nn import functional as F

from tinyclip.core import TinyclipError
from tinyclip.data.cache import encode_views
from tinyclip.evaluate import (
    TEMPLATES,
    chance,
    class_embeddings,
    prompts,
    recall,
    retrieval,
    zero_shot,
)
from tinyclip.evaluate.agreement import model_answers
from tinyclip.evaluate.benchmarks import _templates_of
from tinyclip.evaluate.cost import macs, profile
from tinyclip.evaluate.probe import image_features
from tinyclip.evaluate.redundancy import layer_features
from tinyclip.evaluate.zeroshot import rank_of
from tinyclip.inheritance import inherit
from tinyclip.keep import choose
from tinyclip.train.step import features

NAMES = ['cat', 'golden retriever', 'T-shirt', 'aeroplane']
tokenizer = open_clip.get_tokenizer('ViT-B-32', context_length=12)


def clip(kind, seed=0):
    torch.manual_seed(seed)
    return kind(
        embed_dim=12,
        vision_cfg=dict(image_size=16, layers=1, width=32, patch_size=8, head_width=16),
        text_cfg=dict(context_length=12, vocab_size=49408, width=16, heads=2, layers=1),
    )


@pytest.fixture(params=[open_clip.CLIP, open_clip.CustomTextCLIP], ids=lambda k: k.__name__)
def model(request):
    return clip(request.param)


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def captions(n, m, seed):
    "Which image each of `m` shuffled captions belongs to; every image has one"
    g = torch.Generator().manual_seed(seed)
    own = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=g)])
    return own[torch.randperm(m, generator=g)]


@pytest.mark.parametrize(
    'templates',
    ['simple', 'openai', ['{}', 'a {} indeed', lambda c: c.upper()]],
    ids=['simple', 'openai', 'own'],
)
def test_class_embeddings_are_open_clips(model, templates):
    theirs = (
        TEMPLATES[templates]
        if isinstance(templates, str)
        else [t if callable(t) else t.format for t in templates]
    )
    if isinstance(templates, str):
        theirs = [t if callable(t) else t.format for t in theirs]
    expected = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, NAMES, theirs)
    torch.testing.assert_close(
        class_embeddings(model, tokenizer, NAMES, templates, batch_size=7), expected.T
    )


def test_zero_shot_is_a_sorted_table(model):
    images = torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(23) % 6
    names = [*NAMES, 'ship', 'violin']
    got = zero_shot(model, tokenizer, zip(images.split(5), labels.split(5)), names)
    with torch.no_grad():
        scores = (
            model.eval().encode_image(images, normalize=True)
            @ class_embeddings(model, tokenizer, names).T
        )
    order = scores.argsort(1, descending=True)
    assert got['top1'] == pytest.approx(
        sum(l in o[:1] for l, o in zip(labels.tolist(), order.tolist())) / 23
    )
    assert got['top5'] == pytest.approx(
        sum(l in o[:5] for l, o in zip(labels.tolist(), order.tolist())) / 23
    )
    assert (got['n'], got['chance']) == (23, 1 / 6)


@pytest.mark.parametrize('rows', [1, 4, 1000])
@pytest.mark.parametrize('seed', range(3))
def test_recall_is_brute_force(rows, seed):
    n, m = 9 + seed, 31
    own = captions(n, m, seed)
    image = unit(n, 4, seed=seed)
    text = unit(m, 4, seed=seed + 10)
    got = recall(image, text, own, ks=(1, 3, 8), rows=rows)
    table = image @ text.T
    for k in (1, 3, 8):
        any_of = [any(own[j] == i for j in table[i].argsort(descending=True)[:k]) for i in range(n)]
        its = [own[j].item() in table[:, j].argsort(descending=True)[:k].tolist() for j in range(m)]
        assert got[f'i2t_r{k}'] == pytest.approx(sum(any_of) / n) and got[
            f't2i_r{k}'
        ] == pytest.approx(sum(its) / m)


def test_a_perfect_and_a_collapsed_model():
    own = captions(6, 20, 0)
    perfect = recall(torch.eye(6), torch.eye(6)[own], own)
    collapsed = recall(torch.ones(6, 2), torch.ones(20, 2), own)
    assert perfect['i2t_r1'] == perfect['t2i_r1'] == 1
    # ties count against the answer
    assert collapsed['i2t_r1'] == collapsed['t2i_r1'] == collapsed['t2i_r5'] == 0
    assert rank_of(torch.zeros(1, 4), torch.tensor([2])).tolist() == [3]


def test_chance_by_counting():
    "Every choice of two of five captions, counted"
    from itertools import combinations

    own = [0, 0, 0, 1, 2]
    picks = list(combinations(range(5), 2))
    found = [sum(any(own[j] == i for j in p) for p in picks) / len(picks) for i in range(3)]
    assert chance(torch.tensor(own), ks=(2,)) == {
        'i2t_r2': pytest.approx(sum(found) / 3),
        't2i_r2': pytest.approx(2 / 3),
    }


def test_retrieval_of_batches_is_recall_of_all(model):
    g = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=g)
    texts = torch.randint(1, 400, (10, 12), generator=g)
    own = torch.tensor([0, 0, 1, 2, 2, 3, 3, 4, 5, 5])
    halves = [(images[:3], texts[:5], own[:5]), (images[3:], texts[5:], own[5:])]
    with torch.no_grad():
        whole = recall(
            model.eval().encode_image(images, normalize=True),
            model.encode_text(texts, normalize=True),
            own,
        )
    assert retrieval(model, halves) == whole


def test_modes_come_back(model):
    model.train()
    model.visual.eval()
    modes = [m.training for m in model.modules()]
    zero_shot(model, tokenizer, [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))], NAMES)
    with pytest.raises(TinyclipError):
        zero_shot(
            model, tokenizer, [(torch.full((2, 3, 16, 16), torch.nan), torch.tensor([0, 1]))], NAMES
        )
    assert [m.training for m in model.modules()] == modes and all(
        p.grad is None for p in model.parameters()
    )


# ---- models held in half precision


def held(kind, dtype):
    "A model in half precision, as people get one"
    model = clip(open_clip.CustomTextCLIP if kind == 'custom' else open_clip.CLIP)
    if kind == 'student':
        return inherit(model.to(dtype), choose(model, {'image.layers.0.heads': 1, 'embed': 8}))
    if kind == 'mixed':  # as open_clip's precision= makes it: norms and embeddings in float32
        convert_weights_to_lp(model, dtype)
        return model
    return model.to(dtype)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('kind', ['plain', 'custom', 'mixed', 'student'])
def test_half_precision(kind, dtype):
    model = held(kind, dtype)
    plain = copy.deepcopy(model).float()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens, labels = tokenizer(NAMES), torch.arange(4)
    assert zero_shot(model, tokenizer, [(images, labels)], NAMES)['n'] == 4
    assert retrieval(model, [(images, tokens, labels)])['images'] == 4
    with torch.no_grad():
        want = plain.encode_image(images, normalize=True)
    for got in (
        F.normalize(image_features(model, [(images, labels)])[0], dim=-1),
        model_answers(model, [(images, tokens, labels)]).image,
        encode_views(model, images[:, None], tokens)[0][:, 0],
        features(model, images, tokens).image.detach(),
    ):
        assert got.dtype == torch.float32 and (got * want).sum(1).min() > 0.99
    depths = layer_features(model, [images], 'image')
    assert all(d.dtype == torch.float32 and d.isfinite().all() for d in depths)
    assert macs(model) == macs(plain)
    assert {p.dtype for p in model.parameters()} >= {dtype}  # it stays as it was


def test_profile_in_half_precision():
    row = profile(dict(half=clip(open_clip.CLIP).bfloat16()), 2, repeats=2)['half']
    assert row['image_macs'] and row['batch_size'] == 2


# ---- templates, as `str.format` reads them


@pytest.mark.parametrize(
    'template, says',
    [
        ('a {style} photo of a {}.', "one {}: ['style', '']"),
        ('{} beside {}', "one {}: ['', '']"),
        ('a photo of a {0}', "one {}: ['0']"),
        ('a photo of a {:>9}', "one {}: [':>9']"),
        ('a photo of a {!r}', "one {}: ['!r']"),
        ('a photo of a {{}}', 'has no {}'),
        ('a photo of a {} :}', 'a brace of the text itself twice'),
        ('a photo of a {', 'a brace of the text itself twice'),
        (7, 'cannot be filled in'),
    ],
)
def test_templates_with_other_fields_are_refused(template, says):
    for given in ([template], template) if isinstance(template, str) else ([template],):
        with pytest.raises(TinyclipError) as e:
            prompts('cat', given)
        assert says in str(e.value)


def test_braces_that_belong_to_a_text():
    assert prompts('{cat}', ['{{{}}}', 'a {} {{:']) == ['{{cat}}', 'a {cat} {:']
    for t, name in (('{{{}}} of a {{b}}', 'dog'), ('{} }}', '{0}')):
        assert prompts(name, t) == [t.format(name)]  # what open_clip makes of it


def test_templates_of_clip_benchmark():
    assert prompts('cat', _templates_of(['a {c}, {{c}}, {c}'])) == ['a cat, {c}, cat']
    for bad, says in (('a {}', 'has none'), ('{c} in {d}', "['c', 'd']"), ('{c:>3}', 'has none')):
        with pytest.raises(TinyclipError) as e:
            _templates_of([bad])
        assert says in str(e.value)


x = torch.randn(2, 3, 16, 16)
BAD = {
    'outside the 4 class names': lambda m: zero_shot(
        m, tokenizer, [(x, torch.tensor([0, 4]))], NAMES
    ),
    'Label -1 is outside': lambda m: zero_shot(m, tokenizer, [(x, torch.tensor([-1, 3]))], NAMES),
    'no images to classify': lambda m: zero_shot(m, tokenizer, [], NAMES),
    'no class names': lambda m: zero_shot(m, tokenizer, [], []),
    'needs class names': lambda m: zero_shot(m, tokenizer, []),
    'a list of names': lambda m: zero_shot(m, tokenizer, [], 'cat'),
    'not finite': lambda m: zero_shot(m, tokenizer, [(x * torch.nan, torch.tensor([0, 1]))], NAMES),
    'has no {}': lambda m: class_embeddings(m, tokenizer, NAMES, ['a photo']),
    'At least one template': lambda m: class_embeddings(m, tokenizer, NAMES, []),
    'no images to retrieve': lambda m: retrieval(m, []),
    'there are 0 and 2': lambda m: recall(x[:0, 0, 0], x[:, 0, 0], torch.zeros(2).long()),
    'width 16 and text features 8': lambda m: recall(x[:, 0, 0], x[:, 0, 0, :8], torch.arange(2)),
    '1 of the 2 images have no caption': lambda m: recall(
        x[:, 0, 0], x[:, 0, 0], torch.zeros(2).long()
    ),
    'one of the 2 images for each of the 2 texts': lambda m: recall(
        x[:, 0, 0], x[:, 0, 0], torch.tensor([0, -1])
    ),
}


@pytest.mark.parametrize('message', BAD)
def test_bad_input_is_named(message):
    with pytest.raises(TinyclipError) as e:
        BAD[message](clip(open_clip.CLIP))
    assert message in str(e.value)
