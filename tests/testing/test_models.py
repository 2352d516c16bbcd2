"""The zoo's models build, run and say the truth about themselves."""

from __future__ import annotations

import importlib.util
import math
import pickle

import pytest
import torch
from torch.overrides import TorchFunctionMode

from raypar.errors import ConfigError
from raypar.testing import models
from raypar.testing.models import Case

HAS_HF = importlib.util.find_spec("transformers") is not None
REQUIRED = {
    "gpt", "gpt_dropout", "mlp", "cnn", "t5", "moe_dense", "moe_sparse", "vit", "lstm", "unet",
    "dlrm", "bert_own", "llama_own", "masked_mean", "two_losses", "gru", "sum_loss",
    "hf_gpt2", "hf_llama", "hf_t5", "hf_bert", "hf_mixtral",
}  # fmt: skip

every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=pytest.mark.skipif(case.hf and not HAS_HF, reason="needs transformers"),
        )
        for case in models.cases()
    ],
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Float32(TorchFunctionMode):
    """Counts the tensors that were computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        self.count += sum(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in found)
        return result


def _step(case: Case, batch_seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = case.model_fn(seed=3)
    loss = case.loss(model, case.batch(batch_seed))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_the_zoo_has_what_it_promises():
    assert set(models.names()) >= REQUIRED
    assert set(models.names(hf=True)) == {n for n in models.names() if n.startswith("hf_")}
    assert models.names(hf=False) == [n for n in models.names() if not n.startswith("hf_")]


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(ConfigError, match="Did you mean 'llama_own'"):
        models.case("lama_own")


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match="already"):

        @models.register(lambda g, b: torch.zeros(b))
        def gpt():
            return torch.nn.Identity()


@every_case
def test_runs_forward_and_backward_in_float64(case: Case):
    loss, grads = _step(case)
    assert loss.shape == ()
    assert math.isfinite(loss)
    assert grads
    assert all(g.dtype == torch.float64 and torch.isfinite(g).all() for g in grads.values())
    assert sum(bool(g.abs().max() > 0) for g in grads.values()) >= 0.8 * len(grads)


@every_case
def test_equal_seeds_give_equal_steps_and_others_do_not(case: Case):
    loss, grads = _step(case)
    again, grads_again = _step(case)
    assert loss == again
    assert grads.keys() == grads_again.keys()
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert _step(case, batch_seed=1)[0] != loss


@every_case
def test_building_leaves_the_generator_to_the_caller(case: Case):
    torch.manual_seed(5)
    first, second = case.model_fn(), case.model_fn()
    torch.manual_seed(5)
    third = case.model_fn()

    def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
        return all(map(torch.equal, a.parameters(), b.parameters()))

    assert same(first, third)
    assert not same(first, second)


@every_case
def test_is_random_only_if_it_says_so(case: Case):
    model = case.model_fn(seed=0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    first = case.loss(model, case.batch())
    model.load_state_dict(state)
    torch.manual_seed(2)
    assert bool(case.loss(model, case.batch()) == first) == (not case.dropout)


@every_case
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_add_up_as_declared(case: Case, parts: int):
    model, batch = case.model_fn(seed=0), case.batch()
    if case.dropout:
        model.eval()
    with torch.no_grad():
        whole = case.loss(model, batch)
        losses = torch.stack([case.loss(model, part) for part in case.split(batch, parts)])
    together = losses.sum() if case.reduction == "sum" else losses.mean()
    limit = (1e-5 if case.fp32_ops else 1e-12) * max(1.0, abs(float(whole)))
    adds_up = case.reduction != "count" and not case.feels_microbatches
    assert (abs(float(whole - together)) <= limit) == adds_up


@every_case
def test_gradients_of_two_halves_make_the_whole(case: Case):
    if case.reduction == "count" or case.feels_microbatches or case.dropout:
        pytest.skip("halves of this batch do not add up")
    batch = case.batch()
    model, halved = case.model_fn(seed=0), case.model_fn(seed=0)
    case.loss(model, batch).backward()
    for half in case.split(batch, 2):
        (case.loss(halved, half) / (1 if case.reduction == "sum" else 2)).backward()
    for a, b in zip(model.parameters(), halved.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-11)


@every_case
@pytest.mark.parametrize("global_batch", [2, 16])
def test_runs_at_other_batch_sizes(case: Case, global_batch: int):
    batch = case.batch(seed=1, global_batch=global_batch)
    assert math.isfinite(case.loss(case.model_fn(seed=0), batch).detach())
    assert len(case.split(batch, global_batch)) == global_batch
    with pytest.raises(ConfigError, match="equal parts of a batch"):
        case.split(batch, global_batch + 1)


@every_case
def test_says_whether_it_computes_in_float32(case: Case):
    model, batch = case.model_fn(seed=0), case.batch()
    with _Float32() as seen:
        case.loss(model, batch)
    assert (seen.count > 0) == case.fp32_ops


@every_case
def test_builds_on_the_meta_device(case: Case):
    with torch.device("meta"):
        model = case.model_fn()
    assert all(parameter.is_meta for parameter in model.parameters())


@every_case
def test_travels_to_another_process(case: Case):
    copy = pickle.loads(pickle.dumps(case))
    assert copy == case
    assert copy.model_fn is case.model_fn


@every_case
def test_batch_statistics_are_declared(case: Case):
    kinds = {type(module).__name__ for module in case.model_fn(seed=0).modules()}
    assert case.batchnorm == any("BatchNorm" in kind for kind in kinds)


def test_a_masked_mean_has_uneven_parts_and_an_empty_one():
    tokens, _, mask = models.case("masked_mean").batch()
    counts = mask.sum(dim=1)
    assert 0 in counts
    assert counts.max() == tokens.shape[1]
    assert len(counts.unique()) > 2


def test_two_samples_share_the_broadcast_mask():
    case = models.case("gpt_shared_mask")
    (_, first), (_, second) = case.split(case.batch(), 2)
    assert first["mask"] is second["mask"]


def test_tied_shared_and_frozen_parameters():
    gpt = models.case("gpt").model_fn()
    assert gpt.get_parameter("head.weight") is gpt.get_parameter("tokens.weight")
    _, grads = _step(models.case("partly_frozen"))
    assert set(grads) == {"adapter.weight", "adapter.bias", "head.weight", "temperature"}
