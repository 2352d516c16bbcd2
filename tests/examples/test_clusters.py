"""Cluster files: Ray's own schema, what that does not say, and the commands in their head."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from raypar.cli import main
from raypar.cli.training import submit
from raypar.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "examples" / "clusters"
LAUNCHED = ["aws", "gcp"]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    return found


def submitted(name: str) -> Config:
    """The config that the `raypar submit` line of a file asks for."""
    [line] = re.findall(r"^#   (raypar submit .*)$", (CLUSTERS / f"{name}.yaml").read_text(), re.M)
    context = submit.make_context("submit", shlex.split(line)[2:])
    assert context.params["address"] == "http://127.0.0.1:8265"
    return load_config(ROOT / context.params["config_file"], context.params["overrides"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launcher_file_is_one_by_rays_own_schema(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    validator = jsonschema.Draft7Validator(json.loads(schema.read_text()))
    assert [e.message for e in validator.iter_errors(read(name))] == []
    assert list(validator.iter_errors({**read(name), "max_worker": 1})), "the schema checks nothing"


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launcher_file_holds_together(name: str) -> None:
    found = read(name)
    types = found["available_node_types"]
    assert found["provider"]["type"] == name
    assert found["head_node_type"] in types
    workers = {k: v for k, v in types.items() if k != found["head_node_type"]}
    assert sum(t["min_workers"] for t in workers.values()) <= found["max_workers"]
    assert sum(t["max_workers"] for t in workers.values()) == found["max_workers"]
    assert found["docker"]["image"].startswith(f"rayproject/ray:{image_version()}")
    installed = " ".join(found["setup_commands"])
    assert "/home/ray/raypar" in installed
    assert "/home/ray/raypar" in found["file_mounts"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_cluster_has_the_devices_that_its_run_asks_for(name: str) -> None:
    config, found = submitted(name), read(name)
    kind = "GPU" if config.mesh.device == "gpu" else "CPU"
    devices = [
        t["resources"].get(kind, 0) * t["max_workers"]
        for key, t in found["available_node_types"].items()
        if key != found["head_node_type"]
    ]
    least, most = config.mesh.num_workers  # type: ignore[misc]
    assert 1 <= least <= most == sum(devices)
    assert config.checkpoint.storage is not None
    assert config.checkpoint.storage.startswith({"aws": "s3://", "gcp": "gs://"}[name])


def test_the_rayjob_has_the_parts_that_kuberay_needs() -> None:
    found = read("kuberay")
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayJob")
    spec = found["spec"]
    known = {
        "entrypoint", "runtimeEnvYAML", "backoffLimit", "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished", "rayClusterSpec",
    }  # fmt: skip
    assert set(spec) == known
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == image_version()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["image"] == "raypar:cpu"
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/mnt/runs"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_rayjob_asks_for_the_cpus_that_its_pods_have() -> None:
    spec = read("kuberay")["spec"]
    program, verb, file, *words = shlex.split(spec["entrypoint"])
    assert (program, verb) == ("raypar", "train")
    context = main.commands["train"].make_context("train", [file, *words])
    config = load_config(file.replace("/opt/raypar", str(ROOT)), context.params["overrides"])
    cpus = sum(
        group["replicas"] * int(container["resources"]["limits"]["cpu"])
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    )
    assert config.mesh.num_workers == cpus
    assert config.run.name, "--resume needs a name"
    assert context.params["go_on"]


def image_version() -> str:
    """The Ray of the images."""
    text = (ROOT / "release" / "docker" / "Dockerfile").read_text()
    [found] = re.findall(r"^ARG BASE=rayproject/ray:([\d.]+)-", text, re.M)
    return str(found)


def test_the_image_takes_what_the_package_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "release" / "docker" / "Dockerfile").read_text()
    [torch] = re.findall(r'^ARG TORCH="(.*)"$', text, re.M)
    assert torch in project["dependencies"]
    [wanted] = [d for d in project["dependencies"] if d.startswith("ray[")]
    least = wanted.partition(">=")[2].partition(",")[0]
    assert image_version().startswith(least)
    readme = (ROOT / "release" / "docker" / "README.md").read_text()
    arguments = set(re.findall(r"^ARG (\w+)=", text, re.M))
    assert set(re.findall(r"--build-arg (\w+)=", readme)) <= arguments
    for extra in re.findall(r"EXTRAS=\[([\w,]+)\]", readme):
        assert set(extra.split(",")) <= set(project["optional-dependencies"])
