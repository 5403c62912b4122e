"""The page *Try it*, whole, with models made afresh. The automatic student is the recorded one of
`results/methods-shapes`, rebuilt from its keep; the manual one has the same size. Both are
reconstructed from drawn pictures, in closed form, and never trained.

    python tools/try_it.py _docs/try_it
"""

import json
import shutil
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from tinyclip.core import TinyclipError, human, write_json
from tinyclip.data import open_pairs
from tinyclip.data.shapes import Shapes, caption, combinations
from tinyclip.evaluate.cost import parameters
from tinyclip.inheritance import inherit
from tinyclip.keep import Keep, keep_for_size
from tinyclip.lab.demo import examine
from tinyclip.zoo import load
from tinyclip.zoo.vocabulary import shorten
from tinyclip.zoo.web import NOTICE, PAGE, runtime_files, to_web

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / 'results' / 'methods-shapes' / 'run.json'
SHARE, SEED = 0.25, 0
ASKED = 1280  # Held-out pictures for the accuracy that the page tells
PICTURES = 12  # Held-out pictures that the page shows
SMALL = '*_quantized.onnx'  # All that the page loads of a model


def models() -> dict:  # name -> model
    "The teacher and two students of a quarter"
    teacher, preprocess, tokenizer = load('shapes-teacher')
    rows = json.loads(RECORDED.read_text())['metrics']
    wanted = dict(method='automatic', share=SHARE, seed=SEED)
    row = next(r for r in rows if wanted.items() <= r.items())
    keeps = dict(manual=keep_for_size(teacher, SHARE), automatic=Keep.from_json(row['keep']))
    found = dict(teacher=teacher)
    for name, keep in keeps.items():
        pairs = open_pairs(Shapes('train', seed=SEED + 1), preprocess, tokenizer, 64, seed=SEED)
        found[name] = inherit(teacher, keep, calibrate=pairs)
    return found


def captions():
    "All that a drawn picture may be called"
    for label in range(len(combinations)):
        for k in range(8):
            yield caption(label, k, (k,) * 4)


def near(label: int) -> list:  # Captions
    "Captions that differ in one word"
    of = combinations[label]
    others = [o for o, c in enumerate(combinations) if sum(a != b for a, b in zip(c, of)) == 1]
    return [caption(o) for o in others[:: max(1, len(others) // 4)]][:4]


def write_pictures(folder: Path) -> list:  # One entry each
    "Pictures of combinations that no training shows"
    folder.mkdir()
    drawn = Shapes('heldout', n=PICTURES, seed=7)
    entries = []
    for i, label in enumerate(drawn.labels(range(PICTURES))):
        drawn[i][0].save(folder / f'{i}.png')
        text = dict(caption=caption(int(label)), near=near(int(label)))
        entries.append(dict(file=f'{folder.name}/{i}.png', **text))
    return entries


def make(folder: Path, runtime: str):
    "Write the page"
    _, preprocess, tokenizer = load('shapes-teacher')
    entries, texts = [], list(captions())
    with runtime_files(runtime) as files:
        (folder / 'runtime').mkdir(parents=True)
        for name, path in files.items():
            shutil.copy(path, folder / 'runtime' / name)
        size = sum(p.stat().st_size for p in files.values())
    (folder / 'runtime' / 'NOTICE.txt').write_text(NOTICE, encoding='utf-8')
    for name in ('clip.js', 'worker.js'):
        shutil.copy(PAGE / name, folder)
    shutil.copy(ROOT / 'tools' / 'try_it.html', folder / 'index.html')
    for name, model in models().items():
        top1 = examine(model, preprocess, tokenizer, ASKED)['top1']
        short, own = shorten(model, texts)
        to_web(short, folder / name, own, 'none')
        for p in set((folder / name / 'onnx').iterdir()) - set((folder / name).rglob(SMALL)):
            p.unlink()
        (folder / name / 'onnx' / 'model_quantized.onnx').unlink()
        count = human(parameters(model)['towers'])
        entries.append(dict(name=name, folder=name, parameters=count, top1=top1))
        print(f'{name}: {count} parameters, {top1:.1%} of {ASKED} held-out pictures')
    pictures = write_pictures(folder / 'pictures')
    write_json(
        folder / 'models.json', dict(models=entries, runtime=size, asked=ASKED, pictures=pictures)
    )


if __name__ == '__main__':
    p = ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder', type=Path, help='what was there is replaced')
    p.add_argument('--runtime', default='npm', help='as for tinyclip export --to web')
    a = p.parse_args()
    try:
        with tempfile.TemporaryDirectory(dir=a.folder.parent) as tmp:
            make(Path(tmp) / 'new', a.runtime)
            shutil.rmtree(a.folder, ignore_errors=True)
            (Path(tmp) / 'new').rename(a.folder)
    except TinyclipError as e:
        sys.exit(f'The page Try it cannot be made: {e}')
