"""A CLIP whose layers may differ in heads and neurons, for transformers: needs torch and
transformers only.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = CLIPProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")

Parameters have open_clip's names. `config.vision` and `config.text` hold one entry per layer in
`heads` and `ffn`; a branch without any still adds the bias of its projection.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput


class TinyCLIPConfig(PretrainedConfig):
    model_type = "tinyclip"

    def __init__(self, vision=None, text=None, projection_dim=512, **kwargs):
        tower = dict(
            width=64, head_dim=64, heads=[1], ffn=[256], act="gelu", eps=1e-5, layer_scale=False
        )
        self.vision = {
            **tower,
            "image_size": [224, 224],
            "patch_size": [32, 32],
            "pool": "tok",
            "pre_norm": True,
            **(vision or {}),
        }
        self.text = {
            **tower,
            "vocab_size": 49408,
            "context_length": 77,
            "eos_id": None,
            "projection_bias": False,
            **(text or {}),
        }
        self.projection_dim = projection_dim
        super().__init__(**kwargs)


def normal(*shape, std):
    return nn.Parameter(std * torch.randn(shape))


class Bias(nn.Module):
    "What is left of a projection into which nothing goes"

    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x=None):
        return self.bias


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.in_proj_weight = normal(3 * inner, width, std=width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, x, mask):
        q, k, v = (
            F.linear(x, self.in_proj_weight, self.in_proj_bias)
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        return self.out_proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        )


class Block(nn.Module):
    attn: Any  # `Attention`, or what is left of one without heads

    def __init__(self, c, heads, ffn):
        super().__init__()
        width = c["width"]
        if heads:
            self.ln_1, self.attn = (
                nn.LayerNorm(width, eps=c["eps"]),
                Attention(width, heads, c["head_dim"]),
            )
        else:
            self.attn = nn.ModuleDict(dict(out_proj=Bias(width)))
        if ffn:
            self.ln_2, self.act = nn.LayerNorm(width, eps=c["eps"]), ACT2FN[c["act"]]
            self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, ffn), c_proj=nn.Linear(ffn, width)))
        else:
            self.mlp = nn.ModuleDict(dict(c_proj=Bias(width)))
        self.ls_1, self.ls_2 = (
            Scale(width) if c["layer_scale"] else nn.Identity() for _ in range(2)
        )
        self.heads, self.ffn = heads, ffn

    def forward(self, x, mask=None):
        x = x + self.ls_1(self.attn(self.ln_1(x), mask) if self.heads else self.attn.out_proj())
        return x + self.ls_2(
            self.mlp["c_proj"](self.act(self.mlp["c_fc"](self.ln_2(x))) if self.ffn else None)
        )


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(c, h, f) for h, f in zip(c["heads"], c["ffn"]))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTower(nn.Module):
    def __init__(self, c, embed):
        super().__init__()
        self.c, width = c, c["width"]
        (h, w), patch = c["image_size"], tuple(c["patch_size"])
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = normal(width, std=width**-0.5)
        self.positional_embedding = normal(
            (h // patch[0]) * (w // patch[1]) + 1, width, std=width**-0.5
        )
        self.ln_pre = nn.LayerNorm(width, eps=c["eps"]) if c["pre_norm"] else nn.Identity()
        self.transformer = Transformer(c)
        self.ln_post = nn.LayerNorm(width, eps=c["eps"])
        self.proj = normal(width, embed, std=width**-0.5)

    def forward(self, pixels):
        if list(pixels.shape[-2:]) != list(self.c["image_size"]):
            raise ValueError(
                f"pixel_values are {tuple(pixels.shape[-2:])}; "
                f"this model takes {tuple(self.c['image_size'])}."
            )
        x = self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = (
            torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
            + self.positional_embedding
        )
        x = self.transformer(self.ln_pre(x))
        pooled = {  # the mean may be taken before or after the norm
            "tok": lambda: self.ln_post(x[:, 0]),
            "avg": lambda: self.ln_post(x)[:, 1:].mean(1),
            "avg_first": lambda: self.ln_post(x[:, 1:].mean(1)),
        }[self.c["pool"]]()
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled @ self.proj)


class TextTower(nn.Module):
    def __init__(self, c, embed):
        super().__init__()
        self.c, width = c, c["width"]
        self.token_embedding = nn.Embedding(c["vocab_size"], width)
        self.positional_embedding = normal(c["context_length"], width, std=0.01)
        self.transformer = Transformer(c)
        self.ln_final = nn.LayerNorm(width, eps=c["eps"])
        if c["projection_bias"]:
            self.text_projection = nn.Linear(width, embed)
        else:
            self.text_projection = normal(width, embed, std=width**-0.5)

    def forward(self, ids, attention_mask=None):
        n = ids.shape[1]
        if n > self.c["context_length"]:
            raise ValueError(
                f"A text has {n} tokens; this model takes {self.c['context_length']}. "
                "Call the processor with truncation=True."
            )
        mask = torch.ones(
            n, n, dtype=torch.bool, device=ids.device
        ).tril()  # no token sees what comes after it
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        x = self.ln_final(
            self.transformer(self.token_embedding(ids) + self.positional_embedding[:n], mask)
        )
        end = (
            ids if self.c["eos_id"] is None else (ids == self.c["eos_id"]).int()
        )  # the first of the highest ids ends the text
        pooled = x[torch.arange(len(x), device=x.device), end.argmax(-1)]
        p = self.text_projection
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=pooled @ p if isinstance(p, torch.Tensor) else p(pooled),
        )


class TinyCLIPModel(PreTrainedModel):
    config_class = TinyCLIPConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.visual = VisionTower(config.vision, config.projection_dim)
        self.text = TextTower(config.text, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.post_init()

    def get_image_features(self, pixel_values, **kwargs):
        "As `CLIPModel` of transformers 5: the features are `pooler_output`"
        return self.visual(pixel_values)

    def get_text_features(self, input_ids, attention_mask=None, **kwargs):
        "As `CLIPModel` of transformers 5: the features are `pooler_output`"
        return self.text(input_ids, attention_mask)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        return_loss=None,
        return_dict=True,
        **kwargs,
    ):
        if input_ids is None or pixel_values is None:
            raise ValueError(
                "Give input_ids and pixel_values; for one of them, call get_text_features or "
                "get_image_features."
            )
        image, text = self.visual(pixel_values), self.text(input_ids, attention_mask)
        i, t = (F.normalize(o.pooler_output, dim=-1) for o in (image, text))
        logits = self.logit_scale.exp() * i @ t.T
        loss = None
        if return_loss:
            pairs = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        out = CLIPOutput(loss, logits, logits.T, t, i, text, image)
        return out if return_dict else out.to_tuple()
