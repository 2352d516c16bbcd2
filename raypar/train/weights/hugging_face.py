"""A model as the folder that Hugging Face's transformers writes and loads.

Layout (huggingface.co/docs/transformers, "Model sharding"): ``config.json``, the tokenizer's files,
and ``model.safetensors``; or, over a size, ``model-00001-of-00003.safetensors`` and so on with
``model.safetensors.index.json``, which says in which of them each tensor is. Of tied names one is
written: transformers ties them again, as its config says.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from raypar.errors import CheckpointError, ConfigError, did_you_mean
from raypar.train.checkpoint.storage import storage_at
from raypar.train.weights.folder import whole_folder
from raypar.train.weights.safetensors import INDEX, SINGLE, folder_weights, save_safetensors
from raypar.train.weights.weights import Weights, refuse_existing

SHARD_BYTES = 5_000_000_000
CONFIG = "config.json"
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_SHOWN = 4
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def save_hugging_face(
    weights: Weights,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    config: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes a folder that ``from_pretrained`` loads; one tensor at a time is in memory.

    Args:
        weights: The model, in Hugging Face's own names: of a model of transformers that was
            trained as it is.
        folder: Where to; it must not be there yet, and is there as a whole or not at all.
        base: A Hugging Face folder of the same model. Its config and tokenizer are copied; where
            it has weights in safetensors files, names and shapes have to be theirs.
        config: The ``config.json`` to take, in place of the base's.
        shard_bytes: Bytes of a file at most, but for a tensor that alone has more.

    Returns:
        The names of the files that were written.

    Raises:
        CheckpointError: There is something already; base or config are missing; the base is of
            another model; or it cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    refuse_existing(str(folder), target.exists())
    settings = _settings(base, config)
    names = _names(weights, base)
    with whole_folder(target, str(folder)) as part:
        if base is not None:
            _copy_small(Path(base), part)
        dtype = _main_dtype(weights, names)
        (part / CONFIG).write_text(json.dumps(_with_dtype(settings, dtype), indent=2) + "\n")
        _write(weights, names, part, shard_bytes)
    return sorted(path.name for path in target.iterdir())


def bytes_of(size: str) -> int:
    """Bytes of a size as people write it: ``5GB``, ``500MB``, ``1000000``.

    Raises:
        ConfigError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", size.strip().upper())
    count = math.floor(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise ConfigError(f"{size!r} is no size; give bytes with a unit, for example 5GB or 500MB")
    return count


def _settings(base: str | Path | None, config: str | Path | None) -> dict[str, object]:
    if base is None and config is None:
        raise CheckpointError(
            "a Hugging Face folder needs a config.json: give the folder that the model began from "
            "(--hf BASE_FOLDER), or the file (--hf-config config.json)"
        )
    path = Path(config) if config is not None else Path(str(base)) / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} is no config of a model: {found!r:.80}")
    return found


def _names(weights: Weights, base: str | Path | None) -> list[str]:
    """The names to write: the base's, where it has weights; else each tensor's first name."""
    other = None if base is None else folder_weights(storage_at(base), str(base))
    if other is None:
        return list(weights.forms)
    problems = []
    written = {weights.names[n] for n in other.names if n in weights.names}
    for name in other.names:
        if name not in weights.names:
            problems.append(f"{name!r} is only there.{did_you_mean(name, weights.names)}")
            continue
        mine, theirs = weights.forms[weights.names[name]], other.forms[other.names[name]]
        if mine.shape != theirs.shape:
            problems.append(f"{name!r} is {theirs.shape} there and {mine.shape} here")
    problems += [
        f"{name!r} is only here.{did_you_mean(name, other.names)}"
        for name in weights.forms
        if name not in written
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{weights.where} is not of the model in {str(base)!r}: "
            f"{'; '.join(problems[:_SHOWN])}{more}. Give the folder that training began from, or "
            "only a config that fits: --hf-config config.json"
        )
    return list(other.names)


def _main_dtype(weights: Weights, names: Sequence[str]) -> torch.dtype | None:
    """The float dtype that most numbers have."""
    counts = Counter[torch.dtype]()
    for name in names:
        form = weights.forms[weights.names[name]]
        if form.dtype.is_floating_point:
            counts[form.dtype] += math.prod(form.shape)
    return counts.most_common(1)[0][0] if counts else None


def _with_dtype(settings: dict[str, object], dtype: torch.dtype | None) -> dict[str, object]:
    """The config with the dtype that is written: transformers would convert to what it says."""
    keys = [key for key in ("dtype", "torch_dtype") if key in settings]
    if dtype is None or not keys:
        return settings
    return {**settings, **dict.fromkeys(keys, str(dtype).removeprefix("torch."))}


def _copy_small(base: Path, target: Path) -> None:
    """Copies configs and tokenizer; no weights, and no code."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in _COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _write(weights: Weights, names: Sequence[str], target: Path, shard_bytes: int) -> None:
    shards = _shards(weights, names, shard_bytes)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_safetensors(weights, target / file, shard)
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(_bytes(weights, name) for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(weights: Weights, names: Sequence[str], limit: int) -> list[list[str]]:
    """Names in their order, cut into files."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in names:
        size = _bytes(weights, name)
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _bytes(weights: Weights, name: str) -> int:
    form = weights.forms[weights.names[name]]
    return math.prod(form.shape) * form.dtype.itemsize
