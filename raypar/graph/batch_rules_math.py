"""Batch rules of element-wise ops, reductions and products."""

from __future__ import annotations

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
    aligned,
    describe,
    dim_list,
    every_output,
    only_batch,
    or_const,
    reduced_over,
    register,
    scaled,
)

if TYPE_CHECKING:
    from raypar.graph.batch import Call

_ELEMENTWISE = """
abs acos acosh addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
bitwise_xor __and__ __or__ __xor__ ceil celu clamp clamp_max clamp_min clip copysign cos cosh
deg2rad digamma elu eq erf erfc erfinv exp exp2 expm1 fill floor floor_divide fmax fmin fmod frac
ge gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot
isfinite isinf isnan isclose ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2
log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
masked_fill maximum minimum mish nan_to_num ne nextafter not_equal pow prelu rad2deg reciprocal
relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus
softshrink softsign sqrt square tan tanh threshold trunc where xlogy isneginf isposinf special_expm1
special_erf special_xlogy special_log1p special_expit gcd lcm positive
polar
""".split()


@register(*_ELEMENTWISE)
def elementwise(call: Call) -> States:
    """Any function of single elements: states must be equal, and unscaled."""
    for name, value in call.args.items():
        if not isinstance(value, fx.Node) and call.number(name)[1]:
            raise Mixing(f"{call.name} is applied with a number that grows with the batch")
    return or_const(aligned(call, call.tensors(), len(call.out.shape)))


@register("where")
def choose(call: Call) -> States:
    """A condition that is the same for all samples chooses between two sums or means."""
    states = {call.state(call.args[k]) for k in ("self", "other") if k in call.args}
    if len(states) == 1 and call.state(call.args["condition"]) == Const():
        state = states.pop()
        if isinstance(state, Reduced):
            return state
    return elementwise(call)


@register(
    "neg", "negative", "real", "imag", "conj", "zeros_like", "ones_like", "full_like", "empty_like"
)
def unary_linear(call: Call) -> States:
    state = call.state(call.args["self"])
    if call.name.endswith("_like"):
        return Batch(state.dim, state.outer) if isinstance(state, Batch) else Const()
    if isinstance(state, Ramp):
        raise Mixing(describe(call, state))
    return state


@register("to", "_to_copy", "type_as", "_to_cpu", "float", "double")
def convert(call: Call) -> States:
    state = call.state(call.args["self"])
    if isinstance(state, Reduced) and not call.out.is_floating_point():
        # Truncation does not commute with the sum; integer to integer does.
        if call.args["self"].meta["val"].is_floating_point():
            raise Mixing("a value reduced over the batch is truncated")
        if call.out.dtype == torch.bool:
            raise Mixing("a value reduced over the batch becomes a truth value")
    return state


@register("mul", "multiply")
def multiply(call: Call) -> States:
    left, right = call.args["self"], call.args["other"]
    if not isinstance(right, fx.Node):
        return scaled(_no_ramp(call, call.state(left)), call.number("other")[1])
    a, b = call.state(left), call.state(right)
    if isinstance(a, Const):
        a, b, left, right = b, a, right, left
    if isinstance(b, Const):
        if isinstance(a, (Reduced, Const)):
            return scaled(a, b.power)
        if isinstance(a, Batch):
            ndim = len(call.out.shape)
            moved = Batch(a.dim + ndim - len(call.shape(left)), a.outer, a.power)
            return scaled(moved, b.power)
    if isinstance(a, Batch) and isinstance(b, Batch):
        ndim = len(call.out.shape)
        x = a.dim + ndim - len(call.shape(left)), a.outer
        if x == (b.dim + ndim - len(call.shape(right)), b.outer):
            return Batch(*x, a.power + b.power)
        raise Mixing(f"{call.name} meets samples along different dims")
    raise Mixing(describe(call, a if isinstance(a, (Reduced, Ramp)) else b))


@register("div", "divide", "true_divide")
def divide(call: Call) -> States:
    if call.args.get("rounding_mode") is not None:
        return elementwise(call)
    left, right = call.args["self"], call.args["other"]
    if not isinstance(right, fx.Node):
        return scaled(_no_ramp(call, call.state(left)), -call.number("other")[1])
    a, b = call.state(left), call.state(right)
    if isinstance(b, Const) and isinstance(a, (Reduced, Const)):
        return scaled(a, -b.power)
    ndim = len(call.out.shape)
    if isinstance(b, Const) and isinstance(a, Batch):
        moved = Batch(a.dim + ndim - len(call.shape(left)), a.outer, a.power)
        return scaled(moved, -b.power)
    if isinstance(b, Reduced):
        raise Mixing("the divisor is reduced over the batch and depends on parameters")
    return or_const(aligned(call, [left, right], ndim))


def _no_ramp(call: Call, state: State) -> State:
    if isinstance(state, Ramp):
        raise Mixing(describe(call, state))
    return state


@register("add", "sub", "subtract", "rsub")
def add(call: Call) -> States:
    left, right = call.args["self"], call.args["other"]
    call.same("alpha")
    a = call.state(left)
    if not isinstance(right, fx.Node):
        grows = call.number("other")[1]
        if grows:
            # A count of samples adds up over the parts just as a sum does.
            if a == Reduced(grows - 1):
                return a
            raise Mixing(f"{call.name} is applied with a number that grows with the batch")
        b: State = Const()
    else:
        b = call.state(right)
    if isinstance(a, Reduced) or isinstance(b, Reduced):
        return _add_reduced(call, a, b)
    if isinstance(a, Batch) and isinstance(b, Batch) and a.power == b.power:
        ndim = len(call.out.shape)
        x = a.dim + ndim - len(call.shape(left)), a.outer
        if x == (b.dim + ndim - len(call.shape(right)), b.outer):
            return Batch(*x, a.power)
    if isinstance(a, Const) and a == b:
        return a
    if isinstance(a, Const) and isinstance(b, Const):
        raise Mixing("a number that grows with the batch is added to one that does not")
    return or_const(aligned(call, call.tensors(), len(call.out.shape)))


def _add_reduced(call: Call, a: State, b: State) -> State:
    """Losses add up, also a sum and a mean, or a sum and a penalty that no sample is part of.

    The second term is scaled so that it counts like the first: with N parts, a term of power q
    that joins a sum of power p is worth N**(q - p) on each part, a constant N**(-1 - p).
    """
    # A constant is a mean over the parts of itself; one that counts samples is a sum.
    powers = [
        s.power if isinstance(s, Reduced) else s.power - 1
        for s in (a, b)
        if isinstance(s, (Reduced, Const)) and _addable(s)
    ]
    if len(powers) != 2:
        raise Mixing("a value reduced over the batch is added to one that keeps samples apart")
    if powers[0] == powers[1]:
        return Reduced(powers[0])
    if not call.out.is_floating_point():
        raise Mixing("a count of the whole batch is added to something else")
    swaps = call.name == "add" and call.args.get("alpha", 1) == 1
    if not isinstance(a, Reduced) and swaps and isinstance(call.args["other"], fx.Node):
        powers.reverse()
        call.swap_terms = True
    elif not isinstance(a, Reduced) or call.name == "rsub":
        raise Mixing("a value reduced over the batch is subtracted from one that is not")
    call.rescale = powers[1] - powers[0]
    return Reduced(powers[0])


def _addable(state: State) -> bool:
    return isinstance(state, (Reduced, Const))


@register("apply_mask")
def apply_mask(call: Call) -> States:
    return or_const(aligned(call, [call.args["x"], call.args["mask"]], len(call.out.shape)))


@register("sum", "mean", "nansum")
def total(call: Call) -> States:
    value = call.args["self"]
    state = call.state(value)
    if isinstance(state, Reduced):
        if call.name == "nansum":
            raise Mixing(describe(call, state))
        return state
    if not isinstance(state, Batch):
        raise Mixing(describe(call, state))
    dims = dim_list(call.args.get("dim"), len(call.shape(value)))
    kept = reduced_over(state, dims, bool(call.args.get("keepdim")))
    if kept is not None:
        return kept
    return Reduced(state.power - (call.name == "mean"))


@register(
    "amax",
    "amin",
    "any",
    "all",
    "argmax",
    "argmin",
    "max",
    "min",
    "prod",
    "var",
    "std",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "softmax",
    "log_softmax",
    "_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "sort",
    "argsort",
    "topk",
    "median",
    "var_mean",
    "std_mean",
    "special_softmax",
    "special_log_softmax",
    "softmin",
    "glu",
    "kthvalue",
    "cummax",
    "cummin",
    "logcumsumexp",
    "diff",
    "count_nonzero",
    "flip",
    "roll",
    "aminmax",
    "quantile",
    "frobenius_norm",
    "linalg_norm",
    "special_logsumexp",
)
def along_dims(call: Call) -> States:
    """Ops that work along some dims, one or several outputs: fine off the batch dim."""
    args = call.args
    if isinstance(args.get("other"), fx.Node):
        return elementwise(call)  # max(a, b), min(a, b)
    state = only_batch(call, args["self"])
    if state is None:
        raise Mixing(f"{call.name} depends on the batch size")
    for key in ("dim", "dims", "k", "correction", "unbiased", "shifts"):
        if key in args:
            call.same(key)
    ndim = len(call.shape(args["self"]))
    dims = dim_list(args.get("dim", args.get("dims")), ndim)
    if call.name == "topk" and args.get("dim") is None:
        dims = [ndim - 1]
    if call.name in ("argmax", "argmin", "max", "min") and args.get("dim") is None:
        dims = list(range(ndim))
    if state.dim in dims:
        raise Mixing(f"{call.name} works along the batch dim")
    first = call.out[0] if isinstance(call.out, (list, tuple)) else call.out
    keeps = len(first.shape) == ndim
    kept = reduced_over(state, dims, keeps)
    assert kept is not None
    return every_output(call, kept)


@register("matmul", "bmm", "mm", "mv", "dot", "vdot", "inner")
def matmul(call: Call) -> States:
    names = [n for n in call.args if isinstance(call.args[n], fx.Node)]
    left, right = call.args[names[0]], call.args[names[1]]
    a, b = only_batch(call, left), only_batch(call, right)
    na, nb = len(call.shape(left)), len(call.shape(right))
    a_contracted, b_contracted = na - 1, max(nb - 2, 0)
    if a is not None and b is not None and a.dim == a_contracted and b.dim == b_contracted:
        if a.outer != b.outer:
            raise Mixing("matmul meets samples along different dims")
        return Reduced()
    if (a is not None and a.dim == a_contracted) or (b is not None and b.dim == b_contracted):
        raise Mixing("matmul sums over the batch dim of one operand only")
    ndim = len(call.out.shape)
    found: list[Batch] = []
    if a is not None:
        found.append(Batch(a.dim + (ndim - na if na > 1 and nb > 1 else 0), a.outer))
    if b is not None:
        if b.dim == nb - 1 and nb > 1:
            found.append(Batch(ndim - 1, b.outer))
        else:
            found.append(Batch(b.dim + ndim - nb + (1 if na == 1 and nb > 1 else 0), b.outer))
    if len(found) == 2 and found[0] != found[1]:
        raise Mixing("matmul pairs every sample with every other")
    return found[0]


@register("addmm")
def add_matmul(call: Call) -> States:
    args = call.args
    call.same("alpha", "beta")
    state = only_batch(call, args["mat1"])
    if only_batch(call, args["mat2"]) or only_batch(call, args["self"]):
        raise Mixing("the weight of addmm comes from the batch")
    if state is None or state.dim != 0:
        raise Mixing("addmm sums over the batch dim")
    return state


@register("linear")
def linear(call: Call) -> States:
    state = only_batch(call, call.args["input"])
    for name in ("weight", "bias"):
        if only_batch(call, call.args[name]) is not None:
            raise Mixing("the weight of a linear op comes from the batch")
    if state is None or state.dim == len(call.shape(call.args["input"])) - 1:
        raise Mixing("linear sums over the batch dim")
    return state


@register("baddbmm")
def add_batched_matmul(call: Call) -> States:
    args = call.args
    call.same("alpha", "beta")
    if not args["beta"]:
        return aligned_products(call, [args["batch1"], args["batch2"]])
    return aligned_products(call, [args["self"], args["batch1"], args["batch2"]])


def aligned_products(call: Call, values: list[fx.Node]) -> States:
    """Batched products whose operands all hold the samples in their batch dim."""
    states = {only_batch(call, v) for v in values if len(call.shape(v)) == 3}
    if len(states) != 1 or any(len(call.shape(v)) != 3 for v in values):
        raise Mixing(f"{call.name} meets values with and without samples")
    state = states.pop()
    if state is None or state.dim != 0:
        raise Mixing(f"{call.name} works along the batch dim")
    return state


@register("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def fourier(call: Call) -> States:
    return _transformed(call, [call.args["dim"]])


@register(
    "fft_fft2",
    "fft_ifft2",
    "fft_rfft2",
    "fft_irfft2",
    "fft_fftn",
    "fft_ifftn",
    "fft_rfftn",
    "fft_irfftn",
    "fft_fftshift",
    "fft_ifftshift",
)
def fourier_over_dims(call: Call) -> States:
    dims = call.args["dim"]
    if dims is None and call.args.get("s") is not None:
        raise Mixing(f"{call.name} without dims has no batch rule")
    return _transformed(call, dims)


def _transformed(call: Call, dims: Any) -> States:
    value = call.args["self"]
    state = only_batch(call, value)
    for key in ("n", "s"):
        call.same(key)
    if state is None or state.dim in dim_list(dims, len(call.shape(value))):
        raise Mixing(f"{call.name} transforms along the batch dim")
    return state


@register(
    "view_as_complex", "view_as_real", "complex", "angle", "conj_physical", "_conj", "resolve_conj"
)
def complex_views(call: Call) -> States:
    """Pairs of numbers along a last dim of their own; the samples' dim stays where it is."""
    if call.name == "complex":
        return elementwise(call)
    value = call.args["self"]
    state = only_batch(call, value)
    if state is None or (
        call.name == "view_as_complex" and state.dim == len(call.shape(value)) - 1
    ):
        raise Mixing(f"{call.name} works along the batch dim")
    return state


@register("einsum")
def einsum(call: Call) -> States:
    operands = call.args["tensors"]
    terms, result = einsum_terms(call.args["equation"], [len(call.shape(v)) for v in operands])
    letters: set[tuple[str, int]] = set()
    for term, value in zip(terms, operands, strict=True):
        state = only_batch(call, value)
        if state is not None:
            if len(set(term)) != len(term):
                raise Mixing("einsum takes a diagonal")
            letters.add((term[state.dim], state.outer))
    if len(letters) != 1:
        raise Mixing("einsum meets samples along different dims")
    letter, outer = letters.pop()
    for term, value in zip(terms, operands, strict=True):
        if letter in term and only_batch(call, value) is None:
            # An ellipsis broadcasts: there, a size of one may stand before the samples.
            broadcast = letter.isdigit() and call.shape(value)[term.index(letter)] == 1
            if not broadcast or letter not in result:
                raise Mixing("einsum sums over the batch dim of one operand only")
    return Batch(result.index(letter), outer) if letter in result else Reduced()


def einsum_terms(equation: str, ndims: list[int]) -> tuple[list[str], str]:
    """The terms and the result of an equation, with ellipses and an implicit result written out.

    Dims under an ellipsis are digits, the last dim 0; there may be ten of them.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms, hidden = [], 0
    for term, ndim in zip(left.split(","), ndims, strict=True):
        width = ndim - len(term.replace("...", "")) if "..." in term else 0
        if width > 10:
            raise Mixing("einsum with more than ten dims under an ellipsis has no batch rule")
        hidden = max(hidden, width)
        terms.append(term.replace("...", "9876543210"[10 - width :]))
    dots = "9876543210"[10 - hidden :]
    if arrow:
        return terms, result.replace("...", dots)
    # Without an output: the ellipsis, then every letter that occurs once, in order.
    letters = [c for c in left if c.isalpha()]
    return terms, dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
