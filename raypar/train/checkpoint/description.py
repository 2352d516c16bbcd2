"""A checkpoint in words."""

from __future__ import annotations

import time
from collections import Counter

from raypar.plan import Plan
from raypar.stages.saved import PARAMETER
from raypar.train.checkpoint.format import Index
from raypar.train.state import TrainState


def description(index: Index, path: str, plan: Plan | None, state: TrainState) -> str:
    """What a checkpoint is, in some lines; without a plan it holds weights alone."""
    count, held = 0, Counter[str]()
    for tensor in index.tensors.values():
        held[tensor.key.kind] += tensor.bytes
        if tensor.key.kind == PARAMETER:
            count += tensor.bytes // tensor.dtype.itemsize
    kinds = ", ".join(f"{kind} {_size(n)}" for kind, n in sorted(held.items()))
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(index.created))
    whole = _size(sum(file.size for file in index.files))
    metrics = ", ".join(f"{k} {v:.6g}" for k, v in state.metrics.items() if _is_number(v))
    lines = [
        path,
        f"  after step    {index.step} ({state.samples} samples), written {when}",
        f"  parameters    {count:,}",
        f"  holds         {kinds}; {whole} in {len(index.files)} files",
        *(_of_weights(index) if plan is None else _of_run(index, plan)),
        "  written by    " + ", ".join(f"{k} {v}" for k, v in index.versions.items()),
    ]
    return "\n".join([*lines, *([f"  metrics       {metrics}"] if metrics else [])])


def _of_run(index: Index, plan: Plan) -> list[str]:
    meshes = "; ".join("×".join(map(str, s.mesh.shape)) or "1" for s in plan.stages)
    return [
        f"  optimizer     {index.values['update'].get('optimizer')}",
        f"  plan          {plan.schedule.name}, stages on meshes {meshes}, {plan.microbatches} "
        f"microbatches of a batch of {plan.global_batch}",
    ]


def _of_weights(index: Index) -> list[str]:
    source = index.facts.get("converted_from", "elsewhere")
    return [f"  weights alone {source}: for init_from; there is no optimizer, and no plan"]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
