"""What a rank's training state consists of: the tensors it speaks for, and where others go.

A visitor (`RankState` is what it is shown) saves or restores; which files there are is not known
here. Every tensor of the model is in the state of the run once: each rank speaks for the parts
that `raypar.stages.layouts.reports` gives it, and takes whatever parts its own plan asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from raypar.errors import CheckpointError
from raypar.sharding.pieces import Piece, piece_of
from raypar.stages.generators import random_states, set_random_states
from raypar.stages.holdings import Holdings
from raypar.stages.layouts import is_view, reports, stored_piece, taken_ranges
from raypar.stages.spec import RankSpec

PARAMETER, BUFFER, OPTIMIZER, RANDOM = "parameter", "buffer", "optimizer", "random"
EXTRA = "extra"

_HOW_NOT_WHAT = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options of torch's optimizers that say how to compute, not what: a new run keeps its own."""


class Key(NamedTuple):
    """What a tensor is.

    Attributes:
        kind: ``parameter``, ``buffer``, ``optimizer``, ``extra`` (made by a part of the recipe) or
            ``random`` (the state of a generator).
        slot: Which one of a parameter's tensors: the optimizer's state key, the extra's name, the
            generator; else empty.
        name: Canonical name of the parameter or buffer; the rank's number for ``random``.
    """

    kind: str
    slot: str
    name: str

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


@dataclass(frozen=True)
class Held:
    """A tensor that a rank speaks for.

    Attributes:
        key: What it is.
        shape: Shape of the whole.
        piece: Which part of the whole `tensor` is.
        tensor: The rank's own memory: it changes with the next step.
        like: Whether it lies like the parameter of its name, and is cut where that is.
    """

    key: Key
    shape: tuple[int, ...]
    piece: Piece
    tensor: torch.Tensor
    like: bool


@dataclass(frozen=True)
class Want:
    """Memory to be filled with a part of a saved tensor."""

    key: Key
    shape: tuple[int, ...]
    piece: Piece
    tensor: torch.Tensor


class SavedForm(NamedTuple):
    """Form of a saved tensor: whole shape, dtype, and `Held.like`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    like: bool


class Saved(Protocol):
    """What was saved, as far as it is needed before any tensor is read."""

    @property
    def world(self) -> int:
        """Ranks of the run that saved it."""

    @property
    def values(self) -> Mapping[str, Any]:
        """`RankState.values` of all ranks as one."""

    def slots(self, kind: str, name: str) -> Mapping[str, SavedForm]:
        """The saved tensors of one name and kind, by slot."""


class Extra(Protocol):
    """A part of the recipe that has state of its own, such as averaged weights."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Parameter name → a tensor in the form of the optimizer's part of it; may be empty."""

    def values(self) -> Any:
        """Plain values that are equal on every rank, or None."""

    def restored(self, values: Any, found: bool) -> None:
        """After a restore: `values` as saved; whether its tensors were among what was saved."""


class RankState:
    """The training state of one rank, as visitors see it between steps.

    Args:
        spec: What the rank is.
        holdings: What it holds.
        optimizer: Its optimizer; None without parameters.
        extras: State of the recipe, by name.

    Attributes:
        scratch: Room for what visitors keep from one visit to the next.
    """

    def __init__(
        self,
        spec: RankSpec,
        holdings: Holdings,
        optimizer: torch.optim.Optimizer | None,
        extras: Callable[[], Mapping[str, Extra]] = dict,
    ) -> None:
        self.spec = spec
        self.scratch: dict[str, Any] = {}
        self._generators: dict[str, torch.Tensor] = {}
        self._holdings = holdings
        self._optimizer = optimizer
        self._extras = extras

    @property
    def names(self) -> dict[str, str]:
        """Key of the model's ``state_dict()`` → canonical name of its tensor."""
        return self._holdings.names

    @property
    def on_device(self) -> bool:
        """Whether its tensors are outside of the host's memory."""
        return self._holdings.device.type != "cpu"

    # -- what is saved ----------------------------------------------------------------------

    def held(self) -> list[Held]:
        """Every tensor that this rank speaks for."""
        held = self._holdings
        found: list[Held] = []
        for name, param in held.stored.items():
            if not reports(self.spec, name):
                continue
            shape, piece = self._shape(name), self._stored_piece(name)
            found.append(Held(Key(PARAMETER, "", name), shape, piece, param.detach(), True))
            found += self._optimizer_state(name, param, shape, piece)
            for slot, extra in self._extras().items():
                tensor = extra.tensors().get(name)
                if tensor is not None:
                    key = Key(EXTRA, slot, name)
                    found.append(Held(key, shape, piece, tensor.detach(), True))
        for name in self.spec.owned_buffers:
            found.append(_whole(Key(BUFFER, "", name), held.buffers[name]))
        for slot, tensor in random_states(accelerator=self.on_device).items():
            found.append(_whole(Key(RANDOM, slot, str(self.spec.rank)), tensor))
        return found

    def _optimizer_state(
        self, name: str, param: torch.nn.Parameter, shape: tuple[int, ...], piece: Piece
    ) -> Iterator[Held]:
        """Tensors shaped like the parameter are cut with it; others are equal on all of its parts.

        (Only element-wise optimizers are given parts: `raypar.stages.optimizers.check_cut`.)
        """
        for slot, value in self._state_of(param).items():
            if not isinstance(value, torch.Tensor):
                continue
            key = Key(OPTIMIZER, str(slot), name)
            if value.shape == param.shape:
                yield Held(key, shape, piece, value.detach(), True)
            elif not any(self.spec.coordinate):
                yield _whole(key, value)

    def values(self) -> dict[str, Any]:
        """What is saved beside tensors.

        Returns:
            ``optimizer`` (its class, or None), ``groups`` (options of every parameter group with
            the names of its parameters), ``states`` (parameter → the optimizer's values that are
            no tensors) and ``extras`` (name → values).
        """
        groups, states = [], {}
        names = self._names_of_stored()
        for group in self._groups():
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append({"options": options, "names": [names[id(p)] for p in group["params"]]})
        for name, param in self._holdings.stored.items():
            plain = {
                k: v for k, v in self._state_of(param).items() if not isinstance(v, torch.Tensor)
            }
            if plain:
                states[name] = plain
        return {
            "optimizer": self.optimizer_name,
            "groups": groups,
            "states": states,
            "extras": {name: extra.values() for name, extra in self._extras().items()},
        }

    @property
    def optimizer_name(self) -> str | None:
        """Class of the optimizer, or None without one."""
        if self._optimizer is None:
            return None
        kind = type(self._optimizer)
        return f"{kind.__module__}.{kind.__qualname__}"

    # -- what is restored -------------------------------------------------------------------

    def forms(self) -> dict[Key, tuple[tuple[int, ...], torch.dtype]]:
        """Whole shape and dtype of every parameter and buffer that this rank holds a part of."""
        held = self._holdings
        found = {
            Key(PARAMETER, "", name): (self._shape(name), param.dtype)
            for name, param in held.params.items()
        }
        for name, buffer in held.buffers.items():
            found[Key(BUFFER, "", name)] = (tuple(buffer.shape), buffer.dtype)
        return found

    def wants(self, saved: Saved, *, weights_only: bool = False) -> list[Want]:
        """Makes room for this rank's part of what was saved.

        Fill it all, then call `restored`.

        Args:
            saved: What there is.
            weights_only: Parameters and buffers alone.
        """
        held = self._holdings
        wants: list[Want] = []
        for name, param in held.params.items():
            key, shape = Key(PARAMETER, "", name), self._shape(name)
            wants.append(Want(key, shape, self._taken_piece(name), param.detach()))
        for name, buffer in held.buffers.items():
            # New memory: the present one may be shared with what a program returned.
            held.buffers[name] = torch.empty_like(buffer)
            key, shape = Key(BUFFER, "", name), tuple(buffer.shape)
            wants.append(Want(key, shape, _all_of(shape), held.buffers[name]))
        if weights_only:
            return wants
        names = self._names_of_stored()
        for group in self._groups():
            for param in group["params"]:
                wants += self._room_for_state(names[id(param)], param, group, saved)
        for slot, extra in self._extras().items():
            for name, tensor in extra.tensors().items():
                if slot in saved.slots(EXTRA, name):
                    piece = self._stored_piece(name)
                    key = Key(EXTRA, slot, name)
                    wants.append(Want(key, self._shape(name), piece, tensor.detach()))
        return wants + self._room_for_generators(saved)

    def _room_for_state(
        self, name: str, param: torch.nn.Parameter, group: Mapping[str, Any], saved: Saved
    ) -> Iterator[Want]:
        assert self._optimizer is not None
        before, state = self._state_of(param), dict(saved.values["states"].get(name, {}))
        for slot, form in saved.slots(OPTIMIZER, name).items():
            piece = self._stored_piece(name) if form.like else _all_of(form.shape)
            device = param.device
            if slot == "step" and not (group.get("capturable") or group.get("fused")):
                device = torch.device("cpu")  # where torch's optimizers count
            room = before.get(slot)
            if not _has_form(room, piece.shape, form.dtype, device):
                room = torch.empty(piece.shape, dtype=form.dtype, device=device)
            state[slot] = room
            yield Want(Key(OPTIMIZER, slot, name), form.shape, piece, room)
        if state:
            self._optimizer.state[param] = state
        else:
            self._optimizer.state.pop(param, None)

    def _room_for_generators(self, saved: Saved) -> list[Want]:
        """Generators go on where they were if there are as many ranks; else they mean nothing."""
        rank = str(self.spec.rank)
        self._generators = {}
        wants = []
        if saved.world == self.spec.world:
            for slot, form in saved.slots(RANDOM, rank).items():
                self._generators[slot] = torch.empty(form.shape, dtype=form.dtype)
                key, piece = Key(RANDOM, slot, rank), _all_of(form.shape)
                wants.append(Want(key, form.shape, piece, self._generators[slot]))
        return wants

    def restored(self, saved: Saved, *, weights_only: bool = False) -> None:
        """After all `wants` were filled: what follows from them, and what is no tensor.

        Raises:
            CheckpointError: A parameter group holds parameters that were saved with unlike
                options.
        """
        held = self._holdings
        for name, way in held.ways.items():
            if way.cut and not is_view(way):
                way.own.copy_into(held.params[name].detach(), held.stored[name].detach())
        if weights_only:
            return
        try:
            set_random_states(self._generators)
        except ValueError as error:
            raise CheckpointError(f"rank {self.spec.rank}: {error}") from None
        self._restore_groups(saved.values["groups"])
        for slot, extra in self._extras().items():
            found = all(slot in saved.slots(EXTRA, name) for name in extra.tensors())
            extra.restored(saved.values["extras"].get(slot), found)

    def _restore_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        of_name = {name: group["options"] for group in groups for name in group["names"]}
        names = self._names_of_stored()
        for group in self._groups():
            own = [names[id(p)] for p in group["params"] if names[id(p)] in of_name]
            if not own:
                continue
            options = of_name[own[0]]
            other = next((n for n in own if not _alike(of_name[n], options)), None)
            if other is not None:
                raise CheckpointError(
                    f"the optimizer puts {own[0]!r} and {other!r} into one parameter group; the "
                    f"checkpoint has them with unlike options {options} and {of_name[other]}: "
                    "build the groups as the run that saved it did, or restore the weights alone"
                )
            for option, value in options.items():
                if option in _HOW_NOT_WHAT:
                    continue
                now = group.get(option)
                if isinstance(now, torch.Tensor):
                    now.fill_(value)  # others may hold on to this very tensor
                else:
                    group[option] = value

    # -- helpers ----------------------------------------------------------------------------

    def _names_of_stored(self) -> dict[int, str]:
        return {id(param): name for name, param in self._holdings.stored.items()}

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self._optimizer is None else self._optimizer.param_groups

    def _state_of(self, param: torch.nn.Parameter) -> dict[str, Any]:
        # Looking a parameter up would make an entry for it: the mapping is a defaultdict.
        state = {} if self._optimizer is None else self._optimizer.state
        return state[param] if param in state else {}

    def _shape(self, name: str) -> tuple[int, ...]:
        layout = self.spec.params.get(name)
        return tuple(self._holdings.params[name].shape) if layout is None else layout.shape

    def _stored_piece(self, name: str) -> Piece:
        layout = self.spec.params.get(name)
        if layout is None:
            return _all_of(self._shape(name))
        return stored_piece(layout, self.spec.axes, self.spec.coordinate)

    def _taken_piece(self, name: str) -> Piece:
        layout = self.spec.params.get(name)
        if layout is None:
            return _all_of(self._shape(name))
        return piece_of(taken_ranges(layout, self.spec.axes, self.spec.coordinate))


def _whole(key: Key, tensor: torch.Tensor) -> Held:
    shape = tuple(tensor.shape)
    return Held(key, shape, _all_of(shape), tensor.detach(), False)


def _all_of(shape: Sequence[int]) -> Piece:
    return piece_of(tuple(((0, n),) for n in shape))


def _has_form(
    tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    return isinstance(tensor, torch.Tensor) and (
        (tuple(tensor.shape), tensor.dtype, tensor.device) == (shape, dtype, device)
    )


def _alike(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return mine.keys() == theirs.keys() and all(bool(mine[k] == theirs[k]) for k in mine)
