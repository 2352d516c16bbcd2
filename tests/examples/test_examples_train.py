"""Every example config trains in small, in this process; the models keep the law."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import TensorDataset

import examples.digits
import examples.llama
from examples.digits import accuracy, cnn, digits
from examples.llama import llama, write_checkpoint
from examples.recommender import clicks, recommender
from raypar._launch import train_config
from raypar.cli import main
from raypar.config import load_config
from raypar.errors import ConfigError
from raypar.graph.capture import capture
from raypar.mesh.cluster import Cluster
from raypar.search.config import SearchConfig
from raypar.search.plan import plan
from raypar.testing import assert_plan_equivalent
from raypar.train.result import Result

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real digits where scikit-learn is installed, else images of the same form."""
    try:
        digits("train")
    except ConfigError:
        labels = torch.arange(640) % 10
        g = torch.Generator().manual_seed(0)
        drawn = torch.rand(640, 1, 8, 8, generator=g)
        bright = torch.nn.functional.one_hot(labels, 64).view(-1, 1, 8, 8)
        made = TensorDataset((drawn + bright) / 2, labels)
        monkeypatch.setattr(examples.digits, "digits", lambda part: made)


def trained(tmp_path: Path, name: str, *overrides: str) -> tuple[Result, list[float]]:
    """Trains an example config in this process; the result, and the loss of every step."""
    settings = [
        "mesh.num_workers=0", f"run.storage_path={tmp_path / 'runs'}", "run.log_every=0",
        *overrides,
    ]  # fmt: skip
    result = train_config(load_config(FOLDER / f"{name}.yaml", settings))
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").open()]
    return result, [line["loss"] for line in lines if "loss" in line]


def test_the_digits_are_learnt_and_evaluated(images: None, tmp_path: Path) -> None:
    result, losses = trained(tmp_path, "digits", "train={steps: 24}", "data.global_batch=32")
    assert result.plan.replicas == 2
    assert sum(losses[-4:]) < sum(losses[:4])
    assert 0 < result.metrics["eval_loss"] < 3


def test_digits_without_scikit_learn_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        digits("train")


def test_the_two_parts_of_the_digits_share_no_image() -> None:
    pytest.importorskip("sklearn")
    train, test = digits("train"), digits("test")
    assert len(train) + len(test) == 1797  # type: ignore[arg-type]
    assert train[0][0].shape == (1, 8, 8)
    assert 0 <= float(train[0][0].min()) < float(train[0][0].max()) <= 1


def test_accuracy_is_the_share_of_hits() -> None:
    logits = torch.eye(4)
    assert accuracy(logits, (logits, torch.tensor([0, 1, 2, 0]))) == 0.75


def test_the_recommender_learns_who_clicks(tmp_path: Path) -> None:
    small = "{tables: [200, 50, 10]}"
    result, losses = trained(
        tmp_path, "recommender", "train.steps=40", f"model.kwargs={small}", f"data.kwargs={small}"
    )
    assert [axis for axis, _ in result.plan.stages[0].mesh.inner] == ["x"]
    assert sum(losses[-8:]) < sum(losses[:8])


def test_clicks_follow_categories_and_numbers() -> None:
    dense, categories, clicked = next(clicks(4000, tables=(8, 3)))
    assert categories.shape == (4000, 2, 4)
    assert int(categories[:, 0].max()) < 8
    assert int(categories[:, 1].max()) < 3
    line = torch.linalg.lstsq(dense, clicked - clicked.mean()).solution
    assert torch.corrcoef(torch.stack((dense @ line, clicked)))[0, 1] > 0.3


def test_llama_is_tuned_from_the_weights_of_its_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = str(tmp_path / "tiny")
    write_checkpoint(folder)
    few = ("train.steps=4", "data.global_batch=4", "data.kwargs={seq_len: 16}")
    from_it = (f"model.kwargs.folder={folder}", f"model.init_from={folder}")
    result, losses = trained(tmp_path, "llama", *few, *from_it)
    assert len(result.plan.stages) == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    batch = next(examples.llama.prompts(4, 16))
    assert losses[0] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    command = ["checkpoint", "export", str(result.path), str(tmp_path / "tuned"), "--hf", folder]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    tuned = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "tuned"))
    assert not torch.equal(tuned.model.norm.weight, model.model.norm.weight)


def test_a_missing_llama_checkpoint_is_told_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"python -m examples\.llama"):
        llama(str(tmp_path))


@pytest.mark.parametrize("name", ["cnn", "recommender"])
def test_example_models_keep_the_law(name: str) -> None:
    loss: Any = None
    if name == "cnn":
        g = torch.Generator().manual_seed(0)
        batch: Any = (torch.rand(8, 1, 8, 8, generator=g).double(), torch.arange(8))
        loss = torch.nn.functional.cross_entropy
        wanted = SearchConfig(stages=2, replicas=2, microbatches=2)

        def model() -> torch.nn.Module:
            return cnn(4).double()
    else:
        dense, categories, clicked = next(clicks(8, tables=(40, 20)))
        batch = (dense.double(), categories, clicked.double())
        wanted = SearchConfig(stages=2, tensor=2, microbatches=2)

        def model() -> torch.nn.Module:
            return recommender((40, 20), 8).double()

    made = plan(capture(model, batch, loss), Cluster.local(4), wanted)
    assert_plan_equivalent(model, batch, made, loss_fn=loss, steps=2)
