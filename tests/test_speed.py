"""Faster ways of the same step: what they compute, what they leave behind, and that nothing
waits for the device"""

import copy
import os
import shutil
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
from test_distill import Pairs, different, job, tiny
from torch.overrides import TorchFunctionMode

from tinyclip.core import TinyclipError, autocast, resolve_precision
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import Objective
from tinyclip.masking import MaskedCLIP
from tinyclip.sparsity import Sparsity
from tinyclip.stages import SHORT
from tinyclip.train.engine import Engine, make_accelerator
from tinyclip.train.speed import check_compile, compiled, half_precision_copy, lay_out


def resnet(seed=0):
    return tiny(seed, size=32, layers=(1, 1, 1, 1), width=8, head_width=4)


def engine(student, teacher=None, precision='fp32', objective='affinity', **kw):
    return Engine(
        student,
        tiny(0) if teacher is None else teacher,
        objective if isinstance(objective, Objective) else Objective(objective),
        make_accelerator(precision, 'cpu'),
        **kw,
    )


def batch(size=16, **kw):
    return next(Pairs(size=size, **kw).epoch(0))


# bf16 where it is fast


@pytest.mark.parametrize(
    'units,used,expected',
    [
        ({'_is_amx_tile_supported'}, True, 'bf16'),
        ({'_is_avx512_bf16_supported'}, True, 'bf16'),
        (set(), True, 'fp32'),
        ({'_is_amx_tile_supported'}, False, 'fp32'),
    ],
)
def test_auto_asks_the_processor_and_what_multiplies_on_it(monkeypatch, units, used, expected):
    for name in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in units, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: used, raising=False)
    assert resolve_precision('auto', 'cpu') == expected
    assert make_accelerator('auto', 'cpu').mixed_precision == dict(bf16='bf16', fp32='no')[expected]


def test_a_cpu_that_may_use_avx2_only_takes_float32():
    said = subprocess.run(
        [
            sys.executable,
            '-c',
            'from tinyclip.core import resolve_precision; print(resolve_precision())',
        ],
        capture_output=True,
        text=True,
        env=os.environ | dict(ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2'),
    )
    assert said.stdout.strip() == 'fp32', said.stderr


def slopes(e, b):
    "Gradients of one batch by name"
    e.backward(b, False, 0.0)
    grads = {n: p.grad.clone() for n, p in e.live.named_parameters() if p.grad is not None}
    e.release()
    return grads


def far(a, b):
    whole = sum(v.square().sum() for v in b.values()).sqrt()
    return (sum((a[k] - b[k]).square().sum() for k in b).sqrt() / whole).item()


class Waits(TorchFunctionMode):
    """Notes what would make a program wait for its GPU: numbers read out of tensors, tensors
    brought to the CPU or made there"""

    # of Python numbers, which wait for the device as well
    COPIES = {
        'new_tensor',
        'tensor',
        'as_tensor',
    }
    ASKS = {
        'item',
        'tolist',
        'cpu',
        'numpy',
        '__bool__',
        '__float__',
        '__int__',
        '__index__',
        '__contains__',
        'nonzero',
        'equal',
        'allclose',
        'unique',
    }

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, f, types, args=(), kwargs=None):
        name = getattr(f, '__name__', '')
        if name in self.COPIES or name in self.ASKS and isinstance(args[0], torch.Tensor):
            self.seen.append(name)
        return f(*args, **(kwargs or {}))


def test_waiting_is_seen():
    x = torch.ones(2)
    for f in (
        lambda: x[0].item(),
        lambda: x.tolist(),
        lambda: bool(x[0]),
        lambda: x.cpu(),
        lambda: torch.tensor([1.0]),
        lambda: x.new_tensor([1.0]),
        lambda: torch.as_tensor(1.0),
        lambda: float(x[0]),
    ):
        with Waits() as w:
            f()
        assert w.seen


def masked():
    return MaskedCLIP(tiny(1, layers=2), start=0.0)


@pytest.mark.parametrize(
    'name, student, kw',
    [
        ('plain', tiny, {}),
        ('chunks', tiny, dict(chunk_size=3)),
        (
            'tiles',
            tiny,
            dict(objective=Objective(['affinity', 'contrastive', 'uni_modal'], tile=3)),
        ),
        ('checkpointing', tiny, dict(grad_checkpointing=True)),
        ('masks', masked, dict(masks=dict(form='two-sided'))),
        ('projected masks', masked, dict(masks=SHORT)),
        ('resnet', resnet, {}),
    ],
)
def test_no_step_waits(name, student, kw, monkeypatch):
    # the length of texts is read where the loader left them, on the CPU: no GPU waits for that
    monkeypatch.setattr('tinyclip.train.engine.shorten_texts', lambda text, *models: text)
    s = student(1) if student is not masked else masked()
    kw = dict(kw)
    how = {k: v for k, v in kw.pop('masks', {}).items() if k != 'hard'}
    penalty = Sparsity(s, 0.5, **how) if how else None
    e = engine(
        s,
        resnet() if name == 'resnet' else None,
        precision='bf16',
        penalty=penalty,
        **dict(objective=['affinity', 'contrastive']) | kw,
    )
    b = batch(32 if name == 'resnet' else 16)
    for done in (0.0, 0.5):
        # past the moment when masks are ranked, which happens once
        e.update(e.backward(b, done=done), 1e-3)
    with Waits() as w:
        e.update(e.backward(b, done=0.6), 1e-3)
    assert not w.seen
    with Waits() as w:
        e.tally.read()
    assert w.seen  # as log points do
    e.release()


@pytest.mark.parametrize(
    'backend',
    [
        'aot_eager',
        pytest.param(
            True, marks=pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler here')
        ),
    ],
)
def test_compiled_is_the_same(backend):
    want = slopes(engine(tiny(1)), batch())
    student, teacher = tiny(1), tiny(0)
    got = slopes(engine(student, teacher, compile=backend), batch())
    assert far(got, want) < 1e-5
    assert student._compiled_call_impl is None and teacher._compiled_call_impl is None
    copy.deepcopy(student)(*batch())


@pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler here')
def test_compiled_runs_fuse_their_tiles(monkeypatch):
    import tinyclip.losses.tiled as tiling

    asked, real = [], tiling._fused
    monkeypatch.setattr(tiling, '_fused', lambda f: asked.append(f.__name__) or real(f))

    def after(**kw):
        e = engine(tiny(1), objective=Objective(['affinity', 'contrastive'], tile=3), **kw)
        e.update(e.backward(batch()), 1e-3)
        e.release()
        return torch.cat([p.detach().flatten() for p in e.live.parameters()])

    plain = after()
    assert not asked
    together = (plain - after(compile=True)).abs()
    assert set(asked) == {'softmax_stats', 'student_grad'}
    # Adam turns roundings into whole steps of 1e-3 where a gradient is next to nothing
    assert together.mean() < 1e-5 and together.max() < 2.1e-3


def test_compiled_masks_are_the_same():
    def run(**kw):
        s = masked()
        e = engine(
            s, penalty=Sparsity(s, 0.5, **{k: v for k, v in SHORT.items() if k != 'hard'}), **kw
        )
        torch.manual_seed(3)
        with s.one_draw():
            return slopes(e, batch())

    assert far(run(compile='aot_eager'), run()) < 1e-5
    assert far(run(chunk_size=3, compile='aot_eager'), run()) < 1e-5


def test_a_compiled_run_trains_and_goes_on(tmp_path):
    straight = job().fit(6).student
    compiled = job(compile='aot_eager').fit(6).student
    worst = max(
        (a - b).abs().max().item() for a, b in zip(straight.parameters(), compiled.parameters())
    )
    # Adam turns roundings into whole steps of 1e-3 where a gradient is next to nothing
    assert worst < 6e-3
    assert straight.state_dict().keys() == compiled.state_dict().keys()


def test_checkpointing_is_the_same_and_set_back():
    student = tiny(1, layers=2)
    got = slopes(engine(student, grad_checkpointing=True), batch())
    assert far(got, slopes(engine(tiny(1, layers=2)), batch())) < 1e-6
    assert (
        not student.visual.transformer.grad_checkpointing
        and not student.transformer.grad_checkpointing
    )
    # slim blocks recompute, too
    cut = inherit(tiny(1, layers=2, width=64), manual(tiny(1, layers=2, width=64), image_width=0.5))
    assert (
        far(
            slopes(engine(copy.deepcopy(cut), grad_checkpointing=True), batch()),
            slopes(engine(copy.deepcopy(cut)), batch()),
        )
        < 1e-6
    )
    with pytest.raises(TinyclipError, match='cannot recompute'):
        engine(torch.nn.Linear(2, 2), grad_checkpointing=True)


def test_a_resnet_is_laid_out_for_its_convolutions_and_back():
    student = resnet(1)
    before = {n: p.stride() for n, p in student.named_parameters()}
    e = engine(student, resnet())
    assert student.visual.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    student.visual.conv1.register_forward_pre_hook(
        lambda m, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last))
    )
    e.update(e.backward(batch(32)), 1e-3)
    e.release()
    assert seen == [True] and {n: p.stride() for n, p in student.named_parameters()} == before


CHANNELS_LAST = dict(fastvit_mci1=False, resnet50=False, convnext_atto=True, regnetx_002=False)


@pytest.mark.parametrize('name', CHANNELS_LAST)
def test_strided_1x1_convolutions_keep_their_order_on_a_cpu(name):
    """In channels_last their backward pass corrupts the heap there (torch 2.14)"""
    with torch.device('meta'):
        tower = timm.create_model(name)
    there = [
        m for m in tower.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size > (1, 1)
    ]
    for device, right in (('cuda', True), ('cpu', CHANNELS_LAST[name])):
        assert lay_out(tower, device) == right
        assert all(m.weight.is_contiguous() != right for m in there if m.in_channels > m.groups)


class Strided(torch.nn.Module):
    "An image tower with the layer that MobileCLIP has"

    def __init__(self):
        super().__init__()
        self.image_size = 32
        self.conv = torch.nn.Conv2d(3, 8, 1, stride=2)
        self.next = torch.nn.Conv2d(8, 16, 3, stride=2)

    def forward(self, x):
        return self.next(self.conv(x)).mean((2, 3))


def strided(seed=0):
    model = tiny(seed, size=32)
    torch.manual_seed(seed)
    model.visual = Strided()
    return model


def test_images_of_such_a_tower_keep_their_order_too():
    student, seen = strided(1), []
    student.visual.conv.register_forward_pre_hook(lambda m, x: seen.append(x[0].is_contiguous()))
    e = engine(student, strided())
    e.update(e.backward(batch(32)), 1e-3)
    assert seen == [True] and all(p.is_contiguous() for p in student.parameters())
    e.release()


@pytest.mark.parametrize('backend', [True, 'inductor', 'aot_eager'])
def test_a_compiler_that_turns_convolutions_is_told(monkeypatch, backend):
    how = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **kw: how.append(kw))
    for model in (strided(), resnet()):
        compiled(model, backend)
    assert 'options' not in how[1]
    assert how[0].get('options') == (
        None if backend == 'aot_eager' else dict(layout_optimization=False)
    )


def failing(graph, inputs):
    raise OSError('nothing compiles here')


@pytest.mark.parametrize('name', ['no_compiler', 'no_compiler_either'])
def test_a_compiler_that_does_not_work_is_found_out_before_the_first_step(tmp_path, name):
    torch._dynamo.register_backend(failing, name=name)
    student, heard = tiny(1).eval(), []
    d = job(student, folder=tmp_path / 'x', compile=name, listeners=[heard.append])
    with pytest.raises(TinyclipError, match=f"compile='{name}' does not work.*nothing compiles"):
        d.fit(2)
    assert not heard and not (tmp_path / 'x').exists()
    assert not student.training and not different(student, tiny(1))


def test_torchs_own_compiler_without_a_c_compiler(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    check_compile.cache_clear()
    torch._dynamo.reset()
    says = 'no-such-compiler.*install g.. or clang.*CXX.*leave compile= out'
    with config.patch('cpp.cxx', ('no-such-compiler',)), pytest.raises(TinyclipError, match=says):
        check_compile(True, torch.device('cpu'))
    torch._dynamo.reset()


def test_batch_norm_counts_a_step_in_chunks_once_per_chunk():
    a, b = resnet(1), resnet(1)
    e = engine(a, resnet(), chunk_size=4)
    e.backward(batch(32), False, 0.0)
    e.release()
    for i in (0, 4):
        b.train()(batch(32).image[i : i + 4], batch(32).text[i : i + 4])
    for k, v in b.state_dict().items():
        if 'running' in k or 'num_batches' in k:
            torch.testing.assert_close(a.state_dict()[k], v, rtol=1e-4, atol=1e-5)


MODELS = dict(
    vit=lambda: tiny(0, layers=2),
    resnet=resnet,
    slim=lambda: inherit(
        tiny(0, layers=2, width=64), manual(tiny(0, layers=2, width=64), image_width=0.5)
    ),
    custom=lambda: open_clip.CustomTextCLIP(
        16,
        dict(image_size=16, layers=2, width=32, patch_size=8, head_width=16, pool_type='tok'),
        dict(context_length=8, vocab_size=64, width=32, heads=2, layers=2),
    ),
)


@pytest.mark.parametrize('name', MODELS)
def test_a_lean_teacher_says_the_same(name):
    torch.manual_seed(0)
    teacher = MODELS[name]().eval()
    b = batch(32 if name == 'resnet' else 16)
    light = half_precision_copy(teacher, torch.bfloat16)
    with torch.no_grad():
        exact = teacher(*b)[:2]
        with autocast('cpu', 'bf16'):
            each, once = teacher(*b)[:2], light(*b)[:2]

    def off(v):
        return max((x.float() - y).norm() / y.norm() for x, y in zip(v, exact)).item()

    assert off(once) < 1.5 * off(each) and off(each) > 0
    assert {p.dtype for p in teacher.parameters()} == {torch.float32} and all(
        p.requires_grad for p in teacher.parameters()
    )
    assert sum(p.nbytes for p in light.parameters()) < sum(p.nbytes for p in teacher.parameters())


def test_a_run_leaves_the_teacher_alone():
    teacher = tiny(0).train()
    before = copy.deepcopy(teacher)
    job(teacher=teacher, precision='bf16').fit(2)
    assert (
        not different(teacher, before)
        and all(p.requires_grad for p in teacher.parameters())
        and {p.dtype for p in teacher.parameters()} == {torch.float32}
    )


def test_refusals():
    with pytest.raises(TinyclipError, match='inductor'):
        engine(tiny(1), compile='indutcor')
    with pytest.raises(TinyclipError, match='there is one'):
        engine(tiny(1), shard=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize(
    'kw',
    [
        {},
        dict(chunk_size=3),
        dict(masks=SHORT),
        dict(objective=Objective(['affinity', 'contrastive'], tile=3)),
    ],
    ids=['plain', 'chunks', 'masks', 'tiles'],
)
def test_no_step_waits_for_a_gpu(kw):
    kw = dict(kw)
    how = {k: v for k, v in kw.pop('masks', {}).items() if k != 'hard'}
    s = masked() if how else tiny(1)
    e = Engine(
        s,
        tiny(0),
        kw.pop('objective', Objective('affinity')),
        make_accelerator('bf16', 'cuda'),
        penalty=Sparsity(s, 0.5, **how) if how else None,
        **kw,
    )
    b = batch()
    for done in (0.0, 0.5, 0.6):
        e.update(e.backward(b, done=done), 1e-3)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            e.update(e.backward(b, done=0.7), 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert e.tally.read()['losses']['loss'] > 0
    e.release()
