"What open_clip's towers are made of: which dimension of which tensor is a width, a head, a neuron or a layer"
from .layout import *
