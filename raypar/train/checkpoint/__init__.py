"""Sharded checkpoints: written by every rank in the background, restored under any plan.

`store.CheckpointStore` writes and keeps them, `checkpoint.Checkpoint` is one of them. `format` says
what is in one; `writing` and `reading` are what ranks do, `committing` makes the index.
"""

from raypar.train.checkpoint.checkpoint import Checkpoint
from raypar.train.checkpoint.store import Begun, CheckpointStore

__all__ = ["Begun", "Checkpoint", "CheckpointStore"]
