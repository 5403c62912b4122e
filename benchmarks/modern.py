"""Today's families, learning: a SigLIP-like teacher with a tokenizer of its own, a ConvNeXt and a
FastViT, trained here on CIFAR-10, each compressed to a half; and one distillation across families,
from the SigLIP-like teacher into a ViT that reads other pixels and other tokens, beside the same
from a ViT of that teacher's size that reads what the student reads.

    # the teachers, one after the other; finished rows are kept below runs/ and not repeated
    python benchmarks/modern.py teach siglip   # and convnext, fastvit, vit
    python benchmarks/modern.py compress siglip  # and convnext, fastvit
    python benchmarks/modern.py across siglip  # and vit, none: who teaches the ViT student

    # writes results/modern/run.json from the rows that are there
    python benchmarks/modern.py record

Their own loss, sigmoid or contrastive, learns little from 17,500 pictures in minutes. While they
learn, the teachers' features also follow those of a guide: a ViT that was trained on all of
CIFAR-10's training part. Learning rates of the students are those that budgets.py has chosen on
CIFAR-10 for every way, from one grid. Both tokenizers are made of the same captions.
"""

import argparse
import copy
import json
import math
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path

from budgets import BATCH, MASK_STEPS, SETTINGS, WEIGHTS_LR, Task
from budgets import one as compressed
from methods import row_of
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinyclip.core import Table, record_run, seed_everything
from tinyclip.data import open_pairs, transforms
from tinyclip.data.cache import write_cache
from tinyclip.data.cached import cached_pairs
from tinyclip.data.pairs import labelled
from tinyclip.data.sources import as_source
from tinyclip.distill import Distiller
from tinyclip.evaluate import zero_shot
from tinyclip.evaluate.cost import parameters
from tinyclip.losses import Objective
from tinyclip.stages import SHORT
from tinyclip.towers.architecture import build
from tinyclip.zoo import load, save
from tinyclip.zoo.folders import finish
from tinyclip.zoo.vocabulary import shorten

TEXT = dict(context_length=16, width=64, heads=4, layers=4)
BPE = TEXT | dict(vocab_size=49408)  # shortened to what the captions and the alphabet need
PIECES = 2000  # of the Unigram tokenizer
LIKE_SIGLIP = dict(no_causal_mask=True, proj_bias=True, pool_type='last')


def timm(name, pool, proj, **trunk):
    "Configuration of an image tower from timm, in another size"
    vision = dict(image_size=48, timm_model_name=name, timm_pool=pool, timm_proj=proj)
    return dict(vision_cfg=vision, tinyclip_cfg=dict(trunk=trunk), custom_text=True)


FLAT = dict(img_size=48, patch_size=12, embed_dim=96, depth=4, num_heads=6, mlp_ratio=4)
TEACHERS = dict(
    siglip=dict(embed_dim=96, text_cfg=TEXT | LIKE_SIGLIP, init_logit_bias=-5.0)
    | timm('vit_base_patch16_siglip_224', 'map', 'none', **FLAT),
    convnext=dict(embed_dim=96, text_cfg=BPE)
    | timm('convnext_tiny', '', 'linear', dims=[32, 64, 128, 192], depths=[1, 1, 3, 1]),
    fastvit=dict(embed_dim=96, text_cfg=BPE | dict(no_causal_mask=True))
    | timm('fastvit_mci0', 'avg', None, embed_dims=[16, 32, 64, 128], layers=[1, 1, 2, 1]),
    vit=dict(
        embed_dim=96,
        vision_cfg=dict(image_size=32, layers=4, width=96, head_width=16, patch_size=8),
        text_cfg=BPE,
    ),
)
STUDENT = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=32, layers=4, width=64, head_width=16, patch_size=8),
    text_cfg=BPE | dict(layers=2),
)
GUIDE = dict(views=4, precision='bf16')
TAUGHT = dict(lr=1e-3, feature=5.0, precision='bf16')
STEPS = dict(siglip=5000, vit=5000, convnext=4000, fastvit=2000)  # each in six minutes or so
VIEWS = 2  # of a teacher
ACROSS = dict(steps=1200, lr=1e-3, feature=5.0)
BUDGET, SHARE, SEEDS = 120, 0.5, (0, 1, 2)
TRAINED = 'random', 'manual', 'automatic', 'manual, reconstructed', 'scores, reconstructed'
UNTRAINED = 'manual', 'manual, reconstructed', 'scores, reconstructed'


def captions(a):
    "Texts that tokens are made for: those of people for 500 photographs, and those of the classes"
    shards = f'{a.shared}/data/flickr8k/train-0000.tar', f'{a.shared}/data/cifar10/train-0000.tar'
    return [c for s in shards for each in as_source(s).samples([s]) for c in each.captions]


def unigram(a, folder):
    "Tokenizer as SentencePiece makes them, of the captions' own pieces, trained and saved"
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.Lowercase()
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ['<pad>', '</s>', '<unk>']
    how = dict(vocab_size=PIECES, special_tokens=special, unk_token='<unk>', show_progress=False)
    t.train_from_iterator(captions(a), trainers.UnigramTrainer(**how))
    t.post_processor = processors.TemplateProcessing(
        single='$A </s>', special_tokens=[('</s>', special.index('</s>'))]
    )
    names = dict(pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
    PreTrainedTokenizerFast(tokenizer_object=t, **names).save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=16, clean='canonicalize')


def fresh(a, cfg, folder=None):
    "A model of a configuration with random weights, its transform and its tokenizer"
    cfg = copy.deepcopy(cfg)
    half, own = {}, cfg['text_cfg']
    if 'vocab_size' not in own:
        pieces = len(unigram(a, folder).tokenizer)
        own |= dict(vocab_size=pieces, hf_tokenizer_name=str(folder))
        own |= dict(tokenizer_kwargs=dict(clean='canonicalize'))
        half = dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')
    model, preprocess, tokenizer = finish(build(cfg), cfg, half)
    if 'hf_tokenizer_name' not in own:
        model, tokenizer = shorten(model, captions(a), tokenizer)
    return model, preprocess, tokenizer


def shards(a):
    "Photographs to train on"
    return f'{a.shared}/data/cifar10/train-000{{0..6}}.tar'


def cached(a, place, loaded, **how):
    "Folder with a teacher's features of these photographs, written where it is not there yet"
    teacher, _, tokenizer = loaded
    write_cache(shards(a), teacher, transforms(teacher)[0], tokenizer, a.work / place, **how)
    return a.work / place


def tested(a, loaded):
    "Function of a student of a model: how it names the test photographs"
    _, preprocess, tokenizer = loaded
    batches = labelled(f'{a.shared}/data/cifar10/val-0000.tar', preprocess, 250)
    return lambda m: zero_shot(m, tokenizer, batches)


def teach(a, name, folder):
    "Train a teacher, and save it; its row"
    seed_everything(0)
    guide = cached(a, 'guide', load(f'{a.shared}/teachers/cifar10'), **GUIDE)
    loaded = model, _, tokenizer = fresh(a, TEACHERS[name], folder / 'tokenizer')
    own = 'contrastive' if model.logit_bias is None else 'sigmoid'
    began = time.process_time()
    pairs = cached_pairs(shards(a), guide, transforms(model)[0], tokenizer, BATCH)
    objective = {own: 1.0, 'feature': TAUGHT['feature']}
    how = dict(SETTINGS, lr=TAUGHT['lr'], precision=TAUGHT['precision'])
    how |= dict(folder=folder / 'run', save_every=1000)
    job = Distiller(model, None, pairs, objective=objective, **how)
    model = job.fit(STEPS[name], resume=True).student.eval()
    seconds = time.process_time() - began
    save(model, folder / 'teacher', tokenizer=tokenizer)
    row = dict(teacher=name, objective=own, steps=STEPS[name], seconds=seconds)
    return row | dict(parameters=parameters(model)) | tested(a, loaded)(model)


def taught(a, name):
    "A teacher that is there, and the folder of its features"
    folder = a.work / 'teachers' / name / 'teacher'
    if not folder.exists():
        raise SystemExit(f'Run python benchmarks/modern.py teach {name} first.')
    loaded = load(folder)
    return loaded, cached(a, f'caches/{name}', loaded, views=VIEWS, precision='fp32')


def task_of(a, name):
    "A teacher, as `budgets` takes it"
    loaded, folder = taught(a, name)
    teacher, _, tokenizer = loaded
    train = transforms(teacher)[0]

    def pairs(seed):
        return cached_pairs(shards(a), folder, train, tokenizer, BATCH, teacher=teacher, seed=seed)

    def calibration(seed):
        return open_pairs(shards(a), train, tokenizer, 50, seed=seed)

    test = tested(a, loaded)
    held = tokenizer if hasattr(teacher, 'tokenizer_cfg') else None
    return Task(teacher, pairs, calibration, 400, test, test, held)


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
            make = partial(compress_one, a, task, way, rates[way], seed, budget)
            yield f'{a.name}-{way}-{budget}-{seed}', make


def across(a, who, seed):
    "A row of the ViT student at 32 pixels that one teacher teaches, or none"
    seed_everything(seed)
    loaded = student, _, tokenizer = fresh(a, STUDENT)
    reads = shards(a), transforms(student)[0], tokenizer
    began = time.process_time()
    if who == 'none':
        objective = 'contrastive'
        pairs = open_pairs(*reads, BATCH, seed=seed)
    else:
        weights = dict(affinity=1.0, feature=ACROSS['feature'])
        objective = Objective(weights, student_scale='own', teacher_scale='own')
        pairs = cached_pairs(reads[0], taught(a, who)[1], *reads[1:], BATCH, seed=seed)
    settings = dict(SETTINGS, objective=objective, lr=ACROSS['lr'], seed=seed)
    student = Distiller(student, None, pairs, **settings).fit(ACROSS['steps']).student.eval()
    row = dict(teacher=who, seed=seed, seconds=time.process_time() - began)
    return row | tested(a, loaded)(student)


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
        pieces=PIECES,
        guide=GUIDE,
        taught=TAUGHT | dict(steps=STEPS),
        views=VIEWS,
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
    p.add_argument('--shared', default='../shared')
    p.add_argument('--work', type=Path, default=Path('runs/modern'))
    a = p.parse_args()
    if a.part == 'record':
        return record(a)
    if a.part == 'teach':
        folder = a.work / 'teachers' / a.name
        return print(row_of(folder, partial(teach, a, a.name, folder)))
    if a.part == 'across':
        todo = ((f'{a.name}-{seed}', partial(across, a, a.name, seed)) for seed in SEEDS)
    else:
        todo = students(a)
    part = dict(compress='students').get(a.part, a.part)
    for name, make in todo:
        row = row_of(a.work / part / name.replace(' ', '_'), make)
        print(name, {k: row[k] for k in ('top1', 'seconds')}, flush=True)


if __name__ == '__main__':
    main()
