"""Config values refuse what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raypar.errors import ConfigError
from raypar.train.config import RunConfig, ScalingConfig


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_workers": -1}, "num_workers is -1"),
        ({"num_workers": True}, "num_workers is True"),
        ({"num_workers": "all"}, "num_workers is 'all'; give 'auto', 0"),
        ({"cpus_per_worker": 0}, "cpus_per_worker is 0"),
        ({"threads_per_worker": 0}, "threads_per_worker is 0"),
        ({"num_workers": 0, "use_gpu": True}, "in-process backend runs on CPU"),
    ],
)
def test_scaling(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ScalingConfig(**values)


@pytest.mark.parametrize("name", ["", "a/b", "..", "."])
def test_a_run_is_one_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="names a folder"):
        RunConfig(name=name)


def test_the_folder_is_made_and_must_be_writable(tmp_path: Path) -> None:
    assert RunConfig(name="a", storage_path=tmp_path / "b").folder() == tmp_path / "b" / "a"
    assert RunConfig(storage_path=tmp_path).folder() != RunConfig(storage_path=tmp_path).folder()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .* set storage_path"):
        RunConfig(name="a", storage_path=tmp_path / "file").folder()
