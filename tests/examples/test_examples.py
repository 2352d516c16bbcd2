import itertools
import math
from pathlib import Path

import pytest
import torch

from examples.data import stdlib_bytes
from examples.models import gpt
from raypar.config import load_config
from raypar.mesh.cluster import Cluster

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def test_batches_are_windows_one_byte_apart() -> None:
    tokens, targets = next(stdlib_bytes(global_batch=5, seq_len=7))
    assert tokens.shape == targets.shape == (5, 7)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 256


def test_the_seed_decides_the_batches_and_every_batch_is_new() -> None:
    def take(seed: int) -> torch.Tensor:
        return torch.stack([t for t, _ in itertools.islice(stdlib_bytes(4, 16, seed), 3)])

    first = take(1)
    assert torch.equal(first, take(1))
    assert not torch.equal(first, take(2))
    assert len({tuple(row.tolist()) for row in first.flatten(0, 1)}) == 12


def test_the_text_is_python_source() -> None:
    tokens, _ = next(stdlib_bytes(64, 256))
    text = bytes(tokens.flatten().tolist())
    assert b"self" in text
    assert b"def " in text


def test_an_untrained_gpt_guesses_uniformly_and_ties_its_embedding() -> None:
    torch.manual_seed(0)
    model = gpt(layers=2, width=32, heads=2, seq_len=16)
    loss = model(*next(stdlib_bytes(8, 16)))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(256), abs=0.3)
    assert model.head.weight is model.token_embedding.weight


def test_gpt_looks_only_back() -> None:
    torch.manual_seed(0)
    model = gpt(layers=2, width=32, heads=2, seq_len=8)
    tokens, targets = next(stdlib_bytes(1, 8))
    before_head: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda _module, _args, out: before_head.append(out))
    model(tokens, targets)
    model(tokens.clone().index_fill_(1, torch.tensor([5]), 7), targets)
    first, second = before_head
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5:], second[:, 5:])


def test_dropout_acts_in_training_only() -> None:
    model = gpt(layers=1, width=16, heads=2, seq_len=8, dropout=0.5)
    batch = next(stdlib_bytes(4, 8))
    assert model(*batch) != model(*batch)
    model.eval()
    assert model(*batch) == model(*batch)


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        gpt(width=10, heads=4)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_config_loads(path: Path) -> None:
    load_config(path)


def test_a_described_cluster_can_be_read() -> None:
    path = FOLDER / "clusters" / "two_nodes.yaml"
    cluster = Cluster.load(path)
    assert cluster.n_devices > 1
    assert f"--cluster examples/clusters/{path.name}" in path.read_text()
