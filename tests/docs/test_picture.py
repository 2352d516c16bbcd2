"""The picture of the README is drawn from a plan."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs import draw_plan

ROOT = Path(__file__).resolve().parents[2]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


def test_it_shows_model_stages_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, data = draw_plan.gpt, draw_plan.stdlib_bytes
    monkeypatch.setattr(draw_plan, "gpt", lambda **_: gpt(2, 16, 2, 8))
    monkeypatch.setattr(draw_plan, "stdlib_bytes", lambda **_: data(8, 8))
    drawn = draw_plan.picture()
    found = texts(drawn)
    assert {"blocks.0", "blocks.1", "device 0", "device 3"} <= set(found)
    shares = [int(n) for text in found for n in re.findall(r"^stage \d: (\d+)% of the work", text)]
    assert len(shares) == 2
    assert 99 <= sum(shares) <= 101
    inside = [
        float(x) + float(w) for x, w in re.findall(r'x="([\d.]+)" .*?width="([\d.]+)"', drawn)
    ]
    assert max(inside) <= 900, "something sticks out of the picture"


def test_the_committed_picture_can_be_read() -> None:
    found = texts((ROOT / "docs" / "plan.svg").read_text())
    assert "its plan" in found
    assert sum(text.startswith("stage ") for text in found) == 2
