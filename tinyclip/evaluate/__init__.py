"What a student is worth and what it costs: accuracy, retrieval, probes, agreement, speed"
from .zeroshot import *
