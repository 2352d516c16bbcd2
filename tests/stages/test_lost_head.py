"""A run whose cluster has lost its head. Starts no Ray."""

from __future__ import annotations

import pytest
import ray

from raypar.stages.remote import RayRun
from tests.stages.fakes import fake_specs


def test_closing_without_a_head_says_so_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("this call waits for the head")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr("raypar.stages.remote.lost_head", lambda: "nobody answers at head:6379")
    for name in ("get", "kill"):
        monkeypatch.setattr(ray, name, forbidden)
    run = RayRun(fake_specs(2), name="alone")
    run._driver = object()
    with pytest.warns(RuntimeWarning, match=r"alone-\w+ cannot give its devices back.*head:6379"):
        run.close()
    run.close()
