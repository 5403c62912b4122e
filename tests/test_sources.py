"""Data as people bring them: tables that no CSV library wrote, class folders with all kinds of
files, greys of any depth, tars that nobody sorted, programs that fail. Used, or counted by name."""

import csv
import functools
import http.server
import io
import json
import os
import tarfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import MaybeConvertMode
from PIL import Image
from samples import *  # its fixtures guard every test here
from torchvision.datasets import ImageFolder

from tinyclip.core import TinyclipError
from tinyclip.data import write_shards
from tinyclip.data.pairs import labelled
from tinyclip.data.samples import Skip, decode
from tinyclip.data.shards import read_shard
from tinyclip.data.sources import as_source
from tinyclip.data.tables import Csv, Folders
from tinyclip.evaluate.standard_sets import ClassFolders

# --- tables


def captions_of(source):
    return {name: captions for name, captions, _ in source.samples}


def notes(source):
    return [f'{n.kind}: {n}' for n in source.notes]


def written(root, text, name='pairs.csv'):
    (root / name).write_text(text, newline='')
    return Csv(root / name)


@pytest.mark.parametrize(
    'captions',
    [
        ['"', 'plain', '"Up" and "away"', 'x'],  # a lone quote, and two that are not the ends
        ['"a', 'b', '"c', 'd', 'e'],  # two rows with a lone quote each
        ['"a', 'b', 'a 5" screen', 'd'],  # closed at the end of a word, rows later
        ['"a', 'b', 'a screen of 5"', 'd'],  # closed at the end of a row
        ['a', '"never closed', 'b'],
        ['back\\slash', 'C:\\new', '\\'],
    ],
)
@pytest.mark.parametrize('separator', ['\t', ',', ';'])
def test_quotes_that_quote_nothing(tmp_path, captions, separator):
    lines = [f'{i}.jpg{separator}{c}' for i, c in enumerate(captions)]
    head = f'filepath{separator}title'
    source = written(tmp_path, '\n'.join([head, *lines]), 'a.tsv' if separator == '\t' else 'a.csv')
    assert captions_of(source) == {f'{i}.jpg': [c] for i, c in enumerate(captions)}
    assert not source.notes


def test_the_caption_before_the_image(tmp_path):
    source = written(tmp_path, 'title\tfilepath\n"up\t0.jpg\nb\t1.png\nof 5"\t2.jpg\n', 'a.tsv')
    assert captions_of(source) == {'0.jpg': ['"up'], '1.png': ['b'], '2.jpg': ['of 5"']}


@pytest.mark.parametrize(
    'cell,caption',
    [
        (r'"say \"hi\", friend"', 'say "hi", friend'),  # Spark, MySQL
        (r'"\"hi\""', '"hi"'),
        (r'a dog\, a cat', 'a dog, a cat'),
        ('"say ""hi"", friend"', 'say "hi", friend'),  # CSV libraries
        ('"two\nlines"', 'two\nlines'),
        ('"two, or\nthree, lines"', 'two, or\nthree, lines'),
    ],
)
def test_quoting_of_databases_and_libraries(tmp_path, cell, caption):
    source = written(tmp_path, f'image,caption\n0.jpg,{cell}\n1.jpg,next\n')
    assert captions_of(source) == {'0.jpg': [caption], '1.jpg': ['next']} and not source.notes


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text('a"\\,;\n \té'), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        min_size=1,
        max_size=6,
    )
)
def test_what_a_csv_library_wrote_is_read_back(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp('t') / 'pairs.csv'
    captions = [c.replace('\0', '').replace('\r', '').strip() for c, _ in cells]
    with open(path, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerow(['image', 'caption'])
        for i, c in enumerate(captions):
            csv.writer(f, quoting=cells[i][1]).writerow([f'{i}.jpg', f'. {c}'])
    source = Csv(path)
    assert captions_of(source) == {f'{i}.jpg': [f'. {c}'.strip()] for i, c in enumerate(captions)}
    assert not source.notes


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text('a"\\,; ', max_size=8), min_size=1, max_size=8))
def test_no_row_is_lost(tmp_path_factory, captions):
    "Whatever stands in it: it is a sample, or it is named with its line"
    path = tmp_path_factory.mktemp('t') / 'pairs.csv'
    lines = [f'{i}.jpg,{c}' for i, c in enumerate(captions)]
    path.write_text('\n'.join(['image,caption', *lines, '']))
    source = Csv(path)
    named = [line for *_, line in source.samples]
    named += [int(n.detail.split()[1].strip(':')) for n in source.notes]
    assert sorted(named) == list(range(2, len(captions) + 2))


def test_rows_that_are_left_out_are_named_with_their_lines(tmp_path):
    source = written(
        tmp_path,
        'image,caption\n0.jpg,a dog\n1.jpg,a dog, a cat\n2.jpg,"two\nlines",of it\n'
        '0.jpg,\n3.jpg,kept,,\n3.jpg,"{""en"": ""x""}"\n4.jpg\n4.jpg,\n,lost\n,lost too\n',
    )
    assert notes(source) == [
        'row with too many cells: in pairs.csv (line 3: 3 cells, 2 columns)',
        'row with too many cells: in pairs.csv (line 4: 3 cells, 2 columns)',
        'caption that is no text: 3.jpg in pairs.csv (line 8: {"en": "x"})',
        'no caption: 0.jpg in pairs.csv (line 6)',
        'no caption: 4.jpg in pairs.csv (line 10)',
    ]
    (tmp_path / '4.jpg').touch()
    found = source.read(range(len(source)))
    assert [(s.kind, s.detail) for s in found] == [
        ('missing image', 'line 2'),
        ('missing image', 'line 7'),
        ('no caption', 'line 9'),
        ('missing image', 'line 11'),
        ('missing image', 'line 12'),
    ]


def test_nothing_but_commas_names_the_remedy(tmp_path):
    text = 'image,caption\n0.jpg,a, b\n1.jpg,c, d\n'
    pairs = open_(table(tmp_path, text + '2.jpg,fine\n'), 1)
    assert len(list(pairs.epoch(0))) == 1 and pairs.skipped == {'row with too many cells': 2}
    with pytest.raises(TinyclipError, match='2 x row with too many cells.*line 2.*double quotes'):
        open_(table(tmp_path, text, name='none.csv'), 1)


@pytest.mark.parametrize(
    'name,head',
    [
        ('a.tsv', 'path, as stored\tcaption, in English'),  # more commas than tabs
        ('b.csv', '"path, as stored";"caption, in English"'),
        ('c.csv', 'path\tcaption; in English; or not'),
    ],
)
def test_the_separator_of_a_header(tmp_path, name, head):
    separator = '\t' if '\t' in head else ';'
    (tmp_path / name).write_text(f'{head}\n0.jpg{separator}"a, b"\n')
    columns = [c.strip('"') for c in head.split(separator)]
    source = Csv(tmp_path / name, image_column=columns[0], caption_column=columns[1])
    assert captions_of(source) == {'0.jpg': ['a, b']}


@pytest.mark.parametrize('text', ['image,caption\n0.jpg,x\n', 'image;caption\n0.jpg;x\n', 'x\n'])
def test_a_tsv_without_tabs(tmp_path, text):
    with pytest.raises(TinyclipError, match="'a.tsv' has no tab.*Name it .csv"):
        written(tmp_path, text, 'a.tsv')


@pytest.mark.parametrize(
    'cell,expected',
    [
        (json.dumps(['a dog', 'b "c"', None, ' ']), ['a dog', 'b "c"']),
        (str(['a dog', "it's b"]), ['a dog', "it's b"]),  # as pandas writes lists
        (str(np.array(['a dog', 'b'])), ["['a dog' 'b']"]),  # which are two, or one: text
        ('[applause]', ['[applause]']),
        ('[1998, 2004]', ['[1998, 2004]']),
        ('{curly}', ['{curly}']),
        ('[]', []),
    ],
)
@pytest.mark.parametrize('column', ['captions', 'text'])
def test_lists_of_captions(tmp_path, cell, expected, column):
    with open(tmp_path / 'pairs.csv', 'w', newline='') as f:
        csv.writer(f).writerows([('image', column), ('0.jpg', cell)])
    assert captions_of(Csv(tmp_path / 'pairs.csv')) == {'0.jpg': expected}


def test_a_caption_in_the_image_column_is_a_missing_image(tmp_path):
    source = written(tmp_path, f'image,caption\n{"a dog and " * 99},0.jpg\n')
    assert [s.kind for s in source.read([0])] == ['missing image']


@pytest.mark.parametrize('words', [30_000, 400_000])
def test_very_long_captions(tmp_path, words):
    limit = csv.field_size_limit()
    for quote in ('', '"'):
        text = f'image,caption\n0.jpg,{quote}{"word " * words}{quote}\n1.jpg,x\n'
        assert [len(c[0]) for _, c, _ in written(tmp_path, text).samples] == [words * 5 - 1, 1]
    assert csv.field_size_limit() == limit  # others' tables are read as before


def test_tables_in_utf_16(tmp_path):
    for encoding in ('utf-16', 'utf-16-le'):
        (tmp_path / 'a.csv').write_text('image,caption\n0.jpg,x\n', encoding=encoding)
        with pytest.raises(TinyclipError, match='Save it as UTF-8'):
            Csv(tmp_path / 'a.csv')


# --- class folders

FORMATS = ['jpg', 'jpeg', 'jpe', 'jfif', 'png', 'ppm', 'pgm', 'pbm', 'bmp', 'gif']
FORMATS += ['tif', 'tiff', 'webp', 'avif', 'jp2', 'tga']
SAVED = dict(jpe='JPEG', jfif='JPEG', pgm='PPM', pbm='PPM')


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = name.rpartition('.')[2].lower()
        if kind in FORMATS:
            Image.new('RGB', (16, 12), (99, 0, 0)).save(root / name, SAVED.get(kind))
        else:
            (root / name).write_text('x')
    return root


@pytest.mark.parametrize('make', [Folders, lambda d: ClassFolders(d, ['a', 'b'], ['a', 'b'])])
def test_every_format_at_every_depth(tmp_path, make):
    root = tree(tmp_path / 'set', *(f'a/{i}.{k}' for i, k in enumerate(FORMATS)), 'b/0.PNG')
    tree(root, 'b/2020/1.jpg', 'b/2020/05/2.webp', 'b/2021/3.jpg')
    source = make(root)
    assert len(source) == len(FORMATS) + 4 and not source.notes
    assert [label for _, label in source.files] == [0] * len(FORMATS) + [1] * 4
    assert all(decode(s.image).size == (16, 12) for s in source.read(range(len(source))))
    theirs = {os.path.relpath(p, root) for p, _ in ImageFolder(root).samples}
    assert theirs < {s.key for s in source.read(range(len(source)))}


@pytest.mark.parametrize('make', [Folders, lambda d: ClassFolders(d, ['a', 'b'], ['a', 'b'])])
def test_what_is_left_out_of_folders_is_counted(tmp_path, make):
    root = tree(tmp_path / 'set', 'a/0.jpg', 'b/0.jpg', 'a/0.xml', 'b/2020/list.csv', 'loose.jpg')
    tree(root, 'b/.thumbs/0.jpg', 'a/.DS_Store', 'classes.txt')
    assert notes(make(root)) == [
        'not an image file: a/0.xml in set',
        'not an image file: b/2020/list.csv in set',
        'image outside the class folders: loose.jpg in set',
    ]


def test_links_in_folders(tmp_path):
    root = tree(tmp_path / 'set', 'a/0.jpg', 'b/0.jpg')
    tree(tmp_path / 'more', '1.jpg', '2.jpg')
    (root / 'a' / 'more').symlink_to(tmp_path / 'more')
    (root / 'b' / 'again').symlink_to(root / 'b')  # it leads back
    (root / 'b' / 'gone.jpg').symlink_to(tmp_path / 'gone.jpg')
    test = labelled(root, VAL)
    assert torch.cat([label for _, label in test]).tolist() == [0, 0, 0, 1]
    assert test.skipped == {'broken image': 1} and 'b/gone.jpg' in test.culprits['broken image'][0]


@pytest.mark.parametrize(
    'names', [['pets/cat/0.jpg', 'pets/dog/1.jpg'], ['train/cat/0.jpg', 'val2017/cat/1.jpg']]
)
def test_the_folder_above_the_class_folders(tmp_path, names):
    with pytest.raises(TinyclipError, match='Name the folder that holds the class folders, such'):
        as_source(str(tree(tmp_path / 'set', *names)))


def test_classes_whose_images_are_all_in_subfolders(tmp_path):
    root = tree(tmp_path / 'set', 'cat/2020/0.jpg', 'dog/2020/1.jpg')
    with pytest.warns(UserWarning, match='the classes are cat, dog.'):
        assert len(as_source(root)) == 2


# --- greys


def stored(image, format):
    image.save(b := io.BytesIO(), format)
    return b.getvalue()


def open_clips(data):
    return np.asarray(MaybeConvertMode('RGB')(Image.open(io.BytesIO(data))))


RAMP = np.linspace(0, 1, 256)[None].repeat(4, 0)


@pytest.mark.parametrize(
    'dtype,format,top',
    [
        (np.int32, 'TIFF', 255),
        (np.uint16, 'PNG', 255),
        (np.uint16, 'TIFF', 200),
        (np.float32, 'TIFF', 255),
        (np.int32, 'TIFF', 1),  # a mask
    ],
)
def test_greys_up_to_255_are_open_clips(dtype, format, top):
    data = stored(Image.fromarray((RAMP * top).astype(dtype)), format)
    assert np.array_equal(np.asarray(decode(data)), open_clips(data))


@pytest.mark.parametrize('bits', [10, 12, 14, 16])
@pytest.mark.parametrize(
    'dtype,format', [(np.uint16, 'PNG'), (np.uint16, 'TIFF'), (np.int32, 'TIFF')]
)
def test_deeper_greys_fill_the_range(dtype, format, bits):
    data = stored(Image.fromarray((RAMP * (2**bits - 1)).astype(dtype)), format)
    grey = np.asarray(decode(data))[..., 0]
    assert np.abs(grey - RAMP * 255).max() <= 1 and grey.max() == 255
    assert open_clips(data).mean() > 180  # nearly everything white


def test_greys_with_other_numbers():
    for top in (1, 3e7):  # fractions, and no unit at all
        grey = np.asarray(decode(stored(Image.fromarray((RAMP * top).astype('f4')), 'TIFF')))
        assert np.abs(grey[..., 0] - RAMP * 255).max() <= 1
    below = np.asarray(decode(stored(Image.fromarray(np.int32([[-1000, 0, 100]])), 'TIFF')))
    assert below[0, :, 0].tolist() == [0, 0, 100]
    odd = np.float32([[np.nan, np.inf, 0.5, 1.0]])
    assert np.asarray(decode(stored(Image.fromarray(odd), 'TIFF')))[0, :, 0].tolist() == [
        0,
        0,
        127,
        255,
    ]
    assert not np.asarray(decode(stored(Image.new('I', (2, 2)), 'TIFF'))).any()


# --- shards


def tar(path, members):
    "A tar of (name, bytes), or (name, 'link', target)"
    with tarfile.open(path, 'w') as t:
        for name, data, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = tarfile.SYMTYPE, target[0]
                t.addfile(info)
            else:
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    return str(path)


IMAGE, TEXT = (
    [(f'{i:02}.jpg', picture(i)) for i in range(12)],
    [(f'{i:02}.txt', b'a dog') for i in range(12)],
)
PAIRS = [m for pair in zip(IMAGE, TEXT) for m in pair]
DOTTED = [(f'img.{name}', data) for name, data in PAIRS]
HARD_TO_READ = {
    'images first': (IMAGE + TEXT, 'files of a sample apart', 'tar --sort=name'),
    'texts first': (TEXT + IMAGE, 'files of a sample apart', 'tar --sort=name'),
    '.caption': (
        [(n.replace('txt', 'caption'), d) for n, d in PAIRS],
        'no caption file',
        'read from a .txt or .json',
    ),
    '.en.txt': ([(n.replace('txt', 'en.txt'), d) for n, d in PAIRS], 'no caption file', '.txt or'),
    'dots': (DOTTED, 'dot in a name', 'write img_001.jpg'),
    'dots in folders': (
        [(f'a.b/{n}', d) for n, d in DOTTED],
        'dot in a name',
        'write img_001.jpg',
    ),
    'links': (
        [(n, d, '/data/x.jpg') if n.endswith('jpg') else (n, d) for n, d in PAIRS],
        'link instead of a file',
        'tar --dereference',
    ),
    'objects': (
        [
            (n.replace('txt', 'json'), json.dumps(dict(caption=dict(en='x'))).encode())
            if n.endswith('txt')
            else (n, d)
            for n, d in PAIRS
        ],
        'caption that is no text',
        'as a string, or as a list of strings',
    ),
    'a list of objects': (
        [
            (n.replace('txt', 'json'), b'{"captions": [{"id": 3, "caption": "x"}]}')
            if n.endswith('txt')
            else (n, d)
            for n, d in PAIRS
        ],
        'caption that is no text',
        'as a string, or as a list of strings',
    ),
}


@pytest.mark.parametrize('name', HARD_TO_READ)
def test_each_sample_is_counted_and_the_remedy_helps(tmp_path, name):
    members, kind, remedy = HARD_TO_READ[name]
    pairs = open_(tar(tmp_path / 'a.tar', members))
    with pytest.raises(TinyclipError) as e:
        list(pairs.epoch(0))
    assert pairs.skipped[kind] == 12
    assert remedy in str(e.value) and 'caption_column=' not in str(e.value)


def test_remedies_help(tmp_path):
    "What the sentences say, done: all twelve pairs are used"
    same_name = [(n.replace('img.', 'img_'), d) for n, d in DOTTED]
    for members in (sorted(IMAGE + TEXT), same_name):
        assert rows(open_(tar(tmp_path / 'a.tar', members)).epoch(0)).total() == 12


def test_a_sorted_part_of_an_unsorted_tar_is_used(tmp_path):
    pairs = open_(tar(tmp_path / 'a.tar', PAIRS[:8] + IMAGE[4:] + TEXT[4:]))
    assert rows(pairs.epoch(0)).total() == 4
    assert pairs.skipped == {'no caption file': 8, 'files of a sample apart': 8}


def test_files_without_extensions_are_no_empty_shard(tmp_path):
    (last,) = read_shard(tar(tmp_path / 'a.tar', [('0001', b'x'), ('README', b'x')]))
    assert (last.kind, last.detail) == ('shard without samples', 'holds 0001, README')


@pytest.mark.parametrize('kind', ['ppm', 'jfif', 'avif', 'TIF'])
def test_formats_in_shards(tmp_path, kind):
    tree(tmp_path, f'0.{kind}')
    data = (tmp_path / f'0.{kind}').read_bytes()
    source = tar(tmp_path / 'a.tar', [(f'0.{kind}', data), ('0.txt', b'a dog')])
    assert len(list(open_(source, 1).epoch(0))) == 1
    write_shards(as_source(source), tmp_path / 'copy')
    assert len(list(open_(f'{tmp_path}/copy/*.tar', 1).epoch(0))) == 1


def test_the_usual_image_goes_first(tmp_path):
    members = [('0.psd', b'layers'), ('0.pgm', b'mask'), ('0.txt', b'a dog'), ('0.jpg', picture())]
    assert len(list(open_(tar(tmp_path / 'a.tar', members), 1).epoch(0))) == 1


# --- programs that read shards


class Answers(http.server.SimpleHTTPRequestHandler):
    "Files, and 403 for what has a signature that is over"

    def do_GET(self):
        if 'Expires' in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *a):
        pass


@pytest.fixture
def served(tmp_path):
    handler = functools.partial(Answers, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def last(url):
    *good, s = read_shard(url)
    return len(good), s.kind, s.detail


def test_urls_that_are_dead(tmp_path, served):
    good = tar(tmp_path / 'good.tar', PAIRS)
    assert not any(isinstance(s, Skip) for s in read_shard(f'{served}/good.tar'))
    (tmp_path / 'nothing.tar').touch()
    assert last(f'{served}/nothing.tar')[1] == 'empty shard'
    for path, status in (('gone.tar', 404), ('good.tar?Expires=1', 403)):
        n, kind, detail = last(f'{served}/{path}')
        assert (n, kind) == (0, 'unreadable shard')
        assert str(status) in detail and 'exit status 22' in detail
    pairs = open_([good, f'{served}/gone.tar'])
    assert len(list(pairs.epoch(0))) == 3 and '404' in pairs.culprits['unreadable shard'][0]


def test_programs_that_are_missing(tmp_path, monkeypatch):
    n, kind, detail = last('pipe:nosuchprogram s3://bucket/a.tar -')
    assert (n, kind) == (0, 'unreadable shard') and 'nosuchprogram: not found' in detail
    monkeypatch.setenv('PATH', str(tmp_path))
    for url, name in (('https://127.0.0.1/a.tar', 'curl'), ('gs://bucket/a.tar', 'gsutil')):
        n, kind, detail = last(url)
        assert (n, kind) == (
            0,
            'unreadable shard',
        ) and f"No such file or directory: '{name}'" in detail


@pytest.mark.parametrize(
    'command,expected',
    [
        ('true', (0, 'empty shard', '')),
        ('exit 3', (0, 'unreadable shard', 'after 0 samples: exit status 3')),
        ('cat gone.tar | cat', (0, 'unreadable shard', 'gone.tar: No such file')),
        (
            'head -c 4000 good.tar; echo broke off >&2; exit 9',
            (2, 'truncated shard', 'broke off; exit status 9'),
        ),
        ('head -c 4000 good.tar', (2, 'truncated shard', 'unexpected end')),
    ],
)
def test_pipes_that_fail(tmp_path, monkeypatch, command, expected):
    tar(tmp_path / 'good.tar', PAIRS)
    monkeypatch.chdir(tmp_path)
    for _ in range(5):  # it used to be a race
        n, kind, detail = last(f'pipe:{command}')
        assert (n, kind) == expected[:2] and expected[2] in detail


def test_a_pipe_that_has_given_everything(tmp_path):
    good = tar(tmp_path / 'good.tar', PAIRS)
    for command in (f'cat {good}; exit 3', f'cat {good}; echo done >&2', f'gzip < {good}'):
        found = list(read_shard(f'pipe:{command}'))
        assert len(found) == 12 and not any(isinstance(s, Skip) for s in found)


def test_a_reader_that_stops_early_leaves_no_program(tmp_path):
    reader = read_shard(f'pipe:cat {tar(tmp_path / "good.tar", PAIRS)}; exec sleep 1000')
    next(reader)
    reader.close()  # it would wait for the program
