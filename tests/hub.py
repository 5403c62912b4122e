"Models of transformers for tests: random CLIPs, and an export in transformers' own hands"

import importlib.util

import pytest
import torch

transformers = pytest.importorskip(
    'transformers', reason="transformers is optional: pip install 'tinyclip[export]'"
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tinyclip.core import TinyclipError
from tinyclip.inheritance import build
from tinyclip.zoo.to_transformers import MODELLING
from tinyclip.zoo.vocabulary import shorten, tokenizer_of

CAPTIONS = [
    'a photo of a cat',
    'a photo of a dog',
    'a ship on the sea',
    'an aeroplane in the blue sky, far above the clouds and all the birds that there are',
    'frogs',
]


def tiny(seed=0, vision=None, text=None, **kw):
    "A random CLIP with weights large enough to matter"
    torch.manual_seed(seed)
    cfg = (
        dict(
            embed_dim=24,
            vision_cfg=dict(image_size=32, layers=3, width=64, patch_size=8, head_width=16)
            | (vision or {}),
            text_cfg=dict(context_length=16, vocab_size=49408, width=48, heads=3, layers=3)
            | (text or {}),
        )
        | kw
    )
    return shake(build(cfg))


def shake(model):
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n != 'logit_scale':
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def short(model):
    return shorten(model, CAPTIONS)[0]  # a small token table: small files


def same(a, b, tol=1e-5):
    off = ((a - b).abs().max() / b.abs().max()).item()
    assert off <= tol, off


spec = importlib.util.spec_from_file_location('modeling_tinyclip', MODELLING)
modelling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(modelling)


def processor_of(folder):
    """Without AutoTokenizer, which would ask for leave to import the modelling file into the
    user's cache"""
    return transformers.CLIPProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(str(folder)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(folder)),
    )


def theirs(folder, form):
    "The export in transformers' hands; nothing may be missing or left over"
    kind = transformers.CLIPModel if form == 'clip' else modelling.TinyCLIPModel
    model, info = kind.from_pretrained(str(folder), output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), processor_of(folder)


@torch.no_grad()
def compare(model, folder, form, tokenizer=None, tol=1e-5):
    "Features of images and texts, and the logits"
    other, processor = theirs(folder, form)
    tokenizer = tokenizer or tokenizer_of(model)
    torch.manual_seed(1)
    pixels = torch.randn(4, 3, *model.visual.image_size)
    i = model.encode_image(pixels, normalize=True)
    t = model.encode_text(tokenizer(CAPTIONS, context_length=model.context_length), normalize=True)
    inputs = processor(text=CAPTIONS, return_tensors='pt', padding=True, truncation=True)
    out = other(pixel_values=pixels, **inputs)
    same(out.image_embeds, i, tol)
    same(out.text_embeds, t, tol)
    same(out.logits_per_image, model.logit_scale.exp() * i @ t.T, tol)
    same(
        other.get_image_features(pixel_values=pixels).pooler_output, model.encode_image(pixels), tol
    )
    same(
        other.get_text_features(**inputs).pooler_output,
        model.encode_text(tokenizer(CAPTIONS, context_length=model.context_length)),
        tol,
    )


def refuse(match, f, *a, **k):
    with pytest.raises(TinyclipError, match=match) as e:
        f(*a, **k)
    assert str(e.value).count('\n') == 0
