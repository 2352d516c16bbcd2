"""One checkpoint that is there: looked at, checked, restored into a run, or read as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from raypar.errors import CheckpointError, ConfigError, PlanError
from raypar.plan import Plan
from raypar.sharding.pieces import piece_of
from raypar.stages.run import Run
from raypar.stages.saved import AVERAGE, BUFFER, PARAMETER, Key
from raypar.train.checkpoint.description import description
from raypar.train.checkpoint.format import INDEX, Index, SavedTensor
from raypar.train.checkpoint.image import header_of, write_tensors
from raypar.train.checkpoint.reading import (
    CheckedFile,
    FormsJob,
    Reader,
    RestoreJob,
    read_index,
)
from raypar.train.checkpoint.storage import Storage, storage_at
from raypar.train.state import TrainState

_NAME = re.compile(r"^(\d{6,})-step-(\d+)$")
_SHOWN = 5


def folder_name(serial: int, step: int) -> str:
    """Name of a checkpoint's folder: they sort by when they were begun."""
    return f"{serial:06d}-step-{step}"


def serial_of(name: str) -> int | None:
    """The number that such a name begins with; None for another name."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


class Checkpoint:
    """A checkpoint of a run.

    Args:
        path: Its folder: a local path, or a URL that fsspec knows.

    Raises:
        CheckpointError: There is none, its index is damaged, or it is of a newer format.
    """

    def __init__(self, path: str | Path) -> None:
        text = str(path).rstrip("/")
        parent, _, name = text.rpartition("/")
        self._storage: Storage = storage_at(
            parent if "://" in text else Path(text).absolute().parent
        )
        self._folder = name if "://" in text else Path(text).absolute().name
        self._index = read_index(self._storage, self._folder)

    @classmethod
    def of(cls, storage: Storage, name: str, index: Index) -> Checkpoint:
        """The checkpoint `name` in a storage, whose index is known."""
        found = cls.__new__(cls)
        found._storage, found._folder, found._index = storage, name, index
        return found

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, step={self.step})"

    @property
    def path(self) -> str:
        """Absolute path, or URL, of its folder."""
        return self._storage.path(self._folder)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self._folder

    @property
    def storage(self) -> Storage:
        """Where that folder is."""
        return self._storage

    @property
    def index(self) -> Index:
        """What is in it, and where."""
        return self._index

    @property
    def weights_only(self) -> bool:
        """Whether it holds a model alone, without what trained it: see `Index.weights_only`."""
        return self._index.weights_only

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._index.step

    @cached_property
    def state(self) -> TrainState:
        """What a resume needs beside tensors.

        Raises:
            CheckpointError: It holds no such state.
        """
        try:
            return TrainState.from_json(self._index.state)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}/{INDEX}: {error}") from None

    @cached_property
    def plan(self) -> Plan:
        """The plan that it was saved under.

        Raises:
            CheckpointError: It holds no plan.
        """
        if self.weights_only:
            raise CheckpointError(f"{self.path} holds weights alone: it was saved under no plan")
        try:
            return Plan.from_json(json.dumps(self._index.plan))
        except PlanError as error:
            raise CheckpointError(f"{self.path}/{INDEX}: {error}") from None

    @property
    def metrics(self) -> dict[str, Any]:
        """The last metrics before it was saved."""
        return dict(self.state.metrics)

    @property
    def facts(self) -> dict[str, Any]:
        """What the run told of itself, its config among it."""
        return dict(self._index.facts)

    @property
    def bytes(self) -> int:
        """Bytes of its files, without the index."""
        return sum(file.size for file in self._index.files)

    # -- into a run -------------------------------------------------------------------------

    def restore(self, run: Run, *, weights_only: bool = False) -> TrainState:
        """Brings a started run to where this one was, under whatever plan that run has.

        Every rank reads the slices it needs, and checks what it reads. After a failure the run is
        of no use: start another one.

        Args:
            run: Started, between steps, of the same model.
            weights_only: Parameters and buffers alone: optimizer, learning rate and averages stay
                as they are.

        Returns:
            The training state that was saved.

        Raises:
            CheckpointError: It holds weights alone, or is of another model, or damaged; in that
                case the text names the newest older checkpoint that is good.
            OptimizerError: It was saved with another optimizer, scheduler or recipe.
        """
        if self.weights_only:
            raise CheckpointError(
                f"{self.path} holds weights alone, and a run is not brought to a state that was "
                "never saved: begin a run with them, Trainer(init_from=...) or model.init_from"
            )
        state = self.state
        self._check_model(run)
        try:
            run.call("visit", RestoreJob(self._storage.root, self._folder, weights_only))
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {self._advice()}") from None
        return state

    def _check_model(self, run: Run) -> None:
        wanted: dict[Key, tuple[tuple[int, ...], torch.dtype]] = {}
        for forms in run.call("visit", FormsJob()):
            wanted.update(forms)
        saved = {
            key: (tensor.shape, tensor.dtype)
            for key, tensor in self._index.tensors.items()
            if key.kind in (PARAMETER, BUFFER)
        }
        place = {name: at for at, name in enumerate(self._index.names.values())}
        wrong = [
            f"{key.name} is {_form(saved.get(key))} there and {_form(wanted.get(key))} here"
            for key in sorted({*saved, *wanted}, key=lambda k: place.get(k.name, len(place)))
            if saved.get(key) != wanted.get(key)
        ]
        if wrong:
            more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise CheckpointError(
                f"{self.path} is of another model: {'; '.join(wrong[:_SHOWN])}{more}. Resume with "
                "the model that saved it, or start a new run"
            )

    def _advice(self) -> str:
        good = self._newest_good_before()
        if good is None:
            return "No older checkpoint beside it is good: start anew"
        return f"The newest good one before it is {good.path!r} (step {good.step}): resume from it"

    def _newest_good_before(self) -> Checkpoint | None:
        own = serial_of(self._folder)
        for name in reversed(self._storage.names()):
            serial = serial_of(name)
            if serial is None or own is None or serial >= own:
                continue
            try:
                found = Checkpoint(self._storage.path(name))
            except CheckpointError:
                continue
            if not found.verify():
                return found
        return None

    # -- looked at --------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Reads every byte and compares it with its checksum.

        Returns:
            What is wrong, a line for each file; empty where all is well.
        """
        problems = []
        for number, file in enumerate(self._index.files):
            try:
                checked = CheckedFile(self._storage, self._folder, file)
                checked.check_all()
                self._check_header(checked, number)
            except CheckpointError as error:
                problems.append(str(error))
        for what in ("state",) if self.weights_only else ("state", "plan"):
            try:
                getattr(self, what)
            except CheckpointError as error:
                problems.append(str(error))
        return problems

    def _check_header(self, file: CheckedFile, number: int) -> None:
        """What other programs will find in a file is what the index says."""
        table, data = header_of(file.read, self._index.files[number].size)
        for key, tensor in self._index.tensors.items():
            for piece in tensor.pieces:
                if piece.file == number and table.get(str(key)) != piece.at - data:
                    raise CheckpointError(
                        f"{self.path}: file {number} has {str(key)!r} at {table.get(str(key))}, "
                        f"the index at {piece.at - data}"
                    )

    def describe(self) -> str:
        """What it is, in some lines."""
        plan = None if self.weights_only else self.plan
        return description(self._index, self.path, plan, self.state)

    # -- as a whole -------------------------------------------------------------------------

    def state_dict(self, *, average: bool = False) -> dict[str, torch.Tensor]:
        """The model in this process's memory, in its own names; tied names share a tensor.

        Args:
            average: The moving average in place of the weights.

        Raises:
            CheckpointError: It is damaged, or has no average.
        """
        known: dict[str, torch.Tensor] = {}
        found = {}
        reader = Reader(self._storage, self._folder, self._index)
        self.check_sizes()
        for name, tensor in self.model_tensors(average=average).items():
            of = self._index.names[name]
            if of not in known:
                known[of] = torch.empty(tensor.shape, dtype=tensor.dtype)
                reader.fill(tensor.key, piece_of(_ranges(tensor.shape)), known[of])
            found[name] = known[of]
        return found

    def save_safetensors(self, path: str | Path, *, average: bool = False) -> None:
        """Writes the model as one safetensors file in its own names; tied tensors once for each.

        No more than one tensor is in memory at a time.

        Args:
            path: The file; it is there as a whole or not at all.
            average: The moving average in place of the weights.

        Raises:
            CheckpointError: It is damaged, has no average, or the file cannot be written.
        """
        self.check_sizes()
        reader = Reader(self._storage, self._folder, self._index)
        saved = self.model_tensors(average=average)

        def fill(name: str, room: torch.Tensor) -> None:
            reader.fill(saved[name].key, piece_of(_ranges(saved[name].shape)), room)

        write_tensors(Path(path), {n: (t.shape, t.dtype) for n, t in saved.items()}, fill)

    def model_tensors(self, *, average: bool = False) -> dict[str, SavedTensor]:
        """Where every tensor of the model is, in the model's own names; tied ones share one.

        Raises:
            CheckpointError: It is damaged, or has no average.
        """
        tensors: Mapping[Key, SavedTensor] = self._index.tensors
        averaged = {key.name for key in tensors if key.kind == AVERAGE}
        if average and not averaged:
            raise CheckpointError(
                f"{self.path} has no moving average: it was saved without ema_decay"
            )
        found = {}
        for name, of in self._index.names.items():
            kinds = (AVERAGE,) if average and of in averaged else (PARAMETER, BUFFER)
            saved = next(
                (tensors[k] for k in (Key(x, "", of) for x in kinds) if k in tensors), None
            )
            if saved is None:
                raise CheckpointError(f"{self.path} is damaged: tensor {of!r} is not there")
            found[name] = saved
        return found

    def check_sizes(self) -> None:
        """What the index says of shapes is believed only as far as there are bytes for it.

        Raises:
            CheckpointError: A file is missing, or shorter or longer than the index says.
        """
        for file in self._index.files:
            name = f"{self._folder}/{file.name}"
            try:
                size = self._storage.size(name)
            except OSError as error:
                raise CheckpointError(
                    f"{self._storage.path(name)}: {error}. {self._advice()}"
                ) from None
            if size != file.size:
                raise CheckpointError(
                    f"{self._storage.path(name)} has {size} bytes, expected {file.size}. "
                    f"{self._advice()}"
                )


def _ranges(shape: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(((0, n),) for n in shape)


def _form(form: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    if form is None:
        return "missing"
    return f"{form[0]} {str(form[1]).removeprefix('torch.')}"
