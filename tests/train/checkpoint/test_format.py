"""Index files: read as written, refused where they are anything else; old ones load."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.errors import CheckpointError
from raypar.stages.generators import random_states, set_random_states
from raypar.stages.saved import Key
from raypar.train.checkpoint import Checkpoint
from raypar.train.checkpoint.format import BLOCK, Index, SavedFile, SavedPiece, SavedTensor
from raypar.train.checkpoint.image import lay_out, write_tensors
from raypar.train.checkpoint.sealed import FORMAT, seal
from tests._tiers import examples
from tests.train.checkpoint.runs import losses, plan_of, start

GOLDEN = Path(__file__).parent / "golden"


def index(**changes: Any) -> Index:
    """A small one, of two pieces in two files."""
    files = tuple(SavedFile(f"rank-{r:05d}.safetensors", BLOCK + 5, (1, 2)) for r in (0, 1))
    pieces = tuple(
        SavedPiece(r, 8, (2, 3), ((((2 * r, 2), (0, 3)), ((0, 2), (0, 3))),)) for r in (0, 1)
    )
    key = Key("parameter", "", "weight")
    tensor = SavedTensor(key, (4, 3), torch.float32, True, pieces)
    values: dict[str, Any] = {
        "step": 3, "world": 2, "files": files, "tensors": {key: tensor},
        "names": {"weight": "weight"}, "state": {"step": 3}, "plan": {},
        "values": {"states": {"weight": {"t": (1, float("inf"))}}, "update": {}},
    }  # fmt: skip
    return Index(**{**values, **changes})


def test_an_index_comes_back() -> None:
    assert Index.from_bytes(index().to_bytes(), "x") == index()


def resealed(data: bytes, change: Any) -> bytes:
    """The same file with something else in it, and a right checksum."""
    inner = json.loads(data)["index"]
    change(inner)
    return seal(inner)


BAD: dict[str, Any] = {
    "a path": lambda i: i["files"][0].__setitem__(0, "../rank-00000.safetensors"),
    "outside of the file": lambda i: i["tensors"][0][6][0].__setitem__(1, BLOCK),
    "no such file": lambda i: i["tensors"][0][6][0].__setitem__(0, 2),
    "a part is missing": lambda i: i["tensors"][0][6].pop(),
    "outside of the whole": lambda i: i["tensors"][0][6][0][3][0][0][0].__setitem__(0, 3),
    "other sizes": lambda i: i["tensors"][0][6][0][3][0][1][0].__setitem__(1, 1),
    "an unknown dtype": lambda i: i["tensors"][0].__setitem__(4, "object"),
    "negative": lambda i: i.__setitem__("step", -1),
    "no number": lambda i: i.__setitem__("world", True),
    "huge": lambda i: i["tensors"][0].__setitem__(3, [2**70, 3]),
    "a key is missing": lambda i: i.pop("plan"),
    "too few checksums": lambda i: i["files"][0].__setitem__(2, [1]),
    "an unknown mark": lambda i: i.__setitem__("values", {"$code": "print()"}),
    "twice": lambda i: i["tensors"].append(i["tensors"][0]),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused(what: str) -> None:
    with pytest.raises(CheckpointError, match="x is damaged"):
        Index.from_bytes(resealed(index().to_bytes(), BAD[what]), "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=examples(75, 300))
@given(st.randoms(use_true_random=False), JSON)
def test_any_value_anywhere_is_read_or_refused(draw: random.Random, value: Any) -> None:
    def change(inner: Any) -> None:
        while True:
            at = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if isinstance(inner[at], (dict, list)) and inner[at] and draw.random() < 0.8:
                inner = inner[at]
                continue
            inner[at] = value
            return

    try:
        data = resealed(index().to_bytes(), change)
    except ValueError:  # not a JSON number
        return
    with contextlib.suppress(CheckpointError):  # any other error fails the test
        Index.from_bytes(data, "x")


@settings(max_examples=examples(50, 200))
@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="x is damaged"):
        Index.from_bytes(data, "x")


def test_a_tensor_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"w is a tensor of torch\.quint8"):
        lay_out({"w": ((2,), torch.quint8)})


def test_generators_go_on_where_they_were() -> None:
    before = random_states(accelerator=False)
    random.gauss(0, 1)  # leaves one behind
    states = random_states(accelerator=False)
    wanted = torch.rand(3).tolist(), random.random(), random.gauss(0, 1)
    set_random_states(states)
    assert (torch.rand(3).tolist(), random.random(), random.gauss(0, 1)) == wanted
    set_random_states(before)
    for name in states:
        with pytest.raises(ValueError, match="no state of"):
            set_random_states({name: torch.ones(3)})


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_checkpoints_of_every_format_load(number: int) -> None:
    """Made once by `make_golden`, with the raypar of that time."""
    saved = Checkpoint(GOLDEN / f"format-{number}")
    assert saved.verify() == []
    assert saved.state.samples == 16
    expected = json.loads((GOLDEN / f"format-{number}.json").read_text())
    with start("sum_loss", plan_of("sum_loss", 4, sharded=False), seed=3) as run:
        state = saved.restore(run)
        assert losses(run, state.step, 2) == pytest.approx(expected["losses"], rel=1e-9)


def make_golden() -> None:
    """Writes the golden checkpoint of the present format."""
    from raypar.train.checkpoint import CheckpointStore
    from tests.train.checkpoint.runs import save

    plan = plan_of("sum_loss", 2, sharded=False)
    with start("sum_loss", plan) as run:
        losses(run, 0, 2)
        store = CheckpointStore(GOLDEN)
        saved = save(store, run, plan, 2)
        store.close()
        Path(saved.path).rename(GOLDEN / f"format-{FORMAT}")
        found = {"losses": losses(run, 2, 2)}
    (GOLDEN / f"format-{FORMAT}.json").write_text(json.dumps(found) + "\n")


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    """As a device, which a rename would take away from the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no file; give another name"):
        write_tensors(tmp_path / "pipe", {}, lambda *_: None)
    assert os.listdir(tmp_path) == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()
