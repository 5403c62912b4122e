"Models in and out: names, folders, released checkpoints, transformers, ONNX"
from typing import TYPE_CHECKING

from ..core import lazy_names as _lazy_names

if TYPE_CHECKING:
    from .folders import save
    from .loading import load

__all__ = ['load', 'save']
__getattr__, __dir__ = _lazy_names(__name__, dict(load='loading', save='folders'))
