"Closed-form reconstruction: what it leaves alone, what it restores, and what it refuses"

import copy
import warnings

import pytest
import torch
from groups import spawn, started
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inheritance import models, quick, random_keep

from tinyclip.core import TinyclipError
from tinyclip.inheritance import inherit
from tinyclip.keep import Keep, choose, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.reconstruction import Sums, reconstruct, refit
from tinyclip.towers import Family, layout
from tinyclip.towers.architecture import build

few = settings(quick, max_examples=8)
CFG = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=16, layers=3, width=32, patch_size=8, head_width=8),
    text_cfg=dict(context_length=6, vocab_size=32, width=32, heads=4, layers=3),
)


def clip(seed=0, **changes):
    torch.manual_seed(seed)
    model = build({**CFG, **changes}).eval()
    for p in model.parameters():  # biases and norms start at 0 and 1, where mistakes do not show
        if p.ndim == 1 and p.numel() > 1:
            torch.nn.init.normal_(p, 1.0 if p.mean() > 0.5 else 0.0, 0.3)
    return model


def batches(n=64, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 16, 16, generator=g)
    t = torch.randint(1, 31, (n, 6), generator=g)
    return list(zip(x.split(size), t.split(size)))


def refitted(student, teacher, pairs=None, **settings):
    return reconstruct(
        student, teacher, batches() if pairs is None else pairs, progress=False, **settings
    )


def features(model, pairs=None):
    x, t = next(iter(pairs or batches(seed=1)))
    with torch.no_grad():
        return model.encode_image(x), model.encode_text(t)


def off(a, b, pairs=None):
    "The larger relative distance of two models' features, over both towers"
    both = zip(features(a, pairs), features(b, pairs))
    return max(((x - y).norm() / y.norm()).item() for x, y in both)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- what must stay


@few
@given(models())
def test_keeping_everything_changes_nothing(model):
    student = refitted(inherit(model, manual(model)), model)
    assert off(student, model) < 1e-5
    assert all(r['after'] < 1e-6 or r['damping'] is None for r in student.reconstruction)


def test_twice_is_once():
    teacher = clip()
    once = refitted(inherit(teacher, manual(teacher, 0.5, text_depth=0.6)), teacher)
    assert equal(refitted(once, teacher), once)


def test_what_was_learnt_is_not_lost_in_silence():
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5, text_depth=0.6))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        once = refitted(student, teacher)
        refitted(once, teacher)
        refitted(copy.deepcopy(student).half().float(), teacher)  # rounding is no learning
    torch.nn.init.normal_(student.transformer.resblocks[0].mlp.c_fc.weight)
    with pytest.warns(UserWarning, match='c_fc.weight .* is replaced: reconstruct first'):
        refitted(student, teacher)


def test_the_inputs_stay_as_they_are():
    teacher = clip().train()
    student = inherit(teacher, manual(teacher, 0.5))
    before = copy.deepcopy((teacher, student))
    new = refitted(student, teacher)
    assert equal(teacher, before[0]) and equal(student, before[1]) and teacher.training
    assert not equal(new, student) and new.keep == student.keep


# --- what must be restored


def doubled(teacher, kinds):
    "A teacher in which the second half of every kind equals the first, and a cut to the first"
    for tower in (teacher.visual, getattr(teacher, 'text', teacher)):
        for block in tower.transformer.resblocks:
            if 'ffn' in kinds:
                for p in (block.mlp.c_fc.weight, block.mlp.c_fc.bias):
                    p.data[len(p) // 2 :] = p.data[: len(p) // 2]
            if 'heads' in kinds:
                for p in (block.attn.in_proj_weight, block.attn.in_proj_bias):
                    qkv = p.data.view(3, len(p) // 3, -1)
                    qkv[:, qkv.shape[1] // 2 :] = qkv[:, : qkv.shape[1] // 2]
    sizes = layout(teacher).sizes
    half = {a: range(n // 2) for a, n in sizes.items() if a.split('.')[-1] in kinds}
    return teacher, inherit(teacher, Keep(sizes, half))


@pytest.mark.parametrize('kinds', [['ffn'], ['heads'], ['ffn', 'heads']], ids='-'.join)
@pytest.mark.parametrize('custom_text', [False, True])
def test_copies_are_made_up_for(kinds, custom_text):
    teacher, student = doubled(clip(custom_text=custom_text), kinds)
    assert off(student, teacher) > 0.01
    assert off(refitted(student, teacher, batches(256)), teacher) < 1e-4


def test_the_first_layers_may_go():
    "The teacher goes through them all the same: what the student aims at is its own embedding"
    teacher = clip()
    student = inherit(teacher, choose(teacher, {'*.layers': [1, 2]}))
    data = batches(512, 64)
    assert off(refitted(student, teacher, data), teacher, data) < 0.5 * off(student, teacher, data)


def test_a_layer_that_adds_a_constant_is_made_up_for():
    """Its constant goes to the layer before it"""
    teacher = clip()
    for blocks in (teacher.visual.transformer.resblocks, teacher.transformer.resblocks):
        for m in (blocks[1].attn.out_proj, blocks[1].mlp.c_proj):
            torch.nn.init.zeros_(m.weight)
    student = inherit(teacher, choose(teacher, {'*.layers': [0, 2]}))
    assert off(student, teacher) > 0.01
    assert off(refitted(student, teacher), teacher) < 1e-4


# --- any cut


@few
@given(st.data())
def test_any_cut_is_closer_on_what_was_seen(data):
    """Layers without heads or neurons, unequal layers, dropped layers, other poolings"""
    teacher = data.draw(models())
    student = inherit(teacher, random_keep(data.draw, teacher))
    new = refitted(student, teacher)
    assert layout(new).sizes == layout(student).sizes
    assert all(r['after'] <= r['before'] for r in new.reconstruction)
    assert all(f.isfinite().all() for f in features(new))


@pytest.mark.parametrize('soft', [False, True])
def test_a_masked_cut(soft):
    "Mask values scale the stream, and the targets with it"
    teacher = clip()
    masked = MaskedCLIP(teacher, ['heads', 'ffn', 'width']).eval()
    g = torch.Generator().manual_seed(0)
    alpha = torch.randn(masked.log_alpha.shape, generator=g)
    masked.log_alpha.data.copy_(0.5 * alpha if soft else 50 * alpha.sign())
    student = masked.cut()
    assert bool(student.keep.values) is soft
    data = batches(512, 64)
    new = refitted(student, teacher, data)
    assert off(new, teacher, data) < 0.8 * off(student, teacher, data)


@pytest.mark.parametrize(
    'changes',
    [
        dict(quick_gelu=True),
        dict(vision_cfg=dict(CFG['vision_cfg'], pool_type='avg', ls_init_value=0.1)),
        dict(text_cfg=dict(CFG['text_cfg'], pool_type='last', no_causal_mask=True)),
        dict(custom_text=True, text_cfg=dict(CFG['text_cfg'], proj_bias=True)),
    ],
    ids=['quickgelu', 'average pooling and layer scale', 'last token', 'projection with bias'],
)
def test_variants_of_towers(changes):
    teacher = clip(**changes)
    student = inherit(teacher, manual(teacher, 0.5, text_width=0.5))
    data = batches(512, 64)
    assert off(refitted(student, teacher, data), teacher, data) < 0.8 * off(student, teacher, data)


# --- any batch, any process


def test_batches_of_any_size():
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5))
    a, b = (refitted(student, teacher, batches(64, n)) for n in (64, 7))
    assert off(a, b) < 1e-4


def test_samples_are_counted():
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5))
    some = refitted(student, teacher, batches(64, 16), samples=24)
    assert equal(some, refitted(student, teacher, [*batches(64, 16)[:1], *batches(64, 8)[2:3]]))


def test_equal_texts_are_held_out_together():
    "Ten captions said four times are held back as ten captions are"
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5, text_depth=0.5))
    [(images, texts)] = batches(40, 40)
    few = texts[:10].repeat(4, 1)
    often = refitted(student, teacher, [(images, few)])
    once = refitted(student, teacher, [(images[:10], few[:10])])
    often, once = (
        [r['damping'] for r in m.reconstruction if not r['matrix'].startswith('visual')]
        for m in (often, once)
    )
    assert often == once and any(often)


def half_of_the_samples(rank, world, port, folder):
    started(rank, world, port)
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5))
    new = refitted(student, teacher, batches(64, 4)[rank::world])
    torch.save(new.state_dict(), folder / f'{rank}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_add_their_sums(tmp_path):
    spawn(half_of_the_samples, 2, tmp_path)
    a, b = (torch.load(tmp_path / f'{r}.pt') for r in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5))
    # the same fourth samples are held out: each process counts its own
    x, t = (torch.cat(p) for p in zip(*batches(64, 4)))
    alone = refitted(student, teacher, [(x, t)])
    student.load_state_dict(a)
    assert off(student, alone) < 1e-3


def too_few_in_one_process(rank, world, port, folder):
    started(rank, world, port)
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5))
    with pytest.raises(TinyclipError, match='8 for each'):
        refitted(student, teacher, batches(64, 16)[: 4 * rank])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_no_process_waits_for_one_without_pairs(tmp_path):
    spawn(too_few_in_one_process, 2, tmp_path)


def test_a_closed_layer_scale():
    teacher = clip(vision_cfg=dict(CFG['vision_cfg'], ls_init_value=0.1))
    teacher.visual.transformer.resblocks[1].ls_2.gamma.data[:5] = 0
    student = inherit(teacher, manual(teacher, 0.5))
    assert all(f.isfinite().all() for f in features(refitted(student, teacher)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5))
    data = batches(512, 64)
    new = refitted(copy.deepcopy(student).to(dtype), copy.deepcopy(teacher).to(dtype), data)
    assert next(new.parameters()).dtype == dtype
    assert off(new.float(), teacher, data) < 0.8 * off(student, teacher, data)


# --- the regression itself


def test_few_rows_and_many_columns_do_no_harm():
    torch.manual_seed(0)
    w = torch.randn(4, 50).double()
    fit, held = (Sums(50, 4, torch.device('cpu')) for _ in range(2))
    for sums, n in ((fit, 9), (held, 1000)):
        x = torch.randn(n, 50)
        sums.add(x, x @ w.T.float() + 0.5 * torch.randn(n, 4))
    new, b, report = refit(fit, held, w, torch.zeros(4).double())
    assert report['after'] <= report['before']
    assert held.error(new, b) <= held.error(w, torch.zeros(4).double()) * 1.001


def test_a_bias_alone_takes_the_mean():
    fit, held = (Sums(0, 2, torch.device('cpu')) for _ in range(2))
    y = torch.tensor([[1.0, 4.0], [3.0, 0.0], [5.0, 2.0]])
    for sums, rows in ((fit, y[:2]), (held, y[2:])):
        sums.add(rows[:, :0], rows)
    _, b, _ = refit(fit, held, torch.zeros(2, 0).double(), torch.zeros(2).double())
    assert b.tolist() == [3.0, 2.0]


# --- bad input


def refused(contains, student, teacher, pairs=None, **settings):
    with pytest.raises(TinyclipError, match=contains):
        refitted(student, teacher, pairs, **settings)


def test_bad_input():
    teacher, other = clip(), clip(text_cfg=dict(CFG['text_cfg'], layers=2))
    student = inherit(teacher, manual(teacher, 0.5))
    refused('has no .keep', teacher, teacher)
    refused('no cut of this teacher', student, other)
    refused('no cut of this teacher', inherit(other, manual(other, 0.5)), teacher)
    x, t = batches()[0]
    refused('are too few', student, teacher, [(x[:7], t[:7])])
    refused('are too few', student, teacher, [])
    refused(r'images are \(8, 8\)', student, teacher, [(x[..., :8, :8], t)])
    refused('texts have 9 tokens', student, teacher, [(x, t.repeat(1, 2)[:, :9])])
    refused('tokenizer of this teacher', student, teacher, [(x, t + 32)])
    refused('image tower|NaN or infinity', student, teacher, [(x * float('inf'), t)])
    refused('samples', student, teacher, samples=0)


def test_towers_whose_linear_maps_are_not_known(monkeypatch):
    teacher = clip()
    student = inherit(teacher, manual(teacher, 0.5))
    monkeypatch.setattr(type(layout(teacher).families['image']), 'branches', Family.branches)
    refused('a ViT, are not known: .* describe them', student, teacher)
