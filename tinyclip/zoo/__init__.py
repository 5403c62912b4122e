"Models in and out: names, folders, released checkpoints, transformers, ONNX"
from .folders import save
from .loading import *
