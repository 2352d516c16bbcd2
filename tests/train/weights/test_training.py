"""Training that begins with weights from a file, as one process that loaded it would train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import raypar as rp
from raypar.testing import random_sharding
from raypar.testing.plans import random_plan
from raypar.train.weights import save_as_checkpoint, weights_at

STEPS = 3


class Model(nn.Module):
    """Tied weights over stages, a frozen part, buffers that train, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.norm = nn.LayerNorm(16)
        self.norm.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(16))
        self.register_buffer("unused", torch.zeros(3))
        self.register_buffer("twist", torch.linspace(0, 1, 16), persistent=False)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.body(self.embed(x) * self.twist + self.seen))
        return self.head(h)


def batches() -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randint(0, 12, (8,), generator=g), torch.randint(0, 12, (8,), generator=g))
        for _ in range(STEPS)
    ]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of such a model, other than any seed gives."""
    torch.manual_seed(99)
    model = Model()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    save_model(model, str(tmp_path / "in.safetensors"))
    return tmp_path / "in.safetensors"


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., rp.Trainer]:
    def make(name: str, **changed: Any) -> rp.Trainer:
        arguments: dict[str, Any] = {
            "loss_fn": nn.functional.cross_entropy,
            "optimizer": adamw,
            "ema_decay": 0.5,
            "data": batches(),
            "steps": STEPS,
            "seed": 5,
            "scaling_config": rp.ScalingConfig(num_workers=0),
            "run_config": rp.RunConfig(name=name, storage_path=tmp_path, log_every=0),
            "search_config": rp.SearchConfig(stages=1, microbatches=1),
        }
        return rp.Trainer(Model, **{**arguments, **changed})

    return make


def losses_of(result: rp.Result) -> list[float]:
    lines = (Path(result.path) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights_after(result: rp.Result, *, average: bool = False) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return result.checkpoint.state_dict(average=average)


def model_alone(file: Path) -> nn.Module:
    torch.manual_seed(5)
    model = Model()
    found = load_file(file)
    found["head.weight"] = found["embed.weight"]
    model.load_state_dict(found)
    return model


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (2, 3, 4))]
)
def test_training_goes_on_as_in_one_process_that_loaded_the_file(
    trainer: Callable[..., rp.Trainer], file: Path, seed: int
) -> None:
    graph = rp.capture(Model, batches()[0], nn.functional.cross_entropy)
    cluster = rp.Cluster.local(4)
    plan = random_plan(graph, cluster, seed=seed)
    if seed % 2:
        plan = random_plan(graph, rp.Cluster.local(2), seed=seed)
        plan = random_sharding(graph, plan, cluster, seed=seed)
    whole = trainer(
        "whole", init_from=file, search_config=rp.SearchConfig(microbatches=1, stages=1)
    )
    alone, apart = whole.fit(), trainer("apart", init_from=file, plan=plan).fit()
    assert losses_of(apart) == pytest.approx(losses_of(alone), rel=1e-9)
    for average in (False, True):
        torch.testing.assert_close(
            weights_after(apart, average=average), weights_after(alone, average=average),
            rtol=1e-9, atol=1e-11,
        )  # fmt: skip


def test_every_kind_of_weights_begins_the_same_training_bit_for_bit(
    trainer: Callable[..., rp.Trainer], file: Path, tmp_path: Path
) -> None:
    made = save_as_checkpoint(weights_at(file), tmp_path / "made")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(file.read_bytes())
    first = trainer("first", init_from=file).fit()
    ways: dict[str, dict[str, Any]] = {
        "folder": {"init_from": tmp_path / "hf"},
        "checkpoint": {"init_from": made},
        "resumed": {"resume_from": made.path},
    }
    for name, how in ways.items():
        again = trainer(name, **how).fit()
        assert losses_of(again) == losses_of(first), name
    # The first loss is that of the file's weights in the model's training mode.
    with_file = model_alone(file)
    x, y = batches()[0]
    with torch.no_grad():
        loss = nn.functional.cross_entropy(with_file.eval()(x), y)
    assert losses_of(first)[0] == pytest.approx(float(loss), rel=0.3)
    unused = weights_after(first)["unused"]
    assert torch.equal(unused, load_file(file)["unused"])
    assert float(unused.abs().sum()) > 0


def test_a_trained_checkpoint_begins_a_run_of_its_own(
    trainer: Callable[..., rp.Trainer], file: Path, tmp_path: Path
) -> None:
    trained = trainer("trained", init_from=file).fit()
    again = trainer("again", init_from=trained.path, steps=1)
    assert again.fit().metrics["total_steps"] == 1
    # A run that is resumed does not begin anew, even where the file is gone.
    file.unlink()
    on = trainer("trained", init_from=file, resume_from="auto", steps=STEPS + 1).fit()
    assert on.metrics["total_steps"] == STEPS + 1


def test_other_dtypes_are_converted_and_told(
    trainer: Callable[..., rp.Trainer], file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    half = {n: t.to(torch.bfloat16) for n, t in load_file(file).items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({n: t.double() for n, t in half.items()}, tmp_path / "same.safetensors")
    run = rp.RunConfig(name="half", storage_path=tmp_path, log_every=1)
    result = trainer("half", init_from=tmp_path / "half.safetensors", run_config=run).fit()
    assert "are bfloat16 in" in capsys.readouterr().out
    same = trainer("same", init_from=tmp_path / "same.safetensors").fit()
    assert losses_of(result) == losses_of(same)


def test_weights_of_another_model_are_refused_by_name(
    trainer: Callable[..., rp.Trainer], file: Path, tmp_path: Path
) -> None:
    good = load_file(file)
    wrong = tmp_path / "wrong.safetensors"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        (
            {("body.0.weights" if n == "body.0.weight" else n): t for n, t in good.items()},
            r"1 of its \d+ tensors are not there: 'body.0.weight' \(nearest there: "
            r"'body.0.weights'\); 1 of the \d+ tensors there are not in it: 'body.0.weights' "
            r"\(nearest here: 'body.0.weight'\)",
        ),
        (
            {**good, "body.3.weight": torch.ones(16, 31, dtype=torch.float64)},
            r"1 have another form: 'body.3.weight' is \(16, 31\) float64 there and \(16, 32\) "
            "float64 here",
        ),
        ({**good, "seen": torch.ones(16, dtype=torch.int64)}, r"'seen' is \(16,\) int64 there"),
        ({f"model.{n}": t for n, t in good.items()}, "behind 'model.': this model is a part"),
        ({}, r"and \d+ more"),
    ]
    for tensors, text in cases:
        save_file(tensors, wrong)
        with pytest.raises(rp.CheckpointError, match=text):
            trainer("wrong", init_from=wrong).fit()
    # Values for what the model makes itself are left where they are.
    save_file({**good, "twist": torch.zeros(16, dtype=torch.float64)}, wrong)
    left = trainer("left", init_from=wrong).fit()
    assert losses_of(left) == losses_of(trainer("right", init_from=file).fit())
    made = save_as_checkpoint(weights_at(file), tmp_path / "made")
    with pytest.raises(rp.ConfigError, match="gives weights too"):
        trainer("twice", init_from=file, resume_from=made).fit()
