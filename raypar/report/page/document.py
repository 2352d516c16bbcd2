"""A plan as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from raypar._plan_html import hue
from raypar._plan_text import count_of, duration, size
from raypar.errors import ConfigError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.report.page._bands import bands, device_map
from raypar.report.page._figures import ShareBar, headline, path_bars
from raypar.report.page._memory import memory_charts
from raypar.report.page._record import best_trials, decision_words, profile_words, reasons
from raypar.report.page._timeline import gantt_chart
from raypar.report.page._trials import trial_plots
from raypar.report.page._words import FIDELITY, KINDS, MEMORY, STATE
from raypar.search.record import FIDELITIES, SearchRecord
from raypar.search.simulation import Simulation
from raypar.search.what_if import WhatIf

_MOST_BANDS, _FIRST_BANDS, _LAST_BANDS = 20, 10, 6
"""Rank groups that are drawn; of more, the first and the last ones, and the others are a table."""
_HERE = Path(__file__).parent


def plan_page(
    plan: Plan,
    graph: OpGraph,
    cluster: Cluster,
    *,
    simulation: Simulation,
    record: SearchRecord | None = None,
    what_if: Sequence[WhatIf] = (),
    lowered: LoweredPlan | None = None,
    model: str = "",
) -> str:
    """The page: the plan, a step in time and in memory, the search, and what would change.

    Args:
        plan: The plan.
        graph: The graph it is for.
        cluster: The cluster it is for.
        simulation: A simulated step of it (`raypar.search.simulate`).
        record: What the search did that found it, where that is known.
        what_if: From `raypar.search.what_if`.
        lowered: The lowered plan, where it is at hand.
        model: What to call the model; default: the name of what was captured.

    Returns:
        HTML, below 1 MB for plans of 128 stages. Names of modules and texts of errors are escaped.

    Raises:
        PlanError: The plan does not fit the graph or the cluster.
    """
    check_plan(plan, graph, cluster)
    lowered = lowered or lower_plan(graph, plan)
    model = model or _model_name(graph)
    rows = bands(plan, graph, cluster, lowered, simulation)
    charts, charts_left = memory_charts(simulation)
    shown = rows if len(rows) <= _MOST_BANDS else [*rows[:_FIRST_BANDS], *rows[-_LAST_BANDS:]]
    boxes = sorted((box for row in rows for box in row.boxes), key=lambda box: box.index)
    return _template().render(
        plan=plan,
        model=model,
        cluster=cluster,
        figures=headline(plan, graph, cluster, simulation, record),
        simulation=simulation,
        boxes=boxes,
        whole_s=sum(box.seconds for box in boxes) or 1.0,
        hues=[hue(group) for group, _ in plan.schedule.placement],
        groups=[group for group, _ in plan.schedule.placement],
        nodes=device_map(plan, cluster),
        shown_bands=shown,
        folded_bands=rows[_FIRST_BANDS:-_LAST_BANDS] if len(rows) > _MOST_BANDS else [],
        first_bands=_FIRST_BANDS,
        gantt=gantt_chart(plan, simulation),
        path=path_bars(simulation.path_shares()),
        memory_charts=charts,
        memory_left=charts_left,
        record=record,
        trials=None if record is None else trial_plots(record),
        best=[] if record is None else best_trials(record),
        reasons=[] if record is None else reasons(record),
        profiled="" if record is None else profile_words(record),
        importance=[] if record is None else _bars(record.importance),
        bound_parts=[] if record is None else _bound_parts(record),
        what_if=what_if,
        alternatives=sorted(plan.alternatives.items(), key=lambda item: item[1]),
        kinds=KINDS,
        memory_words=MEMORY,
        memory_seen=[k for k in MEMORY if any(m.peak_parts.get(k) for m in simulation.memory)],
        fidelities=FIDELITIES,
        fidelity_words=FIDELITY,
        states=STATE,
        decision_words=decision_words,
    )


def save_page(page: str, path: str | Path) -> None:
    """Writes a page.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html: cannot write {str(path)!r}: {error.strerror}") from None


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": duration, "size": size, "change": _change}
    environment.globals["count_of"] = count_of
    environment.globals["style"] = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    environment.globals["script"] = Markup((_HERE / "page.js").read_text(encoding="utf-8"))
    return environment.get_template("page.html.jinja")


def _change(seconds: float, before: float) -> str:
    """``-12.3 %``: what a step takes more or less than before."""
    return f"{100 * (seconds / before - 1):+.1f} %" if before > 0 else ""


def _bars(shares: dict[str, float]) -> list[ShareBar]:
    """Largest first; the longest bar fills its place."""
    most = max(shares.values(), default=0.0) or 1.0
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return [ShareBar(name, max(0.0, v) / most, f"{v:.1%}") for name, v in ordered]


def _bound_parts(record: SearchRecord) -> list[ShareBar]:
    whole = max(record.bound_parts.values(), default=0.0) or 1.0
    return [ShareBar(k, v / whole, duration(v)) for k, v in record.bound_parts.items()]


def _model_name(graph: OpGraph) -> str:
    """What was captured: a function's or a class's name."""
    made = graph.model_fn
    if inspect.isfunction(made):
        names = [n for n in made.__qualname__.split(".") if not n.startswith("<")]
        return names[-1] if names and "<lambda>" not in made.__qualname__ else "a model"
    return type(made).__name__
