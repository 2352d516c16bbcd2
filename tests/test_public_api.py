"""The public names are frozen: a change to this list is a decision."""

import subprocess
import sys

import pytest

import raypar

NAMES = [
    "Callback",
    "CaptureError",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "Cluster",
    "ClusterError",
    "CommAbortedError",
    "CommError",
    "CommTimeoutError",
    "ConfigError",
    "DataError",
    "EarlyStop",
    "FailureConfig",
    "LossScale",
    "NetworkSettings",
    "NonFiniteError",
    "NothingFitsError",
    "OpGraph",
    "OptimizerError",
    "PadTo",
    "Plan",
    "PlanError",
    "RayparError",
    "Result",
    "RunConfig",
    "ScalingConfig",
    "ScheduleError",
    "SearchConfig",
    "StageDiedError",
    "Trainer",
    "TrainingError",
    "__version__",
    "batches",
    "capture",
    "explain",
    "plan",
]


def test_the_names_are_these() -> None:
    assert raypar.__all__ == NAMES
    assert dir(raypar) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(raypar, name)
    assert name == "__version__" or value.__doc__


def test_every_error_is_public() -> None:
    from raypar import errors

    declared = {
        n
        for n, v in vars(errors).items()
        if isinstance(v, type) and issubclass(v, errors.RayparError)
    }
    assert declared == {n for n in NAMES if n.endswith("Error")}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        raypar.trainer  # noqa: B018


def test_plan_is_the_function_and_the_module() -> None:
    import raypar.plan
    from raypar.plan import Plan

    assert callable(raypar.plan)
    assert raypar.plan.Plan is Plan is raypar.Plan


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import raypar", {"torch", "ray", "numpy", "networkx", "pydantic"}),
        ("import raypar; raypar.Cluster.local(2)", {"ray"}),
        (
            "import raypar; raypar.capture; raypar.plan; raypar.SearchConfig; raypar.explain; "
            "import raypar.search.simulate",
            {"ray"},
        ),
    ],
)
def test_an_import_costs_only_what_is_used(code: str, absent: set[str]) -> None:
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())


def test_planning_works_where_ray_cannot_be_imported() -> None:
    code = """
import sys
sys.modules["ray"] = None
import torch
import raypar as rp
batch = torch.randn(4, 8)
graph = rp.capture(lambda: torch.nn.Linear(8, 8), batch, lambda out, batch: out.square().mean())
plan = rp.plan(graph, rp.Cluster.local(1), rp.SearchConfig(trials=2))
print(rp.explain(plan, graph))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
