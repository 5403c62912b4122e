"""Training from caches: the same as with the teacher, from one or several, resumed, and refused
where it does not fit"""

import gc
import json
import signal
import weakref

import pytest
import torch
import torch.nn.functional as F
from caches import *  # with the fixture `data`
from shards import shard
from test_distill import Pairs, different, when

from tinyclip.cli import train as cli
from tinyclip.cli.main import main
from tinyclip.core import TinyclipError
from tinyclip.data import open_pairs
from tinyclip.data.cache import encode_views, write_cache
from tinyclip.data.cached import CachedBatch, cached_pairs
from tinyclip.data.sources import as_source, mix
from tinyclip.distill import CalibratedDistiller, Distiller
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import Features, Objective
from tinyclip.train.step import step
from tinyclip.zoo import load as load_model

# --- who may read


def test_readers_must_fit(data, tmp_path):
    folder = tmp_path / 'c'
    with pytest.raises(TinyclipError, match='holds no cache'):
        opened(data, folder)
    written(data, folder)
    with pytest.raises(TinyclipError, match='different parts of a picture'):
        cached_pairs(data, folder, VAL, TOKENIZER, 4)
    index = json.loads((folder / 'cache.json').read_text())
    drawn = index['preprocess'].pop('draws')  # as caches were once written
    (folder / 'cache.json').write_text(json.dumps(index))
    with pytest.raises(TinyclipError, match='another preprocess'):
        cached_pairs(data, folder, VAL, TOKENIZER, 4)
    opened(data, folder)
    index['preprocess']['draws'] = drawn
    (folder / 'cache.json').write_text(json.dumps(index))
    # a student's own tokens: of the same captions, see test_two_readers
    cached_pairs(data, folder, TRAIN, OTHER, 4)
    with pytest.raises(TinyclipError, match='other captions.*caption column'):
        opened(as_source(data, caption_column='captions'), folder)
    with pytest.raises(TinyclipError, match='another teacher'):
        opened(data, folder, teacher=clip(1))
    opened(data, folder, teacher=clip())
    opened(str(tmp_path / 'data' / '1.tar'), folder)  # some of the shards
    with pytest.raises(TinyclipError, match='batch_size=0'):
        opened(data, folder, batch_size=0)
    with pytest.raises(TinyclipError, match='Only webdataset shards'):
        opened('shapes', folder)
    with pytest.raises(TinyclipError, match='Only webdataset shards'):
        opened(mix({data: 1}), folder)


def test_damaged_answers_are_skipped(data, tmp_path):
    "Rows that are no safetensors: the sample is left out and counted, the others are used"
    written(data, tmp_path / 'c')
    path = sorted((tmp_path / 'c').glob('*.tar'))[0]
    raw = bytearray(path.read_bytes())
    raw[512:520] = b'\xff' * 8  # the length of the first header
    path.write_bytes(raw)
    pairs = opened(data, tmp_path / 'c')
    # 29 in batches of 6
    assert sum(len(b.image) for b in pairs.epoch(0)) == 24 and dict(pairs.skipped) == {
        'damaged answers': 1
    }


# --- several teachers


def second(dim=24, scale=40.0):  # another width, another temperature
    teacher = clip(1, 48, dim)
    teacher.logit_scale.data.fill_(scale).log_()
    return teacher


def test_several_teachers_agree_by_their_mean_logits(data, tmp_path):
    """Against live teachers and a loss written down in float64: own temperatures and a fixed
    one, whole and in tiles"""
    teachers = clip(), second()
    for t, name in zip(teachers, 'ab'):
        written(data, tmp_path / name, t)
    pairs = opened(data, [tmp_path / 'a', tmp_path / 'b'])
    for epoch in (0, 1):
        batch = next(pairs.epoch(epoch))
        plain = next(open_pairs(data, TRAIN, TOKENIZER, 6).epoch(epoch))
        assert (
            torch.equal(batch.image, plain.image)
            and torch.equal(batch.text, plain.text)
            and batch.teacher_image.shape == batch.teacher_text.shape == (6, 40)
        )
        for k in ROWS:
            assert (getattr(batch, k).norm(dim=1) - 1).abs().max() < 1e-6
        with torch.no_grad():
            live = [
                (
                    t.logit_scale.exp().double(),
                    F.normalize(t.encode_image(plain.image).double(), dim=1)
                    @ F.normalize(t.encode_text(plain.text).double(), dim=1).T,
                )
                for t in teachers
            ]
        student = Features(*(F.normalize(torch.randn(6, 12), dim=1) for _ in 'it'), 50.0)
        theirs = Features(batch.teacher_image, batch.teacher_text, batch.teacher_scale)
        mean = sum(s * c for s, c in live) / 2
        total = sum(s for s, _ in live)
        for scale, logits in (('own', mean), (50.0, 50 * sum(s / total * c for s, c in live))):
            own = 50 * (student.image.double() @ student.text.double().T)
            want = sum(
                -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
                for s, t in ((own, logits), (own.T, logits.T))
            )
            for tile in (None, 4):
                assert (
                    abs(Objective(teacher_scale=scale, tile=tile)(student, theirs)['loss'] - want)
                    < 1e-5 * want
                )
        geometric = F.normalize(
            ((live[0][0] * live[0][1]).softmax(1) * (live[1][0] * live[1][1]).softmax(1)).sqrt(),
            p=1,
            dim=1,
        )
        assert (
            (batch.teacher_scale * batch.teacher_image @ batch.teacher_text.T).softmax(1)
            - geometric
        ).abs().max() < 1e-5


def test_one_teacher_in_a_list_is_one_teacher(data, tmp_path):
    written(data, tmp_path / 'a')
    a = opened(data, tmp_path / 'a')
    b = opened(data, [tmp_path / 'a'])
    assert a.teacher == b.teacher and same(list(a.epoch(0)), list(b.epoch(0)))


def test_several_caches_must_fit(data, tmp_path):
    a, b = tmp_path / 'a', tmp_path / 'b'
    written(data, a)
    written(data, b, second())
    both = opened(data, [a, b], teacher=second())
    with pytest.raises(TinyclipError, match='another teacher'):
        opened(data, [a, b], teacher=clip(5))
    with pytest.raises(TinyclipError, match='empty list'):
        opened(data, [])
    with pytest.raises(TinyclipError, match='same teacher'):
        opened(data, [a, b, str(a)])
    for kw, message in (
        (dict(views=3), 'views=2 and views=3'),
        (dict(seed=1), 'seed=0 and seed=1'),
    ):
        written(data, tmp_path / message, clip(2), **kw)
        with pytest.raises(TinyclipError, match=f'of other crops, {message}'):
            opened(data, [a, tmp_path / message])
    write_cache(data, clip(2), VAL, TOKENIZER, tmp_path / 'val', precision='fp32', views=2)
    with pytest.raises(TinyclipError, match="cache in '.*val' leaves nothing to chance"):
        opened(data, [a, tmp_path / 'val'])
    nan = clip(2)
    plain = nan.encode_image

    def broken(x):
        y = plain(x)
        y[2] = float('nan')
        return y

    nan.encode_image = broken
    written(data, tmp_path / 'holes', nan, views=2)
    pairs = opened(data, [a, tmp_path / 'holes', b], batch_size=9)
    assert len(list(pairs.epoch(0))) == 3 and pairs.skipped == {'not in the cache': 3}
    assert next(pairs.epoch(1)).teacher_image.shape == (9, 56)
    (b / '2.tar.json').unlink()
    with pytest.raises(TinyclipError, match="'.*b' has no answers for the shard '2.tar'"):
        opened(data, [a, b])
    assert both.teacher['parameters'][0] != both.teacher['parameters'][1]


def test_a_run_with_several_teachers_resumes_to_the_bit(data, tmp_path):
    written(data, tmp_path / 'a', dtype='float16')
    written(data, tmp_path / 'b', second(), dtype='bfloat16')

    def both():
        return opened(data, [tmp_path / 'a', tmp_path / 'b'])

    whole = job(both()).fit(8).student
    with pytest.raises(KeyboardInterrupt):
        job(
            both(),
            folder=tmp_path / 'run',
            listeners=[when('log', 5, lambda: signal.raise_signal(signal.SIGINT))],
        ).fit(8)
    assert not different(
        whole, job(both(), folder=tmp_path / 'run', student=clip(4)).fit(8, resume=True).student
    )
    with pytest.raises(TinyclipError, match='belongs to another run: cache is'):
        job(opened(data, tmp_path / 'a'), folder=tmp_path / 'run').fit(8, resume=True)
    # features are compared through a projection to the widths of all teachers together
    compared = job(both(), folder=tmp_path / 'feature', objective='feature')
    assert compared.fit(1).finished
    state = torch.load(tmp_path / 'feature/checkpoint-000001/trainer.pt', weights_only=True)
    assert state['projection']['image.weight'].shape == (40, 16)


# --- training


def test_a_step_is_the_step_with_the_teacher(data, tmp_path):
    "Losses and gradients, with an objective that looks at the teacher's own temperature"
    written(data, tmp_path / 'c')
    written(data, tmp_path / 'h', dtype='float16')
    objective = Objective(['affinity', 'contrastive'], teacher_scale='own')

    def taken(batch, teacher):
        student = clip(3)
        losses = step(student, teacher, batch, objective)
        losses['loss'].backward()
        return {k: v.item() for k, v in losses.items()}, [
            p.grad for p in student.parameters() if p.grad is not None
        ]

    want, grads = taken(next(open_pairs(data, TRAIN, TOKENIZER, 6).epoch(0)), clip())
    for folder, off in (('c', 1e-6), ('h', 1e-3)):
        found, g = taken(next(opened(data, tmp_path / folder).epoch(0)), None)
        assert set(found) == set(want) and all(
            abs(found[k] - want[k]) < off * max(1, abs(want[k])) for k in want
        )
        assert all((a - b).norm() <= 10 * off * b.norm() + 1e-6 for a, b in zip(g, grads))
    own = CachedBatch(
        *next(open_pairs(data, TRAIN, TOKENIZER, 6).epoch(0)),
        *(
            f.reshape(6, -1)
            for f in encode_views(
                clip(),
                *(lambda b: (b.image[:, None], b.text))(
                    next(open_pairs(data, TRAIN, TOKENIZER, 6).epoch(0))
                ),
            )
        ),
        clip().logit_scale.exp().detach(),
    )
    found = taken(own, None)[0]  # asked with the same batch: to the rounding of its products
    assert found.keys() == want.keys()
    assert all(abs(found[k] - want[k]) <= 1e-6 * abs(want[k]) for k in want)


def job(pairs, teacher=None, student=None, **kw):
    return Distiller(
        student or clip(3),
        teacher,
        pairs,
        **dict(lr=1e-3, log_every=1, device='cpu', precision='fp32', progress=False) | kw,
    )


def test_a_run_without_a_teacher_is_the_run_with_one(data, tmp_path):
    written(data, tmp_path / 'c')
    live, cached = ([], [])
    job(
        open_pairs(data, TRAIN, TOKENIZER, 6),
        clip(),
        listeners=[lambda e: e['event'] == 'log' and live.append(e['loss'])],
    ).fit(4)
    teacher = clip()

    def never(*_):
        raise AssertionError('the teacher was run')

    teacher.encode_image = teacher.encode_text = teacher.forward = never
    job(
        opened(data, tmp_path / 'c'),
        teacher,
        listeners=[lambda e: e['event'] == 'log' and cached.append(e['loss'])],
    ).fit(4)
    assert len(live) == len(cached) == 4 and max(abs(a - b) for a, b in zip(live, cached)) < 1e-4


def test_resumes_to_the_bit(data, tmp_path):
    written(data, tmp_path / 'c', dtype='float16')
    whole = job(opened(data, tmp_path / 'c')).fit(12).student
    with pytest.raises(KeyboardInterrupt):
        job(
            opened(data, tmp_path / 'c'),
            folder=tmp_path / 'run',
            listeners=[when('log', 7, lambda: signal.raise_signal(signal.SIGINT))],
        ).fit(12)
    r = job(opened(data, tmp_path / 'c'), folder=tmp_path / 'run', student=clip(4)).fit(
        12, resume=True
    )
    assert r.steps == 12 and not different(whole, r.student)
    written(data, tmp_path / 'other', clip(1))
    with pytest.raises(TinyclipError, match='belongs to another run: cache is'):
        job(opened(data, tmp_path / 'other'), folder=tmp_path / 'run').fit(12, resume=True)


def test_refusals(data, tmp_path):
    written(data, tmp_path / 'c')
    with pytest.raises(TinyclipError, match='another teacher'):
        job(opened(data, tmp_path / 'c'), clip(1))
    with pytest.raises(TinyclipError, match='teacher=None'):
        job(open_pairs(data, TRAIN, TOKENIZER, 6))
    assert job(Pairs(size=16), None, objective='contrastive').teacher is None


def test_a_teacher_that_answered_is_let_go(tmp_path, monkeypatch):
    "The student inherits and the fingerprint is compared; then nothing holds the teacher any more"
    shard(tmp_path / 'data' / '0.tar', [sample(i) for i in range(8)])
    where = ['--data', str(tmp_path / 'data' / '*.tar'), '--batch-size', '4']
    held, alive = [], []

    def watched(*a):
        loaded = load_model(*a)
        held.append(weakref.ref(loaded.model))
        return loaded

    class Looks(Distiller):
        def fit(self, *a, **kw):
            gc.collect()
            alive.append(held[-1]() is not None)
            return super().fit(*a, **kw)

    monkeypatch.setattr(cli, 'load', watched)
    monkeypatch.setattr(cli, 'Distiller', Looks)
    assert (
        main(
            ['cache', *where, '--teacher', 'shapes-teacher', '--out', str(tmp_path / 'c'), '--json']
        )
        == 0
    )
    train = [
        'distill',
        *where,
        '--teacher',
        'shapes-teacher',
        '--image-width',
        '.5',
        '--steps',
        '1',
        '--json',
    ]
    assert (
        main([*train, '--out', str(tmp_path / 'live')])
        == main([*train, '--cache', str(tmp_path / 'c'), '--out', str(tmp_path / 'cached')])
        == 0
    )
    assert alive == [True, False]
    assert json.loads((tmp_path / 'cached' / 'result.json').read_text())['losses']['affinity'] > 0


def test_stored_features_and_a_calibration(data, tmp_path):
    "The teacher is there for the calibration, and not while the student trains"
    teacher = clip()
    written(data, tmp_path / 'cache', teacher)
    job = CalibratedDistiller(
        inherit(teacher, manual(teacher, 0.5)),
        teacher,
        opened(data, tmp_path / 'cache'),
        calibrate=16,
        device='cpu',
        progress=False,
    )
    assert job.teacher is None
    assert job.fit(2).finished and job.reconstruction['samples'] == 16
