"""The sweep with Ray Tune, in small."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_sweep_finds_a_trial(ray_session: str, tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="Ray Tune needs the extra tune")
    pytest.importorskip("pyarrow", reason="Ray Tune needs the extra tune")
    pytest.importorskip("tensorboardX", reason="Ray Tune needs the extra tune")
    from examples.sweep import sweep

    small = ("train.steps=5", "data={target: 'examples.data:stdlib_bytes', global_batch: 4, "
             "kwargs: {seq_len: 8}}", "search={stages: 1, replicas: 1}")  # fmt: skip
    found = sweep(trials=1, storage=tmp_path, overrides=small)
    assert found["loss"] < 7
    assert found["step"] == 5
    assert found["plan_stages"] == 1
    assert 1e-4 <= found["config"]["optimizer.kwargs.lr"] <= 1e-1
