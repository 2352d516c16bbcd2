"""What a private Ray needs around it: folders, authentication, sizes. No Ray is started here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raypar.errors import ClusterError
from raypar.train import _folders, session


def test_a_folder_of_a_killed_process_is_removed_and_no_other(tmp_path: Path) -> None:
    script = (
        "import os, sys; from raypar.train import _folders; "
        "print(_folders.make(sys.argv[1]), flush=True); os.kill(os.getpid(), 9)"
    )
    left = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    ).stdout.strip()
    mine = _folders.make(str(tmp_path))
    foreign = tmp_path / "rp-foreign"
    foreign.mkdir()
    assert Path(left).is_dir()
    assert _folders.remove_stale(str(tmp_path)) == [left]
    assert not Path(left).exists()
    assert Path(mine).is_dir()
    assert foreign.is_dir()


def test_a_process_number_that_was_given_again_counts_as_gone(tmp_path: Path) -> None:
    folder = Path(_folders.make(str(tmp_path)))
    owner = folder / "raypar-owner"
    owner.write_text(owner.read_text() + "0")  # the same number, started at another time
    assert _folders.remove_stale(str(tmp_path)) == [str(folder)]


def test_a_folder_of_another_container_is_left_alone(tmp_path: Path) -> None:
    folder = Path(_folders.make(str(tmp_path)))
    (folder / "raypar-owner").write_text("pid:[1]\n999999999 1")
    assert _folders.remove_stale(str(tmp_path)) == []


def test_far_more_ranks_than_cores_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with pytest.raises(ClusterError, match=r"500 ranks.*4 cores.*at most 32.*num_workers=4"):
        session.start_private_ray(500)


@pytest.mark.parametrize(
    ("env", "changed"),
    [
        ({}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None}),
        ({"RAY_AUTH_MODE": "token"}, {}),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, {}),
    ],
)
def test_the_authentication_mode_that_ray_was_imported_with_is_kept(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], changed: dict[str, str | None]
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert session._authentication() == changed


def test_a_token_that_cannot_be_read_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    assert len(session._authentication()["RAY_AUTH_TOKEN"] or "") == 64


class Fake:
    """A Ray that notes when it begins and ends."""

    def __init__(self, patch: pytest.MonkeyPatch, up: bool = False) -> None:
        self.up, self.told = up, list[str]()
        patch.setattr(session.ray, "is_initialized", lambda: self.up)
        patch.setattr(session.ray, "init", self._init)
        patch.setattr(session.ray, "shutdown", self._shutdown)

    def _init(self, **_: object) -> None:
        self.up = True
        self.told.append("init")

    def _shutdown(self) -> None:
        self.up = False
        self.told.append("shutdown")


def test_runs_on_several_threads_share_a_ray_and_the_last_one_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Fake(monkeypatch)
    first, second = session.connect("local", num_cpus=3), session.connect("local")
    assert (first.shared_cpus, second.shared_cpus) == (None, 3)
    first.close()
    first.close()  # twice is once
    assert fake.told == ["init"]
    second.close()
    assert fake.told == ["init", "shutdown"]
    session.connect("local").close()
    assert fake.told == ["init", "shutdown"] * 2


def test_a_ray_that_was_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, up=True)
    session.connect("local").close()
    assert fake.told == []


def test_a_cluster_whose_head_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch)
    monkeypatch.setattr(session.discover, "connect", lambda _: fake._init())
    monkeypatch.setattr(session, "_left", False)
    for answer, told in (("", ["init", "shutdown"]), ("it says nothing", ["init"])):
        monkeypatch.setattr(session.discover, "lost_head", lambda answer=answer: answer)
        fake.told.clear()
        session.connect("head:6379").close()
        assert fake.told == told
        assert session.exit_would_hang() == bool(answer)


def test_no_run_begins_on_a_connection_whose_head_still_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hangs = [True, False]
    monkeypatch.setattr(session, "_left", True)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(session.discover, "lost_head", lambda: hangs.pop(0))
    with pytest.raises(ClusterError, match="in a new process"):
        session.connect()
    assert session.exit_would_hang()
    session.connect().close()  # it answers again
    assert not session.exit_would_hang()
