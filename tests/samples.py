"""What tests of data share: small pictures and captions in shards, tables and folders, and
guards against hanging"""

import io
import signal
import warnings
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from shards import shard

from tinyclip.data import open_pairs

TRAIN, VAL = (image_transform_v2(PreprocessCfg(size=16), is_train=t) for t in (True, False))
TOKENIZER = open_clip.SimpleTokenizer(context_length=12)
SHARED = Path(__file__).parents[2] / 'shared'
both = pytest.mark.parametrize('workers', [0, 2])


@pytest.fixture(autouse=True)
def never_hang():
    if not hasattr(signal, 'SIGALRM'):
        yield
        return

    def late(*_):
        raise AssertionError('hangs')

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def few_cores():
    "Remarks about more workers than cores or shards: no matter here"
    with warnings.catch_warnings():
        warnings.filterwarnings(
            'ignore', message='This DataLoader will create|.* can keep .* loader workers busy'
        )
        yield


def picture(i=0, format='JPEG', mode='RGB', size=(20, 16)):
    Image.new(
        mode,
        size,
        i % 250 if mode == 'L' else tuple((i * k) % 250 for k in (3, 7, 11, 13)[: len(mode)]),
    ).save(b := io.BytesIO(), format)
    return b.getvalue()


def sample(i, **other):
    return {'jpg': picture(i), 'txt': f'caption {i}', **other}


def shards(folder, n=3, each=10):
    return [
        shard(folder / f'train-{s:04}.tar', [sample(s * each + i) for i in range(each)], s * each)
        for s in range(n)
    ]


def open_(source, batch_size=4, **kw):
    return open_pairs(source, TRAIN, TOKENIZER, batch_size, **kw)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.image, y.image) and torch.equal(x.text, y.text) for x, y in zip(a, b)
    )


def rows(batches):
    return Counter(tuple(t.tolist()) for b in batches for t in b.text)


def caption_rows(*captions):
    return Counter(tuple(t.tolist()) for t in TOKENIZER(list(captions)))


def folder(root, classes):
    for name, n in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            (root / name / f'{i}.jpg').write_bytes(picture(i))
    return root


def table(root, text, images=3, name='pairs.csv'):
    for i in range(images):
        (root / f'{i}.jpg').write_bytes(picture(i))
    (root / name).write_text(text)
    return str(root / name)
