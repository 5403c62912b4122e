"Image-text pairs: sources, JPEGs, transforms, loaders, and stored teacher features"

from .inspect import Report, check
from .pairs import Batch, EvalBatches, Pairs, captioned, labelled, open_pairs
from .shapes import Shapes
from .samples import IndexedSource, Sample, SamplingPlan, Skip, Source
from .sources import SOURCES, as_source, mix
from .transforms import transforms

_LATER = {  # imported at first use
    'cache_size': 'cache',
    'write_cache': 'cache',
    'write_shards': 'cache',
    'cached_pairs': 'cached',
}
__all__ = [
    *['open_pairs', 'labelled', 'captioned', 'mix', 'check', 'transforms'],
    *['as_source', 'SOURCES', 'Source', 'IndexedSource', 'SamplingPlan', 'Sample', 'Skip'],
    *['Shapes', 'Pairs', 'Batch', 'EvalBatches', 'Report'],
    *_LATER,
]


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'.{_LATER[name]}', __name__), name)


def __dir__():
    return sorted({*globals(), *_LATER})
