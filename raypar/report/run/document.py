"""The page of a run: what was measured beside what its plan promised."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from raypar._plan_html import hue
from raypar._plan_text import count_of, duration, size
from raypar.errors import ConfigError
from raypar.report.page._figures import ShareBar, path_bars
from raypar.report.page._memory import memory_charts
from raypar.report.page._record import best_trials, decision_words
from raypar.report.page._timeline import Gantt, gantt_chart
from raypar.report.page._words import KINDS, MEMORY
from raypar.report.run._curves import STYLE, loss_curve, parts_curve, small_curves
from raypar.report.run._figures import figures, startup
from raypar.report.run._tables import event_rows, link_rows, rank_rows
from raypar.report.run.files import RunFiles, read_run
from raypar.report.run.measured import MeasuredStep, measured_step
from raypar.report.run.predicted import Prediction
from raypar.search.record import FIDELITIES

_HERE = Path(__file__).parent
_PAGE = _HERE.parent / "page"
_MOST_BANDS = 20


def write_report(run_folder: Path, out: Path) -> None:
    """Writes the page of a run.

    Args:
        run_folder: Folder of the run; it may still go on.
        out: Where to write the HTML; it needs no other file and no network.

    Raises:
        ConfigError: It is no run's folder, a file in it is damaged, or `out` cannot be written.
    """
    page = run_page(run_folder)
    try:
        Path(out).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(out)!r}: {error.strerror}") from None


def run_page(run_folder: Path) -> str:
    """The page as text; texts of errors, names and paths in it are escaped.

    Raises:
        ConfigError: It is no run's folder, or a file in it is damaged.
    """
    run = read_run(Path(run_folder))
    limits = {lane.group: lane.memory_limit for lane in run.prediction.lanes} if (
        run.prediction
    ) else {}  # fmt: skip
    measured = measured_step(run.timeline, limits) if run.timeline else None
    until = max([s.step_s for s in (run.prediction, measured) if s is not None], default=1.0)
    bands = run.prediction.bands if run.prediction else ()
    boxes = sorted((box for band in bands for box in band.boxes), key=lambda box: box.index)
    groups = [group for group, _ in run.plan.schedule.placement] if run.plan else []
    charts = _gantts(run, measured, until)
    names = [name for *_, chart in charts for name, _ in chart.rows]
    return _template().render(
        run=run,
        plan=run.plan,
        prediction=run.prediction,
        figures=figures(run, measured),
        error=(run.result or {}).get("error"),
        startup=startup(run.result),
        loss=loss_curve(run.steps, run.evaluations),
        parts=parts_curve(run.steps),
        curves=small_curves(run.steps),
        part_styles=STYLE,
        charts=charts,
        longest_name=max(map(len, names), default=0),
        measured=measured,
        path=_path(run.prediction),
        memory=_memory(run, measured, until),
        bands=bands[:_MOST_BANDS],
        bands_left=max(0, len(bands) - _MOST_BANDS),
        boxes=boxes,
        whole_s=sum(box.seconds for box in boxes) or 1.0,
        hues=[hue(group) for group in groups],
        groups=groups,
        ranks=rank_rows(run.timeline) if run.timeline else [],
        links=link_rows(run.timeline, run.prediction),
        ports=sorted(run.prediction.links, key=lambda p: -p.busy)[:16] if run.prediction else [],
        events=event_rows(run.events),
        record=run.record,
        best=best_trials(run.record, 5) if run.record else [],
        fidelities=FIDELITIES,
        decision_words=decision_words,
        kinds=KINDS,
        memory_words=MEMORY,
    )


def _gantts(
    run: RunFiles, measured: MeasuredStep | None, until: float
) -> list[tuple[str, str, Gantt]]:
    """(id, title, chart): the predicted step above the measured one, on one scale."""
    if run.plan is None:
        return []
    found = []
    if run.prediction is not None:
        words = f"predicted: {duration(run.prediction.step_s)}"
        found.append(("predicted", words, gantt_chart(run.plan, run.prediction, until)))
    if measured is not None:
        words = f"measured: step {measured.step + 1}, {duration(measured.step_s)}"
        found.append(("measured", words, gantt_chart(run.plan, measured, until)))
    return found


def _memory(
    run: RunFiles, measured: MeasuredStep | None, until: float
) -> list[tuple[str, Any, str]]:
    """(which step, charts, what is left out), with one scale for time and one for bytes."""
    steps = [("predicted", run.prediction)] if run.prediction else []
    pairs: list[tuple[str, Prediction | MeasuredStep]] = [*steps]
    if measured is not None and measured.memory:
        pairs.append(("measured", measured))
    top = max((max(step.peak_bytes) for _, step in pairs), default=0)
    return [(name, *memory_charts(step, until, top)) for name, step in pairs]


def _path(prediction: Prediction | None) -> list[ShareBar]:
    return [] if prediction is None else path_bars(prediction.path)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([_HERE, _PAGE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": duration, "size": size}
    environment.globals["count_of"] = count_of
    css = [path.read_text(encoding="utf-8") for path in (_PAGE / "page.css", _HERE / "run.css")]
    environment.globals["style"] = Markup("\n".join(css))
    environment.globals["script"] = Markup((_PAGE / "page.js").read_text(encoding="utf-8"))
    return environment.get_template("run.html.jinja")
