"""What one device reaches: timings of ops of many sizes, in the process and thread of a rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from raypar.compat import raw_callable
from raypar.graph.randomops import seeded

aten = torch.ops.aten
_REPEATS = 13
_CASE_S = 0.06
"""Longest that one op is measured, in seconds, once it ran twice."""
_ROWS_OF_CALLS, _MOST_CALLS = 5, 1000
"""On a GPU: rows of calls that are timed, and calls in one at most."""
_TURNS = 4
"""Ops take turns over this many inputs, as in a program, where inputs are not all in the cache."""


class Sample(NamedTuple):
    """One measured op.

    Attributes:
        kind: ``matmul``, a form of product, or a class of element-wise op.
        dtype: What it computed in.
        flops: Its floating-point operations, counted as the cost model counts.
        nbytes: Bytes read and written.
        seconds: Time of one call.
    """

    kind: str
    dtype: str
    flops: float
    nbytes: float
    seconds: float


class Case(NamedTuple):
    """An op to be measured: `call(turn)` runs it on the inputs of one turn."""

    kind: str
    dtype: str
    flops: float
    nbytes: float
    call: Callable[[int], Any]


@dataclass
class DeviceSamples:
    """All that was measured on one device.

    Attributes:
        ops: Products and element-wise ops.
        overhead: Seconds of an op on one element.
        view_overhead: Seconds of an op that moves nothing.
        optimizer: (bytes of parameters, tensors, seconds of one Adam step).
    """

    ops: list[Sample] = field(default_factory=list)
    overhead: float = 0.0
    view_overhead: float = 0.0
    optimizer: list[tuple[float, int, float]] = field(default_factory=list)


def measure_device(device: torch.device, ready: Callable[[], None] = lambda: None) -> DeviceSamples:
    """Measures a device.

    Args:
        device: Where this rank computes.
        ready: Called before every group of ops: waits until all ranks are there, so that each is
            measured while all work.
    """
    samples = DeviceSamples()
    with torch.no_grad():
        stopwatch = _Stopwatch(device)
        ready()
        samples.overhead = statistics.fmean(stopwatch(call) for call in _tiny(device))
        samples.view_overhead = statistics.fmean(stopwatch(call) for call in _views(device))
        for group in (_products, _convolutions, _attentions, _elementwise):
            ready()
            for case in group(device):
                samples.ops.append(Sample(*case[:4], stopwatch(case.call)))
    ready()
    samples.optimizer = _optimizer(device, stopwatch)
    return samples


class _Stopwatch:
    """Times calls as they are in a program: after other ops, with caches full of other things.

    A call that is repeated in a tight loop finds its code and its data in the first caches; in a
    program it does not, and small ops take a multiple of that. So a product and a softmax, which
    are not timed, run before every call on a CPU. There, time is the thread's own: that of a core
    which nobody else is given.

    A GPU works through what it is told, and has its own clock: a row of calls lies between two
    events, long enough that reading them does not count. So an op that takes less than telling it
    to the device is measured at what telling costs, as in a program that is bound by it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = device.type == "cuda"
        self._clock = time.thread_time
        self._left, self._right = _rand(device, 256, 192), _rand(device, 192, 384)
        self._cost = 0.0
        if not self._gpu:
            self._cost = self(lambda turn: None)  # reading the clock takes time, too

    def __call__(self, call: Callable[[int], Any]) -> float:
        """Seconds of one call: the lower quartile, which other programs disturb least."""
        for turn in range(2):
            call(turn)
        _wait(self._device)
        if self._gpu:
            return gpu_seconds(call)
        found: list[float] = []
        began = time.perf_counter()
        for turn in range(_REPEATS):
            torch.softmax(self._left @ self._right, -1)
            start = self._clock()
            call(turn % _TURNS)
            found.append(self._clock() - start)
            if time.perf_counter() - began > _CASE_S and len(found) >= 4:
                break
        return max(sorted(found)[len(found) // 4] - self._cost, 1e-9)


def gpu_seconds(
    call: Callable[[int], Any],
    event: Callable[..., Any] = torch.cuda.Event,
    least_s: float = 2e-3,
) -> float:
    """Seconds of one call on a GPU: the lower quartile over rows of calls between two events.

    Args:
        call: Has run before.
        event: Makes an event that can be timed.
        least_s: A row takes at least this long, in seconds.
    """
    count = 1
    found: list[float] = []
    while len(found) < _ROWS_OF_CALLS:
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        for turn in range(count):
            call(turn % _TURNS)
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        if seconds < least_s and count < _MOST_CALLS:
            count = min(_MOST_CALLS, max(2 * count, int(count * least_s / max(seconds, 1e-6))))
            found.clear()
            continue
        found.append(seconds / count)
    return max(sorted(found)[len(found) // 4], 1e-9)


def _tiny(device: torch.device) -> list[Callable[[int], Any]]:
    """Different ops on almost nothing: what calling an op costs."""
    x, y = torch.ones(4, 4, device=device), torch.ones(4, 4, device=device)
    ops = (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mm.default)
    calls = [raw_callable(op) for op in ops]
    relu, total = raw_callable(aten.relu.default), raw_callable(aten.sum.dim_IntList)
    return [
        *(lambda turn, f=f: f(x, y) for f in calls),  # type: ignore[misc]
        lambda turn: relu(x),
        lambda turn: total(x, [0], True),
    ]


def _views(device: torch.device) -> list[Callable[[int], Any]]:
    """Different ops that move nothing."""
    x = torch.ones(4, 4, device=device)
    flip, view = raw_callable(aten.t.default), raw_callable(aten.view.default)
    swap, wide = raw_callable(aten.transpose.int), raw_callable(aten.expand.default)
    return [
        lambda turn: flip(x),
        lambda turn: view(x, [2, 8]),
        lambda turn: swap(x, 0, 1),
        lambda turn: wide(x, [2, 4, 4]),
    ]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rand(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_CPU_PRODUCTS = (
    (16, 64, 64),
    (64, 64, 64),
    (64, 128, 128),
    (128, 128, 128),
    (128, 256, 256),
    (256, 256, 512),
    (512, 256, 512),
    (128, 1024, 512),
    (512, 512, 768),
    (768, 768, 768),
)
_GPU_PRODUCTS = (
    *((n, n, n) for n in (256, 512, 1024, 2048, 4096, 8192)),
    (1024, 4096, 4096),
    (4096, 1024, 4096),
)


def _products(device: torch.device) -> Iterator[Case]:
    """Matrix products of growing size, the right one transposed as a linear layer's is."""
    gpu = device.type == "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if gpu else (torch.float32,)
    call = raw_callable(aten.mm.default)
    for dtype in (*dtypes, torch.float64):
        sizes = _GPU_PRODUCTS if gpu else _CPU_PRODUCTS
        for m, k, n in sizes if dtype is not torch.float64 else sizes[:5]:
            left = [_rand(device, m, k, dtype=dtype) for _ in range(_TURNS)]
            right = [_rand(device, n, k, dtype=dtype).t() for _ in range(_TURNS)]
            nbytes = (m * k + k * n + m * n) * left[0].element_size()

            def run(turn: int, a: Any = left, b: Any = right) -> Any:
                return call(a[turn], b[turn])

            yield Case("matmul", _name(dtype), 2.0 * m * k * n, nbytes, run)


_CONVOLUTIONS = (
    # samples, channels in and out, height, kernel, stride
    (8, 16, 16, 32, 3, 1),
    (4, 32, 32, 32, 3, 1),
    (8, 32, 64, 16, 3, 2),
    (8, 64, 64, 16, 3, 1),
    (8, 32, 64, 32, 1, 1),
    (8, 128, 128, 8, 3, 1),
    (8, 64, 128, 16, 1, 1),
    (4, 32, 64, 32, 2, 2),
)


def _convolutions(device: torch.device) -> Iterator[Case]:
    """Convolutions with channels in whole blocks, forward and backward."""
    scale = 8 if device.type == "cuda" else 1
    forward = raw_callable(aten.convolution.default)
    backward = raw_callable(aten.convolution_backward.default)
    for batch, inside, outside, height, kernel, stride in _CONVOLUTIONS:
        pad = kernel // 2 if kernel % 2 else 0
        x = [_rand(device, batch * scale, inside, height, height) for _ in range(2)]
        w = _rand(device, outside, inside, kernel, kernel)
        form = ([stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1)
        y = forward(x[0], w, None, *form)
        g = torch.randn_like(y)
        flops = 2.0 * y.numel() * inside * kernel**2
        nbytes = 4.0 * (x[0].numel() + w.numel() + y.numel())

        def run(turn: int, x: Any = x, w: Any = w, form: Any = form) -> Any:
            return forward(x[turn % 2], w, None, *form)

        def back(turn: int, g: Any = g, x: Any = x, w: Any = w, form: Any = form) -> Any:
            return backward(g, x[turn % 2], w, None, *form, [True, True, False])

        yield Case("conv", "float32", flops, nbytes, run)
        more = 4.0 * (x[0].numel() + w.numel())  # the gradients it writes
        yield Case("conv_backward", "float32", 2 * flops, nbytes + more, back)


_ATTENTIONS = ((4, 4, 64, 32), (2, 8, 128, 32), (4, 4, 128, 64), (2, 4, 256, 64))


def _attentions(device: torch.device) -> Iterator[Case]:
    """Fused attention on four-dimensional heads, forward and backward."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for batch, heads, length, width in _ATTENTIONS:
        if gpu:
            batch, length = 4 * batch, 8 * length
        shape = (batch, heads, length, width)
        q, k, v = (_rand(device, *shape, dtype=dtype).requires_grad_(True) for _ in range(3))
        flops = 4.0 * batch * heads * length**2 * width
        nbytes = 4.0 * q.numel() * q.element_size()

        def run(turn: int, q: Any = q, k: Any = k, v: Any = v) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        yield Case("attention", _name(dtype), flops, nbytes, run)
        with torch.enable_grad():
            y = run(0)
        g = torch.randn_like(y)

        def back(turn: int, y: Any = y, g: Any = g, q: Any = q, k: Any = k, v: Any = v) -> Any:
            return torch.autograd.grad(y, (q, k, v), g, retain_graph=True)

        yield Case("attention_backward", _name(dtype), 2.5 * flops, 2.25 * nbytes, back)


_ROWS = (64, 512, 4096, 16384)
_BEYOND_CACHES = 1 << 17
"""On a GPU 0.8 GB a tensor, some twelve of which are held at once."""
_ROOM = 32 << 30
_WIDTH = 192
_TABLE = 2000


def _rows(device: torch.device) -> tuple[int, ...]:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= _ROOM:
        return (*_ROWS, _BEYOND_CACHES)
    return _ROWS


def _elementwise(device: torch.device) -> Iterator[Case]:
    """One op of every class, from sizes that fit a cache to sizes that do not."""
    scale = 8 if device.type == "cuda" else 1
    for rows in _rows(device):
        n = rows * scale
        x = [_rand(device, n, _WIDTH) for _ in range(_TURNS)]
        g = _rand(device, n, _WIDTH)
        for kind, count, call in (*_rowwise(x, g, n, device), *_image_ops(n, device)):
            yield Case(kind, "float32", 0.0, count, call)


_Op = tuple[str, float, Callable[[int], Any]]


def _rowwise(x: list[torch.Tensor], g: torch.Tensor, n: int, device: torch.device) -> list[_Op]:
    one = 4.0 * g.numel()
    w, b = _rand(device, _WIDTH), _rand(device, _WIDTH)
    normed = [_WIDTH]
    _, mean, rstd = aten.native_layer_norm(x[0], normed, w, b, 1e-5)
    probabilities = torch.log_softmax(x[0], -1)
    table = _rand(device, _TABLE, _WIDTH)
    index = torch.randint(0, _TABLE, (n,), device=device)
    three = [t.view(-1, 8, _WIDTH) for t in x]
    rng = torch.zeros(3, dtype=torch.int64)
    noise = ("bernoulli", 0.9, torch.float32)
    return [
        ("plain", 3 * one, lambda t: aten.add(x[t], g)),
        ("exp", 2 * one, lambda t: aten.gelu(x[t])),
        ("exp_backward", 3 * one, lambda t: aten.gelu_backward(g, x[t])),
        ("softmax", 2 * one, lambda t: aten._softmax(x[t], -1, False)),
        ("log_softmax", 2 * one, lambda t: aten._log_softmax(x[t], -1, False)),
        (
            "softmax_backward",
            3 * one,
            lambda t: aten._log_softmax_backward_data(g, probabilities, -1, torch.float32),
        ),
        ("norm", 2 * one, lambda t: aten.native_layer_norm(x[t], normed, w, b, 1e-5)),
        (
            "norm_backward",
            3 * one,
            lambda t: aten.native_layer_norm_backward(
                g, x[t], normed, mean, rstd, w, b, [True, True, True]
            ),
        ),
        ("reduce", one, lambda t: aten.sum(x[t], [0], True)),
        (
            "copy",
            2 * one,
            lambda t: aten.clone(three[t].transpose(0, 1), memory_format=torch.contiguous_format),
        ),
        ("gather", 2 * one, lambda t: aten.embedding(table, index)),
        ("random", one, lambda t: seeded(rng, t, [n, _WIDTH], 1, 1, True, *noise, device)),
        (
            "scatter",
            one + 4.0 * table.numel() + 8.0 * n,
            lambda t: aten.embedding_dense_backward(g, index, _TABLE, -1, False),
        ),
    ]


def _image_ops(n: int, device: torch.device) -> list[_Op]:
    """Classes that look at images: as many elements, 16 channels of 16 x 12."""
    x = [_rand(device, max(n // 16, 1), 16, 16, 12) for _ in range(_TURNS)]
    one = 4.0 * x[0].numel()
    g = torch.randn_like(x[0])
    w, b, mean, var = (torch.ones(16, device=device) for _ in range(4))
    small = torch.randn_like(x[0][..., ::2, ::2]).contiguous()
    _, where = aten.max_pool2d_with_indices(x[0], [2, 2])
    _, saved_mean, saved_std = aten.native_batch_norm(x[0], w, b, mean, var, True, 0.1, 1e-5)
    return [
        (
            "batch_norm",
            2 * one,
            lambda t: aten.native_batch_norm(x[t], w, b, mean, var, True, 0.1, 1e-5),
        ),
        (
            "batch_norm_backward",
            3 * one,
            lambda t: aten.native_batch_norm_backward(
                g, x[t], w, mean, var, saved_mean, saved_std, True, 1e-5, [True, True, True]
            ),
        ),
        ("pool", 1.75 * one, lambda t: aten.max_pool2d_with_indices(x[t], [2, 2])),
        (
            "pool_backward",
            2.75 * one,
            lambda t: aten.max_pool2d_with_indices_backward(
                small, x[t], [2, 2], [2, 2], [0, 0], [1, 1], False, where
            ),
        ),
    ]


def _optimizer(device: torch.device, stopwatch: _Stopwatch) -> list[tuple[float, int, float]]:
    """Steps of Adam over few large, over many, and over many small tensors."""
    found = []
    for tensors, numel in ((64, 256), (16, 1 << 15), (4, 1 << 17), (4, 1 << 19)):
        numel *= 16 if device.type == "cuda" else 1
        params = [torch.nn.Parameter(torch.zeros(numel, device=device)) for _ in range(tensors)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = torch.optim.AdamW(params)
        seconds = stopwatch(lambda turn, o=optimizer: o.step())  # type: ignore[misc]
        found.append((4.0 * tensors * numel, tensors, seconds))
    return found
