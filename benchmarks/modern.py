"""Today's families, learning: a SigLIP-like teacher with a tokenizer of its own, a ConvNeXt and a
FastViT, trained here on drawn pictures, each compressed to a half; and one distillation across
families, from the SigLIP-like teacher into a ViT that reads other pixels and other tokens.

    # the teachers, one by one or side by side; finished rows are kept below runs/ and not repeated
    python benchmarks/modern.py teach siglip   # and convnext, fastvit, vit
    python benchmarks/modern.py compress siglip  # and convnext, fastvit
    python benchmarks/modern.py across siglip  # and vit, none: who teaches the ViT student

    # writes results/modern/run.json from the rows that are there
    python benchmarks/modern.py record

A contrastive start from nothing takes thousands of steps before it tells colours apart, so the
teachers' features also follow those of the embedded teacher while they learn; their own loss,
sigmoid or contrastive, is trained with it throughout. Learning rates are those that budgets.py has
chosen on CIFAR-10 for every way, from one grid.
"""

import argparse
import copy
import json
import math
import statistics
import time
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
from budgets import BATCH, MASK_STEPS, SETTINGS, WAYS, WEIGHTS_LR, Task
from budgets import one as compressed
from methods import row_of
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinyclip.core import Table, record_run, seed_everything
from tinyclip.data import open_pairs, transforms
from tinyclip.data.cached import CachedBatch
from tinyclip.data.pairs import as_teacher_reads
from tinyclip.data.shapes import Shapes
from tinyclip.distill import Distiller
from tinyclip.evaluate.cost import parameters
from tinyclip.lab.demo import examine
from tinyclip.losses import Objective
from tinyclip.stages import SHORT
from tinyclip.towers.architecture import build
from tinyclip.zoo import load, save
from tinyclip.zoo.folders import finish
from tinyclip.zoo.vocabulary import shorten

TEXT = dict(context_length=16, width=64, heads=4, layers=4)
BPE = TEXT | dict(vocab_size=49408)  # shortened to what the captions and the alphabet need
LIKE_SIGLIP = dict(no_causal_mask=True, proj_bias=True, pool_type='last')


def timm(name, pool, proj, **trunk):
    "Configuration of an image tower from timm, in another size"
    vision = dict(image_size=48, timm_model_name=name, timm_pool=pool, timm_proj=proj)
    return dict(vision_cfg=vision, tinyclip_cfg=dict(trunk=trunk), custom_text=True)


FLAT = dict(img_size=48, patch_size=12, embed_dim=96, depth=4, num_heads=6, mlp_ratio=4)
TEACHERS = dict(
    siglip=dict(embed_dim=96, text_cfg=TEXT | LIKE_SIGLIP, init_logit_bias=-5.0)
    | timm('vit_base_patch16_siglip_224', 'map', 'none', **FLAT),
    convnext=dict(embed_dim=64, text_cfg=BPE)
    | timm('convnext_tiny', '', 'linear', dims=[24, 48, 96, 144], depths=[1, 1, 3, 1]),
    fastvit=dict(embed_dim=64, text_cfg=BPE | dict(no_causal_mask=True))
    | timm('fastvit_mci0', 'avg', None, embed_dims=[16, 32, 64, 128], layers=[1, 1, 2, 1]),
    vit=dict(
        embed_dim=64,
        vision_cfg=dict(image_size=32, layers=4, width=96, head_width=16, patch_size=8),
        text_cfg=BPE,
    ),
)
STUDENT = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=32, layers=4, width=64, head_width=16, patch_size=8),
    text_cfg=BPE | dict(layers=2),
)
TAUGHT = dict(lr=1e-3, batches=100, feature=5.0)
STEPS = dict(siglip=800, vit=800, convnext=400, fastvit=400)  # convolutions learn faster
ACROSS = dict(steps=400, lr=1e-3, feature=5.0)
BUDGET, SHARE, SEEDS = 120, 0.5, (0, 1, 2)
TRAINED = 'random', 'manual', 'automatic', 'manual, reconstructed', 'scores, reconstructed'
UNTRAINED = 'manual', 'manual, reconstructed', 'scores, reconstructed'


def unigram(folder):
    "Tokenizer as SentencePiece makes them, of the captions' own pieces, trained and saved"
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.Lowercase()
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ['<pad>', '</s>', '<unk>']
    how = dict(vocab_size=300, special_tokens=special, unk_token='<unk>', show_progress=False)
    t.train_from_iterator(Shapes('train').captions(range(5000)), trainers.UnigramTrainer(**how))
    t.post_processor = processors.TemplateProcessing(
        single='$A </s>', special_tokens=[('</s>', special.index('</s>'))]
    )
    names = dict(pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
    PreTrainedTokenizerFast(tokenizer_object=t, **names).save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=16, clean='canonicalize')


def fresh(cfg, folder):
    "A model of a configuration with random weights, its transform and its tokenizer"
    cfg = copy.deepcopy(cfg)
    half, own = {}, cfg['text_cfg']
    if 'vocab_size' not in own:
        own |= dict(vocab_size=len(unigram(folder).tokenizer), hf_tokenizer_name=str(folder))
        own |= dict(tokenizer_kwargs=dict(clean='canonicalize'))
        half = dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')
    model, preprocess, tokenizer = finish(build(cfg), cfg, half)
    if 'hf_tokenizer_name' not in own:
        model, tokenizer = shorten(model, Shapes('train').captions(range(5000)), tokenizer)
    return model, preprocess, tokenizer


class Remembered:
    "Batches that are drawn once, with what a teacher says of them: all who learn from it see these"

    def __init__(self, pairs, teacher, count):
        self.inputs = pairs.inputs
        self.drawn = pairs.epoch(0)
        self.asked = teacher
        self.count = count
        self.batches = []
        self.teacher = dict(parameters=sum(p.numel() for p in teacher.parameters()))
        self.bias = teacher.logit_bias
        self.width = self.batch(0).teacher_image.shape[1]

    @torch.no_grad()
    def batch(self, i):
        while len(self.batches) <= i:
            b = next(self.drawn)
            said = self.asked(*as_teacher_reads(b)[:2])
            self.batches.append(CachedBatch(b.image, b.text, *said))
        return self.batches[i]

    def epoch(self, e, start=0):
        yield from map(self.batch, range(start, self.count))


def opened(model, tokenizer, n, seed, **how):
    "Pairs of drawn pictures for a model"
    return open_pairs(
        Shapes('train', seed=seed + 1), transforms(model)[0], tokenizer, n, seed=seed, **how
    )


def tested(loaded):
    "student -> how it names and finds pictures of combinations that no training shows"
    return lambda m, n=1280: examine(m, *loaded[1:], n, templates=['{}'])


def teach(name, folder):
    "Train a teacher, and save it; its row"
    seed_everything(0)
    loaded = model, _, tokenizer = fresh(TEACHERS[name], folder / 'tokenizer')
    own = 'contrastive' if model.logit_bias is None else 'sigmoid'
    guide, _, words = load('shapes-teacher')
    reads = transforms(guide)[0], words
    began = time.process_time()
    pairs = opened(model, tokenizer, BATCH, 1000, teacher_reads=reads)
    pairs = Remembered(pairs, guide, TAUGHT['batches'])
    how = dict(SETTINGS, objective={own: 1.0, 'feature': TAUGHT['feature']}, lr=TAUGHT['lr'])
    how |= dict(folder=folder / 'run', save_every=200)
    test = tested(loaded)
    how |= dict(evaluate=partial(test, n=256), evaluate_every=200)
    model = Distiller(model, None, pairs, **how).fit(STEPS[name], resume=True).student.eval()
    save(model, folder / 'teacher', tokenizer=tokenizer)
    seconds = time.process_time() - began
    row = dict(teacher=name, objective=own, seconds=seconds, parameters=parameters(model))
    return row | test(model)


def taught(a, name):
    "A teacher that is there"
    folder = a.work / 'teachers' / name / 'teacher'
    if not folder.exists():
        raise SystemExit(f'Run python benchmarks/modern.py teach {name} first.')
    return load(folder)


def task_of(a, name):
    "A teacher, as `budgets` takes it"
    loaded = teacher, _, tokenizer = taught(a, name)

    @cache
    def pairs(seed):
        return Remembered(opened(teacher, tokenizer, BATCH, seed), teacher, BUDGET)

    calibration = partial(opened, teacher, tokenizer, 50)
    test = tested(loaded)
    held = tokenizer if hasattr(teacher, 'tokenizer_cfg') else None
    return Task(teacher, pairs, calibration, 1000, test, test, held)


def chosen_rates():
    "Learning rates by way, from the record of another benchmark"
    record = json.loads(Path('results/budgets-cifar10/run.json').read_text())
    return record['recipe']['chosen']


def compress_one(a, task, way, lr, seed, budget):
    "A row of one student of a teacher"
    own = 'affinity' if task.teacher.logit_bias is None else 'sigmoid_mimicking'
    starts = argparse.Namespace(work=a.work / 'starts' / a.name)
    row = compressed(task, starts, way, SHARE, seed, budget, lr, task.test, objective=own)
    return dict(teacher=a.name) | row


def read_rows(a, part):
    return [json.loads(f.read_text()) for f in sorted((a.work / part).glob('*/row.json'))]


def students(a):
    "Rows of the students of one teacher that are to be made: (name, what makes it)"
    task, rates = task_of(a, a.name), chosen_rates()
    for (budget, ways), seed in product(((BUDGET, TRAINED), (0, UNTRAINED)), SEEDS):
        for way in ways:
            if WAYS[way].chosen != 'scores' or a.name in ('siglip', 'vit'):
                make = partial(compress_one, a, task, way, rates[way], seed, budget)
                yield f'{a.name}-{way}-{budget}-{seed}', make


def across(a, who, seed):
    "A row of the ViT student at 32 pixels that one teacher teaches, or none"
    seed_everything(seed)
    loaded = student, _, tokenizer = fresh(STUDENT, None)
    began = time.process_time()
    objective, how, teacher = 'contrastive', {}, None
    if who != 'none':
        teacher, _, words = taught(a, who)
        how = dict(teacher_reads=(transforms(teacher)[0], words))
        weights = dict(affinity=1.0, feature=ACROSS['feature'])
        objective = Objective(weights, student_scale='own', teacher_scale='own')
    pairs = opened(student, tokenizer, BATCH, seed, **how)
    settings = dict(SETTINGS, objective=objective, lr=ACROSS['lr'], seed=seed)
    student = Distiller(student, teacher, pairs, **settings).fit(ACROSS['steps']).student.eval()
    row = dict(teacher=who, seed=seed, seconds=time.process_time() - began)
    return row | tested(loaded)(student)


def table(rows, *keys):
    "Means and spreads"
    out, of = Table(), lambda r: tuple(r[k] for k in keys)
    for key in dict.fromkeys(map(of, rows)):
        top1 = [100 * r['top1'] for r in rows if of(r) == key]
        spread = statistics.stdev(top1) if len(top1) > 1 else math.nan
        out.append(dict(zip(keys, key)) | dict(top1=f'{statistics.mean(top1):.1f} +- {spread:.1f}'))
    return out


def record(a):
    "Write what is there into results/"
    parts = {p: read_rows(a, p) for p in ('teachers', 'students', 'across')}
    recipe = dict(
        teachers=TEACHERS,
        student=STUDENT,
        taught=TAUGHT | dict(steps=STEPS),
        across=ACROSS,
        batch_size=BATCH,
        share=SHARE,
        budget=BUDGET,
        mask_steps=MASK_STEPS[BUDGET],
        weights_lr=WEIGHTS_LR,
        masks=dict(SHORT),
        settings=SETTINGS,
        rates={way: lr for way, lr in chosen_rates().items() if way in TRAINED},
        commits=sorted({r['commit'] for rows in parts.values() for r in rows}),
    )
    print(table(parts['students'], 'teacher', 'budget', 'method'))
    print(table(parts['across'], 'teacher'), record_run('modern', recipe, parts, SEEDS))


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('part', choices=['teach', 'compress', 'across', 'record'])
    p.add_argument('name', nargs='?', choices=[*TEACHERS, 'none'], help='of the teacher')
    p.add_argument('--work', type=Path, default=Path('runs/modern'))
    a = p.parse_args()
    if a.part == 'record':
        return record(a)
    if a.part == 'teach':
        folder = a.work / 'teachers' / a.name
        return print(row_of(folder, partial(teach, a.name, folder)))
    if a.part == 'across':
        todo = ((f'{a.name}-{seed}', partial(across, a, a.name, seed)) for seed in SEEDS)
    else:
        todo = students(a)
    part = dict(compress='students').get(a.part, a.part)
    for name, make in todo:
        row = row_of(a.work / part / name.replace(' ', '_'), make)
        print(name, {k: row[k] for k in ('top1', 'i2t_r1', 'seconds')}, flush=True)


if __name__ == '__main__':
    main()
