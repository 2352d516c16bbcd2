"""Weights read from files, part by part, and what is said of damaged or foreign ones."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file, save_model
from torch import nn

from raypar.errors import CheckpointError
from raypar.sharding.pieces import Piece, piece_of
from raypar.train.checkpoint import Checkpoint
from raypar.train.checkpoint.sealed import FORMAT
from raypar.train.weights import Weights, copy_checkpoint, save_as_checkpoint, weights_at
from tests._tiers import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float16)


class Tied(nn.Module):
    """A tied pair, a buffer, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight


def random_tensors(draw: random.Random) -> dict[str, torch.Tensor]:
    found = {}
    for number in range(6):
        shape = [draw.choice([1, 2, 3, 5, 7]) for _ in range(draw.randrange(4))]
        found[f"layer.{number}"] = (10 * torch.randn(shape)).to(DTYPES[number])
    return found


def random_piece(shape: torch.Size, draw: random.Random) -> Piece:
    ranges = []
    for n in shape:
        start = draw.randrange(n)
        stop = draw.randrange(start + 1, n + 1)
        ranges.append(((start, stop),) if draw.random() < 0.7 or n < 4 else ((0, 1), (2, n)))
    return piece_of(tuple(ranges))


def in_every_kind(tensors: dict[str, torch.Tensor], folder: Path) -> list[Weights]:
    """The same tensors as a file of safetensors, of torch, two files, a checkpoint, a copy."""
    save_file(tensors, folder / "one.safetensors")
    torch.save(tensors, folder / "one.pt")
    (folder / "hf").mkdir()
    names, index = list(tensors), dict[str, str]()
    for part, some in enumerate((names[:2], names[2:])):
        save_file({n: tensors[n] for n in some}, folder / "hf" / f"p{part}.safetensors")
        index |= dict.fromkeys(some, f"p{part}.safetensors")
    text = json.dumps({"weight_map": index})
    (folder / "hf" / "model.safetensors.index.json").write_text(text)
    made = save_as_checkpoint(weights_at(folder / "one.pt", torch_files=True), folder / "made")
    copied = copy_checkpoint(made, folder / "copy")
    assert copied.verify() == []
    kinds: list[Any] = [folder / "one.safetensors", folder / "hf", made, folder / "copy"]
    return [weights_at(folder / "one.pt", torch_files=True), *(weights_at(k) for k in kinds)]


@pytest.mark.parametrize("seed", range(3))
def test_any_part_of_any_tensor_is_read_from_every_kind(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tensors = random_tensors(draw)
    for weights in in_every_kind(tensors, tmp_path):
        if "pt" not in weights.where:
            weights = pickle.loads(pickle.dumps(weights))
        assert set(weights.names) == set(tensors)
        for name, tensor in tensors.items():
            assert weights.forms[name] == (tuple(tensor.shape), tensor.dtype)
            piece = random_piece(tensor.shape, draw)
            for dtype in (tensor.dtype, torch.float64):
                out = torch.empty(piece.shape, dtype=dtype)
                weights.fill(name, piece, out)
                assert torch.equal(out, piece.read(tensor).to(dtype)), (weights.where, name)


def test_tensors_larger_than_a_span_come_through_every_kind(tmp_path: Path) -> None:
    big = torch.arange(3 << 20, dtype=torch.float32).reshape(3, 1 << 10, 1 << 10)
    piece = piece_of((((0, 3),), ((5, 900),), ((1, 7), (1000, 1024))))
    for weights in in_every_kind({"a": torch.ones(3), "b": big, "c": torch.zeros(1)}, tmp_path):
        out = torch.empty(piece.shape)
        weights.fill("b", piece, out)
        assert torch.equal(out, piece.read(big)), weights.where


def test_ties_are_known_however_they_were_written(tmp_path: Path) -> None:
    model = Tied()
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    save_model(model, str(tmp_path / "tied.safetensors"))
    for name in ("tied.pt", "tied.safetensors"):
        weights = weights_at(tmp_path / name, torch_files=True)
        assert weights.names["head.weight"] == weights.names["embed.weight"]
        made = save_as_checkpoint(weights, tmp_path / f"from-{name}")
        found = made.state_dict()
        assert found.keys() == model.state_dict().keys()
        assert found["head.weight"] is found["embed.weight"]
        assert made.bytes < 40 * 8 * 4 + 2000
        again = Tied()
        again.load_state_dict(found)
        assert all(torch.equal(v, found[k]) for k, v in again.state_dict().items())


def test_weights_go_out_as_they_came_in_at_a_url_too(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 3), "n": torch.tensor(7), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "in.safetensors")
    made = save_as_checkpoint(weights_at(tmp_path / "in.safetensors"), "memory://weights/made")
    assert made.verify() == []
    assert made.weights_only
    assert "weights alone" in made.describe()
    back = copy_checkpoint(Checkpoint("memory://weights/made"), tmp_path / "back")
    back.save_safetensors(tmp_path / "out.safetensors")
    found = weights_at(tmp_path / "out.safetensors")
    assert all(torch.equal(found.read(name), value) for name, value in tensors.items())
    with pytest.raises(CheckpointError, match="exists already"):
        copy_checkpoint(made, tmp_path / "back")
    with pytest.raises(CheckpointError, match="saved under no plan"):
        print(made.plan)


def test_a_copy_of_a_damaged_checkpoint_does_not_come_about(tmp_path: Path) -> None:
    save_file({"w": torch.randn(400, 300)}, tmp_path / "in.safetensors")
    made = save_as_checkpoint(weights_at(tmp_path / "in.safetensors"), tmp_path / "made")
    file = tmp_path / "made" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[100_000] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: bytes 0 to"):
        copy_checkpoint(made, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "made"]


def test_what_is_no_file_of_weights_is_told_with_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bin").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "bin" / "pytorch_model.bin")
    torch.save({"w": torch.ones(2), "step": 3}, tmp_path / "mixed.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    for where, text in [
        (tmp_path / "nowhere", "hf download NAME"),
        (tmp_path / "empty", "a Hugging Face folder with model.safetensors"),
        (tmp_path / "bin", r"raypar checkpoint convert .*pytorch_model.bin"),
        (tmp_path / "mixed.pt", "raypar checkpoint convert"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            weights_at(where)
    for name, text in [("mixed.pt", "int 3 under 'step'"), ("code.pt", "torch.save")]:
        with pytest.raises(CheckpointError, match=text):
            weights_at(tmp_path / name, torch_files=True)
    assert weights_at(tmp_path / "bin", torch_files=True).read("w").tolist() == [1.0, 1.0]


@settings(max_examples=examples(37, 150), deadline=None)
@given(st.data())
def test_damaged_headers_end_in_clear_errors(data: st.DataObject) -> None:
    raw = bytearray(save({"a": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.int64)}))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "damaged.safetensors"
        file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
        with contextlib.suppress(CheckpointError):  # any other error fails the test
            weights = weights_at(file)
            for name in weights.names:
                weights.read(name)


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_weights_alone_of_every_format_load(number: int) -> None:
    """Converted once by the raypar of that time."""
    saved = Checkpoint(Path(__file__).parent / "golden" / f"format-{number}")
    assert saved.verify() == []
    assert (saved.weights_only, saved.step) == (True, 0)
    found = saved.state_dict()
    assert found["a.weight"] is found["b.weight"]
    assert found["a.weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert int(found["n"]) == 3
