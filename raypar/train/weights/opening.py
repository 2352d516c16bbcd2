"""Which kind of weights is at a path."""

from __future__ import annotations

from pathlib import Path

from raypar.errors import CheckpointError
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.checkpoint.format import INDEX
from raypar.train.checkpoint.storage import storage_at
from raypar.train.resuming import CHECKPOINTS
from raypar.train.weights.dcp import METADATA, not_read
from raypar.train.weights.safetensors import SafetensorsWeights, folder_weights
from raypar.train.weights.torch_file import TorchFileWeights
from raypar.train.weights.weights import CheckpointWeights, Weights

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_KINDS = (
    "a Hugging Face folder with model.safetensors, a .safetensors file, a checkpoint, or the "
    "folder of a run"
)


def weights_at(where: Checkpoint | str | Path, *, torch_files: bool = False) -> Weights:
    """The weights at a path.

    Args:
        where: A checkpoint; or the path or URL of one, of a safetensors file, or of a Hugging Face
            folder; or the folder of a run, whose newest checkpoint is taken.
        torch_files: Whether a file of `torch.save` will do. Only this process can read it.

    Raises:
        CheckpointError: There is nothing, something else, or something damaged.
    """
    if isinstance(where, Checkpoint):
        return CheckpointWeights(where)
    text = str(where).rstrip("/")
    path = None if "://" in text else Path(text).expanduser().absolute()
    if path is not None and not path.exists():
        raise CheckpointError(
            f"there is no {text!r}; give {_KINDS}. A model of the Hugging Face hub is downloaded "
            "first: hf download NAME --local-dir DIR"
        )
    if text.endswith(".safetensors") and (path is None or path.is_file()):
        parent, _, name = str(path or text).rpartition("/")
        return SafetensorsWeights(storage_at(parent), [name], text)
    if path is not None and path.is_file():
        if torch_files:
            return TorchFileWeights(path)
        raise CheckpointError(_of_file(text))
    return _of_folder(text, path, torch_files)


def _of_folder(text: str, path: Path | None, torch_files: bool) -> Weights:
    storage = storage_at(path or text)
    names = storage.names()
    if INDEX in names:
        return CheckpointWeights(Checkpoint(path or text))
    if METADATA in names:
        raise not_read(text)
    if CHECKPOINTS in names:
        newest = CheckpointStore(storage.path(CHECKPOINTS)).latest()
        if newest is None:
            raise CheckpointError(f"run {text!r} has no good checkpoint")
        return CheckpointWeights(newest)
    found = folder_weights(storage, text)
    if found is not None:
        return found
    pickled = [name for name in names if name.endswith(_TORCH)]
    if path is not None and torch_files and len(pickled) == 1:
        return TorchFileWeights(path / pickled[0])
    if path is not None and pickled:
        raise CheckpointError(_of_file(f"{text}/{pickled[0]}"))
    raise CheckpointError(
        f"{text!r} holds no weights that raypar reads, it has {', '.join(names[:8]) or 'nothing'}; "
        f"give {_KINDS}"
    )


def _of_file(text: str) -> str:
    return (
        f"{text!r} is no safetensors file, and only those are read in parts by every rank: turn it "
        f"into a checkpoint, raypar checkpoint convert {text} weights, and give that"
    )
