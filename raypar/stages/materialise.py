"""`materialise`: a rank's part of a model, bit for bit as ``manual_seed(seed); model_fn()`` has it.

The model is built once on the meta device, where it takes no memory, while every operator call is
written down (`_recorder.py`). Then the calls that the rank's part needs run for real, each tensor
is cut as soon as it is finished, and the numbers that the other random calls would have drawn are
drawn into a few kilobytes (`_replay.py`). So a rank holds its own part and, at any time, little
more than the tensor that is being made. What the model begins with may also come from elsewhere, a
file say (`InitialWeights`): then the calls that would have made it do not run.

What cannot be put off (Python that looks at random values, numpy views of parameters, foreign
operators) is built whole, once and for real, and cut then; `Materialised.note` says why.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raypar.compat import wrapped_truncated_normal
from raypar.errors import PlanError
from raypar.graph.capture import build_model
from raypar.graph.origins import Path, fetch_tensor
from raypar.sharding.pieces import piece_of
from raypar.sharding.spec import Ranges
from raypar.stages._disguise import Disguise
from raypar.stages._memory import Take, cut
from raypar.stages._recorder import Recorder
from raypar.stages._replay import Replay
from raypar.stages._tape import NotDeferrable
from raypar.stages.initial import InitialWeights

Part = tuple[Ranges, ...] | None
"""For every dim the ``[start, stop)`` ranges to keep, or None for the whole tensor."""


@dataclass
class Materialised:
    """A rank's own tensors.

    Attributes:
        params: The wanted parts, in the model's order, with the parameters' ``requires_grad``.
        buffers: The wanted buffers, whole, in the model's order.
        constants: The wanted constants.
        names: Key of the model's ``state_dict()`` → canonical name of the tensor: of tied names the
            first, as in `torch.nn.Module.named_parameters`.
        note: Why the whole model had to be built to get them, or None.
    """

    params: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    note: str | None = None


def materialise(
    model_fn: Callable[[], nn.Module] | nn.Module,
    seed: int,
    wanted: Mapping[str, Part],
    buffers: Collection[str] = (),
    constants: Mapping[str, torch.Tensor | Path] | None = None,
    device: torch.device | None = None,
    initial: InitialWeights | None = None,
) -> Materialised:
    """Makes the wanted parts of a model's tensors.

    The global random state is left alone. Parameters that the model leaves uninitialised are zero
    where they are built in parts.

    Args:
        model_fn: Builds the model; a module itself is also taken, and only cut.
        seed: What torch's default generator is seeded with before.
        wanted: Parameter → the part of it to keep.
        buffers: Names of the buffers to keep.
        constants: Constants of a graph: the value, or its place in the model.
        device: Where the parts end up, each as soon as it is made; default: the CPU.
        initial: What tensors begin with that it has; the others are as the seed makes them, as
            after ``load_state_dict`` on the seeded model.

    Raises:
        PlanError: The model has no parameter of a wanted name, or a smaller one.
        CaptureError: `model_fn` fails, or makes no module.
    """
    order = _Order(wanted, buffers, constants or {}, device or torch.device("cpu"), initial)
    if isinstance(model_fn, nn.Module):
        return order.from_real(model_fn)
    with _seeded(seed), _python_randomness() as bring_back:
        recorder = Recorder()
        try:
            return _in_parts(model_fn, recorder, order)
        except NotDeferrable as problem:
            why = recorder.failed or str(problem)
        except PlanError:
            raise
        except Exception as problem:
            why = recorder.failed or f"{type(problem).__name__}: {problem}"
        recorder.undo()
        bring_back()
        made = order.from_real(build_model(model_fn, on_meta=False))
        made.note = f"the whole model was built in memory to cut this part out of it: {why}"
        return made


def _in_parts(model_fn: Callable[[], nn.Module], recorder: Recorder, order: _Order) -> Materialised:
    with wrapped_truncated_normal(recorder.truncated_normal), recorder, Disguise(recorder):
        model = build_model(model_fn, on_meta=False)
    if recorder.failed is not None:
        raise NotDeferrable(recorder.failed)
    made, takes = Materialised(), []
    for name, tensor, part, deliver in order.items(model, made):
        region = recorder.region(tensor)
        if order.loads(name):
            deliver(order.loaded(name, tensor, part))
        elif region is None:
            deliver(cut(tensor, part))
        else:
            takes.append(Take(region, deliver, part, order.room(tensor, part)))
    ends = Replay(recorder.tape, takes).run()
    if any(outside.changed for outside in recorder.tape.outside):
        raise NotDeferrable("a tensor that the model was made from changed while it was built")
    recorder.streams.finish(ends)
    order.sort(model, made)
    return made


@dataclass(frozen=True)
class _Order:
    """What is wanted."""

    params: Mapping[str, Part]
    buffers: Collection[str]
    constants: Mapping[str, torch.Tensor | Path]
    device: torch.device
    initial: InitialWeights | None

    def items(
        self, model: nn.Module, made: Materialised
    ) -> Iterator[tuple[str, torch.Tensor, Part, Callable[[torch.Tensor], None]]]:
        """(name, tensor of the model, part of it, where to deliver that) of everything.

        A constant has no name of its own.
        """
        params = dict(model.named_parameters())
        missing = sorted(set(self.params) - set(params))
        if missing:
            raise PlanError(
                f"model_fn built a model without parameter {missing[0]!r}, which the plan's graph "
                "has: plan and model do not belong together"
            )
        for name, part in self.params.items():
            shape = tuple(params[name].shape)
            if part is not None and not _fits(part, shape):
                raise PlanError(
                    f"parameter {name!r} of the model that model_fn built has shape {shape}, and "
                    f"the plan gives this rank {part} of it: plan and model do not belong together"
                )
            if part == tuple(((0, n),) for n in shape):
                part = None
            deliver = self._param(made.params, name, params[name].requires_grad)
            yield name, params[name], part, deliver
        for name, buffer in model.named_buffers():
            if name in self.buffers:
                yield name, buffer, None, self._plain(made.buffers, name)
        for key, found in self.constants.items():
            tensor = found if isinstance(found, torch.Tensor) else fetch_tensor(model, found)
            yield "", tensor, None, self._plain(made.constants, key)

    def loads(self, name: str) -> bool:
        """Whether a tensor's values come from elsewhere."""
        return self.initial is not None and self.initial.has(name)

    def loaded(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        """A part of a tensor, read from elsewhere."""
        assert self.initial is not None
        piece = piece_of(part or tuple(((0, n),) for n in tensor.shape))
        room = torch.empty(piece.shape, dtype=tensor.dtype)
        self.initial.fill(name, piece, room)
        return room

    def room(self, tensor: torch.Tensor, part: Part) -> torch.Tensor | None:
        """Memory for a part that stays on this host."""
        if part is None or self.device.type != "cpu":
            return None
        return torch.empty(piece_of(part).shape, dtype=tensor.dtype)

    def from_real(self, model: nn.Module) -> Materialised:
        """Cuts a model that is there."""
        made = Materialised()
        for name, tensor, part, deliver in self.items(model, made):
            loads = self.loads(name)
            deliver(self.loaded(name, tensor, part) if loads else cut(tensor, part))
        self.sort(model, made)
        return made

    def sort(self, model: nn.Module, made: Materialised) -> None:
        """Puts parameters and buffers into the model's order, and takes down all names."""
        names = [n for n, _ in model.named_parameters() if n in made.params]
        made.params = {n: made.params[n] for n in names}
        names = [n for n, _ in model.named_buffers() if n in made.buffers]
        made.buffers = {n: made.buffers[n] for n in names}
        made.names = state_names(model)

    def _param(
        self, into: dict[str, nn.Parameter], name: str, requires_grad: bool
    ) -> Callable[[torch.Tensor], None]:
        def deliver(part: torch.Tensor) -> None:
            into[name] = nn.Parameter(part.to(self.device), requires_grad=requires_grad)

        return deliver

    def _plain(self, into: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], None]:
        def deliver(part: torch.Tensor) -> None:
            into[name] = part.to(self.device)

        return deliver


def state_names(model: nn.Module) -> dict[str, str]:
    """Key of a model's ``state_dict()`` → canonical name of its tensor (`Materialised.names`)."""
    first: dict[int, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    canonical = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    return {key: canonical[key] for key in model.state_dict(keep_vars=True) if key in canonical}


def _fits(part: tuple[Ranges, ...], shape: tuple[int, ...]) -> bool:
    return len(part) == len(shape) and all(
        stop <= n for ranges, n in zip(part, shape, strict=True) for _, stop in ranges
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _python_randomness() -> Iterator[Callable[[], None]]:
    """Yields what brings Python's and numpy's generators back to where they are now."""
    state = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()

    def bring_back() -> None:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    yield bring_back
