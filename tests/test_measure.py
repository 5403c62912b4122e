"""What models cost, against counts made another way; and the published facts, against their own
file names"""

import contextlib
import json
import math
import re
import types
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

import tinyclip
from tinyclip.core import TinyclipError
from tinyclip.evaluate import cost as measure
from tinyclip.inheritance import inherit
from tinyclip.keep import choose
from tinyclip.lab.chart import AXES, chart, label_places, overlap, save_chart, scale
from tinyclip.towers.architecture import config, create

FACTS = json.loads((Path(tinyclip.__file__).parent / 'assets' / 'released.json').read_text())
MANUAL = [f for f in FACTS if f['config']]
# G
PUBLISHED = {
    'ViT-39M-16-Text-19M': 9.5,
    'ViT-8M-16-Text-3M': 2.0,
    'ResNet-30M-Text-29M': 6.9,
    'ResNet-19M-Text-19M': 4.4,
    'ViT-61M-32-Text-29M': 5.3,
    'ViT-40M-32-Text-19M': 3.5,
}


def meta(name):
    with torch.device('meta'):
        return create(config(name))


def tiny(width=64):
    torch.manual_seed(0)
    return create(
        dict(
            embed_dim=16,
            vision_cfg=dict(image_size=48, layers=2, width=width, patch_size=16, head_width=16),
            text_cfg=dict(context_length=16, vocab_size=512, width=32, heads=2, layers=2),
        )
    )


# The published facts


def test_eleven_models_are_published_and_six_of_them_have_a_configuration():
    assert len(FACTS) == len({f['name'] for f in FACTS}) == 11
    assert {f['config'].removeprefix('TinyCLIP-'): f['macs'] for f in MANUAL} == PUBLISHED


@pytest.mark.parametrize('f', FACTS, ids=lambda f: f['name'])
def test_a_name_agrees_with_its_facts(f):
    kind, image, patch, text, data = re.fullmatch(
        r'TinyCLIP-(?:auto-)?(ViT|ResNet)-(\d+)M(?:-(16|32))?-Text-(\d+)M-(\w+)', f['name']
    ).groups()
    assert (int(image), int(text), data) == (f['image'], f['text'], re.sub(r'\W', '', f['data']))
    assert ('auto' in f['name'], f['config'] is None) == (f['inheritance'] == 'auto',) * 2
    assert f['title'] == f"TinyCLIP {kind}-{image}M{'/' + patch if patch else ''} Text-{text}M"
    assert (
        f['file'] == f['name'] + '.pt'
        and f['url'].startswith('https://')
        and f['url'].endswith('/' + f['file'])
        and f['hub'] in (None, 'wkcn/' + f['name'])
    )
    if f['config']:
        cfg = config(f['config'])['vision_cfg']
        assert cfg['image_size'] == 224 and (
            cfg.get('patch_size') == int(patch) if patch else isinstance(cfg['layers'], list)
        )


# Six models recounted


@pytest.mark.parametrize('f', MANUAL, ids=lambda f: f['config'])
def test_published_macs_within_two_per_cent(f):
    mine = measure.macs(meta(f['config']))['total'] / 1e9
    assert abs(mine / f['macs'] - 1) < 0.02 and round(mine, 1) == f['macs']


@pytest.mark.parametrize('f', MANUAL, ids=lambda f: f['config'])
def test_names_are_the_towers_without_the_token_table_to_whole_millions(f):
    model = meta(f['config'])
    p = measure.parameters(model)
    assert (round(p['image'] / 1e6), round(p['text'] / 1e6)) == (f['image'], f['text'])
    for tower in ('image', 'text'):  # what a rounded name leaves open: half a million
        assert abs(p[tower] / 1e6 / f[tower] - 1) < max(0.02, 0.5 / f[tower])
    by_name = {n: q.numel() for n, q in model.named_parameters()}
    assert (
        p['token_table']
        == by_name['token_embedding.weight']
        == 49408 * config(f['config'])['text_cfg']['width']
    )
    assert p['image'] == sum(v for n, v in by_name.items() if n.startswith('visual.'))
    # without logit_scale
    assert (
        p['text']
        == sum(v for n, v in by_name.items() if not n.startswith('visual.')) - p['token_table'] - 1
    )
    assert p['total'] == p['towers'] + p['token_table'] + 1


def test_the_abstract_counts_alike():
    "8.9 % of ViT-B/16, with the rounded numbers of the names"
    b = measure.parameters(meta('ViT-B-16'))
    assert round(100 * (8 + 3) / (round(b['image'] / 1e6) + round(b['text'] / 1e6)), 1) == 8.9


def vit_macs(w, layers, patch, embed, size=224):
    n = (size // patch) ** 2
    return (
        layers * (12 * w * w * (n + 1) + 2 * (n + 1) ** 2 * w)
        + n * 3 * patch * patch * w
        + w * embed
    )


def text_macs(w, layers, embed, n=77):
    return layers * (12 * w * w * n + 2 * n * n * w) + w * embed


def conv_macs(visual, size=224):
    """Convolutions by their output, and the attention pool by hand: open_clip lets the mean and
    every place ask, and takes what the mean is answered"""
    total, handles = [0], []

    def count(m, _, y):
        total[0] += y[0].numel() * m.weight[0].numel()

    for m in visual.modules():
        if isinstance(m, nn.Conv2d):
            handles.append(m.register_forward_hook(count))
    with torch.no_grad():
        visual.eval()(torch.empty(1, 3, size, size, device='meta'))
    for h in handles:
        h.remove()
    pool, n = visual.attnpool, (size // 32) ** 2 + 1
    c = pool.q_proj.in_features
    return total[0] + 3 * c * c * n + 2 * n * n * c + n * c * pool.c_proj.out_features


@pytest.mark.parametrize('name', [f['config'] for f in MANUAL] + ['ViT-B-32', 'ViT-B-16', 'RN50'])
def test_macs_by_hand(name):
    cfg, model = config(name), meta(name)
    v, t, embed = cfg['vision_cfg'], cfg['text_cfg'], cfg['embed_dim']
    mine = measure.macs(model)
    assert mine['text'] == text_macs(t['width'], t['layers'], embed)
    image = (
        conv_macs(model.visual)
        if isinstance(v['layers'], list)
        else vit_macs(v['width'], v['layers'], v['patch_size'], embed)
    )
    assert mine['image'] == image


def map_pooled(name, grad=True):
    "A tower that hands a parameter to its pooling, as SigLIP and PE do"
    return open_clip.CustomTextCLIP(
        embed_dim=384 if 'small' in name else 192,
        vision_cfg=dict(
            image_size=224,
            timm_model_name=name,
            timm_model_pretrained=False,
            timm_pool='map',
            timm_proj='none',
        ),
        text_cfg=dict(context_length=16, vocab_size=64, width=32, heads=2, layers=1),
    ).requires_grad_(grad)


@pytest.mark.parametrize(
    'name, w, patch, known',
    [
        ('vit_tiny_patch16_224', 192, 16, 1_268_385_792),
        ('vit_small_patch32_224', 384, 32, None),
    ],
)
def test_attention_pooling_by_hand(name, w, patch, known):
    n = (224 // patch) ** 2
    trunk = n * 3 * patch * patch * w + 12 * (12 * w * w * (n + 1) + 2 * (n + 1) ** 2 * w)
    pool = 2 * w * w + 2 * n * w * w + 2 * n * w + 8 * w * w
    assert known in (None, trunk + pool)
    assert measure.macs(map_pooled(name))['image'] == trunk + pool
    assert measure.macs(map_pooled(name, grad=False))['image'] == trunk + pool


@pytest.mark.parametrize('extra', [dict(attentional_pool=True, attn_pooler_queries=5), {}])
def test_open_clips_own_pooling(extra):
    "Whether parameters learn changes no count, and they learn as before"
    vision = dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16) | extra
    model = open_clip.CLIP(24, vision, dict(context_length=8, vocab_size=64, width=32, layers=1))
    count = measure.macs(model)
    assert all(p.requires_grad for p in model.parameters())
    assert count == measure.macs(model.requires_grad_(False)) and count['image'] > 0


def test_counting_leaves_a_model_as_it_was():
    model = tiny().train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    measure.macs(model)
    measure.parameters(model)
    measure.weight_bytes(model)
    assert (
        model.training
        and all(torch.equal(before[n], p) for n, p in model.state_dict().items())
        and next(model.parameters()).device.type == 'cpu'
    )


# Bytes


@pytest.mark.parametrize('name', ['tiny', 'RN50'])
def test_weights_take_what_a_file_takes(name, tmp_path):
    from safetensors.torch import save_file

    # batch norm has buffers, some of them integers
    model = tiny() if name == 'tiny' else create(config('RN50'))
    for precision, dtype in (('fp32', torch.float32), ('fp16', torch.float16)):
        save_file(
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()},
            tmp_path / 'm',
        )
        header = 8 + int.from_bytes((tmp_path / 'm').open('rb').read(8), 'little')
        assert measure.weight_bytes(model)[precision] == (tmp_path / 'm').stat().st_size - header


def test_a_shared_weight_is_stored_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert measure.weight_bytes(model) == dict(fp32=256, fp16=128)


# Speed: a clock that the test sets


def scripted(monkeypatch, times):
    "`seconds` returns, per tower, what `times` says for each round; the last one again and again"
    rounds = {}

    def seconds(f, x):
        f(x)
        n = rounds[f] = rounds.get(f, -1) + 1
        t = times[(id(f.__self__), f.__name__)]
        return t[min(n, len(t) - 1)]

    monkeypatch.setattr(measure, 'seconds', seconds)


def paced(monkeypatch, **rounds):
    """A model per name, whose image tower takes so long in each round after the two for warming
    up, and whose texts take none of it"""
    models = {n: tiny() for n in rounds}
    scripted(
        monkeypatch,
        {
            (id(models[n]), f): [1e9, 1e9, *r] if f == 'encode_image' else [1e-9]
            for n, r in rounds.items()
            for f in ('encode_image', 'encode_text')
        },
    )
    return models


def test_speed_is_the_median_of_what_each_round_says(monkeypatch):
    # 2, 2, 3, 1, 2; the medians alone say 2, too
    found = measure.speeds(paced(monkeypatch, a=[2, 2, 3, 2, 4], b=[1, 1, 1, 2, 2]), 4, repeats=5)
    assert found['b']['image_speed'] == 2 and found['a']['image_speed'] == 1
    found = measure.speeds(
        paced(monkeypatch, a=[1, 1.1, 10, 11, 12], b=[1, 1, 10, 10, 10]), 4, repeats=5
    )
    assert found['b']['image_speed'] == pytest.approx(1.1)  # 1, 1.1, 1, 1.1, 1.2; the medians say 1


def test_towers_one_after_the_other_make_a_pair(monkeypatch):
    a, b = tiny(), tiny(32)
    scripted(
        monkeypatch,
        {
            (id(a), 'encode_image'): [1],
            (id(a), 'encode_text'): [1],
            (id(b), 'encode_image'): [0.5],
            (id(b), 'encode_text'): [0.25],
        },
    )
    found = measure.speeds(dict(a=a, b=b), batch_size=4)

    def rates(r):
        return {k: v for k, v in r.items() if k.endswith('_per_s')}

    assert rates(found['a']) == dict(images_per_s=4.0, texts_per_s=4.0, pairs_per_s=2.0)
    assert rates(found['b']) == pytest.approx(
        dict(images_per_s=8.0, texts_per_s=16.0, pairs_per_s=16 / 3)
    )
    assert (
        found['b']['image_speed'],
        found['b']['text_speed'],
        found['b']['speed'],
    ) == pytest.approx((2, 4, 8 / 3))


def test_a_busy_phase_changes_nothing_if_it_meets_all_or_few(monkeypatch):
    quiet = measure.speeds(paced(monkeypatch, a=[2] * 9, b=[1] * 9), 4)['b']
    # everything takes seven times as long for a while
    both = measure.speeds(paced(monkeypatch, a=[2] * 5 + [14] * 4, b=[1] * 5 + [7] * 4), 4)['b']
    # two rounds of one model only
    one = measure.speeds(paced(monkeypatch, a=[2] * 9, b=[1, 9, 9, 1, 1, 1, 1, 1, 1]), 4)['b']
    assert (quiet['speed'], both['speed'], one['speed']) == pytest.approx((2, 2, 2)) and (
        quiet['spread'],
        both['spread'],
        one['spread'],
    ) == pytest.approx((0, 0, 0), abs=1e-6)


def test_a_spread_that_is_too_large_is_said_instead_of_a_number(monkeypatch):
    models = paced(monkeypatch, a=[1] * 9, b=[0.5, 1, 2] * 5, c=[0.5] * 9)
    found = measure.speeds(models, 4)
    assert (found['b']['speed'], found['b']['pairs_per_s']) == (None, None) and found['b'][
        'spread'
    ] == pytest.approx(1.5)
    assert found['c']['speed'] == pytest.approx(2) and found['c']['pairs_per_s'] == pytest.approx(8)
    table = {
        r['model']: (r['pairs/s'], r['speed'], r['spread'])
        for r in measure.compare(paced(monkeypatch, a=[1] * 9, b=[0.5, 1, 2] * 5, c=[0.5] * 9), 4)
    }
    assert table == dict(
        a=('4', '1.00x', '0%'), b=('too noisy', 'too noisy', '150%'), c=('8', '2.00x', '0%')
    )


def test_pairs_per_second_need_a_steady_clock_and_a_ratio_does_not(monkeypatch):
    found = measure.speeds(paced(monkeypatch, a=[2, 4, 8] * 5, b=[1, 2, 4] * 5), 4)
    assert (
        found['b']['speed'] == pytest.approx(2)
        and found['a']['pairs_per_s'] is found['b']['pairs_per_s'] is None
    )


def test_a_processor_is_read_by_its_own_time_on_one_thread(monkeypatch):
    clock, model = iter([5.0, 7.5]), tiny()
    monkeypatch.setattr(measure.time, 'process_time', lambda: next(clock))
    assert measure.seconds(lambda x: x, torch.ones(1)) == 2.5
    monkeypatch.undo()
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(
            measure, 'seconds', lambda f, x: seen.append(torch.get_num_threads()) or 1.0
        )
        measure.speeds(dict(a=model), 1, repeats=1)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_gpu_is_read_by_its_events(monkeypatch):
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append('record')

        def synchronize(self):
            told.append('wait')

        def elapsed_time(self, end):
            return 1500.0  # ms

    for name, stub in dict(
        Event=Event,
        synchronize=lambda: told.append('wait'),
        device=lambda d: contextlib.nullcontext(),
    ).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    assert (
        measure.seconds(
            lambda x: told.append('work'), types.SimpleNamespace(device=torch.device('cuda'))
        )
        == 1.5
    )
    assert told == ['wait', 'record', 'work', 'record', 'wait']


@pytest.mark.parametrize(
    'reference,ratios', [(None, (1, 8 / 3)), ('a', (1, 8 / 3)), ('b', (3 / 8, 1))]
)
def test_the_ratio_is_to_the_reference(monkeypatch, reference, ratios):
    a, b = tiny(), tiny(32)
    scripted(
        monkeypatch,
        {
            (id(a), 'encode_image'): [1],
            (id(a), 'encode_text'): [1],
            (id(b), 'encode_image'): [0.5],
            (id(b), 'encode_text'): [0.25],
        },
    )
    found = measure.profile(dict(a=a, b=b), 2, reference=reference)
    assert tuple(r['speed'] for r in found.values()) == pytest.approx(ratios)
    assert found['b']['pairs_per_s'] == pytest.approx(8 / 3)  # to whatever the ratio is
    assert [r['speed'] for r in measure.compare(dict(a=a, b=b), 2, reference=reference)] == [
        f'{x:.2f}x' for x in ratios
    ]


def test_a_reference_from_outside_is_measured_in_the_same_run(monkeypatch):
    other, mine = tiny(32), tiny()
    monkeypatch.setattr(measure, 'baseline', lambda name, device: other)
    seen = []
    monkeypatch.setattr(
        measure, 'seconds', lambda f, x: seen.append(f.__self__) or f(x) is None or 1.0
    )
    found = measure.profile(dict(mine=mine), 1, reference='some-config', repeats=1)
    assert list(found) == ['some-config', 'mine'] and found['mine']['speed'] == 1
    assert seen == [other, other, mine, mine] * 3  # in turns


def test_slim_students_and_uncut_ones_say_the_same_things():
    model = tiny()
    slim = inherit(model, choose(model, {'image.layers.0.heads': 1, 'text.layers.1.heads': []}))
    a, b = measure.profile(dict(a=model, b=slim), 1).values()
    assert (
        set(a) == set(b) and b['total_macs'] < a['total_macs'] and b['fp16_bytes'] < a['fp16_bytes']
    )


def test_models_without_numbers_are_counted_and_not_run():
    mine = measure.profile(dict(a=tiny()), 1, repeats=1)['a']
    there = measure.profile(dict(a=tiny().to('meta'), b=tiny(32).to('meta')))
    assert (
        'speed' not in there['a']
        and 'peak_memory' not in there['b']
        and there['a'].items() <= mine.items()
    )
    assert list(measure.compare(dict(a=tiny().to('meta')))[0]) == [
        'model',
        'image',
        'text',
        'token table',
        'total',
        'MACs',
        'fp16',
    ]


@pytest.mark.parametrize(
    'call,says',
    [
        (lambda: measure.compare({}), 'no models'),
        (lambda: measure.profile({}), 'no models'),
        (
            lambda: measure.compare(dict(a=tiny()), 1, reference='ViT-B-23'),
            "Did you mean 'ViT-B-32'",
        ),
        (lambda: measure.compare(dict(a=tiny()), 1, 'fp61'), "'fp61'"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(TinyclipError, match=re.escape(says)):
        call()


# Chart


def published():
    return [
        dict(
            model=f['title'],
            family=f['inheritance'] + f['data'],
            top1=f['top1'] / 100,
            macs=f['macs'] * 1e9,
            throughput=f['throughput'],
            towers=(f['image'] + f['text']) * 1e6,
        )
        for f in FACTS
    ]


@pytest.mark.parametrize('x', ['macs', 'pairs/s', 'towers'])
def test_every_model_stands_once_where_it_belongs(x):
    rows, fig = published(), chart(published(), x)
    key = next(k for k in AXES[x][0] if k in rows[0])
    drawn = sorted((t.text[i], t.x[i], round(t.y[i], 6)) for t in fig.data for i in range(len(t.x)))
    assert drawn == sorted((r['model'], r[key], round(100 * r['top1'], 6)) for r in rows)
    assert sorted(a.text for a in fig.layout.annotations) == sorted(r['model'] for r in rows)
    assert {t.name for t in fig.data} == {r['family'] for r in rows} and all(
        list(t.x) == sorted(t.x) for t in fig.data
    )
    wide = max(r[key] for r in rows) >= 4 * min(r[key] for r in rows)
    assert fig.layout.xaxis.type == ('log' if wide else 'linear')
    on = math.log10 if wide else float
    low, high = fig.layout.xaxis.range
    assert all(low < on(r[key]) < high for r in rows) and all(
        low <= on(t) <= high for t in fig.layout.xaxis.tickvals
    )
    # names of a log axis stand at logarithms
    assert sorted(on(r[key]) for r in rows) == pytest.approx(
        sorted(a.x for a in fig.layout.annotations)
    )


@pytest.mark.parametrize('seed', range(8))
def test_names_do_not_overlap_where_there_is_room(seed):
    g = torch.Generator().manual_seed(seed)
    points = [
        tuple(p)
        for p in (torch.rand(10, 2, generator=g) * torch.tensor([600.0, 300.0]) + 40).tolist()
    ]
    texts = ['model %d' % i for i in range(10)]
    boxes = [
        (x + dx - 3.1 * 7, y + dy - 7, x + dx + 3.1 * 7, y + dy + 7)
        for (x, y), (dx, dy) in zip(points, label_places(points, texts, 700, 400))
    ]
    assert not sum(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(a[0] >= -1 and a[1] >= -1 and a[2] <= 701 and a[3] <= 401 for a in boxes)


@pytest.mark.parametrize(
    'values',
    [[1], [0], [0, 0], [0.2, 0.8], [1e9, 1e12], [1469, 5504], [-3, 5], [5, 5.0001], [0, 10]],
)
def test_axes_hold_their_points_and_have_ticks(values):
    log, (low, high), ticks = scale(values)
    on = math.log10 if log else float
    assert (
        low < high
        and all(low <= on(v) <= high for v in values)
        and 2 <= len(ticks) <= 12
        and all(low <= on(t) <= high for t in ticks)
    )


@pytest.mark.parametrize(
    'rows,kw,says',
    [
        ([], {}, 'no models'),
        ([dict(top1=0.5, macs=1)], {}, "no name under 'model'"),
        ([dict(model='a', top1=59.8, macs=1)], {}, 'divide what is in per cent by 100'),
        ([dict(model='a', top1=0.5, macs=None)], {}, "'a' has no number for 'macs'"),
        ([dict(model='a', top1=float('nan'), macs=1)], {}, "no number for 'top1'"),
        ([dict(model='a', top1=0.5, macs='3.5 G')], {}, "no number for 'macs'"),
        ([dict(model='a', top1=0.5)], dict(x='size'), "looked under size"),
    ],
)
def test_what_cannot_be_drawn_is_refused(rows, kw, says):
    with pytest.raises(TinyclipError, match=re.escape(says)):
        chart(rows, **kw)


def test_names_from_outside_are_text(tmp_path):
    fig = chart(
        [dict(model='</script><script>alert(1)</script>', family='<b>', top1=0.5, macs=1e9)],
        title='<img src=x>',
    )
    page = save_chart(fig, tmp_path / 'c.html').read_text()
    assert '<script>alert' not in page and '<img src=x>' not in page
    assert '<script src' not in page and [p.name for p in tmp_path.iterdir()] == ['c.html']


def test_a_chart_without_the_exporter_costs_one_sentence(tmp_path, monkeypatch):
    fig = chart([dict(model='a', top1=0.5, macs=1e9)])
    for suffix in ('gif', 'txt'):
        with pytest.raises(TinyclipError, match='chart file'):
            save_chart(fig, tmp_path / f'c.{suffix}')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(TinyclipError, match='pip install'):
        save_chart(fig, tmp_path / 'c.png')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: name)

    def no_browser(*a, **kw):
        raise RuntimeError('\n\nKaleido requires Google Chrome to be installed.\n\nmore')

    monkeypatch.setattr(type(fig), 'write_image', no_browser)
    with pytest.raises(TinyclipError, match='Chrome or Chromium') as e:
        save_chart(fig, tmp_path / 'c.png')
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix,starts', [('png', b'\x89PNG'), ('svg', b'<svg'), ('pdf', b'%PDF')])
def test_pictures(suffix, starts, tmp_path):
    pytest.importorskip(
        'kaleido', reason="pictures need plotly's exporter: pip install 'kaleido>=1'"
    )
    try:
        made = save_chart(chart([dict(model='a', top1=0.5, macs=1e9)]), tmp_path / f'c.{suffix}')
    except TinyclipError as e:
        pytest.skip(str(e))
    assert made.read_bytes().startswith(starts)
