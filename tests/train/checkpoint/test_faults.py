"""Whatever fails or dies at whatever byte: the last good checkpoint stays, and damage is found."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raypar.errors import CheckpointError, RayparError
from raypar.stages.run import Run
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.checkpoint.format import Index
from raypar.train.checkpoint.pending import Pending
from raypar.train.checkpoint.storage import LocalStorage, Storage, UrlStorage
from raypar.train.checkpoint.writing import note_name
from raypar.train.config import CheckpointConfig
from raypar.train.state import TrainState
from tests._tiers import examples
from tests.train.checkpoint.runs import differences, losses, plan_of, save, start

ROOT = Path(__file__).resolve().parents[3]
PLAN = plan_of("mlp", 3, sharded=False)
STEPS = ("_write", "_sync", "_replace", "make_folder", "remove")
"""The steps of which all writing to a local folder consists."""


@pytest.fixture(scope="module")
def running() -> Iterator[Run]:
    with start("mlp", PLAN) as run:
        losses(run, 0, 1)
        yield run


class _Trap:
    """Lets the n-th of some calls fail, after half of what it should have written."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.at = -1
        for name in STEPS:
            patch.setattr(LocalStorage, name, self._spied(getattr(LocalStorage, name), name))

    def _spied(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def step(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                if name == "_write":
                    real(args[0], args[1], bytes(args[2])[: len(args[2]) // 2])
                raise OSError(28, "No space left on device")
            return real(*args)

        return step


def test_any_write_may_fail(tmp_path: Path, running: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of each writer in turn raises; what was there before stays, and writing goes on."""
    trap = _Trap(monkeypatch)
    store = CheckpointStore(tmp_path, CheckpointConfig(num_to_keep=1))
    save(store, running, PLAN, 0)
    trap.calls = 0
    save(store, running, PLAN, 1)
    count = trap.calls
    failures: list[str] = []
    for at in range(1, count + 1):
        before = CheckpointStore(tmp_path).latest()
        assert before is not None
        trap.calls, trap.at = 0, at
        try:
            save(store, running, PLAN, at)
        except RayparError as error:
            failures.append(str(error))
        trap.at = -1
        after = CheckpointStore(tmp_path).latest()
        assert after is not None
        assert after.step >= before.step
        assert not after.verify()
    assert len(failures) > count // 4
    assert all("No space left" in text for text in failures)
    last = save(store, running, PLAN, 10_000)
    assert differences(last, last) == []
    assert os.listdir(tmp_path) == [last.name]  # nothing is left of what failed
    store.close()


def test_random_kills(tmp_path: Path) -> None:
    """SIGKILL at random moments, over and over in one folder; see `killed.py`."""
    kills = examples(4, 8)
    ended = subprocess.run(
        [sys.executable, "-m", "tests.train.checkpoint.killed", str(tmp_path), str(kills), "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["kills"] == kills
    assert found["broken"] == found["lost"] == found["other_losses"] == 0
    assert found["steps"] > 2


def test_a_flipped_bit_is_found_anywhere(tmp_path: Path, running: Run) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig(num_to_keep=None))
    older, newer = (save(store, running, PLAN, step) for step in (1, 2))
    store.close()
    draw = random.Random(4)
    files = sorted(Path(newer.path).iterdir())
    for turn in range(24):
        file = files[turn % len(files)]
        data = file.read_bytes()
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(damaged))
        try:
            problems = Checkpoint(newer.path).verify()
        except CheckpointError as error:
            problems = [str(error)]
        assert problems, (file, turn)
        assert file.name in problems[0]
        if file.name != "index.json":
            with pytest.raises(CheckpointError, match=f"{file.name} is damaged.*{older.name}"):
                Checkpoint(newer.path).restore(running)
        file.write_bytes(data)
    assert newer.verify() == []


def test_missing_and_cut_files_are_named(tmp_path: Path, running: Run) -> None:
    store = CheckpointStore(tmp_path)
    saved = save(store, running, PLAN, 1)
    store.close()
    file = next(Path(saved.path).glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    with pytest.raises(CheckpointError, match=f"{file.name} is cut off.*{len(data)}.*start anew"):
        saved.restore(running)
    with pytest.raises(CheckpointError, match=f"{file.name} has {len(data) - 7} bytes"):
        saved.state_dict()
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        saved.restore(running)
    with pytest.raises(CheckpointError, match=r"no index\.json"):
        Checkpoint(tmp_path / "nothing")


def test_the_newest_with_a_good_index_is_the_latest(tmp_path: Path, running: Run) -> None:
    store = CheckpointStore(tmp_path)
    older, newer = (save(store, running, PLAN, step) for step in (1, 2))
    store.close()
    (Path(newer.path) / "index.json").write_text("{}")
    with pytest.warns(UserWarning, match="passed over"):
        found = CheckpointStore(tmp_path).latest()
    assert found is not None
    assert found.path == older.path


def test_leftovers_are_swept_and_what_others_hold_is_not(tmp_path: Path, running: Run) -> None:
    store = CheckpointStore(tmp_path)
    first = save(store, running, PLAN, 1)
    store.close()
    (tmp_path / ".000007-step-9.abcd.tmp").mkdir()
    (tmp_path / ".000003-step-9.abcd.trash").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert CheckpointStore(tmp_path).all()[0].path == first.path
    assert len(os.listdir(tmp_path)) == 4  # looking changes nothing
    store = CheckpointStore(tmp_path)
    second = save(store, running, PLAN, 2)
    store.close()
    assert sorted(os.listdir(tmp_path)) == [first.name, second.name, "notes.txt"]


def test_a_checkpoint_that_is_removed_while_it_is_written_is_told(
    tmp_path: Path, running: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another run in the same folder: nobody waits for its notes for ever."""
    store = CheckpointStore(tmp_path)
    real = Pending.finish

    def finish(self: Pending, storage: Storage) -> Checkpoint | None:
        if {note_name(rank) for rank in range(self.world)} <= set(storage.names(self.folder)):
            shutil.rmtree(tmp_path)  # all is written, and nothing counts yet
        return real(self, storage)

    monkeypatch.setattr(Pending, "finish", finish)
    store.begin(running, TrainState(step=1), PLAN)
    with pytest.raises(CheckpointError, match=r"removed from .* while it was written"):
        store.wait(30)
    monkeypatch.undo()
    assert save(store, running, PLAN, 2).step == 2
    store.close()


def test_an_error_after_a_checkpoint_counts_does_not_lose_it(
    tmp_path: Path, running: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    real = LocalStorage.settle

    def settled(self: LocalStorage, folder: str, name: str) -> None:
        real(self, folder, name)
        monkeypatch.undo()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalStorage, "settle", settled)
    assert save(store, running, PLAN, 1).step == 1
    store.close()


def test_where_folders_cannot_be_renamed_the_index_comes_last(
    running: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore("memory://raypar-test/run", CheckpointConfig(num_to_keep=2))
    for step in (1, 2, 3):
        save(store, running, PLAN, step)
    assert [c.step for c in store.all()] == [2, 3]
    wanted = store.latest()
    assert wanted is not None
    real = UrlStorage.write

    def fails_at_index(self: UrlStorage, name: str, chunks: Any) -> None:
        if name.endswith("index.json"):
            raise CheckpointError("the bucket is gone")
        real(self, name, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(UrlStorage, "write", fails_at_index)
        with pytest.raises(CheckpointError, match="bucket is gone"):
            save(store, running, PLAN, 4)
    again = CheckpointStore("memory://raypar-test/run")
    latest = again.latest()
    assert latest is not None
    assert (latest.step, latest.verify()) == (3, [])
    assert latest.restore(running) == TrainState(step=3, samples=24)
    assert differences(latest, save(again, running, PLAN, 5)) == []
    store.close()
    again.close()


def test_storage_that_cannot_be_written_is_told(tmp_path: Path, running: Run) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "folder")
    with pytest.raises(CheckpointError, match="storage_path"):
        store.begin(running, TrainState(), PLAN)
    with pytest.raises(CheckpointError, match=r"facts\.model is a function"):
        CheckpointStore(tmp_path).begin(running, TrainState(), PLAN, {"model": losses})
    with pytest.raises(CheckpointError, match="nosuch"):
        CheckpointStore("nosuch://bucket")


def test_a_rank_elsewhere_is_told_to_share_the_storage(
    tmp_path: Path, running: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStorage, "read", lambda *_: b"another machine's folder")
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="all nodes must reach one storage"):
        store.begin(running, TrainState(), PLAN)
    assert os.listdir(tmp_path) == []


def test_an_index_that_anybody_wrote_is_read_or_refused(tmp_path: Path, running: Run) -> None:
    store = CheckpointStore(tmp_path)
    saved = save(store, running, PLAN, 1)
    store.close()
    data = (Path(saved.path) / "index.json").read_bytes()
    assert Index.from_bytes(data, "x").to_bytes() == data
    newer = data.replace(b'"format":1', b'"format":2')
    with pytest.raises(CheckpointError, match=r"format 2.*upgrade raypar"):
        Index.from_bytes(newer, "x")
    shutil.rmtree(saved.path)


def test_a_folder_opened_while_others_are_swept_away_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    (tmp_path / ".000007-step-9.abcd.tmp").mkdir()
    real, opened = store._storage.names, ".000008-step-10.ef01.tmp"

    def names(folder: str = "") -> list[str]:
        store._opening = opened  # the thread that trains begins a checkpoint just now
        store._storage.make_folder(opened)
        return real(folder)

    monkeypatch.setattr(store._storage, "names", names)
    store._sweep()
    assert [path.name for path in tmp_path.iterdir()] == [opened]
