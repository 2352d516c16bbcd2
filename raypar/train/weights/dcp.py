"""A model as a folder of `torch.distributed.checkpoint` (DCP), for programs that load those.

Such a folder is only written. Its ``.metadata`` is a pickle, and to read a pickle is to run what
is in it: a folder that somebody else made could run anything.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from raypar.errors import CheckpointError
from raypar.train.weights.folder import whole_folder
from raypar.train.weights.weights import Weights, refuse_existing

METADATA = ".metadata"
"""File by which a folder of DCP is known."""


def save_dcp(weights: Weights, folder: str | Path) -> list[str]:
    """Writes a folder that ``torch.distributed.checkpoint.load`` reads into any sharding.

    Its tensors have the model's own names, as in ``model.state_dict()``; the optimizer is not
    written. One tensor is in memory at a time.

    Args:
        weights: The model.
        folder: Where to; it must not be there yet, and is there as a whole or not at all.

    Returns:
        The names of the files that were written.

    Raises:
        CheckpointError: There is something already, the weights are damaged, or it cannot be
            written.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
    from torch.distributed.checkpoint.metadata import MetadataIndex

    class OneByOne(DefaultSavePlanner):
        """Plans with tensors that are not there, and reads each as it is written."""

        def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
            return weights.read(index.fqn)

    target = Path(folder).expanduser().absolute()
    refuse_existing(str(folder), target.exists())
    forms = {name: weights.forms[of] for name, of in weights.names.items()}
    state = {n: torch.empty(f.shape, dtype=f.dtype, device="meta") for n, f in forms.items()}
    with whole_folder(target, str(folder)) as part, warnings.catch_warnings():
        # It warns that there is one process, which is meant.
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        # A file for each tensor: what goes into one file is kept until it is whole.
        writer = FileSystemWriter(part, single_file_per_rank=False)
        save(state, storage_writer=writer, planner=OneByOne(), no_dist=True)
    return sorted(path.name for path in target.iterdir())


def not_read(where: str) -> CheckpointError:
    """The error for a folder of DCP that is to be read."""
    return CheckpointError(
        f"{where!r} is a folder of torch.distributed.checkpoint, whose {METADATA} is a pickle: "
        "reading it could run code, and raypar does not. If you trust it, make it a file: "
        'python -c "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save; '
        f"dcp_to_torch_save({where!r}, 'model.pt')\", and then raypar checkpoint convert model.pt "
        "weights"
    )
