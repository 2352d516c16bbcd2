"""Every backend passes the one suite."""

from __future__ import annotations

from typing import Any

import pytest

from raypar.testing.comm import Case, CommConformance

from .conftest import Processes, run_threads


class TestLocal(CommConformance):
    def run(self, case: Case, *, size: int = 3, timeout_s: float = 20.0) -> list[Any]:
        return run_threads(case, size, timeout_s)


class TestGloo(CommConformance):
    @pytest.fixture(autouse=True)
    def _processes(self, processes: Processes) -> None:
        self.world = processes

    def run(self, case: Case, *, size: int = 3, timeout_s: float = 20.0) -> list[Any]:
        return self.world.run(case, size, timeout_s)
