"What a student is worth and what it costs: zero-shot accuracy, retrieval, probes, agreement, parameters, speed"
from .zeroshot import *
