"Losses for a student and its teacher: affinity mimicking and its relatives, whole and tiled"
from .later import *
from .mimicking import *
from .objective import *
from .sigmoid import *
