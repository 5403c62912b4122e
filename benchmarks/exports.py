"""Which towers of open_clip leave torch as ONNX and as LiteRT files. Towers built of the same kinds
of modules with the same settings are one kind; of each, the smallest is cut to few layers at its
full width, built with random weights, exported, and compared with torch.

    make phone                                    # LiteRT has an environment of its own
    .venv-phone/bin/python benchmarks/exports.py  # writes results/exports/run.json, in minutes
"""

import json
import logging
import tempfile
import warnings
from pathlib import Path

import open_clip
import torch
from architectures import RECORD
from architectures import build as on_meta

from tinyclip.core import Table, TinyclipError, record_run
from tinyclip.inheritance import inherit
from tinyclip.keep import manual
from tinyclip.towers import TOWERS, layout, tower_of
from tinyclip.towers.architecture import architecture, build
from tinyclip.zoo import litert, onnx

# settings that say how large something is, or where it comes from
SIZES = {'image_size', 'context_length', 'vocab_size', 'patch_size', 'head_dim', 'head_width'}
SIZES |= {'eos_id', 'timm_model_name', 'timm_drop_path', 'hf_model_name', 'hf_config'}
SIZES |= {'hf_model_pretrained', 'output_tokens'}


def kind_of(clip, tower):
    "Family, settings and kinds of modules of a tower, sizes left out; and its parameters"
    family, (m, _) = layout(clip).families[tower], tower_of(clip, tower)
    static = family.static(getattr(clip, 'text', clip) if tower == 'text' else m)
    settings = {k: v for k, v in static.items() if k not in SIZES and (k[0] != '_' or v is True)}
    inside = [m] if m is not clip else [clip.transformer, clip.token_embedding, clip.ln_final]
    modules = sorted({type(o).__name__ for part in inside for o in part.modules()})
    size = sum(p.numel() for part in inside for p in part.parameters())
    return (tower, family.name, json.dumps(settings, sort_keys=True), *modules), size


def kinds(names):
    "Of every kind: size and name of its architectures"
    found = {}
    for name in names:
        clip = on_meta(name)
        for tower in TOWERS:
            kind, size = kind_of(clip, tower)
            found.setdefault(kind, []).append((size, name))
    return found


def short(name):
    "An architecture with few layers and random weights, ready for exports"
    clip = on_meta(name)
    with torch.device('meta'):
        cfg = architecture(inherit(clip, manual(clip, image_depth=0.1, text_depth=0.1)))
    torch.manual_seed(0)
    return onnx.float_copy(build(cfg))


def as_onnx(m, tower, x, path):
    onnx.export_tower(m, tower, x, path)
    return onnx.run_rows(onnx.session(path), x)


def as_litert(m, tower, x, path):
    x = x.int() if tower == 'text' else x
    litert.write_tower(m, tower, x, path)
    return litert.Program(path, tower)(x.numpy())


def exported(tower, name):
    "How far each file is from torch, or why there is none"
    row, m = {}, short(name)
    x = onnx.sample_inputs(m, 2)[tower == 'text']
    want = onnx.rows_of(m, tower, x)
    for form, export in dict(onnx=as_onnx, litert=as_litert).items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                got = export(m, tower, x, Path(folder) / f'{tower}.{form}')
                row[form] = onnx.apart(got, want)['difference']
            except TinyclipError as e:
                row[form], row[f'{form}_why'] = None, str(e)
    return row


if __name__ == '__main__':
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
    recorded = json.loads(RECORD.read_text())['metrics']['rows']
    rows = []
    for (tower, family, settings, *_), all_of in kinds(
        r['architecture'] for r in recorded if r['inherit']
    ).items():
        smallest = min(all_of)[1]
        row = dict(tower=tower, family=family, settings=json.loads(settings), tried=smallest)
        rows.append(row | exported(tower, smallest) | dict(architectures=[n for _, n in all_of]))
        print({k: v for k, v in rows[-1].items() if k != 'architectures'}, flush=True)
    recipe = dict(open_clip=open_clip.__version__, depth=0.1, precision='fp32')
    counts = {f: sum(r[f] is not None for r in rows) for f in ('onnx', 'litert')}
    print(Table([dict(kinds=len(rows)) | counts]), record_run('exports', recipe, rows, [0]))
