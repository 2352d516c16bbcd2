"""The plan of a run, searched on the devices that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from raypar._plan_text import duration
from raypar.errors import ConfigError
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.train.attempt import Prepared
from raypar.train.data import RandomState
from raypar.train.metrics_file import told
from raypar.train.settings import Settings

if TYPE_CHECKING:
    from raypar.train.measure import RayMeasurer


def find_plan(
    settings: Settings,
    made: Prepared,
    cluster: Cluster,
    before: Plan | None,
    tell: Callable[[str], None],
) -> Plan:
    """Searches a plan, and writes ``search.json`` into the run's folder.

    Args:
        settings: What the trainer was asked for.
        made: The run.
        cluster: The devices.
        before: The plan that the run had until now, if it had one.
        tell: Is told how far the search is.

    Raises:
        PlanError: Nothing fits.
        KeyboardInterrupt: The search was interrupted; its best plan is in ``plan.json``.
    """
    # Only here does train/ need a search.
    from raypar.search.config import SearchConfig
    from raypar.search.plan import search
    from raypar.search.progress import SoFar

    so_far = SoFar()
    config = settings.search or SearchConfig()
    before = before or (made.resume.plan if made.resume is not None else None)
    if before is not None and made.graph.feels_microbatches:
        # M belongs to the recipe of such a model: it stays what it was.
        config = dataclasses.replace(config, microbatches=before.microbatches)
    measures = config.chosen_planner == "optuna" and config.measure != 0
    if settings.lent is not None and measures:
        if config.measure != "auto":
            raise ConfigError(
                f"search.measure is {config.measure!r}: plans are measured on placement groups of "
                "their own, and this run has only the devices that it was lent; set measure=0"
            )
        measures = False
    with random_state_kept(), ExitStack() as stack:
        warm = None
        profiles = settings.lent is None and config.profile not in ("auto", 0)
        if (measures or profiles) and not settings.scaling.in_process:
            warm = stack.enter_context(_measurer(settings, made, cluster))
            if measures:
                warm.prepare()
        measurer = warm if measures else None
        found = search(
            made.graph,
            cluster,
            config,
            measurer=measurer,
            profiler=warm,
            progress=lambda trial, best: tell(so_far.line(trial, best)),
        )
    with told(made.folder):
        (made.folder / "search.json").write_text(found.record.to_json() + "\n")
        if found.record.stopped == "interrupted":  # a search then ends with its best; a run ends
            found.plan.save(made.folder / "plan.json")
            raise KeyboardInterrupt
    return found.plan


def plan_words(plan: Plan) -> str:
    """A plan in one line, with the time of a step that was foreseen where there is one."""
    from raypar.search.interop.contest import in_words

    step = plan.predicted.get("step_s")
    return in_words(plan) + ("" if step is None else f"; step {duration(step)} foreseen")


def _measurer(settings: Settings, made: Prepared, cluster: Cluster) -> RayMeasurer:
    from raypar.train.measure import RayMeasurer

    return RayMeasurer(
        made.graph,
        cluster,
        made.opened.example,
        settings.optimizer,
        seed=settings.seed,
        recipe=settings.recipe,
        scaling=settings.scaling,
    )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Sets the random states back at the end."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.set()
