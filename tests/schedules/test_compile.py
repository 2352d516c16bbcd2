"""Transfers, frees and their order; text; the registry."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypar.errors import ScheduleError
from raypar.schedules import registry
from raypar.schedules.base import Action, Placement, Schedule
from raypar.schedules.check import check_lists
from raypar.schedules.compile import compile_schedule
from raypar.schedules.instructions import RECV, SEND, Instruction, Kind
from raypar.schedules.io import Edge, StageIO
from raypar.schedules.text import draw, format_lists, parse_lists
from raypar.schedules.timing import Durations
from raypar.testing._replay import reference, replay
from raypar.testing.schedules import chain_io


def test_two_stages_as_text() -> None:
    lists = compile_schedule("1f1b", chain_io(2, 2), 2)
    assert format_lists(lists) == (
        "0: GLOBALS 0F0 0SF0[x0>1] 0DEL0[x0] 0F1 0SF1[x0>1] 0DEL1[x0] "
        "0RB0[x0<1] 0B0 0DEL0[grad:x0] 0RB1[x0<1] 0B1 0DEL1[grad:x0] 0SYNC NORM OPTIMIZER\n"
        "1: GLOBALS 1RF0[x0<0] 1F0 1DEL0[x0] 1B0 1SB0[x0>0] 1DEL0[grad:x0] "
        "1RF1[x0<0] 1F1 1DEL1[x0] 1B1 1SB1[x0>0] 1DEL1[grad:x0] 1SYNC NORM OPTIMIZER\n"
    )


def test_a_value_goes_once_to_each_rank_group_and_one_gradient_comes_back() -> None:
    # x: stage 0 → itself no, 1 and 3 on rank group 1, 2 on rank group 2, 4 at home.
    io = StageIO(
        5,
        (0, 1, 2, 1, 0),
        (Edge("x", 0, (1, 2, 3, 4), True, 8), Edge("mask", 0, (1, 3), False, 2)),
        (True,) * 5,
    )
    lists = compile_schedule("gpipe", io, 1)
    check_lists(lists, io, 1)
    rows = format_lists(lists).splitlines()
    assert rows[0] == (
        "0: GLOBALS 0F0 0SF0[x>1] 0SF0[x>2] 0SF0[mask>1] 0DEL0[mask] 4F0 4DEL0[x] 4B0 "
        "0RB0[x<1] 0RB0[x<2] 0B0 0DEL0[grad:x] 4SYNC 0SYNC NORM OPTIMIZER"
    )
    assert rows[1] == (
        "1: GLOBALS 1RF0[x<0] 1RF0[mask<0] 1F0 3F0 3DEL0[x] 3DEL0[mask] 3B0 1B0 1SB0[x>0] "
        "1DEL0[grad:x] 3SYNC 1SYNC NORM OPTIMIZER"
    )


def test_both_sides_of_a_transfer_name_the_same_message() -> None:
    lists = compile_schedule("interleaved_1f1b", chain_io(4, 2), 3)
    sent = [ins.message for program in lists for ins in program if ins.kind in SEND]
    received = [ins.message for program in lists for ins in program if ins.kind in RECV]
    assert sorted(map(str, sent)) == sorted(map(str, received))
    assert len(set(sent)) == len(sent) == 3 * 3 * 2
    assert Instruction.parse("2SB0[x>1]").message == ("B", "x", 0, 2, 1)
    assert Instruction.parse("1RB0[x<2]").message == ("B", "x", 0, 2, 1)
    assert Instruction.parse("1F0").message is None


def test_input_gradients_leave_before_the_weight_half() -> None:
    lists = compile_schedule("zero_bubble_h1", chain_io(2, 2), 4)
    words = [str(ins) for ins in lists[1]]
    for mb in range(4):
        assert words[words.index(f"1I{mb}") + 1] == f"1SB{mb}[x0>0]"
        assert words.index(f"1W{mb}") > words.index(f"1SB{mb}[x0>0]")


@pytest.mark.parametrize("name", registry.schedule_names())
def test_size_grows_with_the_work_only(name: str) -> None:
    io = chain_io(32, 8)
    counts = [sum(map(len, compile_schedule(name, io, m))) for m in (8, 16, 64)]
    assert counts[2] - counts[1] == 6 * (counts[1] - counts[0])


def test_a_rank_group_without_stages_still_steps() -> None:
    io = StageIO(2, (0, 2), (Edge("x", 0, (1,), True, 1),), (True, True))
    for name in registry.schedule_names():
        lists = compile_schedule(name, io, 3)
        assert [str(ins) for ins in lists[1]] == ["GLOBALS", "NORM", "OPTIMIZER"]
        check_lists(lists, io, 3)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rank_of": (0,)}, "rank_of has 1"),
        ({"rank_of": (0, -1)}, "negative rank group"),
        ({"edges": (Edge("x", 1, (0,), True, 1),)}, "leads from stage 1"),
        ({"edges": (Edge("x", 0, (2,), True, 1),)}, "leads from stage 0"),
        ({"edges": (Edge("x", 0, (), True, 1),)}, "not ascending"),
        ({"edges": (Edge("a[0]", 0, (1,), True, 1),)}, "edge name"),
        ({"edges": (Edge("grad:a", 0, (1,), True, 1),)}, "edge name"),
        ({"edges": (Edge("a", 0, (1,), True, 1), Edge("a", 0, (1,), True, 1))}, "two edges"),
    ],
)
def test_malformed_stage_descriptions(change: dict[str, object], why: str) -> None:
    io = dataclasses.replace(chain_io(2, 2), **change)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=why):
        compile_schedule("1f1b", io, 2)


@pytest.mark.parametrize("microbatches", [0, -1])
def test_no_microbatches(microbatches: int) -> None:
    with pytest.raises(ScheduleError, match=r"microbatches >= 1.*train\.microbatches"):
        compile_schedule("1f1b", chain_io(2, 2), microbatches)


@pytest.mark.parametrize(
    ("orders", "why"),
    [
        ([], "0 orders for 1 rank groups"),
        ([["0F0"]], "never finishes the backward of microbatch 0"),
        ([["0F0", "0F0"]], "comes twice"),
        ([["0B0", "0F0"]], "0B0 comes before 0F0"),
        ([["0F0", "0W0"]], "0W0 comes before 0I0"),
        ([["0F0", "0I0", "0B0", "0W0"]], "after its input half"),
        ([["0F0", "0B0", "0I0"]], "after a whole backward"),
        ([["0F1"]], "1 microbatches"),
        ([["1F0"]], "on rank group 0"),
    ],
)
def test_a_schedule_that_breaks_the_contract(orders: list[list[str]], why: str) -> None:
    class Broken(Schedule):
        name = "broken"

        def orders(
            self, placement: Placement, microbatches: int, splits: Sequence[bool]
        ) -> list[list[Action]]:
            found = [[Instruction.parse(word) for word in order] for order in orders]
            return [[Action(i.kind, i.stage or 0, i.microbatch or 0) for i in row] for row in found]

    with pytest.raises(ScheduleError, match=f"'broken' broke its contract: .*{why}"):
        compile_schedule(Broken(), chain_io(1, 1), 1)


def test_any_order_that_follows_the_dependencies_compiles_right() -> None:
    """Random topological orders, mixing whole and divided backwards."""

    class Random(Schedule):
        name = "random"

        def __init__(self, seed: int) -> None:
            self.seed = seed

        def orders(
            self, placement: Placement, microbatches: int, splits: Sequence[bool]
        ) -> list[list[Action]]:
            rng = random.Random(self.seed)
            last = placement.n_stages - 1
            result: list[list[Action]] = [[] for _ in placement.stages]
            left = []
            for m in range(microbatches):
                left += [Action(Kind.FORWARD, s, m) for s in range(last + 1)]
                for s in range(last + 1):
                    kinds = [Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT]
                    left += [
                        Action(k, s, m) for k in (kinds if rng.random() < 0.5 else [Kind.BACKWARD])
                    ]
            done: set[tuple[str, int, int]] = set()
            while left:
                ready = []
                for a in left:
                    needs = [("F", a.stage, a.microbatch)]
                    if a.kind is Kind.FORWARD:
                        needs = [("F", a.stage - 1, a.microbatch)] * (a.stage > 0)
                        needs += [("F", a.stage, a.microbatch - 1)] * (a.microbatch > 0)
                    elif a.kind is Kind.BACKWARD_WEIGHT:
                        needs = [("B", a.stage, a.microbatch)]
                    elif a.stage < last:
                        needs.append(("B", a.stage + 1, a.microbatch))
                    if done.issuperset(needs):
                        ready.append(a)
                action = rng.choice(ready)
                left.remove(action)
                label = {"F": "F", "W": "W"}.get(action.kind.value, "B")
                done.add((label, action.stage, action.microbatch))
                result[placement.rank_of[action.stage]].append(action)
            return result

    edges = (
        Edge("a", 0, (1, 2, 4), True, 3),
        Edge("b", 1, (2,), True, 5),
        Edge("c", 1, (3, 4), False, 7),
        Edge("d", 3, (4,), True, 9),
    )
    for seed, rank_of in itertools.product(
        range(10), [(0, 1, 0, 1, 0), (0, 1, 1, 2, 2), (1, 0, 2, 2, 1)]
    ):
        io = StageIO(5, rank_of, edges, (True,) * 5)
        lists = compile_schedule(Random(seed), io, 3)
        check_lists(lists, io, 3)
        assert replay(lists, io, 3) == reference(io, 3)


# --- text -----------------------------------------------------------------------------------------

VALUES = st.from_regex(r"\A[a-z][\w ./:\-]{0,12}[\w:]\Z")


@given(value=VALUES, stage=st.integers(0, 99), mb=st.integers(0, 999), peer=st.integers(0, 99))
def test_every_instruction_survives_text(value: str, stage: int, mb: int, peer: int) -> None:
    lists = [
        [
            Instruction(Kind.GLOBALS),
            Instruction(Kind.RECV_FORWARD, stage, mb, value, peer),
            Instruction(Kind.BACKWARD_WEIGHT, stage, mb),
            Instruction(Kind.FREE, stage, mb, f"grad:{value}"),
            Instruction(Kind.GRAD_SYNC, stage),
        ],
        [],
        [Instruction(Kind.SEND_BACKWARD, stage, mb, value, peer)],
    ]
    assert parse_lists(format_lists(lists)) == lists


def test_comments_and_blank_lines_are_skipped() -> None:
    assert parse_lists("# by hand\n\n0: 0F0\n") == [[Instruction(Kind.FORWARD, 0, 0)]]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0F0 0B0", "line 1: expected '0: '"),
        ("1: 0F0", "line 1: expected '0: '"),
        ("0: 0F0\n\n1: 0X1", "line 3: '0X1' is not an instruction"),
        ("0: 0RF0[x", "not an instruction"),
    ],
)
def test_text_that_is_no_schedule(text: str, why: str) -> None:
    with pytest.raises(ScheduleError, match=why):
        parse_lists(text)


def test_the_drawing() -> None:
    lists = compile_schedule("1f1b", chain_io(2, 2), 2)
    rows = [row.split(" | ")[1].split() for row in draw(lists).splitlines()]
    assert rows == [
        ["0F0", "0F1", ".", ".", "0B0", "-", ".", "0B1", "-"],
        [".", "1F0", "1B0", "-", "1F1", "1B1", "-", ".", "."],
    ]
    wide = draw(lists, Durations((0.5, 1.0), (0.5, 1.0), (0.5, 1.0)))
    assert wide.splitlines()[0].startswith("0 | 0F0 0F1 ")
    assert max(map(len, draw(lists, max_slots=4).splitlines())) < 30


# --- registry -------------------------------------------------------------------------------------


def test_names_and_did_you_mean() -> None:
    assert registry.schedule_names() == (
        "gpipe", "1f1b", "eager_1f1b", "interleaved_1f1b", "zero_bubble_h1",
        "interleaved_zero_bubble", "interleaved_eager",
    )  # fmt: skip
    with pytest.raises(ScheduleError, match=r"Did you mean 'gpipe'\?.*1f1b, eager_1f1b"):
        registry.get_schedule("gpip")


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_schedules", dict(registry._schedules))
    one = registry.get_schedule("1f1b")

    class Mine(type(one)):  # type: ignore[misc]
        name = "mine"

    registry.register(Mine())
    assert compile_schedule("mine", chain_io(2, 2), 2) == compile_schedule(
        "1f1b", chain_io(2, 2), 2
    )

    class Other(type(one)):  # type: ignore[misc]
        pass

    with pytest.raises(ScheduleError, match="name '1f1b' is taken"):
        registry.register(Other())
    with pytest.raises(ScheduleError, match="takes an instance"):
        registry.register(Mine)  # type: ignore[arg-type]
