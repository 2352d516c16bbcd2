"""Who proposes, and where proposals are kept."""

from __future__ import annotations

import importlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from raypar.errors import ConfigError, did_you_mean

_STARTUP = 10
"""Proposals at random before a sampler learns from them."""
_POPULATION = 16


def _tpe(seed: int, parallel: bool) -> BaseSampler:
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, n_startup_trials=_STARTUP, constant_liar=parallel
    )


def _gp(seed: int, parallel: bool) -> BaseSampler:
    _need("gp", "scipy")
    return optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=_STARTUP, warn_independent_sampling=False
    )


def _cmaes(seed: int, parallel: bool) -> BaseSampler:
    _need("cmaes", "cmaes")
    return optuna.samplers.CmaEsSampler(
        seed=seed, n_startup_trials=_STARTUP, warn_independent_sampling=False
    )


def _nsga2(seed: int, parallel: bool) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=_POPULATION)


def _random(seed: int, parallel: bool) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


_SAMPLERS: dict[str, Callable[[int, bool], BaseSampler]] = {
    "tpe": _tpe,
    "gp": _gp,
    "cmaes": _cmaes,
    "nsga2": _nsga2,
    "random": _random,
}
PARETO = ("nsga2",)
"""Samplers for step time × peak memory × devices; the others look at the step time alone."""


WITHOUT_CONSTRAINTS = ("cmaes",)
"""Samplers that know no constraints: what does not fit is told as a slow plan."""


def sampler_of(name: str, seed: int, *, parallel: bool = False) -> BaseSampler:
    """An Optuna sampler.

    Args:
        name: One of the names that `raypar.search.config.SAMPLERS` lists.
        seed: Same seed, same proposals.
        parallel: Whether proposals are made while others are still looked at.

    Raises:
        ConfigError: There is none of that name, or it needs a package that is not installed.
    """
    if name not in _SAMPLERS:
        raise ConfigError(
            f"search.sampler is {name!r}; valid are {', '.join(_SAMPLERS)}."
            f"{did_you_mean(name, _SAMPLERS)}"
        )
    return _SAMPLERS[name](seed, parallel)


def _need(sampler: str, package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"search.sampler {sampler!r} needs the package {package!r}, which is not installed: "
            "pip install 'raypar[samplers]', or set search.sampler: tpe"
        ) from None


def storage_of(path: str | None) -> tuple[BaseStorage, str]:
    """Where proposals are kept: a journal file, or memory.

    A journal that cannot be read is set aside under another name and a new one is begun.

    Args:
        path: The journal; None: memory.

    Returns:
        The storage, and what the user should know about it (mostly nothing).

    Raises:
        ConfigError: It is a folder, or in one that cannot be written to.
    """
    if path is None:
        return InMemoryStorage(), ""
    file = Path(path)
    if not path or file.is_dir():
        raise ConfigError(
            f"search.storage is {path!r}, which is {'a folder' if path else 'empty'}; give a file, "
            f"for example {str(file / 'search.journal')!r}"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage, fault = _opened(file)
        if storage is not None:
            return storage, ""
        spare = _spare(file)
        file.replace(spare)
        note = f"{file} cannot be read ({fault}); it was set aside as {spare.name}"
        return JournalStorage(JournalFileBackend(str(file))), note
    except OSError as error:
        raise ConfigError(
            f"search.storage: cannot use {path!r}: {error.strerror}; give a file in a folder that "
            "can be written to, for example search.journal"
        ) from None


def _opened(file: Path) -> tuple[JournalStorage | None, str]:
    """A journal that can be read and written; else None, and what is wrong with it."""
    # Where nobody may write, Optuna would notice at its first entry only, by an error that hides
    # the reason: the lock is a file beside the journal, so that one is tried.
    probe = file.with_name(f"{file.name}.{secrets.token_hex(4)}.try")
    probe.touch()
    probe.unlink()
    with file.open("ab"):
        pass
    lock = JournalFileSymlinkLock(str(file))
    lock.acquire()  # nobody is in the middle of a line then
    try:
        fault = _fault(file)
    finally:
        lock.release()
    if fault:
        return None, fault
    try:
        return JournalStorage(JournalFileBackend(str(file))), ""
    except OSError:
        raise
    except Exception as error:  # entries that each are JSON, and together no journal
        return None, f"its entries do not fit together: {type(error).__name__} {error}"


def _fault(file: Path) -> str:
    """What is wrong with the lines of a journal, if anything; a cut last line is dropped."""
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return f"line {number} is no JSON"
        if not isinstance(entry, dict) or "op_code" not in entry:
            return f"line {number} is no entry of a journal"
    if lines[-1]:  # a process died while it wrote: what it wrote is not part of the journal
        with file.open("rb+") as raw:
            raw.truncate(os.path.getsize(file) - len(lines[-1]))
    return ""


def _spare(file: Path) -> Path:
    """A name that is still free."""
    for number in range(1, 1000):
        spare = file.with_name(f"{file.name}.bad{number if number > 1 else ''}")
        if not spare.exists():
            return spare
    raise ConfigError(f"search.storage: too many files {file.name}.bad*: delete some")


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """No log lines of Optuna, whose progress is raypar's to show."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Some regimes for parameter")
            yield
    finally:
        optuna.logging.set_verbosity(before)
