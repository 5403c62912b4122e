"Small CLIPs out of large ones: affinity mimicking and weight inheritance (TinyCLIP, ICCV 2023)"
__version__ = "0.1.0"

import sys as _sys
import typing as _typing
from pathlib import Path as _Path

from .core import lazy_names as _lazy_names
from .core import when_imported as _when_imported

if _typing.TYPE_CHECKING:
    from .data import open_pairs
    from .distill import Distiller
    from .inheritance import inherit
    from .keep import Keep, manual
    from .live import watch
    from .masking import MaskedCLIP
    from .reconstruction import reconstruct
    from .stages import Stage, Stages
    from .zoo import load, save

__all__ = [
    'Distiller',
    'Keep',
    'MaskedCLIP',
    'Stage',
    'Stages',
    'inherit',
    'load',
    'manual',
    'open_pairs',
    'reconstruct',
    'save',
    'watch',
]

# name -> where it is defined; imported when it is first used, since torch takes seconds
_HOMES = dict(
    Distiller='distill',
    Keep='keep',
    MaskedCLIP='masking',
    Stage='stages',
    Stages='stages',
    inherit='inheritance',
    load='zoo',
    manual='keep',
    open_pairs='data',
    reconstruct='reconstruction',
    save='zoo',
    watch='live',
)
__getattr__, __dir__ = _lazy_names(__name__, _HOMES)

# open_clip.create_model("TinyCLIP-...") works beside tinyclip, whichever is imported first
_CONFIGS = _Path(__file__).parent / 'assets' / 'configs'
_when_imported('open_clip.factory', lambda factory: factory.add_model_config(_CONFIGS))

# in a notebook all of it is loaded now: Tab looks at every name, and would wait for torch unseen
if 'ipykernel' in _sys.modules:
    for _name in __all__:
        __getattr__(_name)
