"""Worker processes of a DataLoader that die."""

from __future__ import annotations


def worker_died(error: BaseException) -> bool:
    """Whether it was raised because a worker process of a DataLoader was lost.

    Torch notices by the process, or by the connection over which a tensor of it was to come.
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and _from_torch(error)


def _from_torch(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "torch.multiprocessing.reductions":
            return True
        trace = trace.tb_next
    return False


def advice(error: BaseException) -> str:
    """What to do about an error of a data source, to be put behind it; empty where unknown."""
    if not worker_died(error):
        return ""
    return (
        ". A process that reads the data was killed from outside or crashed: where the machine ran "
        "out of memory (`dmesg` tells), set num_workers of the loader lower, or 0 to read without "
        'processes. Checkpoints are kept: go on with resume_from="auto"'
    )
