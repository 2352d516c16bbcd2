"""What a rank's training state consists of: the tensors it speaks for, and where others go.

A visitor (`RankState` is what it is shown) saves or restores; which files there are is not known
here. Every tensor of the model is in the state of the run once: each rank speaks for the parts
that `raypar.stages.layouts.reports` gives it, and takes whatever parts its own plan asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from raypar.errors import CheckpointError
from raypar.sharding.pieces import Piece, piece_of, whole_piece
from raypar.stages.generators import random_states, set_random_states
from raypar.stages.holdings import Holdings
from raypar.stages.layouts import is_view, reports, stored_piece, taken_ranges
from raypar.stages.saved import (
    AVERAGE,
    BUFFER,
    OPTIMIZER,
    PARAMETER,
    RANDOM,
    Held,
    Key,
    Saved,
    Want,
)
from raypar.stages.spec import RankSpec
from raypar.stages.update import Update


class RankState:
    """The training state of one rank, as visitors see it between steps.

    Args:
        spec: What the rank is.
        holdings: What it holds.
        update: Its optimizer, and what else the recipe keeps.
        all_arrived: Waits for parameters that are still on their way from the last step.

    Attributes:
        scratch: Room for what visitors keep from one visit to the next.
    """

    def __init__(
        self, spec: RankSpec, holdings: Holdings, update: Update, all_arrived: Callable[[], None]
    ) -> None:
        self.spec = spec
        self.scratch: dict[str, Any] = {}
        self._generators: dict[str, torch.Tensor] = {}
        self._holdings = holdings
        self._update = update
        self._all_arrived = all_arrived

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
            average = self._averages().get(name)
            if average is not None:
                found.append(Held(Key(AVERAGE, "", name), shape, piece, average, True))
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
            ``states``: parameter → the optimizer's values of it that are no tensors; ``update``:
            what is equal on every rank (`raypar.stages.update.Update.state`).
        """
        states = {}
        for name, param in self._holdings.stored.items():
            state = self._state_of(param)
            plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
            if plain:
                states[name] = plain
        return {"states": states, "update": self._update.state()}

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

        Raises:
            OptimizerError: It was saved with another optimizer, scheduler, or other options of the
                recipe; nothing was touched.
        """
        if not weights_only:
            self._update.check(dict(saved.values["update"]))
        self._all_arrived()
        held = self._holdings
        wants: list[Want] = []
        for name, param in held.params.items():
            key, shape = Key(PARAMETER, "", name), self._shape(name)
            wants.append(Want(key, shape, self._taken_piece(name), param.detach()))
        for name, buffer in held.buffers.items():
            # New memory: the present one may be shared with what a program returned.
            held.buffers[name] = torch.empty_like(buffer)
            key, shape = Key(BUFFER, "", name), tuple(buffer.shape)
            wants.append(Want(key, shape, whole_piece(shape), held.buffers[name]))
        if weights_only:
            return wants
        names = {id(param): name for name, param in held.stored.items()}
        for group in self._update.optimizer.param_groups:
            for param in group["params"]:
                if id(param) in names:
                    wants += self._room_for_state(names[id(param)], param, group, saved)
        for name, average in self._averages().items():
            piece = self._stored_piece(name)
            wants.append(Want(Key(AVERAGE, "", name), self._shape(name), piece, average))
        return wants + self._room_for_generators(saved)

    def _room_for_state(
        self, name: str, param: torch.nn.Parameter, group: Mapping[str, Any], saved: Saved
    ) -> Iterator[Want]:
        before, state = self._state_of(param), dict(saved.values["states"].get(name, {}))
        for slot, form in saved.slots(OPTIMIZER, name).items():
            piece = self._stored_piece(name) if form.like else whole_piece(form.shape)
            device = param.device
            if slot == "step" and not (group.get("capturable") or group.get("fused")):
                device = torch.device("cpu")  # where torch's optimizers count
            room: Any = before.get(slot)
            if not _has_form(room, piece.shape, form.dtype, device):
                room = torch.empty(piece.shape, dtype=form.dtype, device=device)
            state[slot] = room
            yield Want(Key(OPTIMIZER, slot, name), form.shape, piece, room)
        if state:
            self._update.optimizer.state[param] = state
        else:
            self._update.optimizer.state.pop(param, None)

    def _room_for_generators(self, saved: Saved) -> list[Want]:
        """Generators go on where they were if there are as many ranks; else they mean nothing."""
        rank = str(self.spec.rank)
        self._generators = {}
        wants = []
        if saved.world == self.spec.world:
            for slot, form in saved.slots(RANDOM, rank).items():
                self._generators[slot] = torch.empty(form.shape, dtype=form.dtype)
                key, piece = Key(RANDOM, slot, rank), whole_piece(form.shape)
                wants.append(Want(key, form.shape, piece, self._generators[slot]))
        return wants

    def restored(self, saved: Saved, *, weights_only: bool = False) -> None:
        """After all `wants` were filled: what follows from them, and what is no tensor.

        Raises:
            CheckpointError: What was saved of a random generator is no state of one.
            OptimizerError: What was saved of optimizer and scheduler is damaged.
        """
        held = self._holdings
        for name, way in held.ways.items():
            if way.cut and not is_view(way):
                way.own.copy_into(held.params[name].detach(), held.stored[name].detach())
        if weights_only:
            return
        self._update.load(dict(saved.values["update"]))
        if self._update.average is not None:
            self._update.average.buffers = dict(held.buffers)
        try:
            set_random_states(self._generators)
        except ValueError as error:
            raise CheckpointError(f"rank {self.spec.rank}: {error}") from None

    def renew_options(self) -> None:
        """After `restored`: the optimizer's options are this run's, not the saved one's."""
        self._update.renew_options()

    # -- helpers ----------------------------------------------------------------------------

    def _averages(self) -> dict[str, torch.Tensor]:
        """Averages of the trained parameters; of the others they are the parameters themselves."""
        average = self._update.average
        if average is None:
            return {}
        trained = {n for n, p in self._holdings.stored.items() if p.requires_grad}
        return {n: t for n, t in average.stored.items() if n in trained}

    def _state_of(self, param: torch.nn.Parameter) -> dict[str, Any]:
        return self._update.optimizer.state.get(param, {})

    def _shape(self, name: str) -> tuple[int, ...]:
        layout = self.spec.params.get(name)
        return tuple(self._holdings.params[name].shape) if layout is None else layout.shape

    def _stored_piece(self, name: str) -> Piece:
        layout = self.spec.params.get(name)
        if layout is None:
            return whole_piece(self._shape(name))
        return stored_piece(layout, self.spec.axes, self.spec.coordinate)

    def _taken_piece(self, name: str) -> Piece:
        layout = self.spec.params.get(name)
        if layout is None:
            return whole_piece(self._shape(name))
        return piece_of(taken_ranges(layout, self.spec.axes, self.spec.coordinate))


def _whole(key: Key, tensor: torch.Tensor) -> Held:
    shape = tuple(tensor.shape)
    return Held(key, shape, whole_piece(shape), tensor.detach(), False)


def _has_form(
    tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    return isinstance(tensor, torch.Tensor) and (
        (tuple(tensor.shape), tensor.dtype, tensor.device) == (shape, dtype, device)
    )
