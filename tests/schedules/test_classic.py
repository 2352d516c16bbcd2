"""On S stages on S rank groups the orders are those of the papers."""

from __future__ import annotations

import pytest

from raypar.schedules.base import Action, Placement
from raypar.schedules.compile import compile_schedule
from raypar.schedules.instructions import COMPUTE, Kind
from raypar.schedules.registry import get_schedule
from raypar.testing.schedules import chain_io


def rows(name: str, stages: int, rank_groups: int, microbatches: int) -> list[str]:
    """The compute of every rank group as words without the stage, if it holds just one."""
    lists = compile_schedule(name, chain_io(stages, rank_groups), microbatches)
    drop = stages == rank_groups
    return [
        " ".join(str(ins)[1 if drop else 0 :] for ins in program if ins.kind in COMPUTE)
        for program in lists
    ]


def test_gpipe_table() -> None:
    assert rows("gpipe", 3, 3, 4) == ["F0 F1 F2 F3 B0 B1 B2 B3"] * 3


def test_1f1b_table() -> None:
    # arXiv:2104.04473, figure 4 (top), counted from 0.
    assert rows("1f1b", 4, 4, 8) == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_zero_bubble_h1_table() -> None:
    # arXiv:2401.10241, figure 3 (top): I is the paper's B.
    assert rows("zero_bubble_h1", 4, 4, 8) == [
        "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7",
        "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 F6 I4 W3 F7 I5 W4 I6 W5 I7 W6 W7",
        "F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 F6 I5 W3 F7 I6 W4 I7 W5 W6 W7",
        "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7",
    ]


def test_interleaved_table() -> None:
    # arXiv:2104.04473, figure 4 (bottom) for two devices: stages 0, 2 and 1, 3.
    assert rows("interleaved_1f1b", 4, 2, 4) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


@pytest.mark.parametrize("stages", range(1, 9))
def test_1f1b_formula(stages: int) -> None:
    for microbatches in (1, 2, 3, stages, stages + 1, 2 * stages, 3 * stages + 1):
        orders = get_schedule("1f1b").orders(
            Placement.of(range(stages)), microbatches, (False,) * stages
        )
        for s, order in enumerate(orders):
            warm = min(microbatches, stages - s)
            expected = [Action(Kind.FORWARD, s, m) for m in range(warm)]
            for m in range(microbatches):
                expected.append(Action(Kind.BACKWARD, s, m))
                if m + warm < microbatches:
                    expected.append(Action(Kind.FORWARD, s, m + warm))
            assert order == expected


@pytest.mark.parametrize("stages", range(1, 9))
def test_eager_1f1b_formula(stages: int) -> None:
    """arXiv:2211.05322, section 4: warm-ups of 2 (S - s) - 1, then as 1F1B."""
    for microbatches in (1, 2, 3, stages, 2 * stages - 1, 2 * stages, 5 * stages + 1):
        orders = get_schedule("eager_1f1b").orders(
            Placement.of(range(stages)), microbatches, (False,) * stages
        )
        for s, order in enumerate(orders):
            warm = min(microbatches, 2 * (stages - s) - 1)
            expected = [Action(Kind.FORWARD, s, m) for m in range(warm)]
            for m in range(microbatches):
                expected.append(Action(Kind.BACKWARD, s, m))
                if m + warm < microbatches:
                    expected.append(Action(Kind.FORWARD, s, m + warm))
            assert order == expected


@pytest.mark.parametrize("stages", range(1, 9))
def test_zero_bubble_h1_formula(stages: int) -> None:
    """Stage s does the weight half s microbatches later than its input half."""
    for microbatches in (2 * stages, 2 * stages + 1, 3 * stages + 2):
        orders = get_schedule("zero_bubble_h1").orders(
            Placement.of(range(stages)), microbatches, (True,) * stages
        )
        for s, order in enumerate(orders):
            expected = [Action(Kind.FORWARD, s, m) for m in range(stages - s)]
            for m in range(microbatches + s):
                if m < microbatches:
                    expected.append(Action(Kind.BACKWARD_INPUT, s, m))
                if m >= s:
                    expected.append(Action(Kind.BACKWARD_WEIGHT, s, m - s))
                if m + stages - s < microbatches:
                    expected.append(Action(Kind.FORWARD, s, m + stages - s))
            assert order == expected


def test_neighbouring_stages_of_a_rank_group_act_as_one() -> None:
    orders = get_schedule("1f1b").orders(Placement.of((0, 0, 1)), 3, (False,) * 3)
    assert " ".join(map(str, orders[0])) == ("0F0 1F0 0F1 1F1 1B0 0B0 0F2 1F2 1B1 0B1 1B2 0B2")
    assert " ".join(map(str, orders[1])) == "2F0 2B0 2F1 2B1 2F2 2B2"


def test_interleaved_with_one_chunk_is_1f1b() -> None:
    for placement in (Placement.of(range(5)), Placement.of((1, 1, 0, 2))):
        for microbatches in (1, 4, 7):
            splits = (False,) * placement.n_stages
            args = (placement, microbatches, splits)
            assert get_schedule("interleaved_1f1b").orders(*args) == get_schedule("1f1b").orders(
                *args
            )


def test_undivided_stages_do_all_in_the_input_half() -> None:
    lists = compile_schedule("zero_bubble_h1", chain_io(3, 3, splits=(False, True, True)), 6)
    words = [str(ins) for ins in lists[0] if ins.kind in COMPUTE]
    for mb in range(6):
        assert words.index(f"0W{mb}") == words.index(f"0I{mb}") + 1
    assert not any(ins.kind is Kind.BACKWARD for program in lists for ins in program)
