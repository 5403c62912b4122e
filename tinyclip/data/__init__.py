"Image-text pairs: sources, JPEGs, transforms, loaders, and a teacher's features beside them"
from .inspect import *
from .pairs import open_pairs
from .transforms import transforms
