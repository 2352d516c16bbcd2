"""Runs a model's construction on the meta device and writes down what it computes.

The idea of a recorded, later replayed initialisation is torchdistx's deferred init; here random
numbers stay those of an eager run, whatever part is replayed.

Tensors that the construction makes live on the meta device and say that they are on the CPU.
Tensors that come from elsewhere (a loaded file, an existing module) stay what they are, and calls
that see only such run at once. Values that Python looks at (``linspace(...).tolist()``) are
computed on the spot where they are not random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from raypar.compat import (
    OpOverload,
    TorchDispatchMode,
    argument_names,
    has_own_dispatch,
    overload_name,
    pytree,
    schema_name,
    storage_id,
    without_torch_function,
    written_arguments,
)
from raypar.stages._memory import Take
from raypar.stages._replay import Replay
from raypar.stages._streams import Streams
from raypar.stages._tape import Call, NotDeferrable, Outside, Region, StreamNumber, Tape

META = torch.device("meta")
CPU = torch.device("cpu")

# Fill all of their first argument without reading it.
_FILLS = frozenset(
    "aten::" + name
    for name in "zero_ fill_ copy_ normal_ uniform_ bernoulli_ random_ exponential_ log_normal_ "
    "cauchy_ geometric_".split()
)
_EMPTY = frozenset(
    "aten::" + name
    for name in "empty empty_strided empty_like new_empty new_empty_strided empty_permuted".split()
)
# Change what storage a tensor has, or its size. (`set_` to another tensor is like an assignment.)
_RESHAPE_STORAGE = frozenset({"aten::resize_", "aten::resize_as_", "aten::set_"})


class Recorder(TorchDispatchMode):
    """Records every operator call while open.

    Attributes:
        tape: What was recorded.
        streams: The generators that were used.
        failed: Why the model cannot be built piece by piece, once that is known; user code may
            have swallowed the error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tape = Tape()
        self.streams = Streams(self.tape)
        self.failed: str | None = None
        self._paused = False
        # Storages stay referenced, so that their ids stay unique.
        self._values: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._read: dict[int, torch.UntypedStorage] = {}
        self._backups: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        with without_torch_function():
            if self.failed is not None:
                raise NotDeferrable(self.failed)
            return self._handle(func, args, dict(kwargs or {}))

    def refuse(self, why: str) -> NotDeferrable:
        """The error that ends the recording."""
        self.failed = why
        return NotDeferrable(why)

    def region(self, tensor: torch.Tensor) -> Region | None:
        """Where a tensor of the model lies on the tape; None for a real one.

        Raises:
            NotDeferrable: The tape does not know the tensor.
        """
        self._check([tensor])
        if not tensor.is_meta:
            return None
        return Region.of(tensor, self._value_of(tensor))

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor holds now.

        Raises:
            NotDeferrable: It depends on random numbers.
        """
        region = self.region(tensor)
        if region is None:
            return tensor
        found: list[torch.Tensor] = []
        self._paused = True
        try:
            Replay(self.tape, [Take(region, found.append)], random=False).run()
        except Exception as problem:  # eager torch would not have raised: no code may catch it
            raise self.refuse(str(problem)) from problem
        finally:
            self._paused = False
        return found[0]

    def truncated_normal(self, eager: Callable[..., Any]) -> Callable[..., Any]:
        """`eager`, recorded as one call: how often it draws depends on what it drew."""

        def record(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            with without_torch_function():
                if not tensor.is_meta or storage_id(tensor) not in self._values:
                    eager(tensor, *args, **kwargs)
                    return tensor
                reads = frozenset({self._value_of(tensor)})
                self._write_down(
                    eager, (tensor, *args), kwargs, [tensor], reads, [], random=True, fill=True
                )
            return tensor

        return record

    def undo(self) -> None:
        """Gives back to tensors that were there before what they held before."""
        for storage, backup in self._backups.values():
            storage.copy_(backup)
        self.streams.rewind()

    def _handle(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        if not isinstance(func, OpOverload):
            raise self.refuse(f"{func} is not an operator of torch itself")
        leaves = _tensors((args, kwargs))
        self._check(leaves)
        name = schema_name(func)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if name == "aten::lift_fresh":
            return self._lift(args[0])
        if leaves and not random and not any(t.is_meta for t in leaves):
            return self._at_once(func, args, kwargs)
        if name == "aten::_local_scalar_dense":
            return self.real(args[0]).item()
        if not name.startswith("aten::"):
            raise self.refuse(f"{name} is not an operator of torch itself")
        if name in _RESHAPE_STORAGE and overload_name(func) != "source_Tensor":
            raise self.refuse(f"{name} changes the storage of a tensor")
        if "device" in argument_names(func):
            self._choose_device(kwargs, factory=not leaves)
        return self._record(func, args, kwargs, leaves, random)

    def _record(
        self,
        func: OpOverload,
        args: Any,
        kwargs: dict[str, Any],
        leaves: list[torch.Tensor],
        random: bool,
    ) -> Any:
        """Runs the call on the meta device and writes it down if it computes anything."""
        written = self._written(func, args, kwargs)
        reads = frozenset(self._value_of(t) for t in leaves if t.is_meta)
        sizes = [t.untyped_storage().nbytes() for t in written]
        stand_ins: dict[int, torch.Tensor] = {}
        meta_args, meta_kwargs = _map_tensors(
            lambda t: t if t.is_meta else _stand_in(t, stand_ins), (args, kwargs)
        )
        if "generator" in meta_kwargs:
            meta_kwargs["generator"] = None
        try:
            result = func(*meta_args, **meta_kwargs)
        except Exception as problem:
            if written or random:
                raise self.refuse(f"{func} does not run on meta tensors: {problem}") from problem
            # Its result depends on values, or its arguments are wrong: then it raises again.
            real_args, real_kwargs = _map_tensors(self.real, (args, kwargs))
            if real_kwargs.get("device") == META:
                real_kwargs["device"] = CPU
            return func(*real_args, **real_kwargs)
        if torch.Tag.inplace_view in func.tags or schema_name(func) == "aten::set_":
            return result
        if sizes != [t.untyped_storage().nbytes() for t in written]:
            raise self.refuse(f"{func} changes the size of a tensor")
        made = self._new_values(func, result, {storage_id(t) for t in stand_ins.values()})
        if schema_name(func) in _EMPTY:
            self.tape.partly.update(region.value for _, region in made)
            return result
        if not made and not written:
            return result  # a view
        if not leaves and "dtype" in argument_names(func):
            kwargs["dtype"] = made[0][1].dtype  # the default dtype may change before the replay
        fill = schema_name(func) in _FILLS
        self._write_down(func, args, kwargs, written, reads, made, random, fill)
        return result

    def _write_down(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        written: list[torch.Tensor],
        reads: frozenset[int],
        made: list[tuple[int, Region]],
        random: bool,
        fill: bool,
    ) -> None:
        """Adds a call to the tape.

        Args:
            func: What was called.
            args: Its arguments.
            kwargs: Its keyword arguments.
            written: Arguments it writes to.
            reads: Values of all its arguments.
            made: What it returned that is new, as in `Call.outputs`.
            random: Whether it draws random numbers.
            fill: Whether it fills its first argument without reading it. If that is all of a
                storage, a new value begins, and the old one ends with the calls before.
        """
        number = len(self.tape.calls)
        writes = frozenset(self._value_of(t) for t in written)
        makes = frozenset(region.value for _, region in made)
        others = _tensors((args[1:], kwargs)) if fill else []
        overwrites = fill and self._overwrites(args[0], others)
        # Arguments that are read are places in the values as they were before the call.
        rest = _map_tensors(self._place, (args[1:] if fill else args, kwargs))
        if fill:
            target = args[0]
            if not any(t.is_meta and self._value_of(t) in writes for t in others):
                reads = reads - writes
            if overwrites:
                self._values[storage_id(target)] = (
                    target.untyped_storage(),
                    self.tape.new_value(target.untyped_storage().nbytes()),
                )
                writes, makes = frozenset(), frozenset({self._value_of(target)})
            places: tuple[Any, ...] = (self._place(target), *rest[0])
        else:
            places = tuple(rest[0])
        place_kwargs = dict(rest[1])
        if place_kwargs.get("device") == META:
            place_kwargs["device"] = CPU
        draw = None
        if random:
            generator = place_kwargs.get("generator")
            if generator is not None and generator.device.type != "cpu":
                raise self.refuse("a generator is not on the CPU")
            draw = self.streams.draw(generator, number, fill=fill and not others)
            if generator is not None:
                place_kwargs["generator"] = StreamNumber(draw.stream)
        self.tape.calls.append(
            Call(func, places, place_kwargs, reads, writes, makes, tuple(made), draw)
        )

    def _overwrites(self, target: torch.Tensor, others: Iterable[torch.Tensor]) -> bool:
        value = self._value_of(target)
        if any(t.is_meta and self._value_of(t) == value for t in others):
            return False
        return Region.of(target, value).covers(target.untyped_storage().nbytes())

    def _place(self, tensor: torch.Tensor) -> Region | Outside:
        if tensor.is_meta:
            return Region.of(tensor, self._value_of(tensor))
        storage = tensor.untyped_storage()
        self._read[storage_id(tensor)] = storage
        found = Outside.of(tensor)
        self.tape.outside.append(found)
        return found

    def _new_values(
        self, func: OpOverload, result: Any, stand_ins: set[int]
    ) -> list[tuple[int, Region]]:
        made: list[tuple[int, Region]] = []
        fresh: set[int] = set()
        for position, tensor in enumerate(_tensors(result)):
            key = storage_id(tensor)
            if key in stand_ins:
                raise self.refuse(f"{func} returned a view of a tensor from elsewhere")
            if key in self._values and key not in fresh:
                continue
            self._check([tensor])
            if key not in fresh:
                storage = tensor.untyped_storage()
                self._values[key] = (storage, self.tape.new_value(storage.nbytes()))
                fresh.add(key)
            made.append((position, Region.of(tensor, self._value_of(tensor))))
        return made

    def _at_once(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        for tensor in self._written(func, args, kwargs, real=True):
            key = storage_id(tensor)
            if key in self._read:
                raise self.refuse(f"{func} changes a tensor that the model was made from")
            if key not in self._backups:
                storage = tensor.untyped_storage()
                self._backups[key] = (storage, storage.clone())
        result = func(*args, **kwargs)
        if any(t.is_meta for t in _tensors(result)):
            raise self.refuse("a tensor was moved to the meta device")
        return result

    def _lift(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor made from Python numbers, or one that shares its memory with numpy."""
        if tensor.is_meta:
            raise self.refuse("a tensor is made on the meta device")
        if not tensor.untyped_storage().resizable():  # not torch's own memory
            return tensor
        twin = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)
        storage = twin.untyped_storage()
        value = self.tape.new_value(storage.nbytes())
        self.tape.contents[value] = tensor
        self._values[storage_id(twin)] = (storage, value)
        return twin

    def _written(
        self, func: OpOverload, args: Any, kwargs: dict[str, Any], real: bool = False
    ) -> list[torch.Tensor]:
        names = written_arguments(func)
        if not names:
            return []
        given = {**dict(zip(argument_names(func), args, strict=False)), **kwargs}
        found = _tensors([given.get(n) for n in names])
        if not real and any(not t.is_meta for t in found):
            raise self.refuse(f"{func} writes to a tensor that was there before")
        return found

    def _choose_device(self, kwargs: dict[str, Any], factory: bool) -> None:
        device = kwargs.get("device")
        # torch's own Python code, which the disguise does not reach, copies the meta device over.
        if device is not None and torch.device(device).type not in ("cpu", "meta"):
            raise self.refuse(f"a tensor is made on {device}")
        if kwargs.get("pin_memory"):
            raise self.refuse("a tensor is made in pinned memory")
        if factory or device is not None:
            kwargs["device"] = META

    def _value_of(self, tensor: torch.Tensor) -> int:
        found = self._values.get(storage_id(tensor))
        if found is None:
            raise self.refuse("a tensor of the meta device came from elsewhere")
        return found[1]

    def _check(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise self.refuse("a tensor is sparse or quantized")
            if has_own_dispatch(tensor):
                raise self.refuse(f"a tensor is a {type(tensor).__name__}")
            if tensor.device.type not in ("cpu", "meta"):
                raise self.refuse(f"a tensor is on {tensor.device}")
            if tensor.is_conj() or tensor.is_neg():
                raise self.refuse("a tensor is a conjugate or negative view")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _map_tensors(change: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, change, tree)


def _stand_in(tensor: torch.Tensor, known: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(tensor) not in known:
        known[id(tensor)] = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META
        )
    return known[id(tensor)]
