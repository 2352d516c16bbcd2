"""The ranks' tensors put together again under the model's own names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from raypar.errors import TrainingError
from raypar.sharding.pieces import piece_of
from raypar.stages.layouts import stored_piece
from raypar.stages.materialise import state_names
from raypar.stages.spec import RankSpec


def assemble(
    specs: Sequence[RankSpec], parts: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Puts the ranks' parts of parameters (or of their gradients) together.

    Args:
        specs: Every rank's spec, by rank.
        parts: Every rank's tensors by name: its stored part where the name is a parameter with a
            layout, else all of it.

    Raises:
        TrainingError: A part has another shape than its layout says, or parts are missing.
    """
    found: dict[str, torch.Tensor] = {}
    elements: dict[str, int] = {}
    for spec, tensors in zip(specs, parts, strict=True):
        for name, tensor in tensors.items():
            layout = spec.params.get(name)
            if layout is None or tuple(tensor.shape) == layout.shape:
                found[name] = tensor
                elements.pop(name, None)
                continue
            piece = stored_piece(layout, spec.axes, spec.coordinate)
            if piece.shape != tuple(tensor.shape):
                raise TrainingError(
                    f"rank {spec.rank} sent {tuple(tensor.shape)} of {name!r}; its part of "
                    f"{layout.shape} is {piece.shape}"
                )
            if name not in found:
                found[name] = tensor.new_empty(layout.shape)
                elements[name] = 0
            if name not in elements:
                continue  # a frozen parameter, which another rank group has sent whole
            piece.write(found[name], tensor)
            elements[name] += piece.numel
    for name, count in elements.items():
        if count < found[name].numel():
            raise TrainingError(
                f"the ranks sent {count} of the {found[name].numel()} elements of {name!r}"
            )
    return found


def consolidate(
    specs: Sequence[RankSpec], parts: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Builds the model's ``state_dict()`` from what the ranks own.

    Tensors that no rank holds (unused parameters and buffers) have the value that they began with,
    which needs one build of the model on the CPU.

    Args:
        specs: Every rank's spec, by rank.
        parts: Every rank's tensors under canonical names (of several tied names any one); see
            `assemble`.

    Raises:
        TrainingError: A rank sent a tensor that the model does not have, or a part is missing.
    """
    held = assemble(specs, parts)
    spec = specs[0]
    model = _build(spec, meta=True)
    keys = _state_keys(model)
    groups = _tied_groups(model)
    unknown = sorted(set(held) - {n for names in groups.values() for n in names})
    if unknown:
        raise TrainingError(f"the ranks hold tensors that the model does not have: {unknown}")
    found: dict[str, torch.Tensor] = {}
    for name in keys:
        owner = next((n for n in groups.get(name, [name]) if n in held), None)
        if owner is not None:
            found[name] = held[owner]
    if len(found) < len(keys):
        fresh = _build(spec, meta=False).state_dict()
        canonical = state_names(model)
        for name in keys:
            if name not in found:
                found[name] = _began(spec, canonical.get(name, name), fresh[name])
        found = {name: found[name] for name in keys}
    return found


def _began(spec: RankSpec, name: str, seeded: torch.Tensor) -> torch.Tensor:
    if spec.initial is None or not spec.initial.has(name):
        return seeded
    value = torch.empty(seeded.shape, dtype=seeded.dtype)
    spec.initial.fill(name, piece_of(tuple(((0, n),) for n in seeded.shape)), value)
    return value


def _build(spec: RankSpec, *, meta: bool) -> torch.nn.Module:
    if isinstance(spec.model_fn, torch.nn.Module):  # a module may be given instead of its maker
        return spec.model_fn
    make: Callable[[], torch.nn.Module] = spec.model_fn
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, spec.default_dtype.removeprefix("torch.")))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            if meta:
                try:
                    with torch.device("meta"):
                        return make()
                except Exception:  # some constructors read their values: build it for real
                    torch.manual_seed(spec.seed)
            return make()
    finally:
        torch.set_default_dtype(before)


def _state_keys(model: torch.nn.Module) -> list[str]:
    return [k for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)]


def _tied_groups(model: torch.nn.Module) -> dict[str, list[str]]:
    """Name → all names of the same tensor, itself among them."""
    by_id: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        by_id.setdefault(id(tensor), []).append(name)
    return {name: names for names in by_id.values() for name in names}
