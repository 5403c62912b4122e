"""A distillation step in pairs per second: `Engine` against open_clip's own `--distill-model` loop,
with the same teacher, student and pairs.

    python benchmarks/step.py                # writes results/step/run.json
                                             # (with a GPU: results/step-cuda)
    python benchmarks/step.py --no-compile   # in a hurry, or without a C++ compiler

open_clip's loop is `train_one_epoch` itself, with the arguments, loss, optimiser and scaler that
its `main` would give it. Its defaults are fp16 by autocast, nothing compiled, no limit on
gradients; beyond them it offers bf16 and `--torchcompile`. Ours runs as `Distiller` does:
gradients limited, bad batches left out; a last case asks no teacher, but has what it said before.
The losses are the same, which the first step in float32 must show.
Pairs are on the device before the clock starts, and steps take turns. On a CPU it is the
processor's time that counts, and fp16 is so slow that it gets one step. The ceiling is what one
large bf16 matrix product reaches.

All of it twice: `rows` with texts that fill the context, `short` with captions as long as those of
Flickr8k (14 tokens, a standard deviation of 4; 30 to 36 is the longest of a thousand). open_clip
computes all 77 tokens of both; ours ends with the longest text of a batch. On a GPU their texts
wait on the CPU, where a loader leaves them.
"""

import argparse
import copy
import logging
import math
import statistics
import types
from collections import namedtuple

import open_clip
import torch
from open_clip_train.distributed import init_distributed_device
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyclip.core import Table, autocast, record_run, seed_everything
from tinyclip.evaluate.cost import flops, image_size, inputs, macs, seconds
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.losses import Objective
from tinyclip.train.engine import Engine, make_accelerator
from tinyclip.train.step import features

# what open_clip's DistillClipLoss adds up to
OBJECTIVE = Objective(dict(affinity=0.5, contrastive=1.0), student_scale='own', teacher_scale='own')
THEIRS = dict(fp16='amp', bf16='amp_bf16', fp32='fp32')  # what open_clip calls autocast to these
Pairs = namedtuple('Pairs', 'image text')
Answered = namedtuple(
    'Answered', 'image text teacher_image teacher_text teacher_scale teacher_bias'
)
NAMES = dict(theirs='open_clip', ours='tinyclip', cached='tinyclip, cached teacher')


class Batches(list):
    "What open_clip's loop asks of a loader"

    num_batches = property(len)
    num_samples = property(lambda self: sum(len(b.image) for b in self))


class Told(dict):
    "Stands in for TensorBoard: keeps the first value of everything"

    def add_scalar(self, name, value, step):
        self.setdefault(name.removeprefix('train/'), value)


def some_pairs(model, n, device, short=False):
    "Noise, and texts of random words that end as CLIP's do"
    context, end = model.context_length, model.vocab_size - 1
    last = (torch.randn(n, 1) * 4 + 14).round().clamp(5, context) - 1 if short else context - 1
    text, at = torch.randint(1, end, (n, context)), torch.arange(context)
    text = text.masked_fill(at > last, 0).masked_fill(at == last, end)
    return Pairs(torch.randn(n, 3, *image_size(model), device=device), text)


def theirs(student, teacher, pairs, a, precision, compiled):
    "A function that does so many steps in open_clip's loop, and returns the first loss of all"
    args = parse_args(
        [
            '--model',
            a.model,
            '--distill-model',
            a.model,
            '--precision',
            THEIRS[precision],
            '--batch-size',
            str(a.batch),
            '--device',
            a.device,
        ]
    )
    device = init_distributed_device(args)
    args.distill = True
    args.wandb = False

    def spared(n, p):
        return p.ndim < 2 or any(part in n for part in ('bn', 'ln', 'bias', 'logit_scale'))

    groups = [
        dict(
            params=[p for n, p in student.named_parameters() if spared(n, p) == s],
            weight_decay=0.0 if s else args.wd,
        )
        for s in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps)
    scaler = torch.amp.GradScaler(device=device) if args.precision == 'amp' else None
    loss = open_clip.create_loss(args)
    schedule = cosine_lr(optimizer, args.lr, args.warmup, 10**6)
    told = Told()
    model = torch.compile(student) if compiled else student

    def run(steps):
        data = types.SimpleNamespace(dataloader=Batches([pairs] * steps), set_epoch=lambda e: None)
        train_one_epoch(
            model, dict(train=data), loss, 0, optimizer, scaler, schedule, teacher, args, told
        )
        return told['loss']

    return run


def ours(student, teacher, pairs, a, precision, compiled):
    "The same with `Engine.backward` and `Engine.update`"
    engine = Engine(
        student, teacher, OBJECTIVE, make_accelerator(precision, a.device), compile=compiled
    )
    first = {}

    def run(steps):
        for _ in range(steps):
            out = engine.backward(pairs)
            engine.update(out, 5e-8)
            first.setdefault('loss', out['loss'])
        return first['loss'].item()

    return run


def cached(student, teacher, pairs, a, precision, compiled):
    "And with what the teacher said before"
    with torch.no_grad(), autocast(a.device, precision):
        said = features(teacher, pairs.image, pairs.text.to(a.device))
    return ours(student, None, Answered(*pairs, *said), a, precision, compiled)


def work(student, teacher):
    """Floating-point operations that a step needs for one pair: the teacher forward, the student
    forward and backward; the loss, which depends on the batch, is left out"""

    def there_and_back(x):
        out = m(*x)
        (out['image_features'].sum() + out['text_features'].sum()).backward()

    m = copy.deepcopy(student).to('meta').train()
    with sdpa_kernel(SDPBackend.MATH):
        return 2 * macs(teacher)['total'] + flops(there_and_back, inputs(m))


def ceiling(device):
    "Floating-point operations per second of a large bf16 matrix product"
    n = 8192 if device == 'cuda' else 1024
    x = torch.randn(n, n, device=device).bfloat16()
    return 2 * n**3 / statistics.median(seconds(lambda x: x @ x, x) for _ in range(20))


def measure(student, teacher, pairs, a, short=False):
    "A row per loop and precision, and the losses of the first step"
    gpu = a.device == 'cuda'
    cases = [
        (who, precision, compiled)
        for who in (theirs, ours)
        for compiled in [False] + [True] * a.compile
        for precision in ('fp16', 'fp32', 'bf16')
        if not (compiled and precision != 'bf16') and (who is theirs or precision != 'fp16')
    ] + [(cached, 'bf16', False)]
    # processors multiply fp16 very slowly: a step is enough, and of full texts only
    defaults = cases[0]
    once = [] if gpu else cases[:1]
    if short:
        cases = [c for c in cases if c not in once]
    runs = {c: c[0](copy.deepcopy(student), teacher, pairs, a, *c[1:]) for c in cases}
    losses = {c: run(1) for c, run in runs.items() if c not in once}
    first = {who: losses[who, 'fp32', False] for who in (theirs, ours)}
    if not math.isclose(*first.values(), rel_tol=1e-3):
        raise SystemExit(
            f'The losses are not the same: {first[theirs]} in open_clip, {first[ours]} here.'
        )
    times = {c: [] for c in cases}
    for i in range(a.rounds):
        for c, run in runs.items():
            if i == 0 or c not in once:
                times[c].append(seconds(lambda _: run(a.steps), pairs.image) / a.steps)
    median = {c: statistics.median(t) for c, t in times.items()}
    best = min((c for c in cases if c[0] is theirs), key=median.get)

    def gain(c, other):
        if other not in times:
            return None
        return round(statistics.median(x / y for x, y in zip(times[other], times[c])), 2)

    rows = [
        dict(
            loop=NAMES[c[0].__name__],
            precision=c[1],
            compiled=c[2],
            step_s=round(median[c], 4),
            pairs_per_s=round(a.batch / median[c], 1),
            over_same=gain(c, (theirs, *c[1:])),
            over_defaults=gain(c, defaults),
            over_best=gain(c, best),
        )
        for c in cases
    ]
    return rows, first


if __name__ == '__main__':
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        '--model',
        default='ViT-B-16' if gpu else 'ViT-B-32',
        help='the teacher; the student has half of its channels',
    )
    p.add_argument('--batch', type=int, default=1024 if gpu else 16)
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--steps', type=int, default=10 if gpu else 1, help='in a round')
    p.add_argument('--threads', type=int, default=1, help='on a CPU')
    p.add_argument(
        '--compile',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='also compiled, open_clip with its --torchcompile',
    )
    p.add_argument('--root', default='results', help='the ledger')
    a = p.parse_args()
    a.device = 'cuda' if gpu else 'cpu'
    torch.set_num_threads(a.threads)
    seed_everything(0)
    logging.disable(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = (
        True  # as open_clip's main; here for both
    )
    teacher = open_clip.create_model(a.model, output_dict=True).to(a.device).eval()
    student = inherit(teacher, manual(teacher, image_width=0.5, text_width=0.5))
    for m, scale in ((teacher, 60.0), (student, 30.0)):
        # so that a loss that mixed them up would be another
        m.logit_scale.data.fill_(math.log(scale))
    top, each = ceiling(a.device), work(student, teacher)
    rows, first = measure(student, teacher, some_pairs(teacher, a.batch, a.device), a)
    short, _ = measure(student, teacher, some_pairs(teacher, a.batch, a.device, True), a, True)
    for r in rows:
        full = r['loop'] != NAMES['cached']
        r['of_ceiling'] = round(each * r['pairs_per_s'] / top, 3) if full else None
    for title, found in (('texts of 77 tokens', rows), ('short captions', short)):
        print(title, Table(found), sep='\n')
    metrics = dict(
        rows=rows,
        short=short,
        first_loss=dict(open_clip=first[theirs], tinyclip=first[ours]),
        pair_gflops=round(each / 1e9, 2),
        ceiling_tflops=round(top / 1e12, 3),
    )
    print({k: v for k, v in metrics.items() if k not in ('rows', 'short')})
    recipe = dict(
        model=a.model,
        student='half of the channels of both towers',
        batch=a.batch,
        rounds=a.rounds,
        steps=a.steps,
        objective=str(OBJECTIVE),
        threads=torch.get_num_threads(),
        clock='events' if gpu else 'processor',
        open_clip=open_clip.__version__,
        against='open_clip_train.train.train_one_epoch',
    )
    print(record_run('step' + ('-cuda' if gpu else ''), recipe, metrics, [0], root=a.root))
