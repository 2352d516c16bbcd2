"""Batch rules of views, copies, joins and indexing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from raypar.graph.batch_rules import (
    Batch,
    Const,
    Mixing,
    Ramp,
    Reduced,
    State,
    States,
    describe,
    dim_list,
    every_output,
    flat_outer,
    only_batch,
    or_const,
    register,
)
from raypar.graph.passes.emit import pick

if TYPE_CHECKING:
    from raypar.graph.batch import Call


def _source(call: Call) -> tuple[fx.Node, Batch]:
    """The first argument and its state, which must be Batch; powers pass through views."""
    value = pick(call.args, "self", "input")
    state = call.state(value)
    if not isinstance(state, Batch):
        raise Mixing(describe(call, state))
    return value, state


@register(
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh_copy",
    "lift_fresh",
    "lift",
    "_unsafe_view_same",
    "resolve_conj",
    "resolve_neg",
    "requires_grad_",
)
def identity(call: Call) -> States:
    return call.state(call.args["self"])


@register(
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "_unsafe_view",
    "view_as",
    "reshape_as",
    "unsqueeze",
    "squeeze",
    "ravel",
    "view_copy",
)
def reshape(call: Call) -> States:
    value = call.args["self"]
    state = call.state(value)
    if isinstance(state, Ramp) and call.name in ("unsqueeze", "view", "reshape"):
        grown = [i for i, n in enumerate(call.out.shape) if n > 1]
        if math.prod(call.out.shape) == call.shape(value)[0] and len(grown) <= 1:
            dim = grown[0] if grown else 0
            return Ramp(dim, state.step)
    if isinstance(state, (Reduced, Const)):
        return state
    value, state = _source(call)
    shape = call.shape(value)
    before = flat_outer(shape, state)
    prefix = 1
    for dim, size in enumerate(call.out.shape):
        # The dim grows with the batch, so it holds the samples; what lies in front of them in
        # memory must be the same number of repetitions as before, or rows were interleaved.
        if _doubles(call, dim):
            if before % prefix == 0 and size % (before // prefix) == 0:
                return Batch(dim, before // prefix, state.power)
            break
        prefix *= size
    raise Mixing(f"{call.name} folds the batch dim so that samples lie interleaved")


def _doubles(call: Call, dim: int) -> bool:
    twin = call.twin.meta["val"].shape
    return bool(twin[dim] == 2 * call.out.shape[dim])


@register(
    "permute",
    "transpose",
    "t",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "numpy_T",
    "mT",
    "transpose_copy",
    "permute_copy",
    "matrix_H",
    "adjoint",
)
def permute(call: Call) -> States:
    if isinstance(call.state(call.args["self"]), Reduced):
        return call.state(call.args["self"])
    value, state = _source(call)
    ndim = len(call.shape(value))
    order = list(range(ndim))
    args = call.args
    if call.name.startswith("permute"):
        order = [d % ndim for d in args["dims"]]
    elif call.name in ("movedim", "moveaxis"):
        order = _moved(args["source"], args["destination"], ndim)
    elif call.name == "numpy_T":
        order.reverse()
    elif ndim >= 2:
        first = args.get("dim0", args.get("axis0", -2 if ndim > 1 else 0))
        second = args.get("dim1", args.get("axis1", -1))
        first, second = first % ndim, second % ndim
        order[first], order[second] = order[second], order[first]
    return Batch(order.index(state.dim), state.outer, state.power)


def _moved(source: Any, destination: Any, ndim: int) -> list[int]:
    sources, places = dim_list(source, ndim), dim_list(destination, ndim)
    rest = [d for d in range(ndim) if d not in sources]
    placed = dict(zip(places, sources, strict=True))
    return [placed[i] if i in placed else rest.pop(0) for i in range(ndim)]


@register("expand", "expand_as", "broadcast_to", "repeat", "tile")
def expand(call: Call) -> States:
    value = call.args["self"]
    state = call.state(value)
    shape = call.shape(value)
    ndim = len(call.out.shape)
    shift = ndim - len(shape)
    if isinstance(state, Batch):
        dim = state.dim + shift
        if call.name in ("repeat", "tile"):
            times = pick(call.args, "repeats", "dims")
            outer = state.outer * ([1] * (ndim - len(times)) + list(times))[dim]
            return Batch(dim, outer, state.power)
        return Batch(dim, state.outer, state.power)
    if state != Const():
        raise Mixing(describe(call, state))
    return _stretched(call, shape, shift)


def _stretched(call: Call, shape: tuple[int, ...], shift: int) -> Batch:
    """A value equal for all samples, stretched along one new or single-sized dim."""
    twin = call.twin.meta["val"].shape
    grown = [i for i, n in enumerate(call.out.shape) if twin[i] != n]
    if len(grown) != 1:
        raise Mixing(f"{call.name} follows the batch size in {len(grown)} dims")
    inside = grown[0] - shift
    if call.name in ("expand", "expand_as", "broadcast_to", "repeat", "tile") and (
        inside < 0 or shape[inside] == 1
    ):
        return Batch(grown[0])
    raise Mixing(f"{call.name} makes a tensor that follows the batch size")


@register(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "scalar_tensor",
    "empty_strided",
    "new_empty_strided",
)
def create(call: Call) -> States:
    if isinstance(call.args.get("fill_value"), fx.Node):
        raise Mixing(f"{call.name} with a tensor as fill value has no batch rule")
    call.number("fill_value")
    twin = call.twin.meta["val"].shape
    grown = [i for i, n in enumerate(call.out.shape) if twin[i] != n]
    if not grown:
        return Const()
    if len(grown) > 1 or call.number("fill_value")[1]:
        raise Mixing(f"{call.name} follows the batch size in several ways")
    return Batch(grown[0])


@register("arange")
def arange(call: Call) -> States:
    start, step = call.args.get("start") or 0, call.args.get("step") or 1
    call.same("start", "step")
    if start == 0 and call.number("end")[1] == 1:
        return Ramp(0, int(step))
    raise Mixing("arange counts over the batch")


@register(
    "slice",
    "narrow",
    "select",
    "unbind",
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "diagonal",
    "triu",
    "tril",
    "unfold",
    "constant_pad_nd",
    "pad",
    "select_scatter",
    "slice_scatter",
    "diagonal_scatter",
    "diag_embed",
    "hsplit",
)
def off_batch(call: Call) -> States:
    """Ops that work along named dims other than the batch dim."""
    args = call.args
    value = args["self"]
    tensors = [v for v in (value, args.get("src")) if isinstance(v, fx.Node)]
    states = [call.state(t) for t in tensors]
    ndim = len(call.shape(value))
    if len(tensors) == 1 and isinstance(states[0], Reduced) and call.name in _PICKS:
        _worked_dims(call, ndim)
        return every_output(call, states[0])  # one of several losses
    batch = next((s for s in states if isinstance(s, Batch)), None)
    cuts = batch is not None and batch.outer > 1 and call.name in _CUTS
    dims = _worked_dims(call, ndim, cuts)
    if batch is None:
        raise Mixing(describe(call, states[0]))
    if (
        call.name in ("slice", "narrow")
        and batch.dim in dims
        and call.out.shape == value.meta["val"].shape
    ):
        return batch
    if batch.dim in dims:
        if len(tensors) == 1 and dims == [batch.dim]:
            return _cut_batches(call, value, batch)
        raise Mixing(f"{call.name} cuts along the batch dim")
    if len(tensors) == 2:
        return _scattered(call, tensors, dims)
    drop = call.name in ("select", "unbind") and dims[0] < batch.dim
    gain = 0
    if call.name in ("diagonal", "diag_embed") and batch.dim > min(dims):
        raise Mixing(f"{call.name} moves the batch dim")
    return every_output(call, Batch(batch.dim - drop + gain, batch.outer, batch.power))


_PICKS = frozenset(
    {"select", "unbind", "slice", "narrow", "split", "chunk", "split_with_sizes", "diagonal"}
)
_CUTS = frozenset({"slice", "narrow", "split", "chunk", "tensor_split", "split_with_sizes"})


def _cut_batches(call: Call, value: fx.Node, state: Batch) -> States:
    """Whole batches taken out of several that lie one behind the other."""
    if state.outer == 1 or call.name not in _CUTS or call.args.get("step", 1) not in (None, 1):
        raise Mixing(f"{call.name} cuts along the batch dim")
    size = call.shape(value)[state.dim] // state.outer
    many = isinstance(call.out, (list, tuple))
    pieces = list(call.out) if many else [call.out]
    twins = call.twin.meta["val"] if many else [call.twin.meta["val"]]
    if len(pieces) != len(twins):
        raise Mixing(f"{call.name} cuts along the batch dim")
    found, start = [], 0
    if call.name in ("slice", "narrow"):
        start = call.args["start"] or 0
        twin_start = call.twin_args["start"] or 0
        total = call.shape(value)[state.dim]
        if start < 0:
            start, twin_start = start + total, twin_start + 2 * total
        if twin_start != 2 * start:
            raise Mixing(f"{call.name} cuts along the batch dim")
    for piece in pieces:
        width = piece.shape[state.dim]
        if start % size or width % size or not width:
            raise Mixing(f"{call.name} cuts along the batch dim")
        found.append(Batch(state.dim, width // size, state.power))
        start += width
    return tuple(found) if many else found[0]


def _worked_dims(call: Call, ndim: int, cuts: bool = False) -> list[int]:
    args = call.args
    for key in ("start", "end", "length", "index", "step", "pad", "diagonal", "offset"):
        if key in args and not isinstance(args[key], fx.Node) and not cuts:
            _same_off_batch(call, key)
    if call.name in ("triu", "tril"):
        return [ndim - 2, ndim - 1]
    if call.name in ("constant_pad_nd", "pad"):
        pads = args["pad"]
        return [ndim - 1 - i // 2 for i in range(len(pads)) if pads[i] or pads[i ^ 1]]
    if "dim1" in args:
        return [(args["dim1"] or 0) % ndim, (1 if args["dim2"] is None else args["dim2"]) % ndim]
    return [(args.get("dim", args.get("dimension", 0)) or 0) % ndim]


def _same_off_batch(call: Call, key: str) -> None:
    if call.name in ("slice", "narrow") and call.args[key] != call.twin_args[key]:
        return  # a full slice of the batch dim; the shape check decides
    call.same(key)


def _scattered(call: Call, tensors: list[fx.Node], dims: list[int]) -> States:
    """select_scatter and its like: both tensors along the same batch dim, or one is Const."""
    found: set[Batch] = set()
    for index, value in enumerate(tensors):
        state = only_batch(call, value)
        if state is None:
            # A constant with the batch's size would be one row per sample, not Const.
            raise Mixing(f"{call.name} writes a value per sample into one without samples")
        if index == 1 and call.name == "select_scatter" and dims[0] <= state.dim:
            state = Batch(state.dim + 1, state.outer)
        found.add(state)
    if len(found) != 1:
        raise Mixing(f"{call.name} meets samples along different dims")
    return found.pop()


@register("cat", "concat", "concatenate", "stack", "hstack", "vstack", "column_stack")
def join(call: Call) -> States:
    if call.name not in ("cat", "concat", "concatenate", "stack"):
        raise Mixing(f"{call.name} has no declared batch rule")
    ndim = len(call.out.shape)
    dim = (call.args.get("dim") or 0) % ndim
    states = {call.state(value) for value in call.args["tensors"] if call.shape(value) != (0,)}
    if len(states) == 1 and isinstance(next(iter(states)), Reduced):
        return states.pop()  # several losses side by side
    if call.name != "stack" and any(isinstance(s, Batch) and s.dim == dim for s in states):
        return _stacked_batches(call, dim)
    found: set[Batch] = set()
    for value in call.args["tensors"]:
        state = call.state(value)
        if call.shape(value) == (0,):
            continue
        if not isinstance(state, Batch):
            raise Mixing(f"{call.name} joins a value per sample with one that has no samples")
        shift = call.name == "stack" and dim <= state.dim
        found.add(Batch(state.dim + shift, state.outer, state.power))
    if len(found) != 1:
        raise Mixing(f"{call.name} meets samples along different dims")
    state = found.pop()
    if state.dim == dim:
        raise Mixing(f"{call.name} joins along the batch dim")
    return state


def _stacked_batches(call: Call, dim: int) -> Batch:
    """Whole batches one behind the other: two views of every sample, and the like."""
    outer, sizes, powers = 0, set(), set()
    for value in call.args["tensors"]:
        state = call.state(value)
        if not isinstance(state, Batch) or state.dim != dim:
            raise Mixing(f"{call.name} joins along the batch dim")
        outer += state.outer
        sizes.add(call.shape(value)[dim] // state.outer)
        powers.add(state.power)
    if len(sizes) != 1 or len(powers) != 1:
        raise Mixing(f"{call.name} joins along the batch dim, with different rows per sample")
    return Batch(dim, outer, powers.pop())


@register("repeat_interleave")
def repeat_interleave(call: Call) -> States:
    _, state = _source(call)
    if isinstance(call.args.get("repeats"), fx.Node) or call.args.get("dim") is None:
        raise Mixing("repeat_interleave with a tensor of counts, or flattened, has no batch rule")
    return state


@register("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_fill_row")
def gather(call: Call) -> States:
    args = call.args
    dim = args.get("dim")
    ndim = len(call.shape(args["self"]))
    if dim is None:
        raise Mixing(f"{call.name} without a dim has no batch rule")
    states = {only_batch(call, t) for t in call.tensors()}
    if len(states) != 1 or None in states:
        raise Mixing(f"{call.name} meets values with and without samples")
    state = states.pop()
    assert state is not None
    if state.dim == dim % ndim:
        raise Mixing(f"{call.name} picks along the batch dim")
    return state


@register("index_select")
def index_select(call: Call) -> States:
    table, index = only_batch(call, call.args["self"]), only_batch(call, call.args["index"])
    dim = call.args["dim"] % len(call.shape(call.args["self"]))
    if table is not None and index is None and table.dim != dim:
        return table
    if table is None and index is not None:
        return Batch(dim, index.outer)
    raise Mixing("index_select picks among samples")


@register("index", "_unsafe_index")
def index(call: Call) -> States:
    value, indices = call.args["self"], call.args["indices"]
    table = only_batch(call, value)
    used = [i for i, x in enumerate(indices) if x is not None]
    if any(
        indices[i].meta["val"].dtype.is_floating_point is False
        and str(indices[i].meta["val"].dtype) == "torch.bool"
        for i in used
    ):
        raise Mixing("index with a mask picks a number of rows that depends on the data")
    adjacent = used == list(range(used[0], used[-1] + 1))
    width = max(len(call.shape(indices[i])) for i in used)
    place = used[0] if adjacent else 0
    picked: set[Batch] = set()
    ramp: int | None = None
    for i in used:
        state = call.state(indices[i])
        shift = width - len(call.shape(indices[i]))
        if isinstance(state, Ramp) and state.step == 1:
            ramp = i
            picked.add(Batch(state.dim + shift))
        else:
            found = only_batch(call, indices[i])
            if found is not None:
                picked.add(Batch(found.dim + shift, found.outer))
    if len(picked) > 1:
        raise Mixing("index meets samples along different dims")
    if table is None:
        if not picked or ramp is not None:
            raise Mixing("index depends on a sample's position in the batch")
        state = picked.pop()
        return Batch(state.dim + place, state.outer)
    if table.dim in used:
        # x[arange(n), column]: row i of the batch is picked for sample i.
        if ramp != table.dim or table.outer != 1 or not picked:
            raise Mixing("index picks among samples")
        return Batch(picked.pop().dim + place)
    if picked:
        raise Mixing("index pairs every sample with every other")
    before = sum(d < table.dim for d in used)
    gained = width if (not adjacent or used[0] < table.dim) else 0
    return Batch(table.dim - before + gained, table.outer)


@register("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> States:
    """x[mask] = number, x[arange(n), columns] = value per sample, x[:, columns] = value."""
    args = call.args
    value, indices, values = args["self"], args["indices"], args["values"]
    state = only_batch(call, value)
    if state is None:
        raise Mixing("index_put writes a value per sample into one without samples")
    used = [i for i, x in enumerate(indices) if x is not None]
    masks = [indices[i] for i in used if indices[i].meta["val"].dtype == torch.bool]
    if masks:
        mask_state = only_batch(call, masks[0])
        width = len(call.shape(masks[0]))
        place = used[0]
        if len(used) != 1 or math.prod(call.shape(values)) != 1 or only_batch(call, values):
            raise Mixing("index_put with a mask writes a number of rows that depends on the data")
        inside = place <= state.dim < place + width
        if mask_state != (Batch(state.dim - place, state.outer) if inside else None):
            raise Mixing("index_put meets samples along different dims")
        return state
    picked = index_states(call, indices, used)
    wanted = state
    if state.dim in used:
        ramp = call.state(indices[state.dim])
        if not isinstance(ramp, Ramp) or ramp.step != 1 or state.outer != 1 or not picked:
            raise Mixing("index_put writes to picked samples")
        wanted = Batch(picked.pop().dim + _index_place(used))
    elif picked:
        raise Mixing("index_put pairs every sample with every other")
    else:
        width = max(len(call.shape(indices[i])) for i in used)
        before = sum(d < state.dim for d in used)
        adjacent = used == list(range(used[0], used[-1] + 1))
        gained = width if (not adjacent or used[0] < state.dim) else 0
        wanted = Batch(state.dim - before + gained, state.outer)
    given = only_batch(call, values)
    if given is None:
        return state
    if (
        Batch(given.dim + _put_ndim(call, used, value) - len(call.shape(values)), given.outer)
        != wanted
    ):
        raise Mixing("index_put meets samples along different dims")
    return state


def _put_ndim(call: Call, used: list[int], value: fx.Node) -> int:
    """Dims of what the indices pick."""
    width = max(len(call.shape(call.args["indices"][i])) for i in used)
    return len(call.shape(value)) - len(used) + width


def _index_place(used: list[int]) -> int:
    """Where the indices' own dims stand in the result."""
    return used[0] if used == list(range(used[0], used[-1] + 1)) else 0


def index_states(call: Call, indices: list[Any], used: list[int]) -> set[Batch]:
    """Where the indices hold the samples, in the shape they broadcast to."""
    width = max(len(call.shape(indices[i])) for i in used)
    picked: set[Batch] = set()
    for i in used:
        state = call.state(indices[i])
        shift = width - len(call.shape(indices[i]))
        if isinstance(state, Ramp) and state.step == 1:
            picked.add(Batch(state.dim + shift))
            continue
        found = only_batch(call, indices[i])
        if found is not None:
            picked.add(Batch(found.dim + shift, found.outer))
    if len(picked) > 1:
        raise Mixing("index meets samples along different dims")
    return picked


@register("one_hot")
def one_hot(call: Call) -> States:
    return or_const(only_batch(call, call.args["self"]))


@register("broadcast_tensors")
def broadcast_tensors(call: Call) -> States:
    found: list[State] = []
    for value, out, twin in zip(call.args["tensors"], call.out, call.twin.meta["val"], strict=True):
        state = only_batch(call, value)
        shift = len(out.shape) - len(call.shape(value))
        grown = [i for i, n in enumerate(out.shape) if twin.shape[i] != n]
        if state is not None:
            found.append(Batch(state.dim + shift, state.outer))
        elif len(grown) == 1:
            found.append(Batch(grown[0]))
        else:
            found.append(Const())
    return tuple(found)
