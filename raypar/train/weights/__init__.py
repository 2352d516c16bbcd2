"""Weights in files: what a model begins with, and what others load.

`weights.Weights` is one place that holds a model's tensors under names; `opening.weights_at` finds
out which kind. `matching` lays them over a model, rank by rank; `converting` makes a checkpoint of
them, `hugging_face` a folder that transformers loads, `dcp` one that torch.distributed.checkpoint
does.
"""

from raypar.train.weights.converting import copy_checkpoint, save_as_checkpoint
from raypar.train.weights.dcp import save_dcp
from raypar.train.weights.hugging_face import save_hugging_face
from raypar.train.weights.matching import FileWeights, initial_weights
from raypar.train.weights.opening import weights_at
from raypar.train.weights.weights import Weights

__all__ = [
    "FileWeights",
    "Weights",
    "copy_checkpoint",
    "initial_weights",
    "save_as_checkpoint",
    "save_dcp",
    "save_hugging_face",
    "weights_at",
]
