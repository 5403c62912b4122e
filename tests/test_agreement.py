"Agreement against counting and written-out formulas, on real photographs, and with bad input"

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tinyclip.core import TinyclipError
from tinyclip.data.pairs import captioned, labelled
from tinyclip.evaluate import zero_shot
from tinyclip.evaluate.agreement import (
    Answers,
    agreement,
    kl_divergence,
    model_answers,
    top_k_overlap,
)
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import affinity_mimicking
from tinyclip.zoo import load


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def classes(n=30, k=5, d=8, seed=0):
    return Answers(
        unit(n, d, seed=seed), unit(k, d, seed=seed + 1), torch.arange(n) % k, 'classes', 10.0
    )


def pairs(n=20, m=40, d=8, seed=0):
    return Answers(
        unit(n, d, seed=seed), unit(m, d, seed=seed + 1), torch.arange(m) % n, 'pairs', 10.0
    )


def kl(s, t, scale):  # of the definition, in float64
    p, q = ((scale * a.double() @ b.double().T).softmax(1) for a, b in (t, s))
    return (p * (p.log() - q.log())).sum(1).mean().item()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(2, 40),
    st.integers(2, 30),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 99),
    st.sampled_from([1.0, 13.7, 50.0, 100.0]),
    st.integers(1, 50),
)
def test_divergence_and_overlap_by_definition(n, m, d, e, seed, scale, rows):
    s = (unit(n, d, seed=seed), unit(m, d, seed=seed + 1))
    t = (unit(n, e, seed=seed + 2), unit(m, e, seed=seed + 3))
    assert kl_divergence(*s, *t, scale, scale, rows) == pytest.approx(
        kl(s, t, scale), rel=1e-4, abs=1e-4
    )
    assert (
        kl_divergence(*s, *s, scale, scale, rows) == 0
        and top_k_overlap(*s, *s, m, rows)
        == top_k_overlap(*s, *s, 1, rows)
        == top_k_overlap(*s, *t, m, rows)
        == 1
    )
    if min(d, e) > 1:  # in one dimension everything is a tie
        k = 1 + seed % m
        first = [
            [set(r.tolist()) for r in (a @ b.T).argsort(1, descending=True)[:, :k]]
            for a, b in (s, t)
        ]
        assert top_k_overlap(*s, *t, k, rows) == pytest.approx(
            sum(len(a & b) for a, b in zip(*first)) / (n * k)
        )


def test_divergence_is_what_the_loss_can_still_lose():
    s = (unit(16, 8), unit(16, 8, seed=1))
    t = (unit(16, 6, seed=2), unit(16, 6, seed=3))
    for now, least, value in zip(
        affinity_mimicking(*s, *t),
        affinity_mimicking(*t, *t),
        (kl_divergence(*s, *t), kl_divergence(*s[::-1], *t[::-1])),
    ):
        assert (now - least).item() == pytest.approx(value, rel=1e-4)


def test_on_classes_by_counting():
    s, t = classes(seed=0), classes(d=6, seed=5)
    r = agreement(s, t, scale=20)
    picks = [(a.image @ a.text.T).argmax(1).tolist() for a in (s, t)]
    rows = list(zip(*picks, s.own.tolist()))

    def same(rows):
        return sum(a == b for a, b, _ in rows) / len(rows)

    assert r['agree'] == pytest.approx(same(rows))
    assert r['agree_right'] == pytest.approx(same([x for x in rows if x[1] == x[2]])) and r[
        'agree_wrong'
    ] == pytest.approx(same([x for x in rows if x[1] != x[2]]))
    assert (r['student_top1'], r['teacher_top1']) == tuple(
        pytest.approx(sum(x[i] == x[2] for x in rows) / 30) for i in (0, 1)
    )
    assert r['agree'] == pytest.approx(
        r['agree_right'] * r['teacher_top1'] + r['agree_wrong'] * (1 - r['teacher_top1'])
    )
    assert r['kl'] == pytest.approx(kl((s.image, s.text), (t.image, t.text), 20), rel=1e-4) and (
        r['n'],
        r['classes'],
    ) == (30, 5)
    x, y = ((a - a.mean(0)).double() for a in (s.image, t.image))
    assert r['cka'] == pytest.approx(
        (((x @ x.T) * (y @ y.T)).sum() / ((x @ x.T).norm() * (y @ y.T).norm())).item(), abs=1e-5
    )


def test_on_pairs_by_counting():
    s, t = pairs(seed=0), pairs(d=6, seed=5)
    r = agreement(s, t, k=4)
    assert set(r) == {f'{w}_{k}' for w in ('i2t', 't2i') for k in ('kl', 'agree', 'top4')} | {
        'cka_image',
        'cka_text',
        'images',
        'texts',
    }
    nearest = [
        [(a @ b.T).argmax(1) for a, b in ((m.image, m.text), (m.text, m.image))] for m in (s, t)
    ]
    for way, a, b in zip(('i2t', 't2i'), *nearest):
        assert r[f'{way}_agree'] == pytest.approx((a == b).double().mean().item())
    assert r['t2i_kl'] == pytest.approx(kl((s.text, s.image), (t.text, t.image), 50), rel=1e-4)


@pytest.mark.parametrize(
    'a',
    [classes(), classes(1, 3), pairs(), classes()._replace(text=unit(5, 8)[[0, 0, 1, 1, 1]])],
    ids=['classes', 'one image', 'pairs', 'ties'],
)
def test_a_model_agrees_with_itself(a):
    r = agreement(a, a)
    assert (
        all(v in (1, None) for k, v in r.items() if 'agree' in k)
        and r.get('i2t_top10', 1) == 1
        and all(v == 0 for k, v in r.items() if k.endswith('kl'))
    )
    assert (
        all(
            v is None or v == pytest.approx(1, abs=1e-5)
            for k, v in r.items()
            if k.startswith('cka')
        )
        and r.get('n', 2) > 1
        or r['cka'] is None
    )


def test_scales():
    s = classes()._replace(scale=7.0)
    t = classes(seed=5)._replace(scale=30.0)
    own = agreement(s, t, scale='own')
    assert (
        own['kl'] == pytest.approx(kl_divergence(s.image, s.text, t.image, t.text, 7.0, 30.0))
        and own['kl'] != agreement(s, t)['kl']
        and own['agree'] == agreement(s, t)['agree']
    )
    # the same cosines, another temperature
    assert agreement(s, s._replace(scale=30.0), scale='own')['kl'] > 0


def test_collapsed_and_perfect():
    t = classes()._replace(image=F.one_hot(torch.arange(30) % 5, 5).float(), text=torch.eye(5))
    flat = t._replace(image=torch.ones(30, 5) / 5**0.5)
    r = agreement(flat, t)
    assert (
        r['agree'] == pytest.approx(0.2)
        and r['cka'] is None
        and r['agree_wrong'] is None
        and r['student_top1'] == 0
        and r['kl'] > 1
    )


@functools.cache
def photographs(shared):
    return load(shared / 'teachers/cifar10'), [
        b
        for b, _ in zip(
            labelled(
                shared / 'data/cifar10/val-0000.tar',
                load(shared / 'teachers/cifar10').preprocess,
                100,
                classnames=shared / 'data/cifar10/classnames.txt',
            ),
            range(1),
        )
    ]


def test_photographs(shared):
    (teacher, _, tokenizer), batches = photographs(shared)
    names = (shared / 'data/cifar10/classnames.txt').read_text().split()
    student = inherit(teacher, manual(teacher, text_depth=0.5))
    modes = [m.training for m in student.train().modules()]
    encoded = model_answers(teacher, batches, tokenizer, names)
    r = agreement(student, encoded, batches, tokenizer, names)
    assert (
        r == agreement(student, teacher, batches, tokenizer, names)
        and [m.training for m in student.modules()] == modes
        and torch.is_grad_enabled()
    )
    for who, m in (('student', student), ('teacher', teacher)):
        assert r[f'{who}_top1'] == zero_shot(m, tokenizer, batches, names)['top1']
    assert (
        encoded.scale == pytest.approx(13.7, abs=0.05)
        and r['cka'] == pytest.approx(1, abs=1e-4)
        and 0 < r['agree'] < 1
        and r['n'] == 100
    )
    same = agreement(teacher, encoded, batches, tokenizer, names)
    assert (same['agree'], same['agree_right'], same['agree_wrong'], same['kl']) == (1, 1, 1, 0)


def test_photographs_with_captions(shared):
    teacher, preprocess, tokenizer = photographs(shared)[0]
    batches = [
        b
        for b, _ in zip(
            captioned(shared / 'data/flickr8k/val-0000.tar', preprocess, tokenizer, 20), range(2)
        )
    ]
    r = agreement(inherit(teacher, manual(teacher, image_width=0.5)), teacher, batches)
    assert (
        (r['images'], r['texts']) == (40, 200)
        and 0 < r['i2t_top10'] < 1
        and r['cka_text'] == pytest.approx(1, abs=1e-4)
        and r['cka_image'] < 1
        and r['i2t_kl'] > 0
    )


class Flat(nn.Module):
    "Takes features for images and for tokens"

    def __init__(self, d=4, **extra):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))
        self.d = d
        for k, v in extra.items():
            setattr(self, k, v)

    def encode_image(self, x, normalize=True):
        return F.normalize(x.flatten(1)[:, : self.d], dim=-1)

    def encode_text(self, t, normalize=True):
        return F.normalize(t.float()[:, : self.d] + 1, dim=-1)


def test_other_batches_are_refused():
    x = torch.randn(6, 1, 1, 4)
    own = torch.arange(6) % 3
    tokens = torch.arange(24).view(6, 4)

    wide, narrow = Flat(), Flat(3)

    def ask(batches, student=wide, teacher=narrow, **kw):
        return agreement(
            student,
            teacher,
            batches,
            **(
                dict(
                    tokenizer=lambda ts: torch.tensor([[len(t)] * 4 for t in ts]),
                    classnames=['a', 'bc', 'def'],
                )
                | kw
            ),
        )

    good, paired = [(x, own)], [(x, tokens, torch.arange(6))]
    assert ask(good)['n'] == 6 and ask(paired, k=3)['texts'] == 6
    for run, says in (
        (lambda: ask([]), 'no images'),
        (lambda: ask(None), 'give batches='),
        (lambda: ask(iter(good)), 'only once'),
        (lambda: ask([x]), r'A batch is \(image, label\)'),
        (lambda: ask([(x,)]), r'A batch is'),
        (lambda: ask(good, classnames=None), 'class names and a tokenizer'),
        (lambda: ask(good, tokenizer=None), 'class names and a tokenizer'),
        (lambda: ask(good, classnames=[]), 'no class names'),
        (
            lambda: ask([(x, own + 1)]),
            'do not belong to them: 6 for 6 images and 3 class names, from 1 to 3',
        ),
        (lambda: ask([(x, own[:4])]), 'do not belong'),
        (lambda: ask([(x, tokens, torch.arange(6) + 1)]), 'do not belong'),
        (lambda: ask([(x * float('nan'), own)]), 'not finite'),
        (lambda: ask(paired), 'first 10 of 6'),
        (lambda: ask(good, k=0), 'k=0'),
        (lambda: ask(good, scale=-1), 'scale=-1'),
        (lambda: ask(good, scale=float('nan')), 'scale=nan'),
        (lambda: ask(good, scale='own'), 'is for models with a logit scale'),
        (lambda: ask(paired, student=Flat(context_length=7)), 'texts are 4 and this model takes 7'),
        (lambda: ask(good, student=classes()), 'different data'),
        (lambda: agreement(classes(), pairs()), 'different data'),
        (
            lambda: agreement(classes(), classes()._replace(own=torch.zeros(30).long())),
            'different data',
        ),
        (lambda: agreement(classes(), classes(31)), 'different data'),
        (lambda: agreement(classes(k=5), classes(k=6)), 'different data'),
        (lambda: agreement(classes(), classes()._replace(text=unit(5, 7))), 'of one width'),
    ):
        with pytest.raises(TinyclipError, match=says) as e:
            run()
        assert '\n' not in str(e.value)
