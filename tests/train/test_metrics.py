"""What is written and shown step by step."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from raypar.errors import ConfigError
from raypar.stages.faults import RankInfo
from raypar.stages.run import merge_reports
from raypar.stages.spec import StepReport
from raypar.train.data import BatchForm
from raypar.train.metrics import Display, MetricsLog, startup_text, tokens_of
from raypar.train.metrics_file import keep_before, read_lines


def test_tokens_are_known_for_a_batch_of_integer_rows() -> None:
    ids = torch.zeros(4, 16, dtype=torch.int64)
    assert tokens_of(BatchForm((ids, ids))) == 64
    assert tokens_of(BatchForm((torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64)))) is None


def test_one_line_of_json_per_step_with_every_rank(tmp_path: Path) -> None:
    log = MetricsLog(
        tmp_path / "m.jsonl", 8, 64, [RankInfo(0, stages=(0,)), RankInfo(1, stages=(1,))]
    )
    for step, loss in enumerate([2.0, 1.0, float("nan")]):
        seconds = 9.0 if step == 0 else 0.5
        log.add(
            merge_reports(
                [
                    StepReport(step, seconds={"total": seconds, "compute": 0.25}),
                    StepReport(step, loss=loss, grad_norm=3.0, peak_saved={1: 100}),
                ]
            )
        )
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [0, 1, 2]
    assert lines[1]["loss"] == 1.0
    assert lines[1]["tokens_per_s"] == 128
    assert lines[1]["samples_per_s"] == 16
    assert lines[1]["ranks"][0]["seconds"]["compute"] == 0.25
    assert lines[1]["ranks"][1]["peak_saved_bytes"] == {"1": 100}
    assert lines[2]["loss"] == "nan", "JSON has no NaN"
    total = log.summary()
    assert total["steps"] == 3
    assert total["step_s"] == 0.5, "the first step warms up and is left out of the rates"


def test_plain_lines_every_so_many_steps_and_at_the_end() -> None:
    out = io.StringIO()
    with Display(5, 2, out) as display:
        for step in range(5):
            display.show(
                {"step": step, "loss": 1.5, "grad_norm": None, "step_s": 0.1, "samples_per_s": 80.0}
            )
    shown = out.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == ["1/5", "2/5", "4/5", "5/5"]
    assert "loss 1.5000" in shown[0]
    assert "80 samples/s" in shown[0]


def test_nothing_is_shown_where_nothing_is_asked_for() -> None:
    out = io.StringIO()
    with Display(1, 0, out) as display:
        display.show({"step": 0, "loss": 1.0, "grad_norm": None, "step_s": 1, "samples_per_s": 1})
    assert out.getvalue() == ""


def test_the_start_is_broken_down_into_its_parts() -> None:
    text = startup_text({"data": 0.5, "start": 3.0, "start.ranks": 2.0, "total": 3.5})
    assert text.splitlines() == [
        "  3.50 s from the call of fit() to the end of the first step",
        "    0.50 s data",
        "    3.00 s start",
        "      2.00 s ranks",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_evaluations_and_checkpoints_are_told_above_the_bar_and_in_plain_lines() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for out in (plain, terminal):
        with Display(5, 1, out) as display:
            display.show(
                {"step": 0, "loss": 1.5, "grad_norm": 2.0, "step_s": 0.1, "samples_per_s": 80.0,
                 "mfu": 0.25}
            )  # fmt: skip
            display.evaluation({"step": 1, "eval_loss": 1.25, "eval_top_1": 0.5})
            display.checkpoint("runs/[a]/1", 1)
        assert "evaluation after step 1  loss 1.25  top 1 0.5" in out.getvalue()
        assert "checkpoint after step 1  runs/[a]/1" in out.getvalue()
        assert "MFU 25.0%" in out.getvalue()


def test_what_goes_on_before_the_first_step_stays_on_a_terminal_no_longer_than_that() -> None:
    plain, terminal, quiet = io.StringIO(), Terminal(), io.StringIO()
    for out, every in ((plain, 1), (terminal, 1), (quiet, 0)):
        display = Display(5, every, out)
        with display.doing("planning for [4] devices") as tell:
            display.say("measured 2 plans")
            tell("[3] trials")
        display.say("planned in 1.0 s")
    assert plain.getvalue().splitlines() == [
        "planning for [4] devices",
        "measured 2 plans",
        "planned in 1.0 s",
    ]
    lines = [line.split("\r")[-1] for line in terminal.getvalue().splitlines()]
    assert [line for line in lines if "measured" in line or "planned" in line]
    assert "planning for [4] devices: [3] trials" in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith("planned in 1.0 s")
    assert quiet.getvalue() == ""


def test_without_a_terminal_progress_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("raypar.train.display.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Display(5, 1, out).doing("planning") as tell:
        for second in (1.0, 20.0, 21.0, 41.0):
            now[0] = second
            tell(f"{second:g} s")
    assert out.getvalue().splitlines() == ["planning", "planning: 20 s", "planning: 41 s"]


def test_a_run_goes_on_though_its_log_was_damaged(tmp_path: Path) -> None:
    """As by a power failure, which leaves zeros: no training is lost for the sake of its log."""
    path = tmp_path / "metrics.jsonl"
    line = '{"step": %d, "step_s": 1.0}\n'
    lines = [(line % number).encode() for number in range(4)]
    path.write_bytes(lines[0] + b"\0" * 9 + b"\n3\n" + lines[2] + lines[3])
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        read_lines(path)
    with pytest.warns(UserWarning, match="2 damaged lines are left out, the first is line 2"):
        keep_before(path, 3)
    assert [found["step"] for found in read_lines(path)] == [0, 2]


def test_a_full_disk_is_told_with_its_folder(tmp_path: Path) -> None:
    full = tmp_path / "metrics.jsonl"
    full.symlink_to("/dev/full")
    log = MetricsLog(full, 4, None, [RankInfo(0, stages=(0,))])
    log.evaluation({"step": 1, "eval_loss": 0.5})
    with pytest.raises(ConfigError, match=r"cannot write to .*: No space left on device"):
        log.close()
    log.close()
