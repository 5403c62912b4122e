"""What a student is worth in every form that it can leave in: accuracy, answers that changed,
bytes, speed.

    python benchmarks/methods.py cifar10 --shared ../shared  # first: makes the students
    python benchmarks/take_away.py --shared ../shared        # writes results/take-away/run.json

The students are those of `methods.py`: half of the CIFAR-10 teacher, by masks, so their layers are
uneven. The vocabulary is shortened to the captions of Flickr8k and CIFAR-10's classes in CLIP's 80
prompts. Speeds are of one student, all forms taking turns on one core, by the processor's time:
what else runs on the machine does not count.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch

from tinyclip.cli.export import texts_in
from tinyclip.core import Table, record_run
from tinyclip.data.pairs import labelled
from tinyclip.evaluate import class_embeddings, prompts
from tinyclip.evaluate.cost import speeds
from tinyclip.zoo import load, save
from tinyclip.zoo.formats import FORMATS
from tinyclip.zoo.onnx import OnnxCLIP, to_onnx
from tinyclip.zoo.to_transformers import to_transformers
from tinyclip.zoo.vocabulary import shorten


def forms(student, words, folder):
    "name -> (the model as its reader loads it, bytes of its weights)"

    def sized(model, sub, form):
        f = next(f for f in FORMATS.values() if form in f.files)
        return model, f.size(folder / sub, form)

    def again(sub):
        return load(folder / sub).model

    save(student, folder / 'plain')
    save(student, folder / 'half', dtype=torch.float16)
    to_transformers(student, folder / 'slim', form='slim')
    out = {
        'open_clip folder': sized(again('plain'), 'plain', 'open_clip'),
        'in half precision': sized(again('half'), 'half', 'open_clip'),
        'transformers, own modelling file': sized(again('slim'), 'slim', 'transformers'),
    }
    if to_transformers(student, folder / 'packed')['form'] == 'clip':
        out['transformers, CLIPModel'] = sized(again('packed'), 'packed', 'transformers')
    short, _ = shorten(student, words)
    save(short, folder / 'short')
    out['fewer tokens'] = sized(again('short'), 'short', 'open_clip')
    for name, model in (('', student), ('fewer tokens, ', short)):
        sub = folder / f'onnx{len(name)}'
        to_onnx(model, sub, int8=True)
        for int8, form in ((False, 'onnx'), (True, 'onnx, 8 bit')):
            out[f'{name}{form.replace("onnx", "ONNX")}'] = sized(
                OnnxCLIP(sub, int8=int8), sub, form
            )
    return out, short


@torch.no_grad()
def answers(model, tokenizer, pixels, names):
    "Cosines of every picture with every class"
    texts = class_embeddings(model, tokenizer, names)
    return (
        torch.cat([model.encode_image(p, normalize=True).float() for p in pixels.split(250)])
        @ texts.T
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--shared', default='../shared')
    p.add_argument('--students', default='runs/methods/cifar10/0.5-automatic-{}/stage-1/student')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a = p.parse_args()
    if hasattr(os, 'sched_setaffinity'):
        # onnxruntime then takes one thread, too
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rows, timed = [], None
    for seed in a.seeds:
        path = Path(a.students.format(seed))
        if not path.is_dir():
            raise SystemExit(
                'Run python benchmarks/methods.py cifar10 first: its students are used here.'
            )
        student, preprocess, tokenizer = load(path)
        data = labelled(f'{a.shared}/data/cifar10/val-0000.tar', preprocess, 250)
        pixels, labels = (torch.cat(t) for t in zip(*data))
        words = [
            *texts_in(f'{a.shared}/data/flickr8k/train-*.tar'),
            *(t for c in data.classnames for t in prompts(c, 'openai')),
        ]
        folder = Path(tempfile.mkdtemp())
        models, short = forms(student, words, folder)
        tokenizers = {
            n: load(folder / 'short').tokenizer if n.startswith('fewer') else tokenizer
            for n in models
        }
        want = answers(student, tokenizer, pixels, data.classnames)
        for name, (model, size) in models.items():
            got = answers(model, tokenizers[name], pixels, data.classnames)
            rows.append(
                dict(
                    form=name,
                    seed=seed,
                    bytes=size,
                    top1=(got.argmax(1) == labels).double().mean().item(),
                    changed=(got.argmax(1) != want.argmax(1)).double().mean().item(),
                    difference=(got - want).abs().max().item(),
                    tokens=short.vocab_size if name.startswith('fewer') else student.vocab_size,
                )
            )
        if timed is None:
            timed = speeds(
                {
                    n: m
                    for n, (m, _) in models.items()
                    if n in ('open_clip folder', 'ONNX', 'ONNX, 8 bit')
                },
                32,
                repeats=15,
            )
        shutil.rmtree(folder)
        print(Table(rows[-len(models) :]), flush=True)
    for r in rows:
        if r['form'] in timed and r['seed'] == a.seeds[0]:
            r |= {
                k: timed[r['form']][k]
                for k in ('image_speed', 'image_spread', 'text_speed', 'text_spread')
            }
    record_run(
        'take-away',
        dict(
            students=a.students,
            texts='Flickr8k train captions and CIFAR-10 classes in the 80 prompts',
            n=len(labels),
            speed=dict(batch_size=32, repeats=15, threads=torch.get_num_threads()),
        ),
        rows,
        a.seeds,
    )
