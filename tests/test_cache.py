"Caches of teachers' answers: what is written, interrupted at any moment, refused"

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from caches import *  # with the fixture `data`
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load
from shards import shard

from tinyclip.cli.main import main
from tinyclip.core import TinyclipError
from tinyclip.data import cache as cache_module
from tinyclip.data import open_pairs
from tinyclip.data.cache import (
    cache_size,
    encode_views,
    first_difference,
    teacher_fingerprint,
    valid_record,
    write_cache,
    write_shards,
)
from tinyclip.data.pairs import labelled
from tinyclip.data.samples import SamplingPlan, Skip
from tinyclip.data.shapes import Shapes
from tinyclip.data.shards import read_shard
from tinyclip.data.sources import as_source, mix
from tinyclip.zoo import load as load_model

# --- what is written


def test_answers_are_the_teachers_on_the_same_crops_and_captions(data, tmp_path):
    """Against the plain way: the pairs of `open_pairs` in the epoch of a view, and the teacher
    on them"""
    written(data, tmp_path / 'c')
    pairs = opened(data, tmp_path / 'c')
    plain = open_pairs(data, TRAIN, TOKENIZER, 6)
    for epoch in (0, 1):
        n = 0
        for a, b in zip(pairs.epoch(epoch), plain.epoch(epoch), strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.text, b.text)
            for found, want in zip(
                (a.teacher_image, a.teacher_text), encode_views(clip(), b.image[:, None], b.text)
            ):
                assert (found - want.reshape(found.shape)).abs().max() < 1e-6
            n += 1
        assert n == 5


def test_later_epochs_show_the_views_again(data, tmp_path):
    """Epoch 2 has the crops of epoch 0, in another order and with captions of its own; rows
    belong to them"""
    written(data, tmp_path / 'c')

    def crops(e):
        return {
            round(v, 3)
            for b in opened(data, tmp_path / 'c').epoch(e)
            for v in b.image.double().sum((1, 2, 3)).tolist()
        }

    assert crops(0) == crops(2) != crops(1) == crops(3)
    pairs = opened(data, tmp_path / 'c')
    texts = [torch.cat([b.text for b in pairs.epoch(e)]) for e in (0, 2)]
    assert not torch.equal(*texts)
    for b in pairs.epoch(2):
        for found, want in zip(
            (b.teacher_image, b.teacher_text), encode_views(clip(), b.image[:, None], b.text)
        ):
            assert (found - want.reshape(found.shape)).abs().max() < 1e-6


def test_crops_have_the_seed_of_the_cache_and_captions_their_own(data, tmp_path):
    written(data, tmp_path / 'c', seed=5)
    pairs = opened(data, tmp_path / 'c', seed=7)

    def crops(p):
        return sorted(
            round(v, 3) for b in p.epoch(0) for v in b.image.double().sum((1, 2, 3)).tolist()
        )

    assert crops(pairs) == crops(open_pairs(data, TRAIN, TOKENIZER, 6, seed=5))
    assert torch.equal(
        next(pairs.epoch(0)).text, next(open_pairs(data, TRAIN, TOKENIZER, 6, seed=7).epoch(0)).text
    )
    b = next(pairs.epoch(0))
    assert (
        encode_views(clip(), b.image[:, None], b.text)[0][:, 0] - b.teacher_image
    ).abs().max() < 1e-6


@pytest.mark.parametrize('dtype, off', [('float16', 1e-3), ('bfloat16', 1e-2)])
def test_half_precision_costs_its_rounding(data, tmp_path, dtype, off):
    written(data, tmp_path / 'full')
    small = written(data, tmp_path / 'half', dtype=dtype)
    a, b = (next(opened(data, tmp_path / n).epoch(0)) for n in ('full', 'half'))
    for k in ROWS:
        x, y = getattr(a, k), getattr(b, k)
        assert (
            0 < (x - y).abs().max() < off
            and (y.norm(dim=-1) - 1).abs().max() < 1e-6
            and y.dtype == torch.float32
        )
    assert small['bytes'] <= sum(p.stat().st_size for p in (tmp_path / 'full').glob('*.tar'))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_the_size_is_known_beforehand(data, tmp_path, dtype):
    size = cache_size(data, 16, views=3, dtype=dtype, look=None)
    assert (
        size
        == written(data, tmp_path / 'c', dtype=dtype, views=3)['bytes']
        == sum(p.stat().st_size for p in (tmp_path / 'c').glob('*.tar'))
    )
    assert abs(cache_size(data, 16, views=3, dtype=dtype, look=1) - size) < 0.4 * size


@pytest.mark.filterwarnings('ignore:.*loader workers busy|This DataLoader')
def test_workers_change_nothing(data, tmp_path):
    written(data, tmp_path / 'a')
    written(data, tmp_path / 'b', workers=2, batch_size=4)
    for n in range(3):
        a, b = (list(read_shard(tmp_path / f / f'{n}.tar')) for f in 'ab')
        assert (
            [r['__key__'] for r in a]
            == [r['__key__'] for r in b]
            == [f'dir/{i:04}' for i in range(10 * n, 10 * n + 10)]
        )
        for r, s in zip(a, b):
            r, s = load(r['safetensors']), load(s['safetensors'])
            assert all((r[k] - s[k]).abs().max() < 1e-6 for k in ('image', 'text'))
    assert same(
        list(opened(data, tmp_path / 'a').epoch(1)),
        list(opened(data, tmp_path / 'a', workers=2).epoch(1)),
    )


def counted(encode, sizes):
    return lambda x: (sizes.append(len(x)), encode(x))[1]


def test_the_teacher_gets_many_pictures_at_a_time(data, tmp_path):
    for size, want in ((8, [8, 8, 4]), (256, [20])):
        teacher, seen = clip(), []
        teacher.encode_image = counted(teacher.encode_image, seen)
        written(data, tmp_path / str(size), teacher, batch_size=size)
        assert seen == want * 3


WORKER = '''
import sys; sys.path.insert(0, {here!r})
from test_cache import *
name = f"printed-{{os.environ['RANK']}}.json"
with open(Path({folder!r}) / name, 'w') as f, contextlib.redirect_stdout(f):
    sys.exit(main({argv!r}))
'''


def argv(data, out):
    return [
        'cache',
        '--data',
        data,
        '--teacher',
        'shapes-teacher',
        '--out',
        str(out),
        '--views',
        '2',
        '--device',
        'cpu',
        '--precision',
        'fp32',
        '--dtype',
        'float32',
        '--json',
    ]


def in_two_processes(tmp_path, argv):
    "`tinyclip` under torchrun; each process prints into a file of its own"
    (tmp_path / 'worker.py').write_text(
        WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path), argv=argv)
    )
    return subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(tmp_path / 'worker.py'),
        ],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
        timeout=900,
    )


def test_two_processes_write_what_one_writes(data, tmp_path, capsys):
    """As `torchrun -m tinyclip cache` does: each takes its share, and together the files are
    those of one process"""

    assert main(argv(data, tmp_path / 'one')) == 0
    alone = json.loads(capsys.readouterr().out)
    out = in_two_processes(tmp_path, argv(data, tmp_path / 'two'))
    assert out.returncode == 0, out.stderr[-3000:]
    results = [json.loads((tmp_path / f'printed-{r}.json').read_text()) for r in (0, 1)]
    assert [(s['process'], s['of'], s['shards'], s['found']) for s in results] == [
        (0, 2, 2, 0),
        (1, 2, 1, 0),
    ]
    assert all(sum(s[k] for s in results) == alone[k] for k in ('samples', 'captions', 'bytes'))

    def files(out):
        return sorted(p.name for p in (tmp_path / out).iterdir())

    assert files('one') == files('two')
    for name in files('one'):
        if name.endswith('json'):
            assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()
            continue
        a, b = (list(read_shard(tmp_path / out / name)) for out in ('one', 'two'))
        assert [r['__key__'] for r in a] == [r['__key__'] for r in b] and len(a) == 10
        for r, s in zip(a, b):
            r, s = load(r['safetensors']), load(s['safetensors'])
            assert all((r[k] - s[k]).abs().max() < 1e-5 for k in ('image', 'text'))


# --- interrupted, broken


def test_goes_on_where_it_stopped(data, tmp_path):
    class Stop(Exception):
        pass

    def stop(r):
        if r['shard'] == '1.tar':
            raise Stop

    with pytest.raises(Stop):
        written(data, tmp_path / 'c', on_shard=stop)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'c').glob('*.tar')}
    assert set(before) == {'0.tar', '1.tar'}
    with pytest.raises(TinyclipError, match="no answers for the shard '2.tar'"):
        opened(data, tmp_path / 'c')
    r = written(data, tmp_path / 'c')
    assert (r['found'], r['shards'], r['samples'], r['captions']) == (
        2,
        3,
        30,
        sum(1 + i % 3 for i in range(10)) * 3,
    )
    assert all((tmp_path / 'c' / n).stat().st_mtime_ns == t for n, t in before.items())


def killed_at(moment, write, folder):
    """Run `write` in a child and kill it at this file operation, tar member or call of the
    teacher; returns how many there were, None if it was killed"""
    read, answer = os.pipe()
    if not (pid := os.fork()):
        signal.alarm(60)
        torch.set_num_threads(1)
        n = [0]

        def tick(*_):
            n[0] += 1
            if n[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        def before(f):
            return lambda *a, **kw: (tick(), f(*a, **kw))[1]

        teacher = clip()
        teacher.encode_image = before(teacher.encode_image)
        tarfile.TarFile.addfile = before(tarfile.TarFile.addfile)
        sys.addaudithook(
            lambda event, args: (
                event in ('open', 'os.rename', 'os.remove', 'os.chmod')
                and str(folder) in str(args[0])
                and tick()
            )
        )
        with contextlib.suppress(BaseException):
            write(teacher)
            os.write(answer, str(n[0]).encode())
        os._exit(0)
    os.close(answer)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(read) as f:
        moments = f.read()
    assert moments or os.WTERMSIG(status) == signal.SIGKILL
    return int(moments) if moments else None


@pytest.mark.filterwarnings('ignore:.*fork')
def test_kills_at_any_moment_cost_nothing(tmp_path):
    """SIGKILL twice, at random moments: nothing half-written counts, and the files in the end
    are those of a process that nobody disturbed"""
    for s in range(3):
        shard(tmp_path / 'data' / f'{s}.tar', [sample(5 * s + i) for i in range(5)], 5 * s)
    data = str(tmp_path / 'data' / '*.tar')
    whole = tmp_path / 'whole'
    c = tmp_path / 'c'

    def held(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    def write(teacher):
        return written(data, c, teacher, batch_size=3)

    written(data, whole, batch_size=3)
    moments = killed_at(None, write, c)
    assert moments > 40 and held(c) == held(whole)
    rng = random.Random(0)
    for moment in sorted(rng.sample(range(1, moments), 12)) + [moments]:
        shutil.rmtree(c)
        assert killed_at(moment, write, c) is None
        # none stands half-written under its name
        assert all(p.read_bytes() == (whole / p.name).read_bytes() for p in c.glob('*.tar'))
        done = [u for u in as_source(data).urls if valid_record(c, u)]
        with (
            contextlib.nullcontext()
            if len(done) == 3
            else pytest.raises(TinyclipError, match='holds no cache|no answers for the shard')
        ):
            opened(data, c)
        killed_at(rng.randrange(1, moments), write, c)
        assert written(data, c, batch_size=3)['found'] >= len(done)
        assert held(c) == held(whole)


def test_the_record_of_other_answers_goes_first(data, tmp_path):
    """A shard that changed is asked about again; killed before its new record is there, the old
    one must not vouch for it when the old data come back"""
    written(data, tmp_path / 'c')
    one = tmp_path / 'data' / '1.tar'
    old = one.read_bytes()
    shard(one, [sample(10 + i, 1 + i % 3) for i in reversed(range(10))], 10)
    teacher = clip()

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    teacher.encode_image = stop
    with pytest.raises(Stop):
        written(data, tmp_path / 'c', teacher)
    one.write_bytes(old)
    with pytest.raises(TinyclipError, match="no answers for the shard '1.tar'"):
        opened(data, tmp_path / 'c')


def test_a_failure_within_a_shard_leaves_none_of_it(data, tmp_path):
    teacher = clip()
    calls, plain = [], teacher.encode_text

    def fails(x):
        calls.append(1)
        if len(calls) > 3:
            raise OSError('no space left')
        return plain(x)

    teacher.encode_text = fails
    with pytest.raises(OSError):
        written(data, tmp_path / 'c', teacher, batch_size=8)
    assert not [
        p
        for p in (tmp_path / 'c').iterdir()
        if p.name != 'cache.json' and not p.name.startswith('0.tar')
    ]


def test_broken_samples_are_left_out_and_counted(tmp_path):
    good = [sample(i) for i in range(10)]
    bad = [dict(good[0], png=b'no picture'), dict(txt='no image'), dict(png=picture(1))]
    shard(tmp_path / 'data' / '0.tar', [*good[:4], bad[0], *good[4:7], bad[1], bad[2], *good[7:]])
    shard(tmp_path / 'data' / '1.tar', [bad[0], bad[0]])  # nothing in it is usable
    data = str(tmp_path / 'data' / '*.tar')
    r = written(data, tmp_path / 'c')
    assert r['samples'] == 10 and r['skipped'] == {
        'broken image': 3,
        'no image': 1,
        'no caption file': 1,
    }
    pairs = opened(data, tmp_path / 'c', batch_size=5)
    assert len(list(pairs.epoch(0))) == 2 and dict(pairs.skipped) == {
        'not in the cache': 3,
        'no image': 1,
        'no caption file': 1,
    }


def test_answers_that_are_no_numbers_are_left_out(data, tmp_path):
    teacher = clip()
    plain = teacher.encode_image

    def broken(x):
        y = plain(x)
        y[1] = float('nan')
        return y

    teacher.encode_image = broken
    r = written(data, tmp_path / 'c', teacher)
    assert r['skipped'] == {'teacher not finite': 3} and r['samples'] == 27


def test_other_captions_are_noticed(data, tmp_path):
    written(data, tmp_path / 'c')
    tar = tmp_path / 'c' / '0.tar'
    rows = {r['__key__']: r['safetensors'] for r in read_shard(tar)}
    first, second = sorted(rows)[:2]  # one caption and two: their answers change places
    rows[first], rows[second] = rows[second], rows[first]
    with tarfile.open(tar, 'w') as t:
        for k, v in rows.items():
            info = tarfile.TarInfo(f'{k}.safetensors')
            info.size = len(v)
            t.addfile(info, io.BytesIO(v))
    pairs = opened(data, tmp_path / 'c', batch_size=4)
    assert len(list(pairs.epoch(0))) == 7 and pairs.skipped['other captions than in the cache'] == 2


# --- what is refused


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(teacher=1), 'another teacher'),
        (dict(preprocess=VAL), 'another preprocess'),
        (dict(tokenizer=OTHER), 'another tokenizer'),
        (
            dict(tokenizer=open_clip.SimpleTokenizer(context_length=11)),
            'texts of 11 tokens, and this teacher takes 12',
        ),
        (
            dict(preprocess=image_transform_v2(PreprocessCfg(size=24), is_train=False)),
            r'images of \(24, 24\), and this teacher takes',
        ),
        (dict(seed=1), 'seed=0, not 1'),
        (dict(views=1), 'views=2, not 1'),
        (dict(dtype='float16'), "dtype='float32', not 'float16'"),
        (dict(reduced=False), 'reduced=True, not False'),
        (dict(dtype='int8'), "no dtype of a cache named 'int8'"),
    ],
)
def test_a_cache_is_not_mixed_up(data, tmp_path, change, message):
    written(data, tmp_path / 'c')
    kw = (
        dict(
            teacher=0,
            preprocess=TRAIN,
            tokenizer=TOKENIZER,
            views=2,
            dtype='float32',
            precision='fp32',
        )
        | change
    )
    with pytest.raises(TinyclipError, match=message):
        write_cache(
            data,
            clip(kw.pop('teacher')),
            kw.pop('preprocess'),
            kw.pop('tokenizer'),
            tmp_path / 'c',
            **kw,
        )


def test_shards_must_be_the_same(data, tmp_path):
    folder, one = tmp_path / 'c', tmp_path / 'data' / '1.tar'
    written(data, folder)
    size = one.stat().st_size
    shard(one, [sample(10 + i, 1 + i % 3) for i in reversed(range(10))], 10)
    assert one.stat().st_size == size
    with pytest.raises(TinyclipError, match="'1.tar' is not the one"):
        opened(data, folder)
    assert written(data, folder)['found'] == 2  # asks again about this one
    opened(data, folder)
    (folder / '2.tar').write_bytes((folder / '2.tar').read_bytes()[:-512])
    with pytest.raises(TinyclipError, match="'2.tar'.*damaged"):
        opened(data, folder)
    shutil.copytree(tmp_path / 'data', tmp_path / 'again')
    with pytest.raises(TinyclipError, match='names more than one shard'):
        opened([data, str(tmp_path / 'again' / '*.tar')], folder)
    with pytest.raises(TinyclipError, match='a folder of its own'):
        written(data, tmp_path / 'data')


def test_fingerprints_of_models_and_transforms():
    own, half = teacher_fingerprint(clip()), clip().half()
    assert own == teacher_fingerprint(copy.deepcopy(clip())) != teacher_fingerprint(clip(1))
    assert teacher_fingerprint(half) == teacher_fingerprint(copy.deepcopy(half)) != own

    def of(t):
        return cache_module.transform_fingerprint(t)

    def here(a, b):
        return first_difference(dict(p=of(a)), dict(p=of(b)))

    def brighter(im):
        return TRAIN(im) + 0.5

    assert (
        here(
            TRAIN,
            image_transform_v2(
                PreprocessCfg(size=16), is_train=True, aug_cfg=dict(scale=(0.3, 1.0))
            ),
        )
        is None
    )
    assert here(TRAIN, image_transform_v2(PreprocessCfg(size=16), is_train=True)) == 'p'
    assert here(lambda im: TRAIN(im), brighter) == 'p'  # both say that they are a function


# --- other sources


def entries(source):
    return {
        (
            tuple(s.captions),
            s.label,
            s.image if isinstance(s.image, bytes) else Path(s.image).read_bytes(),
        )
        for c in as_source(source).chunks(SamplingPlan(shuffle=False))
        for s in c
        if not isinstance(s, Skip)
    }


def test_tables_and_folders_become_shards(tmp_path):
    for i in range(12):
        file = tmp_path / 'things' / f'{"ab"[i % 2]}_class' / f'{i}.v1.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    (tmp_path / 'things' / 'a_class' / 'broken.jpg').write_bytes(b'no picture')
    rows = [
        f'things/{"ab"[i % 2]}_class/{i}.v1.png,caption {k} of {i}'
        for i in range(12)
        for k in range(1 + i % 2)
    ]
    (tmp_path / 'pairs.csv').write_text(
        '\n'.join(['image,caption', *rows, 'things/gone.png,nothing'])
    )
    for source, left_out in (('pairs.csv', {'missing image': 1}), ('things', {'broken image': 1})):
        out = tmp_path / f'{source}-shards'
        assert write_shards(tmp_path / source, out, each=5) == dict(
            shards=3, samples=12, skipped=left_out
        )
        assert entries(str(out / '*.tar')) == {
            e for e in entries(tmp_path / source) if e[2] != b'no picture'
        }
        written(str(out / '*.tar'), tmp_path / f'{source}-cache')
        assert len(list(opened(str(out / '*.tar'), tmp_path / f'{source}-cache').epoch(0))) == 2
        with pytest.raises(
            TinyclipError, match='Only webdataset shards.*tinyclip.data.cache.write_shards'
        ):
            opened(str(tmp_path / source), tmp_path / f'{source}-cache')
        with pytest.raises(TinyclipError, match='holds something already'):
            write_shards(tmp_path / source, out)
    order = [
        s.captions[0]
        for s in as_source(str(tmp_path / 'things-shards' / '*.tar')).samples(
            as_source(str(tmp_path / 'things-shards' / '*.tar')).urls
        )
    ]
    assert order != sorted(order)  # classes are mixed
    assert labelled(str(tmp_path / 'things-shards' / '*.tar'), VAL, 4).source.classnames == [
        'a class',
        'b class',
    ]


def test_mixes_and_drawings_become_shards(data, tmp_path):
    "An epoch of a mix: a picture that comes twice is two samples; drawn ones are kept to the pixel"
    assert write_shards(mix([(data, 1), (data, 3)], length=48), tmp_path / 'mixed')['samples'] == 48
    assert (
        entries(str(tmp_path / 'mixed' / '*.tar')) <= entries(data)
        and len(entries(str(tmp_path / 'mixed' / '*.tar'))) >= 25
    )
    write_shards(Shapes('train', n=8), tmp_path / 'drawn')

    def pixels(s):
        return sorted(
            round(v, 3)
            for b in open_pairs(s, VAL, TOKENIZER, 8).epoch(0)
            for v in b.image.double().abs().sum((1, 2, 3)).tolist()
        )

    assert pixels(str(tmp_path / 'drawn' / '*.tar')) == pixels(Shapes('train', n=8))


def test_half_written_shards_are_not_left(data, tmp_path, monkeypatch):
    plain, calls = tarfile.TarFile.addfile, []

    def full(*a):
        calls.append(1)
        (_ for _ in ()).throw(OSError('no space left')) if len(calls) > 9 else None
        return plain(*a)

    monkeypatch.setattr(tarfile.TarFile, 'addfile', full)
    with pytest.raises(OSError):
        write_shards(data, tmp_path / 'out', each=4)
    assert {p.name for p in tmp_path.iterdir()} == {'data'}
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'x.csv').write_text('image,caption\ngone.png,nothing')
    with pytest.raises(TinyclipError, match='holds nothing to write'):
        write_shards(tmp_path / 'none' / 'x.csv', tmp_path / 'out')
    with pytest.raises(TinyclipError, match='each=0'):
        write_shards(data, tmp_path / 'out', each=0)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"shard": 3}', 'null', '{"teacher": 1}'])
def test_damaged_records_are_named(data, tmp_path, text):
    """A record beside a shard that says nothing sound is none; an index that lacks something is
    damaged"""
    written(data, tmp_path / 'c')
    record = sorted((tmp_path / 'c').glob('*.tar.json'))[0]
    whole = record.read_text()
    record.write_text(text)
    with pytest.raises(TinyclipError, match='no answers for the shard|are damaged'):
        opened(data, tmp_path / 'c')
    assert written(data, tmp_path / 'c')['found'] == 2  # asked again about this one
    opened(data, tmp_path / 'c')
    assert record.read_text() == whole
    (tmp_path / 'c' / 'cache.json').write_text(text)
    with pytest.raises(TinyclipError, match='is damaged'):
        opened(data, tmp_path / 'c')


def test_command_line(tmp_path, capsys):
    teacher, _, _ = load_model('shapes-teacher')
    shard(tmp_path / 'data' / '0.tar', [sample(i) for i in range(12)])
    where = [
        '--data',
        str(tmp_path / 'data' / '*.tar'),
        '--teacher',
        'shapes-teacher',
        '--batch-size',
        '4',
    ]
    assert main(['cache', *where, '--out', str(tmp_path / 'c'), '--views', '2']) == 0
    out, err = capsys.readouterr()
    assert (
        err.startswith('About 20.5 kB for 1 shards')
        and 'are free there' in err
        and '0.tar: 12 samples, 20.5 kB' in err
    )
    assert main(['cache', *where, '--out', str(tmp_path / 'c'), '--views', '2', '--json']) == 0
    r = json.loads(capsys.readouterr().out)
    assert (r['found'], r['samples'], r['captions']) == (1, 12, 24) and r['bytes'] == r['estimate']
    train = [
        'distill',
        *where,
        '--image-width',
        '.5',
        '--steps',
        '3',
        '--cache',
        str(tmp_path / 'c'),
        '--out',
        str(tmp_path / 'run'),
        '--json',
    ]
    assert main(train) == 0
    assert json.loads(capsys.readouterr().out)['losses']['affinity'] > 0
    assert main([*train[:-2], str(tmp_path / 'run2'), '--cache', str(tmp_path / 'nothing')]) == 2
    assert 'holds no cache' in capsys.readouterr().err
    student = str(tmp_path / 'run' / 'student')
    # it teaches, too
    assert (
        main(['cache', *where, '--teacher', student, '--out', str(tmp_path / 'd'), '--views', '2'])
        == 0
    )
    assert (
        main([*train[:-2], str(tmp_path / 'run3'), '--cache', str(tmp_path / 'd'), '--json']) == 0
    )
    assert json.loads((tmp_path / 'run3' / 'result.json').read_text())['arguments']['cache'] == [
        str(tmp_path / n) for n in 'cd'
    ]
    assert (
        len(
            next(map(json.loads, (tmp_path / 'run3' / 'events.jsonl').read_text().splitlines()))[
                'cache'
            ]['teacher']
        )
        == 2
    )
