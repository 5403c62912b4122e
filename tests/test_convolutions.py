"Closed-form reconstruction of towers of convolutions: ModifiedResNet, TinyViT, DaViT"

import copy

import pytest
import torch
from groups import spawn, started
from test_reconstruction import equal, refitted, refused
from torch import nn

from tinyclip.inheritance import inherit
from tinyclip.keep import Keep, choose, manual
from tinyclip.reconstruction import PLACES, places
from tinyclip.towers import layout
from tinyclip.towers.architecture import build

SIZE = 64
TEXT = dict(context_length=6, vocab_size=32, width=16, heads=2, layers=1)
VISION = dict(
    resnet=dict(image_size=SIZE, layers=[1, 2, 1, 1], width=8, head_width=16, patch_size=None),
    tinyvit=dict(image_size=SIZE, timm_model_name='tiny_vit_5m_224'),
    davit=dict(image_size=SIZE, timm_model_name='davit_tiny'),
)
TRUNK = dict(
    tinyvit=dict(embed_dims=[16, 16, 32, 32], depths=[2, 2, 1, 1], num_heads=[2, 2, 4, 4]),
    davit=dict(embed_dims=[8, 16, 16, 32], depths=[1, 2, 1, 1], num_heads=[2, 2, 2, 4]),
)
families = pytest.mark.parametrize('family', VISION)


def clip(family, seed=0):
    "A tiny CLIP whose biases, norms and statistics are far from where they start"
    torch.manual_seed(seed)
    own = dict(tinyclip_cfg=dict(trunk=TRUNK[family])) if family in TRUNK else {}
    model = build(dict(embed_dim=12, vision_cfg=VISION[family], text_cfg=TEXT, **own)).eval()
    for n, t in model.visual.state_dict().items():
        if t.ndim > 1:
            fan = t[0].numel() if t.ndim > 2 or 'proj' in n or 'fc' in n or 'qkv' in n else 4
            torch.nn.init.normal_(t, 0, fan**-0.5)
        elif t.ndim and t.is_floating_point():
            torch.nn.init.normal_(t, 0.0 if n.endswith(('bias', 'mean')) else 1.0, 0.2).abs_()
    return model


def batches(n=64, size=16, seed=0, dtype=torch.float32):
    "Smooth pictures, of a few waves each"
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(n, 3, 9, 9, generator=g), SIZE, mode='bicubic')
    t = torch.randint(1, 31, (n, 6), generator=g)
    return list(zip(x.to(dtype).split(size), t.split(size)))


def image_off(model, teacher, seed=1):
    "Relative distance of image features, on pictures that no fit has seen"
    x = batches(32, 32, seed)[0][0]
    with torch.no_grad():
        a, b = (m.encode_image(x) for m in (model, teacher))
    return ((a - b).norm() / b.norm()).item()


def half(teacher):
    return inherit(teacher, manual(teacher, image_width=0.5))


@families
def test_keeping_everything_changes_nothing(family):
    teacher = clip(family)
    new = refitted(inherit(teacher, manual(teacher)), teacher, batches())
    assert equal(new, teacher)
    assert {r['damping'] for r in new.reconstruction} == {None}


def doubled(teacher):
    "Every second half of what a tensor writes equals the first half"
    l, state = layout(teacher), teacher.state_dict()
    for name, dims in l.dims.items():
        for i, d in enumerate(dims):
            writes = i == 0 or dims[0] is None
            if name.startswith('visual.') and d and writes and d.axis != 'embed':
                n = l.sizes[d.axis]
                first, second = torch.arange(n).chunk(2)
                rows = state[name].index_select(i, d.expand(first, n))
                state[name].index_copy_(i, d.expand(second, n), rows)
    return teacher


@families
def test_copies_are_made_up_for(family):
    teacher = doubled(clip(family))
    student = half(teacher)
    new = refitted(student, teacher, batches(192, 64))
    assert image_off(student, teacher) > 0.1
    assert image_off(new, teacher) < 1e-4


@families
def test_half_of_everything_is_closer_on_other_pictures(family):
    teacher = clip(family)
    student = half(teacher)
    new = refitted(student, teacher, batches(256, 64))
    assert image_off(new, teacher) < 0.7 * image_off(student, teacher)
    assert all(t.isfinite().all() for t in new.state_dict().values())
    once = new.reconstruction
    assert all(r['after'] <= r['before'] for r in once) and not new.training


def test_twice_is_once():
    teacher = clip('resnet')
    once = refitted(half(teacher), teacher, batches(64, 32))
    assert equal(refitted(once, teacher, batches(64, 32)), once)


@pytest.mark.parametrize('dropped', [0, 1])
@pytest.mark.parametrize('family', ['tinyvit', 'davit'])
def test_a_layer_that_adds_a_constant_is_made_up_for(family, dropped):
    "Its constant goes to the layer before it, or to the convolution that enters the stage"
    teacher = clip(family)
    layer = teacher.visual.trunk.stages[1].blocks[dropped]
    for n, m in layer.named_modules():
        if n.endswith(('proj', 'fc2')):
            nn.init.zeros_(m.weight)
        if n == 'local_conv':
            nn.init.dirac_(m.conv.weight, groups=m.conv.groups)
            m.bn.reset_running_stats()
            nn.init.ones_(m.bn.weight)
    student = inherit(teacher, choose(teacher, {'image.stages.1.layers': [1 - dropped]}))
    assert image_off(student, teacher) > 0.01
    assert image_off(refitted(student, teacher, batches(64, 32)), teacher) < 1e-4


def test_a_dropped_bottleneck_is_made_up_for_before_its_activation():
    teacher = clip('resnet')
    student = inherit(teacher, choose(teacher, {'image.stages.1.layers': 1}))
    new = refitted(student, teacher, batches(256, 64))
    assert image_off(new, teacher) < 0.7 * image_off(student, teacher)


@pytest.mark.parametrize('family', ['resnet', 'tinyvit'])
def test_statistics_are_those_of_the_student(family):
    teacher = clip(family)
    new = refitted(half(teacher), teacher, batches(128, 64))
    ratio = {}

    def look(n):
        def hook(norm, inputs, output):
            x = inputs[0].transpose(0, 1).flatten(1)
            ratio[n] = ((x.mean(1) - norm.running_mean) / x.std(1)).abs().max().item()

        return hook

    norms = [(n, m) for n, m in new.visual.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for n, m in norms[1:]:  # the first convolution loses nothing that it reads, and stays
        m.register_forward_hook(look(n))
    with torch.no_grad():
        new.encode_image(torch.cat([x for x, _ in batches(128, 64)]))
    assert len(ratio) == len(norms) - 1 and max(ratio.values()) < 0.1


def test_batches_of_any_size():
    teacher = clip('resnet')
    a, b = (refitted(half(teacher), teacher, batches(64, n)) for n in (64, 7))
    assert image_off(a, b) < 1e-3


def half_of_the_samples(rank, world, port, folder):
    started(rank, world, port)
    teacher = clip('resnet')
    new = refitted(half(teacher), teacher, batches(64, 4)[rank::world])
    torch.save(new.state_dict(), folder / f'{rank}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_add_their_sums(tmp_path):
    spawn(half_of_the_samples, 2, tmp_path)
    a, b = (torch.load(tmp_path / f'{r}.pt') for r in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    teacher = clip('resnet')
    alone = refitted(half(teacher), teacher, batches(64, 4))
    student = half(teacher)
    student.load_state_dict(a)
    # large maps give other places of a picture to another process
    assert image_off(student, alone) < 0.05


@families
def test_half_precision(family):
    teacher = clip(family)
    student = half(teacher)
    data = batches(64, 32, dtype=torch.bfloat16)
    new = refitted(copy.deepcopy(student).bfloat16(), copy.deepcopy(teacher).bfloat16(), data)
    assert next(new.parameters()).dtype == torch.bfloat16
    assert image_off(new.float(), teacher) < 0.8 * image_off(student, teacher)


def test_places():
    number = torch.arange(5)
    rows, columns = places(3, 4, number)
    assert (rows * 4 + columns == torch.arange(12)).all()
    rows, columns = places(40, 50, number)
    at = rows * 50 + columns
    assert at.shape == (5, PLACES) and at.max() < 2000
    assert all(len(set(a.tolist())) == PLACES for a in at) and not torch.equal(at[0], at[1])


def test_what_is_not_finite_is_refused_by_name():
    teacher = clip('resnet')
    (x, t), *_ = batches(16)
    refused('visual.conv1.weight cannot be refitted', half(teacher), teacher, [(x / 0, t)])
    nn.init.constant_(teacher.visual.layer2[0].bn2.bias, float('nan'))
    refused('layer2.0.conv2.weight cannot be refitted', half(teacher), teacher, [(x, t)])


@pytest.mark.parametrize('family', ['tinyvit', 'davit'])
def test_fewer_heads_and_none(family):
    "Attention narrower than its stream, and a branch of which a bias is left"
    teacher = clip(family)
    sizes = layout(teacher).sizes
    heads = [a for a in sizes if a.startswith('image') and a.endswith('.heads')]
    student = inherit(teacher, Keep(sizes, {a: () if a == heads[0] else (0,) for a in heads}))
    better = refitted(student, teacher, batches())
    assert image_off(better, teacher) < image_off(student, teacher)
