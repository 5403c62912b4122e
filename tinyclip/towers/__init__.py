"What towers are made of: a page per family says it, and the registry finds the family of a model"
from .family import Branch, Family, LinearMap, tower_of
from .layout import TOWERS, Dim, Layout, ParamCount
from .registry import (
    FAMILIES,
    branch_biases,
    embed_dim,
    family_of,
    layout,
    parts,
    select_tokens,
    token_table,
)
from .text import TEXT
from .vit import VIT
