"""How the benchmark takes turns, and what it makes of the times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from examples.models import gpt
from release.pairs import Rounds, Timing, alternate, first_losses
from release.pieces import cut
from release.runtime import RAYPAR_SCHEDULES, TARGETS, Bench

ROOT = Path(__file__).resolve().parents[2]


class _Scripted:
    """A system with given times, which notes when it is called."""

    def __init__(self, name: str, seconds: list[float], calls: list[str], loss: float = 1.0):
        self.name, self.seconds, self.calls, self.loss = name, iter(seconds), calls, loss

    def steps(self, count: int) -> Timing:
        self.calls.append(self.name)
        return Timing(next(self.seconds), [self.loss] * count)

    def close(self) -> None: ...


def test_every_system_runs_once_a_round_and_the_first_one_moves_on():
    calls: list[str] = []
    systems = [_Scripted(name, [1.0] * 3, calls) for name in "abc"]
    shown: list[dict[str, float]] = []
    found = alternate(systems, rounds=3, steps=2, on_round=shown.append)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert shown == found.seconds
    assert len(shown) == 3


def test_ratios_are_taken_within_a_round():
    calls: list[str] = []
    ours = _Scripted("ours", [1.0, 2.2, 9.0], calls)
    theirs = _Scripted("theirs", [1.0, 2.0, 10.0], calls)
    found = alternate([ours, theirs], rounds=3, steps=1)
    assert found.ratios("ours", "theirs") == pytest.approx([1.0, 1.1, 0.9])
    assert found.ratio("ours", "theirs") == pytest.approx(1.0)
    assert found.median("ours") == 2.2
    assert found.fastest(["ours", "theirs"]) == "theirs"


def test_the_spread_is_the_middle_half_over_the_median():
    rounds = Rounds(("x",), [{"x": value} for value in (1.0, 2.0, 3.0, 4.0, 100.0)])
    assert rounds.spread("x") == pytest.approx((4 - 2) / 3)
    assert Rounds(("x",), [{"x": 5.0}]).spread("x") == 0.0


@pytest.mark.parametrize("loss", [1.1, float("nan")])
def test_systems_that_train_something_else_are_refused(loss: float):
    calls: list[str] = []
    a, b = _Scripted("a", [1.0], calls), _Scripted("b", [1.0], calls, loss=loss)
    with pytest.raises(RuntimeError, match="b trains something else than a"):
        first_losses([a, b], 2, 1e-3)


def test_a_missed_target_is_said(capsys: pytest.CaptureFixture[str]):
    bench = Bench(rounds=3, steps=1, microbatches=4, peers_only=False)
    calls: list[str] = []
    ours = _Scripted("ours", [1.0, 1.1, 1.1, 1.2], calls)
    theirs = _Scripted("theirs", [1.0] * 4, calls)
    found = bench.measure("ddp", [ours, theirs])
    bench.compare("ddp", found, "ours", "theirs")
    bench.compare("extra", found, "theirs", "ours")
    out = capsys.readouterr().out
    assert bench.ratios == {"ddp": pytest.approx(1.1)}
    assert set(bench.beside) == {"extra"}
    assert "target ≤ 1.03: MISSED" in out
    assert "pairs: 1.100 1.100 1.200" in out
    assert json.loads(json.dumps(bench.pairs)) == {"ddp": found.seconds}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_pieces_one_after_the_other_are_the_model(count: int):
    torch.manual_seed(0)
    model = gpt(4, 16, 2, 6, 32)
    tokens, targets = torch.randint(0, 32, (2, 3, 6))
    want = model(tokens, targets)
    pieces = cut(model, list(range(count)), count)
    x: torch.Tensor = tokens
    for piece in pieces.values():
        x = piece(x)
    assert torch.equal(F.cross_entropy(x.flatten(0, 1), targets.flatten()), want)
    tied = [p.tied_weight for p in pieces.values() if p.tied_weight is not None]
    assert len(tied) == (1 if count == 1 else 2)


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="4 blocks do not make 3 equal pieces"):
        cut(gpt(4, 16, 2, 6, 32), [0], 3)


def test_the_list_of_release_tests_is_true():
    entries = yaml.safe_load((ROOT / "release" / "release_tests.yaml").read_text())
    for entry in entries:
        assert (ROOT / entry["script"]).exists()
        assert entry["command"].startswith(f"python {entry['script']}")
        assert entry["prints"]
        for target in entry["targets"].values():
            comparison, number = target.split()
            if comparison == "==":
                assert number == "true"
            else:
                assert comparison in ("<=", ">=", "<", ">")
                float(number)
    [runtime] = [e for e in entries if e["name"] == "runtime"]
    assert {k: float(v.split()[1]) for k, v in runtime["targets"].items()} == TARGETS


def test_the_schedules_exist():
    from raypar.schedules.registry import schedule_names

    assert set(RAYPAR_SCHEDULES) <= set(schedule_names())
