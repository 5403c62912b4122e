"""A teacher that reads other pictures and other tokens than its student: one decoded crop and one
caption for both, live and from caches, in Python and on the command line"""

import io
import json
import math
import warnings

import open_clip
import pytest
import torch
from groups import spawn, started
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw
from shards import shard
from torch.nn import functional as F
from torchvision.transforms import Compose, RandomHorizontalFlip

from tinyclip.cli.main import main
from tinyclip.core import TinyclipError
from tinyclip.data import check, open_pairs, transforms
from tinyclip.data.cache import encode_views, write_cache
from tinyclip.data.cached import cached_pairs
from tinyclip.data.pairs import Batch, TeacherBatch, as_teacher_reads
from tinyclip.data.transforms import own_readings, probe_tokens
from tinyclip.distill import Distiller
from tinyclip.keep import keep_for_config
from tinyclip.losses import Objective
from tinyclip.reconstruction import check_calibration
from tinyclip.train.engine import Engine, make_accelerator
from tinyclip.train.sharding import full
from tinyclip.train.step import split, step, step_in_chunks
from tinyclip.zoo import load, save

BPE = open_clip.SimpleTokenizer(context_length=12)
HALF = (0.5, 0.5, 0.5)
STUDENT = dict(size=32)
TEACHER = dict(size=48, mean=HALF, std=HALF, interpolation='bilinear')


class Letters:
    "A tokenizer of another family: one token per letter, 16 of them"

    merges = None

    def __call__(self, texts, context_length=16):
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [1 + ord(c) % 60 for c in text][: context_length - 1] + [61]
            row[: len(ids)] = torch.tensor(ids)
        return rows


LETTERS = Letters()


def read(cfg, train=True, flip=False):
    aug = dict(scale=(0.3, 1.0)) if train else None
    made = image_transform_v2(PreprocessCfg(**cfg), is_train=train, aug_cfg=aug)
    steps = made.transforms
    return Compose([steps[0], RandomHorizontalFlip(), *steps[1:]]) if flip else made


def picture(i, size=(400, 300)):
    "Smooth colours, and a white corner that says which way is up and left"
    im = Image.radial_gradient('L').resize(size)
    bands = [im.rotate(17 * i), im.rotate(31 * i + 90), im.point(lambda v: (v * 3 + i * 9) % 256)]
    im = Image.merge('RGB', bands)
    draw = ImageDraw.Draw(im)
    draw.rectangle((0, 0, size[0] // 3, size[1] // 3), fill='white')
    draw.rectangle((size[0] * 2 // 3, size[1] * 2 // 3, *size), fill='black')
    im.save(b := io.BytesIO(), 'JPEG', quality=92)
    return b.getvalue()


def sample(i):
    captions = [f'caption {k} of number {i}' for k in range(1 + i % 3)]
    return dict(jpg=picture(i), json=json.dumps(dict(captions=captions)))


@pytest.fixture
def data(tmp_path):
    for s in range(2):
        shard(tmp_path / 'data' / f'{s}.tar', [sample(8 * s + i) for i in range(8)], 8 * s, 'dir/')
    return str(tmp_path / 'data' / '*.tar')


def clip(cfg, tokens, context, seed=0, bias=None, dim=16):
    torch.manual_seed(seed)
    vision = dict(image_size=cfg['size'], layers=1, width=32, patch_size=8, head_width=16)
    text = dict(context_length=context, vocab_size=tokens, width=32, heads=2, layers=1)
    model = open_clip.CLIP(dim, vision, text, init_logit_bias=bias)
    model.visual.preprocess_cfg = vars(PreprocessCfg(**cfg))
    return model


def student(seed=1, **kw):
    return clip(STUDENT, 49408, 12, seed, **kw)


def teacher(seed=0):
    return clip(TEACHER, 62, 16, seed, bias=-10.0, dim=24).eval()


def opened(data, batch_size=8, flip=False, **kw):
    reads = read(TEACHER, flip=flip), LETTERS
    return open_pairs(
        data, read(STUDENT, flip=flip), BPE, batch_size, **dict(teacher_reads=reads) | kw
    )


def job(student, pairs, taught=None, **kw):
    how = dict(lr=2e-3, warmup=0, device='cpu', precision='fp32', progress=False, log_every=1) | kw
    return Distiller(student, taught or teacher(), pairs, **how)


quiet = pytest.mark.filterwarnings('ignore:The teacher has a logit_bias')


def plain(pixels, cfg, side=8):
    "Colours between 0 and 1 of what a model reads, coarsely"
    cfg = PreprocessCfg(**cfg)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.mean, cfg.std))
    return F.adaptive_avg_pool2d(pixels * std + mean, side)


# --- one region, one flip, one caption


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('reduced', [False, True])
def test_both_see_the_same_region_and_the_same_flip(data, flip, reduced):
    white, seen = [], []
    for epoch in range(3):
        for b in opened(data, flip=flip, reduced=reduced).epoch(epoch):
            assert b.image.shape == (8, 3, 32, 32) and b.teacher_pixels.shape == (8, 3, 48, 48)
            a, t = plain(b.image, STUDENT), plain(b.teacher_pixels, TEACHER)
            assert (a - t).abs().mean() < 0.02
            # a region drawn apart is far from it
            assert (a - t.roll(1, 0)).abs().mean() > 0.08
            assert (a - t.flip(3)).abs().mean() > 0.08
            white += (
                a.mean(1)[:, :2, :2].mean((1, 2)) > a.mean(1)[:, :2, -2:].mean((1, 2))
            ).tolist()
            seen.append(a)
    assert all(not torch.equal(x, y) for x, y in zip(seen, seen[2:]))  # other crops in every epoch
    assert flip == (0.1 < sum(white) / len(white) < 0.9)


def test_both_read_the_same_caption(data):
    captions = [f'caption {k} of number {i}' for i in range(16) for k in range(1 + i % 3)]
    rows = {tuple(t): c for t, c in zip(LETTERS(captions).tolist(), captions)}
    cut = {c[:15] for c in captions}
    b = next(opened(data).epoch(0))
    for own, theirs in zip(b.text, b.teacher_tokens):
        fits = [c for c in captions if torch.equal(BPE([c])[0], own)]
        assert len(fits) == 1 and rows[tuple(theirs.tolist())][:15] == fits[0][:15] in cut


def test_what_is_read_alike_is_made_once_and_as_before(data):
    one = [*open_pairs(data, read(STUDENT), BPE, 8).epoch(1)]
    for reads in (None, (read(STUDENT), open_clip.SimpleTokenizer(context_length=12))):
        pairs = opened(data, teacher_reads=reads)
        assert pairs.teacher_inputs is None
        for a, b in zip(one, pairs.epoch(1), strict=True):
            assert (
                type(b) is Batch and torch.equal(a.image, b.image) and torch.equal(a.text, b.text)
            )
    for reads, names in (
        ((read(STUDENT), LETTERS), ['teacher_tokens']),
        ((read(TEACHER), BPE), ['teacher_pixels']),
        ((read(TEACHER), LETTERS), ['teacher_pixels', 'teacher_tokens']),
    ):
        for a, b in zip(one, opened(data, teacher_reads=reads).epoch(1), strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.text, b.text)
            assert [k for k in b._fields[2:] if getattr(b, k) is not None] == names
            shown = as_teacher_reads(b)
            assert (shown.image is b.image) == (b.teacher_pixels is None)
            assert as_teacher_reads(shown) is shown


def test_two_tokenizers_that_read_the_first_words_alike_are_two(tmp_path):
    "Numbers of other words may differ, as in a shortened table"
    transformers = pytest.importorskip('transformers')
    tokenizers = pytest.importorskip('tokenizers')
    made = []
    for words in (['<unk>', 'a', 'zebra'], ['<unk>', 'a', 'zebu']):
        own = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>')
        )
        own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        folder = str(tmp_path / words[-1])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=own, pad_token='<unk>', unk_token='<unk>'
        ).save_pretrained(folder)
        made.append(open_clip.tokenizer.HFTokenizer(folder, context_length=8))
    reads = transforms(student())[1]
    assert torch.equal(probe_tokens(made[0]), probe_tokens(made[1]))
    assert own_readings(reads, made[0], (reads, made[0])) == (None, None)
    assert own_readings(reads, made[0], (reads, made[1])) == (None, made[1])


def test_workers_and_a_place_in_an_epoch_change_nothing(data):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        flows = [[*opened(data, 4, workers=w).epoch(2)] for w in (0, 2)]
    for a, b in zip(*flows, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    rest = [*opened(data, 4).epoch(2, start=2)]
    assert all(torch.equal(x, y) for a, b in zip(flows[0][2:], rest) for x, y in zip(a, b))


# --- training


@quiet
def test_a_student_learns_from_a_teacher_of_another_family(data):
    losses = []
    d = job(student(), opened(data), listeners=[lambda e: losses.append(e.get('loss'))])
    d.fit(30)
    losses = [l for l in losses if l is not None]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.05


def test_a_step_is_that_of_the_teacher_on_its_own_inputs(data):
    t, s, b = teacher(), student(bias=-9.0), next(opened(data).epoch(0))
    twin = Objective('sigmoid_mimicking')
    with torch.no_grad():
        i, x, scale, bias = t(b.teacher_pixels, b.teacher_tokens)
        a, c, own, shift = s(b.image, b.text)
        p = (scale * i @ x.T + bias).sigmoid()
        l = own * a @ c.T + shift
        want = F.binary_cross_entropy_with_logits(l, p, reduction='sum') / len(l)
    torch.testing.assert_close(step(s, t, b, twin)['loss'], want, rtol=1e-5, atol=1e-6)
    whole, parts = student(bias=-9.0), student(bias=-9.0)
    step(whole, t, b, twin)['loss'].backward()
    step_in_chunks(parts, t, split(b, 3), twin)
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)


@quiet
@pytest.mark.parametrize('chunk_size', [None, 3])
def test_a_run_resumes_to_the_bit(data, tmp_path, chunk_size):
    def run(folder, **kw):
        return job(
            student(), opened(data, 4), folder=tmp_path / folder, chunk_size=chunk_size, **kw
        )

    whole = run('whole').fit(6).student
    half = run('half')
    half.listeners = [lambda e: half.stop() if (e['event'], e['step']) == ('log', 3) else None]
    assert not half.fit(6).finished
    rest = run('half').fit(6, resume=True).student
    for a, b in zip(whole.parameters(), rest.parameters()):
        assert torch.equal(a, b)


# --- caches


def cache(data, folder, model=None, cfg=TEACHER, tokenizer=LETTERS):
    how = dict(views=2, precision='fp32', dtype='float32')
    write_cache(data, model or teacher(), read(cfg), tokenizer, folder, **how)
    return folder


@quiet
def test_a_cache_is_the_live_teacher(data, tmp_path):
    t = teacher()
    cached = cached_pairs(data, cache(data, tmp_path / 'c'), read(STUDENT), BPE, 8, teacher=t)
    live = opened(data)
    for epoch in (0, 1):
        for a, b in zip(cached.epoch(epoch), live.epoch(epoch), strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.text, b.text)
            image, text = encode_views(t, b.teacher_pixels[:, None], b.teacher_tokens)
            torch.testing.assert_close(a.teacher_image, image[:, 0], rtol=0, atol=1e-5)
            torch.testing.assert_close(a.teacher_text, text, rtol=0, atol=1e-5)
    one = job(student(), opened(data)).fit(3).student
    two = Distiller(
        student(), None, cached, lr=2e-3, warmup=0, device='cpu', precision='fp32', progress=False
    )
    assert two.objective.teacher_scale == 'own'  # as the live run chose
    for a, b in zip(one.parameters(), two.fit(3).student.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_an_ensemble_of_two_families(data, tmp_path):
    "Each teacher is asked what it reads; together they are the mean of their logits"
    other_cfg = dict(size=40)
    other = clip(other_cfg, 49408, 12, 5, dim=8).eval()
    folders = [
        cache(data, tmp_path / 'a'),
        cache(data, tmp_path / 'b', other, other_cfg, BPE),
    ]
    pairs = cached_pairs(data, folders, read(STUDENT), BPE, 8)
    b = next(pairs.epoch(0))
    logits = []
    for model, cfg, tokenizer in ((teacher(), TEACHER, LETTERS), (other, other_cfg, BPE)):
        own = opened(data, teacher_reads=(read(cfg), tokenizer))
        seen = as_teacher_reads(next(own.epoch(0)))
        with torch.no_grad():
            image, text, scale, *_ = model(seen.image, seen.text)
        logits.append(scale * image @ text.T)
    got = b.teacher_scale * b.teacher_image @ b.teacher_text.T
    torch.testing.assert_close(got, sum(logits) / 2, rtol=1e-4, atol=1e-4)
    assert pairs.bias is None  # one of them has none
    d = Distiller(student(), None, pairs, lr=1e-3, device='cpu', progress=False)
    assert d.fit(2).losses['affinity'] > 0


# --- the command line


@pytest.fixture
def folders(tmp_path):
    "A SigLIP-like teacher with a tokenizer of whole words, and the configuration of a student"
    pytest.importorskip('transformers', reason="transformers: pip install 'tinyclip[export]'")
    from test_hugging_towers import tokenizer as words

    words(tmp_path / 'words')
    vision = dict(image_size=48, layers=1, width=32, patch_size=8, head_width=16)
    text = dict(context_length=16, vocab_size=300, width=32, heads=2, layers=1)
    text |= dict(hf_tokenizer_name=str(tmp_path / 'words'), no_causal_mask=True, pool_type='last')
    cfg = dict(embed_dim=24, vision_cfg=vision, text_cfg=text, init_logit_bias=-10.0)
    held = dict(model_cfg=cfg, preprocess_cfg=dict(mean=HALF, std=HALF, resize_mode='squash'))
    (tmp_path / 'teacher.json').write_text(json.dumps(held))
    from tinyclip.cli.train import from_config

    torch.manual_seed(0)
    made = from_config(str(tmp_path / 'teacher.json'))
    save(made.model, tmp_path / 'teacher', tokenizer=made.tokenizer)
    small = dict(vision, image_size=32), dict(context_length=12, vocab_size=49408, width=32)
    student = dict(embed_dim=16, vision_cfg=small[0], text_cfg=small[1] | dict(heads=2, layers=1))
    (tmp_path / 'student.json').write_text(json.dumps(student))
    return tmp_path


def run(*argv):
    return main([*map(str, argv), '--json'])


@quiet
def test_from_the_command_line(data, folders, capsys):
    where = ['--data', data, '--batch-size', 4]
    train = ['distill', *where, '--teacher', folders / 'teacher', '--steps', 2, '--device', 'cpu']
    train += ['--precision', 'fp32']  # as the cache
    # nothing passes from one family to the other, and the way that works is named
    assert run(*train, '--student', folders / 'student.json', '--out', folders / 'x') != 0
    assert '--random-start' in capsys.readouterr().err
    fresh = [*train, '--student', folders / 'student.json', '--random-start']
    assert run(*fresh, '--out', folders / 'fresh') == 0
    made = load(folders / 'fresh' / 'student')
    assert made.model.visual.image_size == (32, 32) and made.tokenizer(['a']).shape == (1, 12)
    assert load(folders / 'teacher').tokenizer(['a']).shape == (1, 16)
    # a model folder learns on, live and from a cache
    again = [*train, '--student', folders / 'fresh' / 'student']
    assert run(*again, '--out', folders / 'live') == 0
    asked = ['cache', '--data', data, '--teacher', folders / 'teacher', '--out', folders / 'cache']
    assert run(*asked, '--precision', 'fp32', '--dtype', 'float32') == 0
    stored = [*again, '--cache', folders / 'cache', '--out', folders / 'cached']
    assert run(*stored) == 0
    found = [
        json.loads((folders / f / 'result.json').read_text())['losses'] for f in ('live', 'cached')
    ]
    assert found[0]['affinity'] == pytest.approx(found[1]['affinity'], rel=1e-4)
    capsys.readouterr()
    seen = ['check', '--data', data, '--model', folders / 'teacher', '--n', 8]
    assert run(*seen, '--student', folders / 'fresh' / 'student', '--html', folders / 'c.html') == 0
    readers = json.loads(capsys.readouterr().out)['readers']
    assert readers['student'] | dict(truncated=0) == dict(size=[32, 32], context=12, truncated=0)
    assert readers['teacher'] | dict(truncated=0) == dict(size=[48, 48], context=16, truncated=0)
    assert (folders / 'c.html').read_text().count('<img') == 3 * 8


def test_check_shows_both(data):
    t = teacher()
    report = check(
        data, read(STUDENT), BPE, t, n=8, seconds=0.1, teacher_reads=(read(TEACHER), LETTERS)
    )
    said = str(report)
    assert 'the student 32 x 32 pixels and 12 tokens' in said
    assert 'the teacher 48 x 48 pixels and 16 tokens (100% of the captions lose their end)' in said
    assert report.recall['n'] == 8
    shown = report.readers['student']['pictures'], report.readers['teacher']['pictures']
    for a, b in zip(*shown, strict=True):
        assert (a.size, b.size) == ((32, 32), (48, 48))
    assert check(data, read(STUDENT), BPE, n=8, seconds=0.1).readers == {}


# --- what cannot work


class Ready:
    "Batches that the caller made, for the student alone"

    def __init__(self, batch):
        self.batch = batch

    def epoch(self, e, start=0):
        yield self.batch


@quiet
def test_refusals(data, tmp_path):
    alone = open_pairs(data, read(STUDENT), BPE, 8)
    one, two = next(alone.epoch(0)), next(opened(data).epoch(0))
    for pairs in (alone, Ready(one)):
        with pytest.raises(TinyclipError, match='for the teacher.*teacher_reads='):
            job(student(), pairs)
    bare = clip(TEACHER, 62, 16)
    bare.visual.preprocess_cfg = {}  # it states nothing but its sizes
    with pytest.raises(TinyclipError, match='image size.*48.*teacher_pixels'):
        job(student(), Ready(one), bare)
    ready = Ready(two)
    ready.teacher_inputs = {}
    assert job(student(), ready).fit(1).finished
    swapped = Ready(TeacherBatch(two.image, two.text, two.image, two.teacher_tokens))
    swapped.teacher_inputs = {}
    with pytest.raises(TinyclipError, match=r'the teacher takes \(n, 3, 48, 48\)'):
        job(student(), swapped).fit(1)
    missing = Ready(TeacherBatch(two.image, two.text, two.teacher_pixels))
    missing.teacher_inputs = {}
    with pytest.raises(TinyclipError, match=r'the teacher takes \(n, 16\)'):
        job(student(), missing).fit(1)
    wrong = opened(data, teacher_reads=(read(dict(size=48)), LETTERS))
    with pytest.raises(TinyclipError, match='in the pairs and .* for the teacher'):
        job(student(), wrong)


def test_refused_readers(data, tmp_path):
    for reads, says in (
        ((read(TEACHER, train=False), LETTERS), 'leaves nothing to chance'),
        ((read(TEACHER, flip=True), LETTERS), 'RandomHorizontalFlip'),
        (teacher(), 'holds two things'),
        ((LETTERS, read(TEACHER)), 'preprocess must turn'),
    ):
        with pytest.raises(TinyclipError, match=says):
            opened(data, teacher_reads=reads)
    folder = cache(data, tmp_path / 'c')
    with pytest.raises(TinyclipError, match='different parts of a picture'):
        cached_pairs(data, folder, read(STUDENT, train=False), BPE, 8)
    with pytest.raises(TinyclipError, match='was trained with'):
        cache(data, tmp_path / 'd', cfg=dict(size=48))  # other pixels than the teacher states


def test_nothing_is_inherited_across_families():
    small = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16),
        text_cfg=dict(context_length=12, vocab_size=49408, width=32, heads=2, layers=1),
    )
    with pytest.raises(TinyclipError, match='inherits nothing.*teacher_reads='):
        keep_for_config(teacher(), small)
    trunk = dict(timm_model_name='convnext_atto', timm_proj='linear', image_size=48)
    with pytest.raises(TinyclipError, match='between towers of one kind.*inherits nothing'):
        keep_for_config(teacher(), small | dict(vision_cfg=trunk))
    with pytest.raises(TinyclipError, match='no .keep'):
        check_calibration(student(), teacher(), 64)


def test_a_tokenizer_that_is_not_there(folders, monkeypatch):
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    held = json.loads((folders / 'teacher.json').read_text())
    held['model_cfg']['text_cfg']['hf_tokenizer_name'] = 'nobody/no-tokenizer'
    (folders / 'lost.json').write_text(json.dumps(held))
    from tinyclip.cli.train import from_config

    with pytest.raises(TinyclipError, match="'nobody/no-tokenizer'.*a folder"):
        from_config(str(folders / 'lost.json'))


def test_transforms_of_the_models_read_what_they_state(data):
    "As the command line opens them"
    t, s = teacher(), student()
    pairs = open_pairs(data, transforms(s)[0], BPE, 4, teacher_reads=(transforms(t)[0], LETTERS))
    b = next(pairs.epoch(0))
    assert b.teacher_pixels.shape[-1] == 48 and b.image.shape[-1] == 32
    assert pairs.teacher_inputs['mean of the pixels'] == HALF
    assert math.isclose((b.teacher_pixels / 2 + 0.5).max().item(), 1, abs_tol=0.01)


# --- several processes


def paired(data, folder, live, batch_size):
    "Pairs that both read, with a live teacher or from its cache"
    if live:
        return opened(data, batch_size, shuffle=False)
    return cached_pairs(data, folder, read(STUDENT), BPE, batch_size, shuffle=False)


def learned(batches, live):
    "Losses and gradients of every batch, and the weights behind plain steps downhill"
    s, out = student(), []
    objective = Objective(dict(affinity=1.0, contrastive=0.5), student_scale=20.0)
    engine = Engine(s, teacher() if live else None, objective, make_accelerator('fp32', 'cpu'))
    for b in batches:
        loss = engine.backward(b)['loss']
        grads = {n: full(p.grad).clone() for n, p in s.named_parameters() if p.grad is not None}
        out.append(dict(loss=loss, **grads))
        with torch.no_grad():
            for p in s.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None
    engine.release()
    return dict(steps=out, weights={n: p.detach().clone() for n, p in s.named_parameters()})


def one_of_two(rank, world, port, data, folder, live):
    started(rank, world, port)
    batches = list(paired(data, folder / 'cache', live, 4).epoch(0))
    torch.save((batches, learned(batches, live)), folder / f'{rank}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def together(batches):
    "The batches of several processes as one: rows behind each other, and what all share"
    fields = zip(*batches, strict=True)
    joined = (torch.cat(f) if torch.is_tensor(f[0]) and f[0].ndim else f[0] for f in fields)
    return type(batches[0])(*joined)


def rows_of(batches):
    "What is read of each pair, by both, as bytes"
    for batch in batches:
        each = zip(*(t for t in batch if torch.is_tensor(t) and t.ndim), strict=True)
        yield from (b''.join(t.numpy().tobytes() for t in row) for row in each)


@quiet
@pytest.mark.parametrize('live', [True, False], ids=['live', 'cached'])
def test_two_processes_read_and_learn_what_one_does(data, live, tmp_path):
    if not live:
        cache(data, tmp_path / 'cache')
    spawn(one_of_two, 2, data, tmp_path, live)
    (a, first), (b, second) = (torch.load(tmp_path / f'{r}.pt', weights_only=False) for r in (0, 1))
    whole = list(paired(data, tmp_path / 'cache', live, 8).epoch(0))
    both = [together(pair) for pair in zip(a, b, strict=True)]
    assert len(both) == len(whole) == 2
    # each pair once, its crop, caption and the teacher's part as in one process, in another order
    assert sorted(rows_of(whole)) == sorted(rows_of(both))
    one = learned(both, live)
    for got in (first, second):
        for have, want in zip(got['steps'], one['steps'], strict=True):
            assert have.keys() == want.keys()
            norm = torch.cat([v.flatten() for k, v in want.items() if k != 'loss']).norm()
            for k, v in want.items():
                assert (have[k] - v).norm() <= 1e-5 * max(v.norm(), 1e-6 * norm), k
        for k, v in one['weights'].items():
            assert (got['weights'][k] - v).norm() <= 1e-5 * v.norm(), k
    assert any((one['weights'][k] != v).any() for k, v in student().named_parameters())
