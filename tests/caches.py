"""What tests of caches share: a small teacher, shards with one caption or more, and short ways
to write and to open"""

import io
import json

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from shards import shard

from tinyclip.data.cache import write_cache
from tinyclip.data.cached import cached_pairs

TRAIN, VAL = (
    image_transform_v2(
        PreprocessCfg(size=16), is_train=t, aug_cfg=dict(scale=(0.3, 1.0)) if t else None
    )
    for t in (True, False)
)
TOKENIZER = open_clip.SimpleTokenizer(context_length=12)


def OTHER(texts, context_length=12):
    return TOKENIZER([t[::-1] for t in texts], context_length)


ROWS = ('teacher_image', 'teacher_text')


def clip(seed=0, width=32, dim=16):
    torch.manual_seed(seed)
    vision = dict(image_size=16, layers=1, width=width, patch_size=8, head_width=16)
    return open_clip.CLIP(
        dim, vision, dict(context_length=12, vocab_size=49408, width=32, heads=2, layers=1)
    )


def picture(i):
    im = Image.radial_gradient('L').resize((40, 30))
    Image.merge(
        'RGB',
        [im.rotate(17 * i), im.rotate(31 * i + 90), im.point(lambda v: (v * 3 + i * 9) % 256)],
    ).save(b := io.BytesIO(), 'PNG')
    return b.getvalue()


def sample(i, captions=2):
    return dict(
        png=picture(i),
        json=json.dumps(dict(captions=[f'caption {k} of {i}' for k in range(captions)])),
    )


@pytest.fixture
def data(tmp_path):
    for s in range(3):
        shard(
            tmp_path / 'data' / f'{s}.tar',
            [sample(10 * s + i, 1 + i % 3) for i in range(10)],
            10 * s,
            'dir/',
        )
    return str(tmp_path / 'data' / '*.tar')


def written(data, folder, teacher=None, **kw):
    return write_cache(
        data,
        teacher or clip(),
        TRAIN,
        TOKENIZER,
        folder,
        **dict(precision='fp32', dtype='float32', views=2) | kw,
    )


def opened(data, folder, **kw):
    return cached_pairs(data, folder, TRAIN, TOKENIZER, **dict(batch_size=6) | kw)


def same(a, b):
    def equal(x, y):
        return x is y if x is None or y is None else torch.equal(x, y)

    return len(a) == len(b) and all(equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))
