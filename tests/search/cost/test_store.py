"""The store of measurements: appended by several, damaged, full, of a read-only folder."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypar import Cluster
from raypar.search.cost import store as store_module
from raypar.search.cost.features import StageWork
from raypar.search.cost.rows import (
    ALONE,
    CollectiveRow,
    StageRow,
    StepRow,
    StoreRow,
    row_from_json,
    row_to_json,
)
from raypar.search.cost.store import STORE_FORMAT, MeasurementStore
from raypar.search.cost.work import Work

seconds = st.floats(1e-6, 100.0)


def _stage(flops: float, forward: float = 1e-3, at: float = 1.0) -> StageRow:
    work = StageWork(((Work(flops, 64.0, matmul=True), (1, 2, 1, 1)),), 8, 1, "full", (("x", 2),))
    return StageRow(work, "CPU", (forward, 2e-3, 0.0, 0.0, 1e-4), ALONE, 1, "m", 1, at)


@st.composite
def rows(draw: st.DrawFn) -> StoreRow:
    kind = draw(st.sampled_from(("stage", "collective", "step")))
    if kind == "stage":
        return _stage(draw(st.floats(0, 1e15)), draw(seconds), draw(st.floats(1, 1e10)))
    if kind == "collective":
        return CollectiveRow("all_reduce", "inside", 2, draw(st.floats(0, 1e12)), draw(seconds))
    features = draw(st.dictionaries(st.text(max_size=5), st.floats(-9, 9), max_size=3))
    return StepRow(features, draw(seconds), draw(seconds), 3, 4, "p", "m")


@given(rows())
def test_a_row_comes_back_from_its_line(row: StoreRow) -> None:
    line = row_to_json(row)
    assert "\n" not in line
    assert row_from_json(line) == row
    assert row_from_json(line).key == row.key


@pytest.mark.parametrize(
    "line",
    ["", "7", "[]", '{"kind":"stage"}', '{"kind":"guess"}', '{"kind":"collective","size":2}',
     row_to_json(_stage(5.0)).replace("0.001", "-1"),
     row_to_json(_stage(5.0)).replace("0.001", "NaN"),
     row_to_json(_stage(5.0)).replace('"alone"', '"nowhere"')],
)  # fmt: skip
def test_a_line_that_is_no_row_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        row_from_json(line)


def test_figures_that_cannot_be_are_not_kept(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.jsonl")
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="cannot be"):
            store.add(_stage(1.0, bad))
    assert not len(store)
    assert not len(MeasurementStore(store.path))


def test_equal_measurements_become_one(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.jsonl")
    store.add(_stage(1.0, 1e-3), _stage(2.0))
    store.add(_stage(1.0, 4e-3))
    for seen in (store, MeasurementStore(store.path)):
        assert len(seen) == 2
        (merged,) = [row for row in seen.stages if row.count == 2]
        assert merged.seconds[0] == pytest.approx(2e-3)  # the geometric mean
        assert merged.seconds[2] == 0.0  # what was never measured stays so


def test_a_line_cut_short_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    MeasurementStore(path).add(_stage(1.0), _stage(2.0))
    path.write_bytes(path.read_bytes()[:-20])
    store = MeasurementStore(path)
    assert len(store) == 1
    assert not store.notes
    store.add(_stage(3.0))
    assert len(MeasurementStore(path)) == 2
    assert not list(tmp_path.glob("*.bad"))


@pytest.mark.parametrize("damage", [b"\x00\xff\x80\n", b'{"kind":"stage"}\n', b"hello\n"])
def test_a_damaged_file_is_kept_aside_and_its_rows_go_on(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "m.jsonl"
    MeasurementStore(path).add(_stage(1.0), _stage(2.0))
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:2], damage, *whole[2:]]))
    store = MeasurementStore(path)
    assert len(store) == 2
    assert "m.bad" in store.notes[0]
    assert damage in (tmp_path / "m.bad").read_bytes()
    again = MeasurementStore(path)
    assert len(again) == 2
    assert not again.notes


def test_a_file_of_something_else_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("no line ends here")
    store = MeasurementStore(path)
    assert (tmp_path / "m.bad").read_text() == "no line ends here"
    assert store.notes
    store.add(_stage(1.0))
    assert len(MeasurementStore(path)) == 1


def test_several_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"

    def work(number: int) -> None:
        store = MeasurementStore(path)
        for i in range(10):
            store.add(_stage(100.0 * number + i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(MeasurementStore(path)) == 40
    assert not list(tmp_path.glob("*.bad"))


def test_the_oldest_go_where_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MOST_ROWS", 5)
    monkeypatch.setattr(store_module, "MOST_BYTES", 4000)
    path = tmp_path / "m.jsonl"
    store = MeasurementStore(path)
    for i in range(60):
        store.add(_stage(float(i)))
    kept = [row.work.works[0][0].flops for row in MeasurementStore(path).stages]
    assert kept == [55.0, 56.0, 57.0, 58.0, 59.0]
    assert path.stat().st_size < 8000


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = MeasurementStore(tmp_path / "file" / "m.jsonl")
    store.add(_stage(1.0))
    store.add(_stage(2.0))
    assert len(store) == 2
    assert sum("RAYPAR_CACHE_DIR" in note for note in store.notes) == 1


def test_clusters_of_equal_devices_share_what_stages_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path))
    two = MeasurementStore.for_cluster(Cluster.local(2))
    two.add(_stage(1.0), StepRow({}, 1.0, 2.0))
    four = MeasurementStore.for_cluster(Cluster.local(4))
    assert four.path != two.path
    assert len(four.stages) == 1
    assert not four.steps
    assert not len(four)


@pytest.mark.parametrize("number", range(1, STORE_FORMAT + 1))
def test_stores_of_every_format_load(tmp_path: Path, number: int) -> None:
    """Written once by the raypar of that time."""
    golden = Path(__file__).parent / "golden" / f"format-{number}.jsonl"
    store = MeasurementStore(Path(shutil.copy(golden, tmp_path)))
    assert store.notes == []
    assert store.stages == [_stage(3.0, 2e-3, 5.0)]
    assert store.collectives == [CollectiveRow("all_reduce", "inside", 2, 4096.0, 1e-4, at=6.0)]
    assert store.steps == [StepRow({"compute": 0.5}, 0.02, 0.03, 3, 4, "p", "m", at=7.0)]


def test_a_store_of_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    newer = f'{{"format": {STORE_FORMAT + 1}, "torch": "9"}}\n{{"kind": "dream"}}\n'
    path.write_text(newer)
    store = MeasurementStore(path)
    assert f"reads up to {STORE_FORMAT}" in store.notes[0]
    store.add(_stage(1.0))
    store.reload()
    assert len(store) == 1
    assert path.read_text() == newer
    beside = MeasurementStore(tmp_path / "own.jsonl", siblings=[path])
    assert beside.stages == []
    assert beside.notes == []
