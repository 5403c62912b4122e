"""What can be done with every architecture that open_clip lists, at full size and without weights:
all of them are built on the meta device, cut evenly and unevenly, and masked.

    python benchmarks/architectures.py  # writes results/architectures/run.json, in minutes
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import open_clip
import torch
import transformers
from open_clip import hf_model

from tinyclip.core import Table, TinyclipError, record_run
from tinyclip.inheritance import inherit
from tinyclip.keep import Keep, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.scores import unit_scores
from tinyclip.towers import TOWERS, layout, tower_of
from tinyclip.towers.architecture import architecture
from tinyclip.zoo.to_transformers import chosen

RECORD = Path('results/architectures/run.json')
ROBERTA = dict(max_position_embeddings=514, type_vocab_size=1, pad_token_id=1)
T5 = dict(vocab_size=250112, d_kv=64)
NLLB = dict(vocab_size=256206, d_model=1024, max_position_embeddings=1024)
# sizes of the text towers of Hugging Face in open_clip's list, as published; no hub is asked
HUGGING_FACE = {
    'roberta-base': (transformers.RobertaConfig, dict(ROBERTA, vocab_size=50265)),
    'xlm-roberta-base': (transformers.XLMRobertaConfig, dict(ROBERTA, vocab_size=250002)),
    'xlm-roberta-large': (
        transformers.XLMRobertaConfig,
        dict(ROBERTA, vocab_size=250002, hidden_size=1024, num_hidden_layers=24)
        | dict(num_attention_heads=16, intermediate_size=4096),
    ),
    'mt5-base': (transformers.MT5Config, dict(T5, d_model=768, d_ff=2048, num_layers=12)),
    'mt5-xl': (
        transformers.MT5Config,
        dict(T5, d_model=2048, d_ff=5120, num_layers=24, num_heads=32),
    ),
    'nllb-200-distilled-600M': (
        transformers.M2M100Config,
        dict(NLLB, encoder_layers=12, decoder_layers=12),
    ),
    'nllb-200-distilled-1.3B': (
        transformers.M2M100Config,
        dict(NLLB, encoder_layers=24, encoder_ffn_dim=8192, decoder_layers=24),
    ),
}


def local_config(name, *args, **kwargs):
    "In place of `AutoConfig.from_pretrained`"
    make, sizes = HUGGING_FACE[name.split('/')[-1]]
    return make(**sizes)


def build(name, device='meta'):
    "An architecture at full size, with random weights or, on `meta`, without any"
    asked = hf_model.AutoConfig.from_pretrained
    hf_model.AutoConfig.from_pretrained = local_config
    try:
        with torch.device(device):
            return open_clip.create_model(
                name, device=device, load_weights=False, pretrained_hf=False
            )
    finally:
        hf_model.AutoConfig.from_pretrained = asked


def uneven(l) -> Keep:
    "All but a head and a neuron of the first layer that has several"
    axes = {}
    for kind in ('.heads', '.ffn'):
        found = [a for a, n in l.sizes.items() if a.endswith(kind) and n > 1]
        for tower in TOWERS:
            if a := next((a for a in found if a.startswith(tower)), None):
                axes[a] = range(l.sizes[a] - 1)
    return Keep(l.sizes, axes)


def half(clip):
    "An even student: half the width or the layers"
    return inherit(clip, manual(clip, 0.5, text_depth=0.5))


def plain(clip):
    "An even student that open_clip builds without tinyclip"
    if 'tinyclip_cfg' in architecture(half(clip)):
        raise TinyclipError('Its configuration has entries of tinyclip.')


def reconstructs(clip):
    for t, family in layout(clip).families.items():
        if family.branches(*tower_of(clip, t)) is None:
            raise TinyclipError(f'The linear maps of {family.name} are not described.')


def scores(clip):
    "Half of it, chosen by scores; which ones does not matter here"
    with torch.device('cpu'):
        keep = unit_scores(clip, by='random', progress=False).keep(0.5)
    inherit(clip, keep)


def leaves(clip):
    "An even student as a class of transformers; of a SigLIP in depth: its width is the embedding"
    bias = getattr(clip, 'logit_bias', None) is not None
    chosen(inherit(clip, manual(clip, image_depth=0.5, text_depth=0.5)) if bias else half(clip))


CAN = dict(
    inherit=half,
    uneven=lambda clip: inherit(clip, uneven(layout(clip))),
    masks=MaskedCLIP,
    plain=plain,
    reconstruct=reconstructs,
    scores=scores,
    transformers=leaves,
)


def row(name, columns=tuple(CAN), known=None):
    "What works with one architecture, and why the rest does not; `known` has the other columns"
    clip = build(name)
    trunk = getattr(clip.visual, 'trunk', clip.visual)
    text = getattr(getattr(clip, 'text', clip), 'transformer', None)
    own = dict(architecture=name, image=type(trunk).__name__, text=type(text).__name__)
    out = (known or {}) | own | dict(why=dict((known or {}).get('why', {})))
    for what in columns:
        out['why'].pop(what, None)
        try:
            with torch.device('meta'):
                CAN[what](clip)
            out[what] = True
        except TinyclipError as e:
            out[what], out['why'][what] = False, str(e)
    return out


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--names', nargs='+', default=open_clip.list_models())
    p.add_argument('--columns', nargs='+', default=[*CAN], choices=CAN)
    p.add_argument('--dry', action='store_true', help='show only')
    a = p.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
    recipe, known = dict(open_clip=open_clip.__version__, device='meta'), {}
    if a.names != open_clip.list_models() or a.columns != [*CAN]:  # a part: the rest as recorded
        recorded = json.loads(RECORD.read_text())
        known = {r['architecture']: r for r in recorded['metrics']['rows']}
        earlier = [*recorded['recipe'].get('earlier', []), recorded['commit']]
        recipe |= dict(earlier=earlier, names=a.names, columns=a.columns)
    rows = []
    for name in known or a.names:
        rows.append(row(name, a.columns, known.get(name)) if name in a.names else known[name])
        if name in a.names:
            print({k: v for k, v in rows[-1].items() if k != 'why'}, rows[-1]['why'], flush=True)
    counts = {what: sum(r[what] for r in rows) for what in CAN}
    print(Table([dict(architectures=len(rows)) | counts]))
    if not a.dry:
        print(record_run('architectures', recipe, dict(counts=counts, rows=rows), [0]))
