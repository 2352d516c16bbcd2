"""What a user passes and every rank needs: whether it can be sent to another process."""

from __future__ import annotations

from raypar.errors import ConfigError
from raypar.train.settings import Settings

_SENT = {
    "model_fn": "builds the model",
    "loss_fn": "computes the loss",
    "optimizer": "builds its optimizer",
    "scheduler": "builds its scheduler",
}


class _Nowhere:
    """A file that forgets."""

    def write(self, data: bytes) -> int:
        return len(data)


def check_sendable(settings: Settings) -> None:
    """Checks, before anything is started, that ranks in other processes can have the functions.

    Raises:
        ConfigError: One holds something of this process; names it.
    """
    from ray import cloudpickle

    for name, does in _SENT.items():
        try:
            cloudpickle.dump(getattr(settings, name), _Nowhere())
        except Exception as error:  # what it holds may raise anything
            raise ConfigError(
                f"{name} cannot be sent to the ranks: {type(error).__name__}: {error}. Every rank "
                f"{does} itself, in its own process: pass a function that opens files, locks and "
                "connections when it is called, instead of one that refers to open ones; or train "
                "in this process, ScalingConfig(num_workers=0)"
            ) from error
