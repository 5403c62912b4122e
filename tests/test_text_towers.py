"""Text towers of transformers in open_clip models: cut, masked, scored, reconstructed and saved as
open_clip's own are"""

import os
import shutil
import subprocess
import sys

import open_clip
import pytest
import torch

pytest.importorskip(
    'transformers', reason="transformers is optional: pip install 'tinyclip[export]'"
)
from test_hugging_towers import tokenizer as words

from tinyclip.core import TinyclipError
from tinyclip.inheritance import inherit
from tinyclip.keep import Keep, manual
from tinyclip.masking import MaskedCLIP
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import scored
from tinyclip.sparsity import Sparsity
from tinyclip.towers import ParamCount, layout
from tinyclip.towers.architecture import architecture, create
from tinyclip.zoo import save

SMALL = dict(vocab_size=64, pad_token_id=1)
BERT = SMALL | dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
BERT |= dict(intermediate_size=48, max_position_embeddings=40)
T5 = SMALL | dict(d_model=32, d_kv=8, d_ff=24, num_layers=3, num_heads=3)
NLLB = SMALL | dict(d_model=32, encoder_layers=3, encoder_ffn_dim=48, encoder_attention_heads=4)
CONFIGS = {'bert': BERT, 'roberta': BERT, 'xlm-roberta': BERT, 'mt5': T5, 'm2m_100': NLLB}
VISION = dict(image_size=32, layers=2, width=32, patch_size=16, head_width=16)
KINDS = pytest.mark.parametrize('kind', CONFIGS)


def clip(kind, embed=24, **text):
    own = dict(hf_model_pretrained=False, hf_pooler_type='mean_pooler', context_length=12)
    own |= dict(hf_proj_type='mlp') | text
    own |= dict(hf_model_name='.', hf_config=dict(CONFIGS[kind], model_type=kind))
    torch.manual_seed(0)
    model = create(dict(embed_dim=embed, vision_cfg=VISION, text_cfg=own)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model


def texts(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (n, 12), generator=g)
    ids[torch.arange(12) >= torch.randint(3, 13, (n, 1), generator=g)] = 1  # padded
    return ids


def pairs(n=64):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 32, 32, generator=g), texts(n, 1))]


def encoded(model):
    with torch.no_grad():
        return model.encode_text(texts())


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@KINDS
@pytest.mark.parametrize('pooler', ['mean_pooler', 'cls_pooler'])
@pytest.mark.parametrize('proj', ['mlp', 'linear', None])
def test_masked_is_cut(kind, proj, pooler):
    if proj is None and kind == 'm2m_100':
        pytest.skip('the width of NLLB stays, so it needs a projection')
    embed = 24 if proj else 32
    model = clip(kind, embed, hf_proj_type=proj, hf_pooler_type=pooler)
    assert torch.equal(encoded(inherit(model, Keep(layout(model).sizes, {}))), encoded(model))
    masked = MaskedCLIP(model).eval()
    with torch.no_grad():
        masked.log_alpha.normal_(0, 3)
    small = masked.cut().eval()
    assert off(encoded(masked), encoded(small)) < 1e-5
    axes = [a for a in small.keep.axes if a.startswith('text')]
    assert any(len(small.keep[a]) < masked.layout.sizes[a] for a in axes)


def without_first_layer(kind):
    "A student whose layers are unequal, without the first one"
    model = clip(kind)
    sizes = layout(model).sizes
    keep = {'text.layers': [1, 2], 'text.layers.2.ffn': range(7)}
    if 'text.layers.1.heads' in sizes:
        keep['text.layers.1.heads'] = [0, 2]
    return inherit(model, Keep(sizes, keep)).eval()


LOAD = """
import sys, torch
from tinyclip.zoo import load
for folder in sys.argv[1:]:
    model = load(folder).model.eval()
    with torch.no_grad():
        torch.save(model.encode_text(torch.load(folder + '/ids.pt')), folder + '/got.pt')
"""


def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    "With what the folder holds alone; nobody is asked for a configuration or a tokenizer"
    words(tmp_path / 'words', rows=64)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path / 'words'), context_length=12)
    want = {}
    for kind in CONFIGS:
        student = without_first_layer(kind)
        save(student, tmp_path / kind, tokenizer=tokenizer)
        torch.save(texts(), tmp_path / kind / 'ids.pt')
        want[kind] = encoded(student)
        assert 'tinyclip_cfg' in architecture(student)
    env = os.environ | dict(HF_HUB_OFFLINE='1')
    shutil.rmtree(tmp_path / 'words')
    folders = [str(tmp_path / k) for k in CONFIGS]
    subprocess.run([sys.executable, '-c', LOAD, *folders], check=True, env=env)
    for kind in CONFIGS:
        assert torch.equal(torch.load(tmp_path / kind / 'got.pt'), want[kind])


@KINDS
def test_even_students_are_plain(kind):
    model = clip(kind)
    width = {} if kind == 'm2m_100' else dict(text_width=0.5)
    student = inherit(model, manual(model, text_depth=0.67, **width))
    assert 'tinyclip_cfg' not in architecture(student)


@KINDS
def test_reconstruction(kind):
    "Of all that is kept nothing changes; what is cut comes nearer to the teacher"
    model = clip(kind)
    whole = reconstruct(inherit(model, manual(model)), model, pairs(), progress=False)
    assert torch.equal(encoded(whole), encoded(model))
    student = without_first_layer(kind)
    better = reconstruct(student, model, pairs(), progress=False)
    assert off(encoded(better), encoded(model)) < off(encoded(student), encoded(model))


@KINDS
@pytest.mark.parametrize('proj', ['mlp', None])
def test_scores_meet_a_share(kind, proj):
    if proj is None and kind == 'm2m_100':
        pytest.skip('the width of NLLB stays, so it needs a projection')
    model = clip(kind, 24 if proj else 32, hf_proj_type=proj)
    keep = scored(model, pairs(128), 0.5, progress=False)
    student = inherit(model, keep)
    whole, left = (ParamCount(layout(m)).whole['text'] for m in (model, student))
    assert left == pytest.approx(0.5 * whole, rel=0.02)
    better = reconstruct(student, model, pairs(128), progress=False)
    assert off(encoded(better), encoded(model)) < off(encoded(student), encoded(model))


@KINDS
def test_masks_come_to_a_share(kind):
    masked = MaskedCLIP(clip(kind))
    student = Sparsity(masked, 0.6).cut()
    assert encoded(student.eval()).isfinite().all()


def test_saving_another_model_leaves_a_file_that_is_not_its_own(tmp_path):
    "config.json is of a text tower from transformers only; elsewhere it is somebody's"
    cfg = dict(context_length=12, vocab_size=64, width=32, heads=2, layers=1)
    plain = open_clip.CLIP(24, VISION, cfg)
    (tmp_path / 'config.json').write_text('mine')
    save(plain, tmp_path)
    assert (tmp_path / 'config.json').read_text() == 'mine'


def test_refusals():
    model = clip('mt5')
    with pytest.raises(TinyclipError, match='All layers share the axis text.heads'):
        MaskedCLIP(model, kinds=('attention',))
    with pytest.raises(TinyclipError, match='must keep it'):
        family = layout(model).families['text']
        family.select_tokens(model.text, [0, 2, 3])
