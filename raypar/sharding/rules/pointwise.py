"""Functions of single elements, with broadcasting; the linear ones let partial sums through."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from raypar.graph.passes.emit import pick
from raypar.sharding.rules.base import Choice, OpView, is_tensor, rule
from raypar.sharding.rules.labels import aligned, cut_choices, dims, is_float, linear_choices
from raypar.sharding.spec import S

_ELEMENTWISE = """
abs acos acosh addcdiv addcmul alias angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh
asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or
bitwise_right_shift bitwise_xor __and__ __or__ __xor__ __lshift__ __rshift__ ceil celu clamp
clamp_max clamp_min clip copysign cos cosh deg2rad digamma elu eq erf erfc erfinv exp exp2 expm1
fill fix float_power floor floor_divide fmax fmin fmod frac ge gelu greater greater_equal gt
hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac isfinite isinf isnan
isneginf isposinf isreal le ldexp leaky_relu lerp less less_equal lgamma log log10 log1p log2
log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
masked_fill maximum minimum mish mvlgamma nan_to_num ne nextafter not_equal polygamma pow
rad2deg reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc
sinh softplus softshrink softsign special_expit special_expm1 special_erf special_log1p
special_xlogy sqrt square tan tanh threshold trunc where xlogy isclose gcd lcm positive
polar complex
""".split()
_ONE_LINEAR = """
neg negative clone contiguous detach lift_fresh_copy lift_fresh to _to_copy type_as float double
real imag conj _conj conj_physical resolve_conj resolve_neg lift _to_cpu
""".split()
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like")


@rule(*_ELEMENTWISE)
def elementwise(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim of the result."""
    yield from broadcast_choices(op)
    if op.name == "where":
        # Chooses among two sums element by element: linear in both.
        chosen = [i for i, t in enumerate(op.tensors) if t is not op.bound["condition"]]
        if len(chosen) == 2 and all(is_float(op.tensors[i]) for i in chosen):
            yield from linear_choices(op, chosen)
    if op.name == "masked_fill" and not _is_tensor_arg(op, "value") and not op.bound["value"]:
        yield from linear_choices(op, [0])


@rule(*_ONE_LINEAR)
def one_linear(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; partial sums pass where no precision is given up."""
    if len(op.shapes) == 0:
        return
    if len(op.tensors) == 2:  # type_as: only the type of the other tensor is read
        out = dims(op.out)
        yield from cut_choices(op, [out, [None] * len(op.shapes[1])], [out])
        return
    yield from broadcast_choices(op)
    same = op.tensors[0].meta["val"].dtype == op.results[0].dtype
    if same and is_float(op.tensors[0]):
        yield from linear_choices(op, [0])


@rule("add", "sub", "subtract")
def add(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; both terms partial sums."""
    yield from broadcast_choices(op)
    if len(op.tensors) == 2 and all(is_float(t) for t in op.tensors):
        yield from linear_choices(op, [0, 1])


@rule("mul", "multiply")
def mul(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; one factor a partial sum."""
    yield from broadcast_choices(op)
    for i, tensor in enumerate(op.tensors):
        if is_float(tensor):
            yield from linear_choices(op, [i])


@rule("div", "divide", "true_divide")
def div(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; the numerator a partial sum, where nothing is rounded."""
    yield from broadcast_choices(op)
    numerator = op.tensors[0] is pick(op.bound, "self", "input") and is_float(op.tensors[0])
    if numerator and op.bound.get("rounding_mode") is None:
        yield from linear_choices(op, [0])


@rule("apply_mask")
def apply_mask(op: OpView, size: int) -> Iterator[Choice]:
    """As a product with the mask."""
    yield from broadcast_choices(op)
    yield from linear_choices(op, [0])


@rule("prelu")
def prelu(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; the slopes belong to dim 1."""
    out: list[object] = list(range(len(op.out)))
    slopes = op.shapes[1]
    per_channel: list[object] = [1 if n > 1 else None for n in slopes]
    yield from cut_choices(op, [out, per_channel], [out])


@rule("glu")
def glu(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim but the halved one; that one cut in both its halves."""
    dim = op.bound["dim"] % len(op.out)
    labels: list[object] = [None if d == dim else d for d in range(len(op.out))]
    yield from cut_choices(op, [labels], [labels])
    yield Choice((S(dim, 2),), (S(dim),))


@rule(*_LIKE)
def like(op: OpView, size: int) -> Iterator[Choice]:
    """The values of the argument are not read, only its form."""
    labels = [list(range(len(op.out))), *([] for _ in op.tensors[1:])]
    yield from cut_choices(op, labels, [list(range(len(op.out)))])


@rule("linalg_cross", "cross")
def cross(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim but that of the three coordinates."""
    dim = (-1 if op.bound["dim"] is None else op.bound["dim"]) % len(op.out)
    yield from cut_choices(
        op,
        [[None if x == dim else x for x in labels] for labels in aligned(op, op.out)],
        [[None if d == dim else d for d in range(len(op.out))]],
    )


def _is_tensor_arg(op: OpView, name: str) -> bool:
    """Whether an argument is a tensor here and not a number."""
    value = op.bound.get(name)
    return isinstance(value, fx.Node) and is_tensor(value.meta.get("val"))


def broadcast_choices(op: OpView) -> Iterator[Choice]:
    """Every dim of the result, cut in all inputs that have it: any function of elements."""
    if any(len(shape) > len(op.out) for shape in op.shapes):
        return
    yield from cut_choices(op, aligned(op, op.out), [list(range(len(op.out)))] * len(op.results))
