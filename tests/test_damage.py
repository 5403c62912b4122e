"""Data that is not as it should be: skipped and counted, or refused in one sentence; never a
hang, never a library's traceback."""

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections import Counter

import open_clip
import pytest
from PIL import Image
from samples import *  # its fixtures guard every test here
from shards import shard

from tinyclip.core import TinyclipError
from tinyclip.data.shards import read_shard
from tinyclip.distill import Distiller


@both
def test_broken_things_are_counted_and_named(tmp_path, workers):
    good = [sample(i) for i in range(20)]
    shard(
        tmp_path / '0.tar',
        [
            {**good[0], 'jpg': good[0]['jpg'][:300]},
            {'jpg': picture()},
            {'txt': 'no picture'},
            {**good[3], 'txt': ' \n'},
            {'jpg': picture(), 'json': '{"caption": '},
            {'jpg': picture(), 'json': '{"alt": "other key"}'},
            {**good[6], 'jpg': b''},
            *good[7:],
        ],
    )
    shard(tmp_path / '1.tar', good, 100)
    whole = (tmp_path / '1.tar').read_bytes()
    for name, data in (
        ('2', whole[: len(whole) // 2]),
        ('3', b''),
        ('5', b'<html>404</html>' * 100),
    ):
        (tmp_path / f'{name}.tar').write_bytes(data)
    shard(tmp_path / '4.tar', [])
    pairs = open_(str(tmp_path / '*.tar'), workers=workers)
    assert len(list(pairs.epoch(0))) >= 10
    assert pairs.skipped == {
        'broken image': 2,
        'no caption': 2,
        'no caption file': 1,
        'no image': 1,
        'unreadable caption': 1,
        'truncated shard': 1,
        'empty shard': 2,
        'unreadable shard': 1,
    }
    assert (
        pairs.culprits['no image'] == ['0002 in 0.tar (holds txt)']
        and '2.tar' in pairs.culprits['truncated shard'][0]
    )
    assert 'alt' in ' '.join(pairs.culprits['no caption'])


@pytest.mark.parametrize('cut', [600, 1024, 1300, 2048, 3000])
def test_a_shard_cut_anywhere(tmp_path, cut):
    shard(tmp_path / 'a.tar', [sample(i) for i in range(10)])
    whole = (tmp_path / 'a.tar').read_bytes()
    (tmp_path / 'b.tar').write_bytes(whole[:cut])
    pairs = open_(str(tmp_path / '*.tar'))
    list(pairs.epoch(0))
    assert pairs.skipped['truncated shard'] == 1


def tar(path, files):
    "A tar of (name, bytes); None makes a folder"
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as t:
        for name, data in files:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            t.addfile(info, data and io.BytesIO(data))
    return path


def bombs():
    "A JPEG and a PNG of a few hundred bytes that say they have four thousand million pixels"
    jpeg, side = bytearray(picture()), 65500
    at = jpeg.index(b'\xff\xc0') + 5  # start of frame: mark, length, precision, height, width
    jpeg[at : at + 4] = struct.pack('>HH', side, side)

    def chunk(d):
        return struct.pack('>I', len(d) - 4) + d + struct.pack('>I', zlib.crc32(d))

    return bytes(jpeg), b'\x89PNG\r\n\x1a\n' + chunk(
        b'IHDR' + struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    ) + chunk(b'IDAT' + zlib.compress(b'')) + chunk(b'IEND')


def png(mode, size=(20, 16)):
    Image.new(mode, size).save(b := io.BytesIO(), 'PNG')
    return b.getvalue()


JPG, NOISE = picture(3), bytes(range(256)) * 3
SPOILED = {  # what one sample holds, by what it counts as
    'broken image': [
        *(dict(jpg=j, txt='x') for j in (JPG[: len(JPG) // 2], b'', NOISE, *bombs())),
        dict(png=picture(5, 'PNG')[:60], txt='x'),
    ],
    'no image': [dict(txt='alone'), {'jpg.txt': 'x'}, dict(mp3=JPG, txt='x')],
    'no caption': [
        dict(jpg=JPG, **rest)
        for rest in (
            dict(txt=''),
            dict(txt=' \n\t'),
            dict(txt='', json='{broken'),
            dict(txt='', json='5'),
            dict(json='{"caption": null}'),
            dict(json='{"alt": "x"}'),
        )
    ],
    'no caption file': [dict(jpg=JPG), dict(jpg=JPG, caption='x')],
    'caption that is no text': [
        dict(jpg=JPG, json=j) for j in ('{"captions": [1, "", []]}', '{"caption": {"en": "x"}}')
    ],
    'unreadable caption': [
        dict(jpg=JPG, **rest)
        for rest in (
            dict(txt=b'caf\xe9'),
            dict(json='{"caption": "a'),
            dict(json='["a"]'),
            dict(json=b'\xff\x00{'),
            dict(json='[' * 100_000),
        )
    ],
    'unreadable label': [dict(jpg=JPG, cls='cat', txt='x')],
}
ODD = [
    *(
        dict(jpg=picture(7, f, m))
        for m, f in (
            ('CMYK', 'JPEG'),
            ('L', 'JPEG'),
            ('L', 'PNG'),
            ('RGBA', 'PNG'),
            ('RGB', 'WEBP'),
            ('RGB', 'GIF'),
            ('RGB', 'BMP'),
        )
    ),  # sound, whatever they look like
    *(dict(png=png(m)) for m in ('P', '1', 'LA', 'I;16')),
    dict(png=png('RGB', (1, 90))),
    dict(png=png('RGB', (1, 1))),
    dict(JPG=JPG),
    dict(json='{"caption": "not asked for"}', jpg=JPG),
]
CUT = {  # what becomes of a tar whose fifth sample begins at o
    'cut': ('truncated shard', lambda d, o: d[: o + 700]),
    'between': ('truncated shard', lambda d, o: d[:o]),
    'header': ('damaged shard', lambda d, o: d[:o] + b'?' * 512 + d[o + 512 :]),
    'hole': ('damaged shard', lambda d, o: d[:o] + bytes(1024) + d[o + 1024 :]),
}


BAD = {k: len(v) for k, v in SPOILED.items()} | {  # what `plant` makes
    'doubled name': 3,
    'truncated shard': 2,
    'damaged shard': 2,
    'empty shard': 4,
    'unreadable shard': 2,
}


def mixed(fine):
    "Files of a tar in which sound samples, from `fine`, stand between bad ones"
    files = [f for o in ODD for f in fine(**o)]
    for i, fields in enumerate(f for fs in SPOILED.values() for f in fs):
        files += [
            (f'b{i:04}.{e}', d.encode() if isinstance(d, str) else d) for e, d in fields.items()
        ] + fine()
    files += [
        ('folder', None),
        ('folder/inner', None),
        ('README', b'no sample'),
        ('__about__', b'{}'),
        ('__about__/more.txt', b'x'),
    ]
    (image, text), again = fine(), fine()
    # the first counts
    doubles = [(image[0], picture(9)), (text[0], b'other words'), (text[0], b'and others')]
    return [*files, image, text, *doubles, *again]


def plant(folder):
    """Shards with every kind of damage; returns the captions of the sound samples, and how many
    others there are of each kind"""
    sound = []

    def fine(**image):
        sound.append(f'sound {len(sound)}')
        return [
            (f's{len(sound):04}.{e}', d.encode() if isinstance(d, str) else d)
            for e, d in ((image or dict(jpg=picture(len(sound)))) | dict(txt=sound[-1])).items()
        ]

    tar(folder / 'mixed.tar', mixed(fine))
    for name, (_, spoil) in CUT.items():
        seven = [fine() for _ in range(7)]
        path = tar(folder / f'{name}.tar', sum(seven, []))
        with tarfile.open(path) as t:
            at = t.getmember(seven[4][0][0]).offset
        path.write_bytes(spoil(path.read_bytes(), at))
        del sound[-3:]
    for n in range(4 + -len(sound) % 4):
        (folder / f'packed{n}.tar.gz').write_bytes(
            gzip.compress(tar(folder / 'p', fine()).read_bytes())
        )
    for name, data in dict(
        nothing=b'', page0=b'404', page1=b'<html>404</html>' * 100, noise=NOISE * 9
    ).items():
        (folder / f'{name}.tar').write_bytes(data)
    tar(folder / 'hollow.tar', [])
    tar(folder / 'folders.tar', [('a', None)])
    return sound, Counter(BAD)


class Overheard:
    "Pairs whose batches and counts are written down, epoch by epoch"

    def __init__(self, pairs):
        self.pairs = pairs
        self.batches = {}
        self.counts = {}

    def epoch(self, e, start=0):
        kept = self.batches.setdefault(e, [])
        for b in self.pairs.epoch(e, start):
            kept.append(b)
            yield b
        self.counts[e] = dict(self.pairs.skipped)


@both
@pytest.mark.filterwarnings('ignore:.*(Transparency|transparency)')
def test_a_run_over_every_kind_of_damage(tmp_path, workers):
    """It ends, every planted thing is counted as what it is, and what was trained from are the
    sound samples, each once"""
    sound, bad = plant(tmp_path)
    heard = Overheard(open_([f'{tmp_path}/*.tar', f'{tmp_path}/*.tar.gz'], workers=workers))
    text = dict(context_length=12, vocab_size=49408, width=16, heads=1, layers=1)
    student = open_clip.CLIP(
        16, dict(image_size=16, layers=1, width=16, head_width=16, patch_size=16), text
    )
    steps = len(sound) // 4 + 1  # into the second epoch, so that the first one is over
    result = Distiller(
        student, None, heard, objective='contrastive', device='cpu', progress=False
    ).fit(steps)
    assert result.finished and result.steps == steps and not result.skipped
    assert heard.counts[0] == dict(bad) and rows(heard.batches[0]) == caption_rows(*sound)
    assert all(b.image.isfinite().all() for b in heard.batches[0])


@pytest.mark.parametrize('name', CUT)
def test_what_can_be_saved_of_a_shard(tmp_path, name):
    seven = [(f'{i}.{e}', d) for i in range(7) for e, d in (('jpg', JPG), ('txt', b'x'))]
    path = tar(tmp_path / 'a.tar', seven)
    kind, spoil = CUT[name]
    with tarfile.open(path) as t:
        path.write_bytes(spoil(path.read_bytes(), t.getmember('4.jpg').offset))
    *good, last = read_shard(path)
    assert (
        [s['__key__'] for s in good] == list('0123')
        and last.kind == kind
        and 'after 4 samples' in last.detail
    )


def test_a_packed_shard_cut_off_or_damaged(tmp_path):
    whole = gzip.compress(
        tar(
            tmp_path / 'a.tar',
            [
                (f'{i}.{e}', d)
                for i in range(40)
                for e, d in (('jpg', os.urandom(900)), ('txt', b'x'))
            ],
        ).read_bytes()
    )
    (tmp_path / 'a.tar.gz').write_bytes(whole[: len(whole) // 2])
    *good, last = read_shard(tmp_path / 'a.tar.gz')
    assert 15 < len(good) < 22 and last.kind == 'truncated shard'
    whole = bytearray(gzip.decompress(whole))
    whole[4 * 2560 : 4 * 2560 + 512] = b'?' * 512  # the header of the fifth
    (tmp_path / 'a.tar.gz').write_bytes(gzip.compress(whole))
    *good, last = read_shard(tmp_path / 'a.tar.gz')
    assert len(good) == 4 and last.kind == 'damaged shard'


@both
def test_all_bad_stops_with_a_sentence(tmp_path, workers):
    source = shard(tmp_path / 'a.tar', [{'jpg': b'no', 'txt': 'x'}] * 5)
    with pytest.raises(TinyclipError, match='Nothing usable in 1 shards: a.tar: 5 x broken image'):
        list(open_(source, workers=workers).epoch(0))


def test_all_bad_does_not_read_for_ever(tmp_path):
    source = shard(tmp_path / 'a.tar', [{'txt': 'x'}] * 3000)
    pairs = open_(source)
    with pytest.raises(TinyclipError, match='no image'):
        list(pairs.epoch(0))
    assert pairs.skipped.total() < 1100


@both
def test_a_pipe_that_fails(tmp_path, workers):
    good = shard(tmp_path / 'a.tar', [sample(i) for i in range(8)])
    pairs = open_([good, f'pipe:cat {good}', 'pipe:exit 3'], workers=workers)
    assert len(list(pairs.epoch(0))) == 4 and pairs.skipped.total() == 1
