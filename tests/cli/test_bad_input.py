"""What people get wrong on the command line: one clear message each, and an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from raypar.cli import main

CONFIG = """
model: {target: "examples.models:gpt", kwargs: {layers: 1, width: 8, heads: 2, seq_len: 4}}
data: {target: "examples.data:stdlib_bytes", global_batch: 4, kwargs: {seq_len: 4}}
mesh: {num_workers: 2}
search: {stages: 1, tensor: 2}
train: {microbatches: 1}
"""
OWN = """
device_kinds:
  Mine:
    {flops: {float32: 1.0e12}, memory: 1 GB, bandwidth: 100 GB/s, INSIDE
     host: {bandwidth: 10 GB/s}, across: {bandwidth: 1 GB/s}}
nodes: [{device: Mine, devices: 2, host_memory: 8 GB}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and a good plan for it."""
    made = tmp_path_factory.mktemp("bad_input")
    (made / "run.yaml").write_text(CONFIG)
    done = run("plan", made / "run.yaml", "-o", made / "plan.json")
    assert done.exit_code == 0, done.output
    return made


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def refused(done: Result, code: int, *told: str) -> None:
    """One message that tells all of it, and no traceback."""
    assert done.exit_code == code, done.output
    message = " ".join(done.stderr.split())
    for text in told:
        assert text in message, message
    assert "Traceback" not in done.output


CLUSTERS = {
    "no file": (None, ["cannot read cluster file"]),
    "no device of that name": (
        "nodes: [{device: H1000, devices: 2, host_memory: 8 GB}]",
        ["nodes[0].device", "Did you mean 'H100'"],
    ),
    "no devices": (
        "nodes: [{device: H100, devices: 0, host_memory: 8 GB}]",
        ["nodes[0].devices", "greater than 0", "found 0"],
    ),
    "no nodes": ("nodes: []", ["nodes: list should have at least 1"]),
    "a link is missing": (OWN.replace("INSIDE", ""), ["device_kinds.Mine.inside", "is missing"]),
    "a link without bandwidth": (
        "nodes: [{device: H100, devices: 2, host_memory: 8 GB, inside: {latency: 1.0e-6}}]",
        ["nodes[0].inside.bandwidth", "is missing"],
    ),
    "a link of no width": (
        OWN.replace("INSIDE", "inside: {bandwidth: 0},"),
        ["device_kinds.Mine.inside.bandwidth", "greater than 0"],
    ),
    "no yaml": ("nodes: {", ["not valid YAML"]),
}


@pytest.mark.parametrize("command", ["plan", "simulate", "explain"])
@pytest.mark.parametrize("case", CLUSTERS)
def test_a_wrong_cluster_file(folder: Path, tmp_path: Path, command: str, case: str) -> None:
    text, told = CLUSTERS[case]
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    refused(run(command, folder / "run.yaml", "--cluster", path), 1, "ClusterError", *told)


def test_an_own_device_with_all_its_links_is_planned_for(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(OWN.replace("INSIDE", "inside: {bandwidth: 10 GB/s},"))
    out = tmp_path / "plan.json"
    done = run("plan", folder / "run.yaml", "--cluster", path, "-o", out)
    assert done.exit_code == 0, done.output
    assert "2 Mine" in done.output


def _other_device(plan: dict[str, Any]) -> None:
    plan["stages"][0]["mesh"]["devices"] = [0, 5]


def _other_cluster(plan: dict[str, Any]) -> None:
    plan["cluster"] = [1, 1]


def _no_strategy(plan: dict[str, Any]) -> None:
    plan["stages"][0]["sharding"] = {"head/linear#0": "S7 R > S7"}


def _no_state(plan: dict[str, Any]) -> None:
    plan["stages"][0]["sharding"] = {"head/linear#0": "sideways"}


def _no_op(plan: dict[str, Any]) -> None:
    plan["stages"][0]["sharding"] = {"heat/linear#0": "Rg S0 > S2"}


def _no_inner_axis(plan: dict[str, Any]) -> None:
    plan["stages"][0]["mesh"].update(shape=[2], axes=["data"])
    plan["stages"][0]["sharding"] = {"head/linear#0": "Rg S0 > S2"}


def _wrong_product(plan: dict[str, Any]) -> None:
    plan["stages"][0]["mesh"]["shape"] = [1, 3]


def _zero_level(plan: dict[str, Any]) -> None:
    plan["stages"][0]["memory"]["zero"] = 4


def _other_model(plan: dict[str, Any]) -> None:
    plan["graph_hash"] = "0" * 64


PLANS: dict[str, tuple[Callable[[dict[str, Any]], None], list[str]]] = {
    "device": (_other_device, ["uses device 5", "has 2 devices (0 to 1)"]),
    "cluster": (_other_cluster, ["(1, 1)", "(2,)", "plan again for this cluster"]),
    "strategy": (_no_strategy, ["'head/linear#0' cannot run as 'S7 R > S7'", "it has", "Rg S0"]),
    "state": (_no_state, ["'head/linear#0' cannot run as 'sideways'"]),
    "op": (_no_op, ["'heat/linear#0', which is no op", "Did you mean 'head/linear#0'"]),
    "axes": (_no_inner_axis, ["only a data axis", "axes ('data', 'x')"]),
    "mesh": (_wrong_product, ["2 devices, shape (1, 3)", "product"]),
    "zero": (_zero_level, ["memory.zero is 4", "3 (parameters too)"]),
    "model": (_other_model, ["made for another graph", "plan.rebind(graph)"]),
}


@pytest.mark.parametrize(
    ("command", "case"),
    [
        *(("simulate", case) for case in PLANS),
        *(  # the file is read by the same function
            pytest.param("explain", case, marks=[pytest.mark.thorough] * (i > 0))
            for i, case in enumerate(PLANS)
        ),
    ],
)
def test_a_wrong_plan_of_a_config(folder: Path, tmp_path: Path, command: str, case: str) -> None:
    change, told = PLANS[case]
    raw = json.loads((folder / "plan.json").read_text())
    change(raw)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw))
    refused(run(command, folder / "run.yaml", "--plan", path), 1, "PlanError", *told)


def test_a_plan_of_a_config_is_explained_with_its_lists(folder: Path) -> None:
    done = run("explain", folder / "run.yaml", "--plan", folder / "plan.json", "--lists")
    assert done.exit_code == 0, done.output
    for text in ("critical path", "what stages do", "over x (2): ", "rank group 0", "0F0"):
        assert text in done.output


@pytest.mark.parametrize("command", ["plan", "simulate", "explain", "train"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, ["cannot read config file", "No such file"]),
        ("nodes: []", ["model.target is missing", "unknown key 'nodes'"]),
        ("model: {", ["not valid YAML"]),
    ],
    ids=["no file", "a cluster file", "no yaml"],
)
def test_a_wrong_config_file(
    tmp_path: Path, command: str, text: str | None, told: list[str]
) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    refused(run(command, path), 2, "ConfigError", *told)


@pytest.mark.parametrize("options", [["--lists"], ["--plan", "other.json"]])
def test_a_plan_alone_has_no_lists(folder: Path, options: list[str]) -> None:
    done = run("explain", folder / "plan.json", *options)
    refused(done, 2, "ConfigError", "need its model", "raypar explain CONFIG --plan")


def test_probe_is_told_where_to_measure_once() -> None:
    refused(run("probe", "--address", "a:1", "--local", 2), 2, "give --address or --local")
    refused(run("probe", "--local", 0), 2, "0 is not in the range")
    refused(run("probe", "--address", "a:1", "--gpu"), 2, "give --address or --gpu")
    refused(run("probe", "--gpu", "--local", 99), 1, "99 GPUs of this machine")


def test_what_is_told_cannot_be_written_is_said_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("_launch.found_of", "_launch.ladder_of", "_simulate.simulate_config"):
        monkeypatch.setattr(f"raypar.{work}", None)  # it is not begun
    for place, told in ((folder, "is a folder"), (folder / "no" / "x.json", "which is no folder")):
        done = run("train", folder / "run.yaml", "--json", place)
        refused(done, 2, "--json", told)
    (folder / "file").touch()
    inside, away = folder / "file" / "x", folder / "no" / "x"
    for command, option in (
        ("bench", "--json"),
        ("plan", "--html"),
        ("plan", "--save-record"),
        ("simulate", "--trace"),
    ):
        refused(run(command, folder / "run.yaml", option, inside), 2, option, "which is no folder")
    refused(run("probe", "--out", away), 2, "--out", "which is no folder")
    refused(run("plan", folder / "run.yaml", "-o", away), 2, "--output", "which is no folder")
    ladder = run("plan", folder / "run.yaml", "--ladder", 2, "-o", inside)
    refused(ladder, 2, "--output", "cannot be made", "is a file")


def test_a_check_looks_at_the_name_of_the_run_too(folder: Path) -> None:
    done = run("config", "check", folder / "run.yaml", "--set", "run.name=../x")
    refused(done, 2, "RunConfig.name is '../x'; it names a folder")


@pytest.mark.parametrize("out", ["", "no/x.safetensors", "run.yaml/x", "s3://b/x", "x" * 300])
@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_a_model_is_exported_to_what_can_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, form: str
) -> None:
    """Told before the checkpoint is looked for."""
    (tmp_path / "run.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    done = run("checkpoint", "export", folder, out, "--format", form)
    if form == "dcp" and out in ("no/x.safetensors", "x" * 300):  # folders are made; a long one not
        refused(done, 1, "has no checkpoints in")
    else:
        refused(done, 2, "ConfigError: OUT: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize(
    "args",
    [
        ("train", ""),
        ("bench", "run.yaml", "--plan", ""),
        ("plan", "run.yaml", "-o", ""),
        ("resume", "run", "--checkpoint", ""),
        ("report", ""),
    ],
)
def test_an_empty_path_is_none_that_was_left_out(args: tuple[str, ...]) -> None:
    """As of a shell variable that is not set."""
    refused(run(*args), 2, "ConfigError", "the path is empty", "name a file or folder")
