"""Redundancy: features against the model run by hand, CKA by its definition, layers left out,
and bad input"""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tinyclip.core import Table, TinyclipError
from tinyclip.evaluate.redundancy import (
    blocks_of,
    drop_bars,
    drop_one,
    layer_features,
    similarity,
    similarity_map,
    without_layer,
)
from tinyclip.inheritance import inherit
from tinyclip.keep import choose
from tinyclip.masking import MaskedCLIP
from tinyclip.towers.architecture import build

EOS = 31


def clip(custom=False, image_layers=3, text_layers=3, **text):
    torch.manual_seed(0)
    return build(
        dict(
            embed_dim=8,
            vision_cfg=dict(
                image_size=16, patch_size=8, head_width=4, width=16, layers=image_layers
            ),
            custom_text=custom,
            text_cfg=dict(context_length=6, vocab_size=32, heads=3, width=12, layers=text_layers)
            | text,
        )
    ).eval()


def slim(custom=False):
    "Unequal layers; one without heads, one without neurons"
    model = clip(custom)
    return inherit(
        model,
        choose(
            model,
            {
                '*.layers.0.heads': 2,
                '*.layers.1.heads': [],
                '*.layers.2.ffn': [],
                '*.layers.0.ffn': 5,
                'image.width': 12,
            },
        ),
    )


def batches(n=3):
    "Images, and texts of several lengths behind whose end noise stands"
    g = torch.Generator().manual_seed(1)
    out = []
    for _ in range(n):
        text = torch.randint(1, EOS, (4, 6), generator=g)
        text[range(4), [1, 5, 3, 2]] = EOS
        out.append((torch.randn(4, 3, 16, 16, generator=g), text, 'more'))
    return out


def by_hand(model, tower, batch, end=(1, 5, 3, 2)):
    "What each depth holds, without hooks"
    blocks, means = blocks_of(model, tower)[0], []
    with torch.no_grad():
        if tower == 'image':
            x, mask = model.visual._embeds(batch[0]), None
        else:
            t = model.text if hasattr(model, 'text') else model
            x = t.token_embedding(batch[1]) + t.positional_embedding
            mask = t.attn_mask
        for i in range(len(blocks) + 1):
            if i:
                x = blocks[i - 1](x, attn_mask=mask)
            means.append(
                x.mean(1)
                if tower == 'image' or end is None
                else torch.stack([row[: e + 1].mean(0) for row, e in zip(x, end)])
            )
    return means


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


MODELS = dict(
    flat=clip,
    custom=lambda: clip(True),
    eos=lambda: clip(True, pool_type='eos', eos_id=EOS),
    flat_eos=lambda: clip(pool_type='eos', eos_id=EOS),
    both_ways=lambda: clip(no_causal_mask=True),
    one_layer=lambda: clip(image_layers=1, text_layers=1),
    slim=slim,
    slim_custom=lambda: slim(True),
)


@pytest.mark.parametrize('tower', ['image', 'text'])
@pytest.mark.parametrize('kind', MODELS)
def test_features_are_those_of_the_model_run_by_hand(kind, tower):
    model = MODELS[kind]()
    got = layer_features(model, batches(), tower)
    end = None if kind == 'both_ways' else (1, 5, 3, 2)  # without a causal mask all count
    want = [torch.cat(p) for p in zip(*(by_hand(model, tower, b, end) for b in batches()))]
    assert len(got) == len(blocks_of(model, tower)[0]) + 1 and all(
        f.dtype == torch.float32 and not f.requires_grad for f in got
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('pool', ['first', 'last'])
def test_towers_that_pool_elsewhere_count_all_tokens(pool):
    model = clip(True, pool_type=pool)
    for a, b in zip(
        layer_features(model, batches(1), 'text'), by_hand(model, 'text', batches(1)[0], end=None)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_follows_the_end_does_not_matter():
    model, (_, text, _) = clip(), batches(1)[0]
    other = text.clone()
    other[0, 2:], other[3, 3:] = 7, 9
    for a, b in zip(*(layer_features(model, [t], 'text') for t in (text, other))):
        torch.testing.assert_close(a, b)


def test_bare_tensors_and_batches_of_other_sizes():
    model, (images, text, _) = clip(), batches(1)[0]
    for tower, x in (('image', images), ('text', text)):
        for a, b in zip(
            layer_features(model, batches(1), tower), layer_features(model, [x[:1], x[1:]], tower)
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('tower', ['image', 'text'])
def test_length_first(tower):
    model = clip()
    want = layer_features(model, batches(), tower)
    for t in (model.transformer, model.visual.transformer):
        t.batch_first = False
        for b in t.resblocks:
            b.attn.batch_first = False
    for a, b in zip(layer_features(model, batches(), tower), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('tower', ['image', 'text'])
def test_checkpointing_and_half_precision(tower):
    model = clip()
    want = layer_features(model, batches(), tower)
    model.set_grad_checkpointing()
    for a, b in zip(layer_features(model, batches(), tower), want):
        torch.testing.assert_close(a, b)
    half = [
        layer_features(model, batches(), tower, precision='bf16'),
        layer_features(clip().bfloat16(), batches(), tower),
        layer_features(slim().bfloat16(), batches(), tower),
    ]
    for f in half:
        assert all(o.dtype == torch.float32 and o.isfinite().all() for o in f)
    for f in half[:2]:
        for a, b in zip(f, want):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * b.abs().max().item())


def test_modes_and_hooks_are_as_before():
    model = clip().train()
    model.visual.transformer.resblocks[1].eval()
    modes = [m.training for m in model.modules()]
    seen = []
    layer_features(model, batches(), 'image')
    drop_one(model, lambda m: seen.append((m.training, torch.is_grad_enabled())) or 1, 'text')
    assert (
        [m.training for m in model.modules()] == modes
        and hooks(model) == 0
        and torch.is_grad_enabled()
    )
    assert not any(training for training, _ in seen) and len(seen) == 4


@pytest.mark.parametrize('bad', [torch.zeros(2, 3, 8, 8), 'interrupt'])
def test_hooks_are_removed_after_an_error(bad):
    model = clip().train()
    if isinstance(bad, str):  # within a layer

        def broken(*_, **__):
            raise KeyboardInterrupt

        model.visual.transformer.resblocks[1].forward = broken
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        layer_features(model, [batches(1)[0][0], bad], 'image')
    assert hooks(model) == 0 and all(m.training for m in model.modules())


def test_nobody_listens_between_batches():
    model = clip()

    def own_use():
        for b in batches():
            assert hooks(model) == 0 and torch.is_grad_enabled()
            model.encode_image(b[0])
            yield b

    assert len(layer_features(model, own_use(), 'image')[0]) == 12


def gram(x, y):
    k, l = ((o - o.mean(0)) @ (o - o.mean(0)).T for o in (x.double(), y.double()))
    return (k * l).sum() / (k.norm() * l.norm())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(2, 40),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(0, 99),
    st.floats(-3, 3),
    st.sampled_from([1e-4, 1, 1e4]),
)
def test_cka(n, widths, seed, shift, scale):
    g = torch.Generator().manual_seed(seed)
    fs = [torch.randn(n, w, generator=g) for w in widths]
    fs.append(fs[0] @ torch.randn(widths[0], 5, generator=g) + torch.randn(n, 5, generator=g))
    s = similarity(fs)
    torch.testing.assert_close(
        s,
        torch.stack([torch.stack([gram(a, b) for b in fs]) for a in fs]).float(),
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(s.diagonal(), torch.ones(len(fs)), rtol=0, atol=1e-5)
    assert torch.equal(s, s.T) and s.min() >= 0 and s.max() <= 1 + 1e-5
    turned = [
        scale * (f @ torch.linalg.qr(torch.randn(f.shape[1], f.shape[1], generator=g)).Q)
        + shift * scale
        for f in fs
    ]
    torch.testing.assert_close(similarity(turned), s, rtol=0, atol=2e-5)


def test_cka_of_a_stream_with_one_huge_channel():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    far = x.clone()
    far[:, 3] += (
        # as in the residual streams of large models: float32 keeps three digits of what it varies
        # by
        1e4
    )
    torch.testing.assert_close(similarity([x, far]), torch.ones(2, 2), rtol=0, atol=1e-5)


def test_cka_refuses():
    x = torch.randn(8, 3)
    for bad, says in (
        ([], 'same samples'),
        ([x, x[:5]], r'\[8, 5\]'),
        ([x, x.fill_(2)], 'same features'),
        ([torch.randn(1, 3)], 'All 1 samples'),
        ([torch.full((4, 2), float('nan'))], 'not finite'),
        ([torch.randn(4)], r'\(n, width\)'),
    ):
        with pytest.raises(TinyclipError, match=says):
            similarity(bad)


class Skip(nn.Module):
    def get_weight_dtype(self):
        return torch.float32  # open_clip asks the first block

    def forward(self, x, *_, **__):
        return x


@pytest.mark.parametrize('tower', ['image', 'text'])
@pytest.mark.parametrize('make', [clip, lambda: clip(True), slim], ids=['flat', 'custom', 'slim'])
def test_without_a_layer_is_the_model_that_skips_it(make, tower):
    for i in range(3):
        model = make()
        small = without_layer(model, tower, i + 1)
        assert len(blocks_of(small, tower)[0]) == 2 and not small.training
        blocks_of(model, tower)[0][i] = Skip()
        images, text, _ = batches(1)[0]
        with torch.no_grad():
            torch.testing.assert_close(
                small.encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                small.encode_text(text), model.encode_text(text), rtol=1e-4, atol=1e-5
            )


def test_drop_one_says_what_the_score_says_one_copy_at_a_time():
    model, alive = clip(image_layers=2), []

    def score(m):
        # the whole model
        assert sum(r() is not None for r in alive if r() is not m) == (0 if m is model else 1)
        alive.append(weakref.ref(m))
        return torch.tensor(10.0 * len(blocks_of(m, 'image')[0]) + len(blocks_of(m, 'text')[0]))

    rows = drop_one(model, score)
    assert isinstance(rows, Table) and [tuple(r.values()) for r in rows] == [
        ('image', i, 13.0, -10.0) for i in (1, 2)
    ] + [('text', i, 22.0, -1.0) for i in (1, 2, 3)]
    alive.clear()
    assert drop_one(model, score, 'text') == rows[2:]
    alive.clear()
    assert drop_one(model, score, ['text', 'image']) == rows[2:] + rows[:2]


def test_a_single_layer_stays():
    model, calls = clip(image_layers=1), []
    with pytest.raises(TinyclipError, match='image tower has one layer only'):
        without_layer(model, 'image', 1)
    with pytest.raises(TinyclipError, match='image tower has one layer only'):
        drop_one(model, calls.append, ['text', 'image'])
    assert not calls  # refused before any work
    assert len(drop_one(model, lambda m: 0, 'text')) == 3


RESNET = dict(
    embed_dim=8,
    vision_cfg=dict(image_size=32, layers=[1, 1, 1, 1], width=8, head_width=8, patch_size=None),
    text_cfg=dict(context_length=6, vocab_size=32, heads=2, width=8, layers=2),
)
DAVIT = RESNET | dict(
    vision_cfg=dict(timm_model_name='davit_tiny', image_size=64), custom_text=True
)


@pytest.mark.parametrize('cfg', [RESNET, DAVIT], ids=['resnet', 'davit'])
def test_towers_without_a_transformer(cfg):
    with torch.device('meta' if cfg is DAVIT else 'cpu'):
        model = build(cfg)
    for f in (
        lambda: layer_features(model, [], 'image'),
        lambda: without_layer(model, 'image', 1),
        lambda: drop_one(model, float),
    ):
        with pytest.raises(
            TinyclipError, match='image tower is no transformer.*the text tower alone'
        ):
            f()
    if cfg is RESNET:
        assert len(layer_features(model, batches(), 'text')) == 3


def test_bad_input():
    model = clip()
    for f in (
        lambda: layer_features(model, [], 'vision'),
        lambda: without_layer(model, 'vision', 0),
        lambda: drop_one(model, float, ['vision']),
    ):
        with pytest.raises(TinyclipError, match="no tower named 'vision'"):
            f()
    for i in (4, 0, -1, None, 'last'):
        with pytest.raises(TinyclipError, match='layers run from 1 to 3'):
            without_layer(model, 'text', i)
    images, text, _ = batches(1)[0]
    for bad, tower, says in (
        (images, 'image', r'\(3, 16, 16\)'),
        ([(images, torch.zeros(4).long())], 'text', r'has \(4,\), torch.int64'),
        ([(images,)], 'text', 'NoneType'),
        ([text], 'image', 'takes images'),
        ([images], 'text', 'takes token ids'),
        ([{'image': images}], 'image', 'has str'),
        ([], 'image', 'no batches'),
        (object(), 'text', 'yields none by itself'),
    ):
        with pytest.raises(TinyclipError, match=says):
            layer_features(model, bad, tower)
    for bad in ({'top1': 1.0}, torch.zeros(2), None):
        with pytest.raises(TinyclipError, match='one number'):
            drop_one(model, lambda m: bad)
    with pytest.raises(TinyclipError, match='still has its masks'):
        layer_features(MaskedCLIP(model), batches(), 'text')


def test_figures():
    maps = {'image': torch.eye(13), 'text': [[1.0, 0.5], [0.5, 1.0]]}
    fig = similarity_map(maps, 'a title')
    assert (
        [len(d.x) for d in fig.data] == [13, 2]
        and fig.data[0].x[0] == 'input'
        and fig.data[1].x[1] == '1'
    )
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)
    assert len(similarity_map({'text': maps['text']}).data) == 1
    rows = Table(
        [
            dict(tower='image', layer=1, score=0.5, change=-0.25),
            dict(tower='text', layer=1, score=0.7, change=-0.05),
            dict(tower='text', layer=2, score=0.75, change=0.0),
        ]
    )
    fig = drop_bars(rows)
    assert [list(d.y) for d in fig.data] == [[0.5], [0.7, 0.75], [0.75, 0.75]] and list(
        drop_bars(rows, 0.8).data[-1].y
    ) == [0.8, 0.8]
    for f in (lambda: similarity_map({}), lambda: drop_bars(Table())):
        with pytest.raises(TinyclipError, match='to draw'):
            f()
