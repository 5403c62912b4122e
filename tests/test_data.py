"""Data as users name them: their order, their shares for processes and workers, tables, folders,
and what is refused in one sentence"""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from samples import *  # its fixtures guard every test here
from shards import shard

from tinyclip.cli.main import main
from tinyclip.core import TinyclipError
from tinyclip.data import check, open_pairs, write_shards
from tinyclip.data import sources as sources_module
from tinyclip.data.pairs import captioned, labelled, worker_count
from tinyclip.data.samples import IndexedSource, Sample, SamplingPlan, Skip
from tinyclip.data.shapes import Shapes
from tinyclip.data.sources import SOURCES, as_source, mix

# --- order


@pytest.mark.parametrize('kind', ['shards', 'table', 'shapes'])
def test_same_order_again_whatever_the_workers(tmp_path, kind):
    source = (
        shards(tmp_path, 4)
        if kind == 'shards'
        else Shapes(n=70)
        if kind == 'shapes'
        else table(
            tmp_path, 'image,caption\n' + ''.join(f'{i}.jpg,caption {i}\n' for i in range(70)), 70
        )
    )
    first = list(open_(source, seed=5).epoch(2))
    for workers in (1, 2):
        assert same(first, list(open_(source, seed=5, workers=workers).epoch(2)))
    assert not same(first, list(open_(source, seed=5).epoch(3)))
    assert not same(first, list(open_(source, seed=6).epoch(2)))


@both
def test_resume_in_the_middle(tmp_path, workers):
    pairs = open_(shards(tmp_path), workers=workers)
    whole = list(pairs.epoch(1))
    assert same(whole[3:], list(pairs.epoch(1, start=3))) and not list(
        pairs.epoch(1, start=len(whole))
    )


@both
def test_every_pair_once(tmp_path, workers):
    got = rows(open_(shards(tmp_path, 3, 10), batch_size=5, workers=workers).epoch(0))
    assert got == caption_rows(*(f'caption {i}' for i in range(30)))


def test_shards_of_uneven_length(tmp_path):
    source = [
        shard(tmp_path / f'{s}.tar', [sample(100 * s + i) for i in range(n)], 100 * s)
        for s, n in enumerate((3, 50, 20, 35))
    ]
    first = list(open_(source, seed=1).epoch(0))
    assert len(first) == 27 and rows(first).total() == len(rows(first))
    for workers in (2, 4):
        assert same(first, list(open_(source, seed=1, workers=workers).epoch(0)))


def test_crops_differ_from_image_to_image_and_epoch_to_epoch(tmp_path):
    Image.radial_gradient('L').save(b := io.BytesIO(), 'PNG')
    pairs = open_(shard(tmp_path / 'a.tar', [{'png': b.getvalue(), 'txt': 'x'}] * 4))
    a, b = (next(pairs.epoch(e)).image for e in range(2))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a.sum(0), b.sum(0))


def test_batch_size_does_not_change_the_order():
    def flow(n):
        return torch.cat([b.image for b in open_(Shapes(n=48), n, seed=1).epoch(0)])

    assert torch.equal(flow(4), flow(16))


def test_length():
    assert len(open_(Shapes(n=43), 4)) == 10 == len(list(open_(Shapes(n=43), 4).epoch(0)))


def test_length_of_shards_is_unknown(tmp_path):
    with pytest.raises(TypeError, match='steps'):
        len(open_(shards(tmp_path)))


def test_one_caption_per_epoch_by_seed_and_name(tmp_path):
    def record(i):
        return json.dumps({'captions': [f'{w} {i}' for w in 'abc']})

    pairs = open_(
        shard(tmp_path / 'a.tar', [{'jpg': picture(i), 'json': record(i)} for i in range(8)]), 8
    )
    seen = [list(pairs.epoch(e))[0].text for e in range(12)]
    words = {e[0, 1].item() for e in [s[s[:, 2].argsort()] for s in seen]}
    assert len(words) == 3 and torch.equal(seen[4], list(pairs.epoch(4))[0].text)


def test_leaves_the_generators_alone():
    torch.manual_seed(1)
    a = torch.rand(2)
    torch.manual_seed(1)
    list(open_(Shapes(n=20)).epoch(0))
    list(open_(Shapes(n=20), workers=1).epoch(0))
    assert torch.equal(a, torch.rand(2))


# --- processes


def test_ranks_share_without_overlap(tmp_path):
    source = as_source(shards(tmp_path, 5, 4))
    keys = [
        [s.key for c in source.chunks(SamplingPlan(rank=r, world=2)) for s in c] for r in range(2)
    ]
    assert len(keys[0] + keys[1]) == 20 == len(set(keys[0] + keys[1]))


@pytest.mark.parametrize('kind', ['shards', 'table', 'mix'])
@pytest.mark.parametrize('world', [1, 2, 3])
def test_every_pair_once_whatever_the_ranks_and_workers(tmp_path, monkeypatch, kind, world):
    "Seven shards of uneven length, a table of 29 rows: nothing divides anything"
    uneven = [
        shard(tmp_path / f'{s}.tar', [sample(100 * s + i) for i in range(3 + s)], 100 * s)
        for s in range(7)
    ]
    n, source = 42, (lambda: uneven)
    if kind == 'table':
        n = 29 - 29 % world
        name = table(
            tmp_path, 'image,caption\n' + ''.join(f'{i}.jpg,caption {i}\n' for i in range(29)), 29
        )

        def source():
            return name

    if kind == 'mix':

        def source():
            return mix([(uneven, 3), (Shapes(n=40), 1)])

    expected = (
        {
            t
            for t in caption_rows(
                *(f'caption {100 * s + i}' for s in range(7) for i in range(3 + s))
            )
        }
        if kind != 'table'
        else {t for t in caption_rows(*(f'caption {i}' for i in range(29)))}
    )
    for workers in range(4):
        got, lengths = Counter(), []
        for rank in range(world):
            monkeypatch.setattr(
                'tinyclip.data.pairs.rank_and_world_size', lambda r=rank: (r, world)
            )
            one = rows(open_(source(), 1, workers=workers).epoch(1))
            got += one
            lengths.append(one.total())
        once = Counter({t: c for t, c in got.items() if t in expected})
        assert once.total() == n and set(once.values()) == {1}, (workers, once.total())
        if kind == 'table':
            assert set(lengths) == {n // world}


@pytest.mark.parametrize('cores,shards_,expected', [(3, 20, 3), (64, 20, 8), (1, 20, 1), (8, 5, 5)])
def test_workers_chosen_by_the_cores(tmp_path, monkeypatch, cores, shards_, expected):
    "One per core this process may use, at most eight, at most one per shard; shared between ranks"
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)), raising=False)
    source = as_source(shards(tmp_path, shards_, 1))
    assert worker_count(None, source, SamplingPlan()) == expected
    assert worker_count(None, source, SamplingPlan(world=5)) == min(expected, shards_ // 5)


def test_ranks_of_a_real_group(tmp_path, monkeypatch):
    "Ranks and world size are those of torch.distributed"
    dist.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1
    )
    try:
        assert len(open_(Shapes(n=40))) == 10
        monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
        got = []
        for rank in range(2):
            monkeypatch.setattr(dist, 'get_rank', lambda r=rank: r)
            pairs = open_(shards(tmp_path, 4, 8), workers=2)
            got.append(rows(pairs.epoch(0)))
        assert len(open_(Shapes(n=40))) == 5
    finally:
        dist.destroy_process_group()
    assert got[0] + got[1] == caption_rows(*(f'caption {i}' for i in range(32)))


def test_fewer_shards_than_processes(tmp_path, monkeypatch):
    monkeypatch.setattr('tinyclip.data.pairs.rank_and_world_size', lambda: (1, 4))
    with pytest.raises(TinyclipError, match='3 shards cannot be dealt to 4 processes'):
        list(open_(shards(tmp_path)).epoch(0))


def test_more_workers_than_shards(tmp_path):
    pairs = open_(shards(tmp_path, 2, 10), batch_size=5, workers=5)
    with pytest.warns(UserWarning, match='2 are used, not 5'):
        got = rows(pairs.epoch(0))
    assert got == caption_rows(*(f'caption {i}' for i in range(20)))


def test_workers_chosen(tmp_path):
    assert rows(open_(shards(tmp_path, 1, 10), batch_size=5, workers=None).epoch(0)).total() == 10
    with pytest.raises(TinyclipError, match='workers=-1'):
        list(open_(shards(tmp_path), workers=-1).epoch(0))


# --- ways to name shards


@pytest.mark.parametrize(
    'pattern,message',
    [
        ('none-*.tar', 'matches no file; the shards beside it: train-0000.tar'),
        ('train-{0000..0009}.tar', 'names 7 missing files'),
        ('train-{0000..00', 'no source|cannot be expanded'),
        ('nowhere/a.tar', 'matches no file; there are no shards'),
    ],
)
def test_patterns(tmp_path, pattern, message):
    shards(tmp_path)
    with pytest.raises(TinyclipError, match=message):
        open_(f'{tmp_path}/{pattern}')


def test_every_way_to_name_shards(tmp_path):
    urls = shards(tmp_path)
    braces = [urls[0], f'{tmp_path}/train-{{0001..0002}}.tar']
    for source in (
        urls,
        [Path(u) for u in urls],
        f'{tmp_path}/train-*.tar',
        f'{tmp_path}/train-{{0000..0002}}.tar',
        braces,
    ):
        assert len(as_source(source).urls) == 3
    with pytest.raises(TinyclipError, match='folder of shards'):
        open_(str(tmp_path))


def test_classes_in_shards(tmp_path):
    source = shard(tmp_path / 'a.tar', [{'jpg': picture(i), 'cls': str(i % 4)} for i in range(20)])
    with pytest.raises(TinyclipError, match='label without class names.*Give classnames='):
        list(open_(source).epoch(0))
    with pytest.raises(TinyclipError, match='no class names'):
        labelled(source, VAL)
    pairs = open_(source, classnames=['cat', 'dog', 'owl'], templates=['a {}'])
    got = rows(pairs.epoch(0))
    assert pairs.skipped == {'label outside the class names': 5} and set(got) <= set(
        caption_rows('a cat', 'a dog', 'a owl')
    )
    (tmp_path / 'classnames.txt').write_text('cat\ndog\nowl\nyak\n')  # found beside the shards
    test = labelled(source, VAL, batch_size=8)
    assert [l.tolist() for _, l in test] == [
        [0, 1, 2, 3] * 2,
        [0, 1, 2, 3] * 2,
        [0, 1, 2, 3],
    ] and test.classnames[3] == 'yak'
    with pytest.raises(TinyclipError, match='place for the class name'):
        open_(source, templates=['a photo'])


@both
def test_too_long_captions_are_counted(tmp_path, workers):
    pairs = open_(
        shard(tmp_path / 'a.tar', [sample(0, txt='cat ' * n) for n in (1, 10, 11, 30)]),
        workers=workers,
    )
    list(pairs.epoch(0))
    assert pairs.truncated == 2


@both
@pytest.mark.parametrize('known', [True, False])
def test_batch_larger_than_the_data(tmp_path, known, workers):
    source = Shapes(n=10) if known else shards(tmp_path, 2, 5)
    with pytest.raises(TinyclipError, match='batch_size=16 is larger than the 10'):
        list(open_(source, 16, workers=workers).epoch(0))


def test_a_worker_that_dies(tmp_path):
    "Killed from outside, as by a full memory"
    pairs = open_(shards(tmp_path), workers=2)
    pairs.collate_fn = _die
    with pytest.raises(TinyclipError, match='worker died'):
        list(pairs.epoch(0))


def _die(entries, order):
    os.kill(os.getpid(), signal.SIGKILL)


# --- tables and folders


def test_csv_with_a_missing_column(tmp_path):
    source = table(tmp_path, 'image,alt\n0.jpg,x\n')
    with pytest.raises(TinyclipError, match=r"\['image', 'alt'\].*caption_column="):
        open_(source)
    with pytest.raises(TinyclipError, match="no column 'al'"):
        open_(source, caption_column='al')
    assert rows(open_(source, 1, caption_column='alt').epoch(0)) == caption_rows('x')


@both
def test_csv_rows_that_lack_something(tmp_path, workers):
    pairs = open_(
        table(tmp_path, 'image,caption\n0.jpg,zero\n1.jpg,\ngone.jpg,x\n,y\n2.jpg\n0.jpg,again\n'),
        1,
        workers=workers,
    )
    assert len(list(pairs.epoch(0))) == 1
    assert (
        pairs.skipped == {'no caption': 2, 'missing image': 2}
        and 'gone.jpg in pairs.csv (line 4)' in pairs.culprits['missing image']
    )


@pytest.mark.parametrize(
    'name,text',
    [
        ('a.tsv', 'path\ttitle\n0.jpg\ta, b\n'),
        ('a.csv', 'file;text\n0.jpg;"a, b"\n'),
        ('b.csv', '\ufefffile,text\n0.jpg,"a, b"\n'),
    ],
)
def test_kinds_of_tables(tmp_path, name, text):
    assert rows(open_(table(tmp_path, text, name=name), 1).epoch(0)) == caption_rows('a, b')


def test_tables_that_are_none(tmp_path):
    with pytest.raises(TinyclipError, match='no table'):
        open_(str(tmp_path / 'no.csv'))
    with pytest.raises(TinyclipError, match='no rows'):
        open_(table(tmp_path, 'image,caption\n'))
    with pytest.raises(TinyclipError, match='no column'):
        open_(table(tmp_path, ''))


def test_folder_of_classes(tmp_path):
    root = folder(tmp_path / 'pets', {'cat': 3, 'guinea_pig': 4, 'yeti': 0})
    pairs = open_(root, 1, templates='a {}')
    assert rows(pairs.epoch(0)) == Counter(
        {k: n for c, n in (('a cat', 3), ('a guinea pig', 4)) for k in caption_rows(c)}
    )
    assert pairs.skipped == {'class folder without images': 1} and pairs.culprits[
        'class folder without images'
    ] == ['yeti in pets']
    test = labelled(root, VAL, classnames=['Cat', 'Pig', 'Yeti'])
    assert (
        [l.tolist() for _, l in test] == [[0] * 3 + [1] * 4]
        and test.classnames[1] == 'Pig'
        and len(test) == 1
    )
    with pytest.raises(TinyclipError, match='2 class names for 3 class folders'):
        labelled(root, VAL, classnames=['a', 'b'])
    with pytest.raises(TinyclipError, match='No folder directly in'):
        open_(tmp_path)


@pytest.mark.parametrize(
    'mode,format',
    [
        ('L', 'JPEG'),
        ('CMYK', 'JPEG'),
        ('RGBA', 'PNG'),
        ('L', 'PNG'),
        ('RGB', 'WEBP'),
        ('RGB', 'GIF'),
    ],
)
def test_modes_and_formats(tmp_path, mode, format):
    source = shard(
        tmp_path / 'a.tar',
        [{format.lower().replace('jpeg', 'jpg'): picture(9, format, mode), 'txt': 'x'}],
    )
    image = next(open_(source, 1).epoch(0)).image
    assert image.shape == (1, 3, 16, 16) and image.dtype == torch.float32 and image.isfinite().all()


# --- sources and arguments that are none


@pytest.mark.parametrize('source', ['photos.zip', 'nothing', 42, [], None, [1, 2], 'http//x'])
def test_no_source(source):
    with pytest.raises(TinyclipError, match='Possible:'):
        open_(source)


class Lines(IndexedSource):
    "A throw-away kind of source: lines of `name|caption` beside the images"

    usage = "lines ('pairs.lines')"

    def __init__(self, path, separator='|'):
        self.path = Path(path)
        self.rows = [line.split(separator) for line in self.path.read_text().splitlines()]

    @classmethod
    def recognises(cls, source):
        return isinstance(source, (str, Path)) and Path(source).suffix == '.lines'

    def __len__(self):
        return len(self.rows)

    def read(self, indices):
        return [self.one(*self.rows[i]) for i in indices]

    def one(self, name, caption):
        if not caption:
            return Skip('no caption', name, self.path.name)
        return Sample(name, self.path.name, self.path.parent / name, [caption])

    def __repr__(self):
        return f'{len(self)} lines'


@pytest.fixture
def lines(tmp_path, monkeypatch):
    "A file that only `Lines` reads, once that is an entry of `SOURCES`"
    for i in range(12):
        (tmp_path / f'{i}.jpg').write_bytes(picture(i))
    path = tmp_path / 'pairs.lines'
    path.write_text(''.join(f'{i}.jpg|{f"caption {i}" if i else ""}\n' for i in range(12)))
    with pytest.raises(TinyclipError, match='no source'):
        as_source(path)
    monkeypatch.setattr(sources_module, 'SOURCES', [*SOURCES, Lines])
    return path


@both
def test_a_source_is_a_class_and_an_entry(lines, tmp_path, workers):
    pairs = open_(lines, 1, seed=3, workers=workers)
    whole = list(pairs.epoch(1))
    assert rows(whole) == caption_rows(*(f'caption {i}' for i in range(1, 12)))
    assert pairs.skipped == {'no caption': 1} and same(whole[4:], list(pairs.epoch(1, start=4)))
    assert rows(open_(lines, 1, separator='|').epoch(0)) == rows(whole)
    report = check(lines, VAL, TOKENIZER, n=8, seconds=0.1)
    assert report.looked == 8 and report.source == '12 lines'
    assert len(list(captioned(str(lines), VAL, TOKENIZER, batch_size=4))) == 3
    assert write_shards(lines, tmp_path / 'shards')['samples'] == 11
    with pytest.raises(TinyclipError, match='it takes separator'):
        open_(lines, caption_column='x')
    with pytest.raises(TinyclipError, match=r"Possible:.*lines \('pairs.lines'\)"):
        open_('photos.zip')


def test_the_command_line_opens_such_a_source(lines, tmp_path, capsys):
    data = ['--data', str(lines)]
    assert main(['check', *data, '--model', 'shapes-teacher', '--n', '8', '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['source'] == '12 lines' and report['looked'] == 8
    half = ['--teacher', 'shapes-teacher', '--image-width', '.5', '--text-depth', '.5']
    run = ['--steps', '1', '--batch-size', '4', '--out', str(tmp_path / 'run'), '--device', 'cpu']
    assert main(['distill', *data, *half, *run, '--json']) == 0
    assert (tmp_path / 'run' / 'student').is_dir()


def test_arguments():
    with pytest.raises(TinyclipError, match='means nothing'):
        open_('shapes', caption_column='x')
    with pytest.raises(TinyclipError, match='batch_size=0'):
        open_('shapes', 0)
    with pytest.raises(TinyclipError, match='preprocess must'):
        open_pairs('shapes', TOKENIZER, TRAIN, 4)
    with pytest.raises(TinyclipError, match='preprocess must'):
        open_pairs('shapes', (TRAIN, VAL), TOKENIZER, 4)
    with pytest.raises(TinyclipError, match='tokenizer'):
        open_pairs('shapes', TRAIN, TRAIN, 4)


# --- evaluation and the check


@both
def test_captioned(tmp_path, workers):
    def both(i):
        return {
            'jpg': picture(i),
            'json': json.dumps({'captions': [f'{i} {k}' for k in range(1 + i % 3)]}),
        }

    source = [
        shard(tmp_path / f'{s}.tar', [both(i) for i in range(s * 7, s * 7 + 7)], s * 7)
        for s in range(2)
    ]
    got = list(captioned(source, VAL, TOKENIZER, batch_size=4, workers=workers))
    images, texts, owner = (torch.cat(x) for x in zip(*got))
    in_turn = [*range(4), *range(7, 11), *range(4, 7), *range(11, 14)]
    assert len(images) == 14 and torch.equal(
        owner.bincount(), torch.tensor([1 + i % 3 for i in in_turn])
    )
    again = list(captioned(source, VAL, TOKENIZER, batch_size=4, workers=0))
    assert all(torch.equal(a, b) for x, y in zip(got, again, strict=True) for a, b in zip(x, y))


def test_evaluating_twice_counts_once(tmp_path):
    test = captioned(
        shard(tmp_path / 'a.tar', [sample(0), {'jpg': b'no', 'txt': 'x'}]), VAL, TOKENIZER
    )
    for _ in range(2):
        list(test)
    assert test.skipped == {'broken image': 1}


def test_labelled_needs_labels(tmp_path):
    with pytest.raises(TinyclipError, match='no class names'):
        labelled(table(tmp_path, 'image,caption\n0.jpg,x\n'), VAL)
    with pytest.raises(TinyclipError, match='no label'):
        list(labelled(shards(tmp_path), VAL, classnames=['a']))


class KnowsGreys(torch.nn.Module):
    "A stand-in teacher that knows each grey by its number"

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def angle(self, a):
        return torch.stack([a.cos(), a.sin()], 1) * self.one

    def encode_image(self, x):
        return self.angle(
            ((x[:, 0].mean((1, 2)) * 0.26862954 + 0.48145466) * 255 / 8).round() * 0.19
        )

    def encode_text(self, t):
        return self.angle(torch.tensor([int(TOKENIZER.decode(r[2:3].tolist())) for r in t]) * 0.19)


def test_check(tmp_path):
    good = [
        {'png': picture(8 * i, 'PNG', 'L', (20 + i, 16)), 'txt': f'grey {i}'} for i in range(10)
    ] * 3
    report = check(
        shard(tmp_path / 'good.tar', good), VAL, TOKENIZER, KnowsGreys(), n=30, seconds=0.1
    )
    assert (
        report.recall['image_to_text'] == 1
        and 'look right' in str(report)
        and report.sizes == ((20, 16), (29, 16))
        and report.repeated == 1
    )
    moved = [{**s, 'txt': t['txt']} for s, t in zip(good, good[1:] + good[:1])]
    shifted = check(
        shard(tmp_path / 'bad.tar', moved), VAL, TOKENIZER, KnowsGreys(), n=30, seconds=0.1
    )
    assert shifted.recall['image_to_text'] == 0 and 'at chance' in str(shifted)
    json.dumps(report.numbers())
    assert report._repr_html_().count('<img') == 12


def test_check_refuses_a_teacher_that_reads_otherwise():
    class Other(KnowsGreys):
        context_length = 77

    with pytest.raises(TinyclipError, match='texts of 12 tokens, and this teacher takes 77'):
        check('shapes', VAL, TOKENIZER, Other(), seconds=0.1)
    other = KnowsGreys()
    other.visual = torch.nn.Identity()
    other.visual.image_size = 224
    with pytest.raises(TinyclipError, match=r'this teacher takes \(224, 224\)'):
        check('shapes', VAL, TOKENIZER, other, seconds=0.1)


def test_check_reports_what_it_met(tmp_path):
    source = shard(
        tmp_path / 'a.tar',
        [
            sample(0, txt='<b>'),
            sample(1, txt='long ' * 30),
            {'jpg': b'no', 'txt': 'x'},
            {'jpg': picture()},
        ],
    )
    report = check(source, VAL, TOKENIZER, seconds=0.1)
    text = str(report)
    assert (
        report.looked == 2
        and report.truncated == 0.5
        and '50% of the captions are longer than the 12 tokens' in text
    )
    assert (
        '1 x broken image (0002 in a.tar' in text
        and '1 x no caption' in text
        and 'No teacher' in text
    )
    assert '<b>' not in report._repr_html_()
    with pytest.raises(TinyclipError, match='Nothing usable'):
        check(shard(tmp_path / 'b.tar', [{'jpg': b'', 'txt': 'x'}]), VAL, TOKENIZER)


# --- real photographs

real = pytest.mark.skipif(not (SHARED / 'data/flickr8k').is_dir(), reason='no ../shared/data')


@real
def test_flickr8k():
    got = next(
        iter(
            captioned(
                str(SHARED / 'data/flickr8k/val-0000.tar'),
                VAL,
                open_clip.SimpleTokenizer(context_length=32),
                batch_size=10,
            )
        )
    )
    assert [tuple(g.shape) for g in got] == [(10, 3, 16, 16), (50, 32), (50,)] and got[
        2
    ].tolist() == [i for i in range(10) for _ in range(5)]


@real
def test_cifar10_finds_its_class_names():
    test = labelled(str(SHARED / 'data/cifar10/val-*.tar'), VAL, batch_size=50)
    image, label = next(iter(test))
    assert len(test.classnames) == 10 and len(label) == 50 and 0 <= label.min() <= label.max() <= 9


@real
def test_the_cifar10_teacher_recognises_its_pairs():
    teacher = SHARED / 'teachers/cifar10'
    if not teacher.is_dir():
        pytest.skip('no ../shared/teachers')
    model = open_clip.create_model(f'local-dir:{teacher}')
    tokenizer = open_clip.get_tokenizer(f'local-dir:{teacher}')
    preprocess = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    report = check(
        str(SHARED / 'data/cifar10/val-*.tar'), preprocess, tokenizer, model, seconds=0.1
    )
    assert report.recall['image_to_text'] > 0.5 and 'look right' in str(report)
