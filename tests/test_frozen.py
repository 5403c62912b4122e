"Frozen layers with a batch norm, and parameters that nothing depends on"

import copy
import warnings

import open_clip
import pytest
import torch
from groups import spawn, started
from test_distill import Pairs, different, job, tiny
from torch import nn

from tinyclip.core import TinyclipError
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import Objective
from tinyclip.masking import MaskedCLIP
from tinyclip.sparsity import Sparsity
from tinyclip.towers.architecture import build
from tinyclip.train.engine import Engine, make_accelerator
from tinyclip.train.step import frozen_batchnorms, unused_parameters
from tinyclip.zoo import load, save

TEXT = dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
TOWERS = dict(
    resnet=dict(image_size=32, layers=[1, 1, 1, 1], width=8, patch_size=None, head_width=4),
    tinyvit=dict(
        image_size=32,
        timm_model_name='tiny_vit_5m_224',
        timm_model_pretrained=False,
        timm_pool='avg',
        timm_proj='linear',
    ),
)


def clip(name='resnet', seed=0):
    torch.manual_seed(seed)
    model = build(dict(embed_dim=16, vision_cfg=TOWERS[name], text_cfg=TEXT))
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32), torch.randint(1, 64, (8, 8)))  # moves statistics
    return model.eval()


def answers(model):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model.eval().encode_image(torch.randn(3, 3, 32, 32, generator=g))


# --- folders and files without `num_batches_tracked`


@pytest.mark.parametrize('name', TOWERS)
def test_a_locked_tower_is_saved_and_loaded(tmp_path, name):
    model = clip(name)
    model.lock_image_tower(freeze_bn_stats=True)
    assert not any('num_batches' in k for k in model.state_dict())
    save(model, tmp_path)
    ours = load(tmp_path).model
    theirs = open_clip.create_model(f'local-dir:{tmp_path}')
    torch.testing.assert_close(answers(ours), answers(theirs), rtol=0, atol=0)
    torch.testing.assert_close(answers(ours), answers(model), rtol=1e-4, atol=1e-5)


def test_a_file_of_torch_before_it_counted_batches(tmp_path):
    model = clip()
    state = {k: v for k, v in model.state_dict().items() if 'num_batches' not in k}
    save(model, tmp_path)
    torch.save(state, tmp_path / 'open_clip_pytorch_model.bin')
    (tmp_path / 'open_clip_model.safetensors').unlink()
    assert torch.equal(answers(load(tmp_path).model), answers(model))
    torch.save(
        {k: v for k, v in state.items() if k != 'visual.bn2.running_var'},
        tmp_path / 'open_clip_pytorch_model.bin',
    )
    with pytest.raises(TinyclipError, match='bn2.running_var is missing'):
        load(tmp_path)


@pytest.mark.parametrize('name', TOWERS)
def test_a_student_of_a_locked_teacher_inherits_statistics(name):
    teacher = clip(name)
    free = copy.deepcopy(teacher)
    teacher.lock_image_tower(freeze_bn_stats=True)
    for keep in (manual(free), manual(free, image_width=0.5)):
        a, b = inherit(teacher, keep), inherit(free, keep)
        torch.testing.assert_close(answers(a), answers(b), rtol=1e-5, atol=1e-6)


# --- frozen by requires_grad_(False), and trained


def fit(model, steps=3, **kw):
    kw = dict(objective='contrastive', precision='fp32') | kw
    return job(model, None, Pairs(size=32), **kw).fit(steps)


def moved(model, before):
    return {
        k.removesuffix('.running_mean') for k in different(model, before) if 'running_mean' in k
    }


@pytest.mark.parametrize('name', TOWERS)
@pytest.mark.parametrize('how', [dict(), dict(chunk_size=4), dict(grad_checkpointing=True)])
def test_a_frozen_tower_does_not_move(name, how):
    if name == 'resnet' and 'grad_checkpointing' in how:
        how = dict(precision='bf16')  # this tower cannot recompute
    model = clip(name)
    model.visual.requires_grad_(False)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r'visual.*are frozen, so these batch norms keep their'):
        fit(model, **how)
    assert not [k for k in different(model, before) if k.startswith('visual.')]
    assert different(model, before)  # the text tower learns
    assert not any(p.requires_grad for p in model.visual.parameters())


@pytest.mark.parametrize('name', TOWERS)
def test_it_trains_as_one_that_open_clip_has_locked(name):
    """The text towers get the same gradients, to rounding: the two normalise in another order"""
    ours, theirs = clip(name), clip(name)
    ours.visual.requires_grad_(False)
    theirs.lock_image_tower(freeze_bn_stats=True)
    batch = next(Pairs(size=32).epoch(0))
    for model in (ours, theirs):
        accelerator = make_accelerator('fp32', 'cpu')
        engine = Engine(model, None, Objective('contrastive'), accelerator)
        engine.backward(batch)
        engine.release()
    for (k, p), q in zip(ours.named_parameters(), theirs.parameters()):
        if k.startswith('transformer.'):
            assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), k


def test_only_what_is_frozen_stays():
    model = clip()
    before = copy.deepcopy(model)
    model.visual.layer1.requires_grad_(False)
    model.visual.bn1.weight.requires_grad_(False)  # its bias still learns
    with pytest.warns(UserWarning, match='layer1.0.bn1 and 3 more are frozen'):
        fit(model)
    names = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert moved(model, before) == {n for n in names if 'layer1' not in n}


def test_without_anything_frozen_all_move_and_nothing_is_said():
    model = clip()
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(model)
    assert len(moved(model, before)) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_norms_without_weights_go_with_their_neighbours():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    model = nn.Sequential(block, copy.deepcopy(block), other).requires_grad_(True)
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    assert [*frozen_batchnorms(model)] == ['1.1']  # the last one has no statistics to keep


# --- parameters that nothing depends on


def with_spares(seed=1, **kw):
    student = tiny(seed, **kw)
    student.spare = nn.Parameter(torch.ones(3))  # of no tower
    student.visual.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    return student


SPARES = {'spare', 'visual.head.0.weight', 'visual.head.0.bias', 'visual.head.1.weight'}


def test_they_are_found_and_nothing_moves():
    student = with_spares(patch_dropout=0.5).train()
    before = copy.deepcopy(student)
    torch.manual_seed(5)
    assert set(unused_parameters(student)) == SPARES
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)) and not different(student, before)
    assert all(p.grad is None for p in student.parameters()) and student.training
    assert unused_parameters(clip('tinyvit').train()) == unused_parameters(clip().train()) == []
    assert unused_parameters(nn.Linear(2, 2)) == []  # does not say what it takes


@pytest.mark.parametrize('objective', ['affinity', ['affinity', 'contrastive']])
def test_one_process_names_them_and_trains_the_rest(objective):
    with pytest.warns(UserWarning, match='depends on spare and 3 more: no gradient') as said:
        ours = job(with_spares(), objective=objective).fit(3).student
    assert len(said) == 1
    plain = job(tiny(1), objective=objective).fit(3).student.state_dict()
    for k, v in ours.state_dict().items():
        assert torch.equal(v, plain[k] if k in plain else with_spares().state_dict()[k]), k


def test_masks_are_not_taken_for_spares():
    masked = MaskedCLIP(tiny(1, layers=2))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        job(masked, penalty=Sparsity(masked, 0.5)).fit(2)


def together(rank, world, port, folder):
    "A run with spares in each process, and one of a student that does not say what it takes"
    started(rank, world, port)
    how = dict(pairs=Pairs(world=world, rank=rank), precision='fp32', log_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        student = job(with_spares(), **how).fit(3).student
    said = [str(w.message) for w in caught if 'no gradient' in str(w.message)]

    class Mute(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = with_spares()
            self.logit_scale = self.clip.logit_scale

        def forward(self, image, text):
            return self.clip(image, text)

    try:
        job(Mute(), **how).fit(3)
    except TinyclipError as e:
        said.append(str(e))
    trains = all(p.requires_grad for p in student.parameters())
    torch.save((student.state_dict(), said, trains), folder / f'{rank}.pt')
    torch.distributed.destroy_process_group()


def test_several_processes_know_before_the_first_step(tmp_path):
    spawn(together, 2, tmp_path)
    (state, said, trains), (other, quiet, _) = (torch.load(tmp_path / f'{r}.pt') for r in range(2))
    assert trains and all(torch.equal(v, other[k]) for k, v in state.items())
    assert 'depends on spare and 3 more' in said[0] and len(said) == 2
    assert 'depends on clip.spare and 3 more' in said[1] and quiet == said[1:]
    one = with_spares().state_dict()
    moves = {k for k, v in state.items() if not torch.equal(v, one[k])}
    assert not moves & SPARES and 'visual.proj' in moves
