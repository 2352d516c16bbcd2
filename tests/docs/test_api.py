"""The API reference: every public name tells what it does, and with which types."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

import raypar
from docs import build_api
from docs.build_api import Entry, entries, public_names, to_markdown


@pytest.fixture(scope="module")
def known() -> dict[str, Entry]:
    return {entry.name: entry for entry in entries()}


def test_every_public_name_has_a_docstring(known: dict[str, Entry]) -> None:
    bare = [e.name for e in known.values() if e.kind != "value" and not e.doc]
    assert not bare, f"without a docstring: {bare}"


def test_every_argument_and_result_has_a_type(known: dict[str, Entry]) -> None:
    untyped = {e.name: e.untyped for e in known.values() if e.untyped}
    assert not untyped, f"without annotation: {untyped}"


def test_every_name_of_the_package_is_in_the_reference(known: dict[str, Entry]) -> None:
    missing = {name for name in public_names(raypar) if f"raypar.{name}" not in known}
    assert not missing
    assert known["raypar.Trainer.fit"].kind == "method"
    assert known["raypar.plan"].signature.endswith("-> Plan")


@pytest.mark.parametrize("name", ["Trainer", "ScalingConfig", "RunConfig", "CheckpointConfig"])
def test_every_setting_is_described(name: str, known: dict[str, Entry]) -> None:
    doc = known[f"raypar.{name}"].doc
    told = [p for p in inspect.signature(getattr(raypar, name)).parameters if f"{p}:" not in doc]
    assert not told, f"{name} says nothing of {told}"


def test_the_page_reads_as_markdown() -> None:
    page = to_markdown()
    assert page.count("```") % 2 == 0
    assert "### `Trainer`\n\n```python\nTrainer(\n    model_fn: " in page
    assert "**Raises**\n\n- `" in page
    assert " at 0x" not in page, "an address differs from build to build"
    assert to_markdown() == page


def test_what_lacks_words_or_types_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(x, y: int = 1):  # type: ignore[no-untyped-def]
        return x

    @dataclasses.dataclass
    class Undescribed:
        x: int = 0

    made: Any = type("module", (), {"__all__": ["bare", "Undescribed"], "bare": bare})
    made.Undescribed = Undescribed
    monkeypatch.setattr(build_api, "MODULES", {"raypar.made_up": ""})
    monkeypatch.setattr(build_api.importlib, "import_module", lambda _name: made)
    found = {e.name.rpartition(".")[2]: e for e in entries()}
    assert found["bare"].untyped == ("x", "return")
    assert not found["bare"].doc
    assert not found["Undescribed"].doc


def test_the_script_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr("sys.argv", ["build_api", str(tmp_path / "api.md")])
    with pytest.warns(RuntimeWarning, match="docs.build_api"):
        runpy.run_module("docs.build_api", run_name="__main__")
    assert (tmp_path / "api.md").read_text() == to_markdown()
