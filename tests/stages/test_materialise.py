"""A rank's own slices: bit for bit those of the whole model, whatever built it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raypar.errors import CaptureError, PlanError
from raypar.sharding.pieces import Piece
from raypar.sharding.spec import ShardingSpec
from raypar.stages._memory import cut
from raypar.stages.materialise import Materialised, Part, materialise
from raypar.testing import models
from tests._tiers import examples

ModelFn = Callable[[], nn.Module]


def parts_of(model: nn.Module, draw: random.Random) -> dict[str, Part]:
    """Random parts of some of the parameters."""
    found: dict[str, Part] = {}
    for name, p in model.named_parameters():
        how = draw.random()
        if how < 0.2:
            continue
        if how < 0.4:
            found[name] = None
            continue
        found[name] = tuple(_ranges(n, draw) for n in p.shape)
    return found


def _ranges(n: int, draw: random.Random) -> tuple[tuple[int, int], ...]:
    how = draw.random()
    if how < 0.4 or n < 4:
        return ((0, n),)
    if how < 0.7:
        start = draw.randrange(n - 1)
        return ((start, draw.randrange(start + 1, n)),)
    return ((0, n // 4), (n // 2, n // 2 + n // 4))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits (NaNs too), type and form."""
    if a.dtype != b.dtype or a.shape != b.shape or a.requires_grad != b.requires_grad:
        return False
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)


def assert_equal_to_whole(
    model_fn: ModelFn, seed: int = 3, draw: int = 0, note: str | None = None
) -> Materialised:
    """Compares random parts with the model built whole; `note` is the reason of a fallback."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = model_fn()
    wanted = parts_of(whole, random.Random(draw))
    buffers = dict(whole.named_buffers())
    before = torch.get_rng_state()
    got = materialise(model_fn, seed, wanted, list(buffers))
    assert torch.equal(before, torch.get_rng_state())
    if note is None:
        assert got.note is None
    else:
        assert got.note is not None
        assert note in got.note
    assert list(got.params) == [n for n, _ in whole.named_parameters() if n in wanted]
    assert list(got.buffers) == list(buffers)
    for name, p in whole.named_parameters():
        if name in wanted:
            part = cut(p, wanted[name]).requires_grad_(p.requires_grad)
            assert same(part, got.params[name]), name
    for name, b in buffers.items():
        assert same(b, got.buffers[name]), name
    return got


@pytest.mark.parametrize("case", models.cases(), ids=lambda c: c.name)
def test_every_model_of_the_zoo_is_built_in_parts(case: models.Case) -> None:
    assert_equal_to_whole(case.model_fn, draw=hash(case.name) % 100)


# Models that are built in unusual ways.


class Own(nn.Module):
    """A module made of what a function returns."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, (nn.Parameter, nn.Module)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)


def drawn_by_hand() -> nn.Module:
    a = nn.Parameter(torch.randn(8, 6) * 0.02)
    b = nn.Parameter(torch.rand(5).mul_(2).sub_(1))
    c = nn.Parameter(torch.normal(torch.arange(6.0), torch.full((6,), 0.5)))
    d = nn.Parameter(torch.zeros(9, 9).bernoulli_(0.3) + torch.eye(9))
    e = nn.Parameter(torch.randn_like(a.detach()) + torch.randperm(6))
    torch.randn(1000)  # drawn, then forgotten
    return Own(a=a, b=b, c=c, d=d, e=e, f=nn.Parameter(torch.randn(4)), g=torch.arange(7) ** 2)


def every_init() -> nn.Module:
    ps = {n: nn.Parameter(torch.empty(20, 12)) for n in "abcdefghi"}
    nn.init.orthogonal_(ps["a"])
    nn.init.trunc_normal_(ps["b"], std=0.1, a=-0.1, b=0.2)
    nn.init.sparse_(ps["c"], 0.3)
    nn.init.xavier_normal_(ps["d"])
    nn.init.kaiming_uniform_(ps["e"], a=2)
    nn.init.eye_(ps["f"])
    nn.init.constant_(ps["g"], 0.5)
    nn.init.orthogonal_(ps["h"].data.t(), gain=3)
    nn.init.uniform_(ps["i"][3:, ::2].data)
    nn.init.ones_(ps["i"].data[:3])
    nn.init.zeros_(ps["i"].data[3:, 1::2])
    dirac = nn.Parameter(torch.empty(4, 4, 3))
    nn.init.dirac_(dirac)
    return Own(**ps, dirac=dirac)


def small_draws() -> nn.Module:
    """Fewer than 16 numbers, odd counts, and strides take other paths through the generator."""
    a, b, c = (nn.Parameter(torch.empty(n)) for n in (3, 17, 31))
    d = nn.Parameter(torch.empty(40, 30))
    for p in (a, b, c):
        p.data.normal_()
    d.data.t().normal_()
    d.data[:, 3].normal_()
    d.data[::3].uniform_()
    return Own(a=a, b=b, c=c, d=d, e=nn.Parameter(torch.randn(5, dtype=torch.float64)))


class Tower(nn.Module):
    """Layers, then an `apply`, then scaling by depth, as in many published models."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, width, padding_idx=0)
        self.rates = [r.item() for r in torch.linspace(0, 0.1, 3)]
        self.scales = torch.linspace(0, 1, 3).tolist()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in self.rates)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 300, bias=False)
        self.head.weight = self.embed.weight
        self.apply(self.draw)
        for depth, layer in enumerate(self.layers):
            layer.weight.data.div_(2.0 * (depth + 1))
        self.table = torch.outer(torch.arange(5.0), torch.tensor([1.0, 10.0]).reciprocal())

    def draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            with torch.no_grad():
                module.weight.normal_()
                module.weight[module.padding_idx].fill_(0)


def copied() -> nn.Module:
    a, b = nn.Linear(9, 9), nn.Linear(9, 9)
    b.load_state_dict(a.state_dict())
    c = copy.deepcopy(b)
    with torch.no_grad():
        b.weight.mul_(torch.randn(9, 1))
        b.weight[:4].copy_(a.weight[5:])
        b.weight.copy_(b.weight.t().clone())
    c.bias.data = a.bias.data * 2
    c.weight.requires_grad_(False)
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    return Own(a=a, b=b, c=c, t=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def seeds_itself() -> nn.Module:
    a = nn.Linear(40, 40)
    torch.manual_seed(11)
    b = nn.Linear(40, 40)
    state = torch.get_rng_state()
    c = nn.Linear(40, 40)
    torch.manual_seed(3)  # the seed that was there before
    d = nn.Linear(40, 40)
    with torch.random.fork_rng(devices=[]):
        e = nn.Linear(40, 40)
    torch.set_rng_state(state)
    f = nn.Linear(40, 40)  # is c
    assert torch.initial_seed() == 11
    return Own(a=a, b=b, c=c, d=d, e=e, f=f, g=nn.Linear(4, 4))


def own_generator() -> nn.Module:
    g = torch.Generator().manual_seed(5)
    a = nn.Parameter(torch.empty(30, 30))
    nn.init.normal_(a, generator=g)
    b = nn.Linear(5, 5)
    c = nn.Parameter(torch.rand(4, generator=g))
    return Own(a=a, b=b, c=c, d=nn.Parameter(torch.randperm(6, generator=g).float()))


def parametrized() -> nn.Module:
    a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    b = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    return Own(a=a, b=b, c=nn.utils.weight_norm(nn.Linear(3, 3)))


def half() -> nn.Module:
    model = Tower(32).to(torch.bfloat16)
    model.to("cpu")
    return model.to(device="cpu", dtype=torch.float16)


def default_dtype() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    try:
        a = nn.Linear(4, 4)
        b = nn.Parameter(torch.randn(4))
    finally:
        torch.set_default_dtype(torch.float32)
    return Own(a=a, b=b, c=nn.Parameter(torch.rand(3)))


def asks_for_devices() -> nn.Module:
    a = nn.Linear(4, 4)
    assert a.weight.device == torch.device("cpu")
    assert not a.weight.is_meta
    assert a.weight.is_cpu
    assert type(a.weight) is nn.Parameter
    b = torch.randn(3, device=a.weight.device).to(a.weight.device)
    c = torch.zeros_like(a.weight, device="cpu").normal_()
    return Own(a=a, b=b, c=c.to(a.weight), d=torch.tensor([4, 5], device=a.weight.device))


def windows() -> nn.Module:
    """Index tables that are computed by looking at values, as in windowed attention."""
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")).flatten(1)
    relative = grid[:, :, None] - grid[:, None, :]
    relative[0] += 2
    kept = relative[relative > 0]
    size = int(relative.max()) + 1
    table = nn.Parameter(torch.zeros(size * 5, 4))
    nn.init.trunc_normal_(table, std=0.02)
    triangle = torch.ones(6, 6).tril().masked_fill(torch.eye(6) > 0, -torch.inf)
    return Own(table=table, relative=relative, kept=kept, triangle=triangle)


def shares_memory() -> nn.Module:
    flat = torch.randn(60)
    a, b = nn.Parameter(flat[:24].view(4, 6)), nn.Parameter(flat[24:48].view(6, 4).t())
    with torch.no_grad():
        flat.mul_(3)
    channels = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    return Own(a=a, b=b, flat=flat, channels=channels)


UNUSUAL = [
    drawn_by_hand, every_init, small_draws, Tower, copied, seeds_itself, own_generator,
    parametrized, half, default_dtype, asks_for_devices, windows, shares_memory,
]  # fmt: skip


@pytest.mark.parametrize("draw", [0, 1, 2])
@pytest.mark.parametrize("model_fn", UNUSUAL, ids=lambda f: f.__name__)
def test_unusual_constructions_are_built_in_parts(model_fn: ModelFn, draw: int) -> None:
    assert_equal_to_whole(model_fn, draw=draw)


def test_an_existing_state_is_loaded() -> None:
    state = nn.Linear(300, 300).state_dict()

    def load() -> nn.Module:
        a, b = nn.Linear(300, 300), nn.Linear(300, 300)
        a.load_state_dict(state)
        b.load_state_dict(state, assign=True)
        return Own(a=a, b=b, c=nn.Linear(3, 3))

    assert_equal_to_whole(load, draw=4)


def test_an_existing_module_is_cut() -> None:
    there = Tower()
    assert_equal_to_whole(lambda: there)
    got = materialise(there, 0, {"embed.weight": None})
    assert got.params["embed.weight"].data_ptr() != there.embed.weight.data_ptr()
    assert got.note is None


def test_constants_come_from_the_model_and_from_the_graph() -> None:
    paths: dict[str, Any] = {"t": ("", "table", ()), "u": torch.ones(2)}
    got = materialise(Tower, 0, {}, (), paths)
    assert torch.equal(got.constants["t"], Tower().table)
    assert torch.equal(got.constants["u"], torch.ones(2))


# What has to be built whole.


def looks_at_random() -> nn.Module:
    a = nn.Linear(4, 4)
    if a.weight.sum() > 0:
        nn.init.zeros_(a.bias)
    return Own(a=a, b=nn.Parameter(torch.randn(random.randrange(3, 9), np.random.randint(2, 9))))


def through_numpy() -> nn.Module:
    a = nn.Linear(4, 4)
    a.weight.detach().numpy()[:] = 3
    return a


def swallows_errors() -> nn.Module:
    a = nn.Linear(4, 4)
    try:
        assert float(a.weight.sum()) < 100
        nn.init.ones_(a.weight)
    except Exception:
        nn.init.zeros_(a.weight)
    return Own(a=a, b=nn.Linear(2, 2))


def changes_its_source() -> nn.Module:
    source = np.ones((200, 200), dtype=np.float32)
    a = nn.Linear(200, 200)
    a.weight.data.copy_(torch.from_numpy(source))
    source[:] = 2
    return a


@pytest.mark.parametrize(
    ("model_fn", "note"),
    [
        (looks_at_random, "random values were looked at"),
        (through_numpy, "Tensor.numpy"),
        (swallows_errors, "random values were looked at"),
        (changes_its_source, "changed while it was built"),
    ],
)
def test_what_cannot_be_put_off_is_built_whole(model_fn: ModelFn, note: str) -> None:
    def again() -> nn.Module:
        random.setstate(state)
        np.random.set_state(numpy_state)
        return model_fn()

    state, numpy_state = random.getstate(), np.random.get_state()
    assert_equal_to_whole(again, note=note)


def test_python_randomness_is_that_of_one_construction() -> None:
    random.seed(4)
    np.random.seed(4)
    whole = looks_at_random()
    random.seed(4)
    np.random.seed(4)
    got = materialise(looks_at_random, 0, {"b": None})
    assert got.params["b"].shape == whole.b.shape


def test_what_was_there_before_is_changed_once() -> None:
    there = torch.ones(3)
    generator = torch.Generator().manual_seed(2)

    def changes() -> nn.Module:
        there.add_(1)
        a = nn.Parameter(torch.rand(3, generator=generator) + there)
        if a[0] > 100:
            raise ValueError
        return Own(a=a)

    got = materialise(changes, 0, {"a": None})
    assert got.note is not None
    assert torch.equal(there, torch.full((3,), 2.0))
    fresh = torch.Generator().manual_seed(2)
    assert torch.equal(got.params["a"], torch.rand(3, generator=fresh) + 2)
    assert torch.equal(fresh.get_state(), generator.get_state())


def test_a_foreign_generator_ends_where_an_eager_run_leaves_it() -> None:
    generator = torch.Generator().manual_seed(2)
    fn = lambda: Own(a=nn.Parameter(torch.rand(40_000, generator=generator)))  # noqa: E731
    assert materialise(fn, 0, {}).note is None
    fresh = torch.Generator().manual_seed(2)
    torch.rand(40_000, generator=fresh)
    assert torch.equal(fresh.get_state(), generator.get_state())


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(PlanError, match="without parameter 'nope'"):
        materialise(Tower, 0, {"nope": None})
    with pytest.raises(PlanError, match=r"'norm.bias'.*shape \(64,\).*\(60, 70\)"):
        materialise(Tower, 0, {"norm.bias": (((60, 70),),)})
    with pytest.raises(CaptureError, match="ZeroDivisionError"):
        materialise(lambda: nn.Linear(1 // 0, 3), 0, {})


@settings(deadline=None, max_examples=examples(10, 30))
@given(
    st.lists(st.tuples(st.integers(1, 70_000), st.sampled_from(
        ["normal_", "uniform_", "exponential_", "bernoulli_", "zero_", "mul"])), max_size=8),
    st.sets(st.integers(0, 7)), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_whatever_is_left_out_the_rest_draws_the_same(
    draws: list[tuple[int, str]], kept: set[int], dtype: torch.dtype
) -> None:
    def build() -> nn.Module:
        ps = [nn.Parameter(torch.ones(n, dtype=dtype)) for n, _ in draws]
        for p, (_, how) in zip(ps, draws, strict=True):
            if how == "mul":
                p.data.mul_(ps[0].data[0].clone()).add_(torch.rand(1, dtype=dtype))
            else:
                getattr(p.data, how)()
        return nn.ParameterList(ps)

    torch.manual_seed(1)
    whole = dict(build().named_parameters())
    wanted: dict[str, Part] = {str(k): None for k in kept if k < len(draws)}
    got = materialise(build, 1, wanted)
    assert got.note is None
    assert all(same(got.params[n], whole[n]) for n in wanted)


def test_parts_are_those_of_a_sharding() -> None:
    model = Tower()
    spec, mesh = ShardingSpec.parse("S0/2,S1"), (2, 4)
    torch.manual_seed(0)
    whole = Tower().layers[1].weight
    pieces = []
    for i in range(2):
        row = []
        for j in range(4):
            ranges = spec.ranges(model.layers[1].weight.shape, mesh, (i, j))
            part = materialise(Tower, 0, {"layers.1.weight": ranges}).params["layers.1.weight"]
            assert part.shape == spec.local_shape(whole.shape, mesh)
            row.append(part)
        pieces.append(torch.cat(row, 1))
    blocks = [p.chunk(2) for p in pieces]
    assert torch.equal(torch.cat([blocks[i][g] for g in range(2) for i in range(2)]), whole)


class Given:
    """Values for some tensors, as a file would have them."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values

    def has(self, name: str) -> bool:
        return name in self.values

    def fill(self, name: str, piece: Piece, out: torch.Tensor) -> None:
        piece.copy_into(self.values[name], out)


@pytest.mark.parametrize("draw", range(2))
@pytest.mark.parametrize("model_fn", [every_init, Tower, swallows_errors, through_numpy])
def test_values_from_elsewhere_replace_those_of_the_seed(model_fn: ModelFn, draw: int) -> None:
    random_draw = random.Random(draw)
    torch.manual_seed(3)
    whole = model_fn()
    tensors = dict([*whole.named_parameters(), *whole.named_buffers()])
    given = {
        name: (torch.randn(t.shape) * 3).to(t.dtype)
        for name, t in tensors.items()
        if random_draw.random() < 0.6
    }
    wanted = parts_of(whole, random_draw)
    buffers = [n for n, _ in whole.named_buffers()]
    state = torch.get_rng_state()
    made = materialise(model_fn, 3, wanted, buffers, initial=Given(given))
    assert torch.equal(torch.get_rng_state(), state)
    for name, got in (*made.params.items(), *made.buffers.items()):
        expected = given.get(name, tensors[name])
        assert torch.equal(got, cut(expected.detach(), wanted.get(name))), name
        assert got.requires_grad == tensors[name].requires_grad
