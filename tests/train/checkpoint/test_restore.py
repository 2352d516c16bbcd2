"""Saved under one plan, restored under another: every tensor equal, and training goes on alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from raypar.errors import CheckpointError, OptimizerError
from raypar.stages.recipe import LossScale, Recipe
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.config import CheckpointConfig
from tests._tiers import examples
from tests.train.checkpoint.runs import (
    OPTIMIZERS,
    adamw,
    differences,
    graph_of,
    losses,
    momentum,
    plan_of,
    save,
    start,
)

SMALL = ("mlp", "sum_loss", "partly_frozen")


@settings(max_examples=examples(2, 7))
@given(
    name=st.sampled_from(SMALL),
    optimizer=st.sampled_from(OPTIMIZERS),
    plans=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    steps=st.integers(0, 2),
)
@example("gpt", adamw, (2, 5), 1)  # tied over stages
def test_every_tensor_comes_back_under_any_plan(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    optimizer: object,
    plans: tuple[int, int],
    steps: int,
) -> None:
    folder = tmp_path_factory.mktemp("store")
    before, after = (plan_of(name, seed) for seed in plans)
    first, second = CheckpointStore(folder / "a"), CheckpointStore(folder / "b")
    with start(name, before, optimizer) as run:  # type: ignore[arg-type]
        losses(run, 0, steps)
        saved = save(first, run, before, steps)
        weights = run.state_dict()
    with start(name, after, optimizer, seed=1) as run:  # type: ignore[arg-type]
        state = saved.restore(run)
        again = save(second, run, after, steps)
        assert state.step == steps
        for key, tensor in run.state_dict().items():
            assert torch.equal(tensor, weights[key]), key
    assert differences(saved, again) == []
    assert not saved.verify()
    assert not again.verify()
    assert saved.plan == before
    whole = saved.state_dict()
    assert list(whole) == list(weights)
    assert all(torch.equal(whole[key], weights[key]) for key in weights)
    first.close()
    second.close()


@pytest.mark.parametrize(("name", "plans"), [("mlp", (3, 6)), ("cnn", (4, 9))])
def test_training_goes_on(tmp_path: Path, name: str, plans: tuple[int, int]) -> None:
    feels = graph_of(name).feels_microbatches
    before, after = (plan_of(name, seed, parts=2 if feels else None) for seed in plans)
    store = CheckpointStore(tmp_path)
    with start(name, before) as run:
        losses(run, 0, 2)
        saved = save(store, run, before, 2)
        wanted = losses(run, 2, 3)
        weights = run.state_dict()
    with start(name, before, seed=5) as run:
        assert losses(run, saved.restore(run).step, 3) == wanted
        found = run.state_dict()
        assert all(torch.equal(found[key], weights[key]) for key in weights)
    with start(name, after, seed=5) as run:
        assert losses(run, saved.restore(run).step, 3) == pytest.approx(wanted, rel=1e-9)
    store.close()


def test_the_recipe_comes_back(tmp_path: Path) -> None:
    recipe = Recipe(
        scheduler=_scheduler, ema_decay=0.5, loss_scale=LossScale(init_scale=8.0, growth_interval=2)
    )
    plans = plan_of("mlp", 1), plan_of("mlp", 4)
    store = CheckpointStore(tmp_path, CheckpointConfig(num_to_keep=None))
    with start("mlp", plans[0], recipe=recipe) as run:
        losses(run, 0, 3)
        saved = save(store, run, plans[0], 3)
        wanted = losses(run, 3, 3)
        end = save(store, run, plans[0], 6)
    average = saved.state_dict(average=True)
    assert not all(torch.equal(average[k], v) for k, v in saved.state_dict().items())
    with start("mlp", plans[0], recipe=recipe, seed=1) as run:
        saved.restore(run)
        assert losses(run, 3, 3) == wanted
        assert differences(end, save(store, run, plans[0], 6)) == []
    with start("mlp", plans[1], recipe=recipe, seed=1) as run:
        saved.restore(run)
        assert losses(run, 3, 3) == pytest.approx(wanted, rel=1e-9)
        again = save(store, run, plans[1], 6).state_dict(average=True)
    for key, tensor in end.state_dict(average=True).items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-9, atol=1e-12)
    with start("mlp", plans[1]) as run, pytest.raises(OptimizerError, match="set ema_decay"):
        saved.restore(run)
    store.close()


def test_the_weights_alone_go_under_another_optimizer(tmp_path: Path) -> None:
    plan = plan_of("mlp", 2)
    store = CheckpointStore(tmp_path)
    with start("mlp", plan) as run:
        losses(run, 0, 2)
        saved = save(store, run, plan, 2)
    with start("mlp", plan, momentum) as run, pytest.raises(OptimizerError, match="AdamW"):
        saved.restore(run)
    with start("mlp", plan, momentum) as run:
        saved.restore(run, weights_only=True)
        found, wanted = run.state_dict(), saved.state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    store.close()


def test_another_model_is_told_by_the_tensors_that_differ(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with start("mlp", plan_of("mlp", 2)) as run:
        saved = save(store, run, plan_of("mlp", 2), 0)
    with start("sum_loss", plan_of("sum_loss", 2)) as run:
        name = next(iter(graph_of("mlp").params))
        with pytest.raises(CheckpointError, match=f"another model: {name} is"):
            saved.restore(run)
    store.close()


def test_one_file_in_the_models_own_names(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    plan = plan_of("partly_frozen", 3)
    with start("partly_frozen", plan) as run:
        saved = save(store, run, plan, 0)
        weights = run.state_dict()
    saved.save_safetensors(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    with pytest.raises(CheckpointError, match="ema_decay"):
        saved.save_safetensors(tmp_path / "model.safetensors", average=True)
    # A rank's file is one that any program can read.
    for file in Path(saved.path).glob("*.safetensors"):
        assert load_file(file)
    assert Checkpoint(saved.path).describe().count("\n") > 5
    store.close()


def _scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
