"""Object stores that refuse, or that are out of reach: told as such, whatever their errors are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raypar.errors import CheckpointError
from raypar.stages.run import Run
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.checkpoint.pending import Pending
from raypar.train.checkpoint.storage import Storage
from raypar.train.state import TrainState
from tests.train.checkpoint.runs import losses, plan_of, save, start

PLAN = plan_of("mlp", 3, sharded=False)


@pytest.fixture(scope="module")
def running() -> Iterator[Run]:
    with start("mlp", PLAN) as run:
        losses(run, 0, 1)
        yield run


class Denied(Exception):
    """As the clients of object stores have them: no OSError."""


class Bucket(MemoryFileSystem):
    """One that refuses what it is told to."""

    protocol = "refusing"
    refused: ClassVar[set[str]] = set()

    def _check(self, call: str) -> None:
        if call in self.refused:
            raise Denied(f"403: no {call} for you")

    def ls(self, *args: Any, **options: Any) -> Any:
        self._check("ls")
        return super().ls(*args, **options)

    def makedirs(self, *args: Any, **options: Any) -> None:
        self._check("makedirs")
        super().makedirs(*args, **options)

    def cat_file(self, *args: Any, **options: Any) -> Any:
        self._check("cat_file")
        return super().cat_file(*args, **options)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Bucket, "refused", set())
    fsspec.register_implementation("refusing", Bucket, clobber=True)
    return "refusing://bucket/run"


@pytest.mark.parametrize(
    ("refused", "told"),
    [("ls", "cannot be looked into: Denied: 403"), ("makedirs", r"checkpoint\.storage")],
)
def test_a_bucket_that_refuses_is_told(bucket: str, running: Run, refused: str, told: str) -> None:
    Bucket.refused.add(refused)
    with pytest.raises(CheckpointError, match=told):
        CheckpointStore(bucket).begin(running, TrainState(), PLAN)


def test_a_bucket_that_stops_to_answer_is_told_with_its_kind_of_error(
    bucket: str, running: Run
) -> None:
    saved = save(CheckpointStore(bucket), running, PLAN, 1)
    Bucket.refused.update(("ls", "cat_file"))
    with pytest.raises(CheckpointError, match="Denied: 403: no ls"):
        CheckpointStore(bucket).latest()
    with pytest.raises(CheckpointError, match=r"cannot read.*Denied: 403: no cat_file"):
        Checkpoint(saved.path)


def test_a_bucket_out_of_reach_for_a_moment_is_asked_again(
    bucket: str, running: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = Pending.finish, []

    def finish(self: Pending, storage: Storage) -> Checkpoint | None:
        tries.append(self.name)
        Bucket.refused = {"ls"} if len(tries) < 3 else set()
        return real(self, storage)

    monkeypatch.setattr(Pending, "finish", finish)
    store = CheckpointStore(bucket)
    assert save(store, running, PLAN, 1).step == 1
    assert len(tries) >= 3
    store.close()
