"""Folders of torch.distributed.checkpoint: written for others, and never read."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from raypar.cli import main
from raypar.errors import CheckpointError
from raypar.train.weights import save_as_checkpoint, save_dcp, weights_at


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.tokens.weight


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(1)
    return Tied()


@pytest.fixture
def checkpoint(model: Tied, tmp_path: Path) -> Path:
    torch.save(model.state_dict(), tmp_path / "w.pt")
    save_as_checkpoint(weights_at(tmp_path / "w.pt", torch_files=True), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_loads_the_folder_into_a_model(
    model: Tied, checkpoint: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    out = tmp_path / "dcp"
    told = CliRunner().invoke(
        main, ["checkpoint", "export", str(checkpoint), str(out), "--format", "dcp"]
    )
    assert told.exit_code == 0, told.output
    files = sorted(path.name for path in out.iterdir())
    # Tied weights are two tensors, as in the state of the model.
    assert files == [".metadata", *(f"__0_{i}.distcp" for i in range(len(model.state_dict())))]
    assert told.output == f"wrote {out}: {len(files)} files\n"
    assert not recwarn.list
    torch.manual_seed(2)
    other = Tied()
    state = other.state_dict()
    assert not torch.equal(state["tokens.weight"], model.tokens.weight)
    load(state, checkpoint_id=out, no_dist=True)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    # The way back that the error shows, for whoever trusts the folder.
    dcp_to_torch_save(out, tmp_path / "back.pt")
    back = weights_at(tmp_path / "back.pt", torch_files=True)
    assert all(torch.equal(back.read(n), t) for n, t in model.state_dict().items())


def test_a_folder_of_torch_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    made = tmp_path / "evil"
    made.mkdir()

    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    (made / ".metadata").write_bytes(pickle.dumps(Evil()))
    for torch_files in (False, True):
        with pytest.raises(CheckpointError, match=r"is a pickle.*dcp_to_torch_save"):
            weights_at(made, torch_files=torch_files)
    done = CliRunner().invoke(main, ["checkpoint", "convert", str(made), str(tmp_path / "new")])
    assert done.exit_code == 1
    assert "could run code" in " ".join(done.output.split())
    assert not (tmp_path / "ran").exists()


def test_nothing_is_overwritten_and_formats_do_not_mix(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        save_dcp(weights_at(checkpoint), checkpoint)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_dcp(weights_at(checkpoint), tmp_path / "w.pt" / "below")
    asked = ["checkpoint", "export", str(checkpoint), str(tmp_path / "out"), "--format", "dcp"]
    mixed = CliRunner().invoke(main, [*asked, "--hf", "base"])
    assert mixed.exit_code == 2
    assert "leave one of them out" in " ".join(mixed.output.split())
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "w.pt"]
