"""Proposals looked at side by side, by whoever runs functions: threads, processes, Ray tasks.

The driver of the study asks and tells; workers get plain decisions and give back outcomes. A worker
captures the model once, at the first proposal that it gets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import dataclass, replace

from raypar.errors import ConfigError, TrainingError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.search.config import SearchConfig
from raypar.search.interop.workbench import Workbench
from raypar.search.study.judge import Judge, Outcome
from raypar.search.study.space import Decisions

_DEFAULT_WIDTH = 4


@dataclass(frozen=True)
class Question:
    """What workers need to know; picklable as far as `capture` is.

    Attributes:
        capture: Captures the model.
        cluster: The devices.
        config: Options of the search.
        calibration: What the cluster reaches.
        name: Equal for equal questions.
    """

    capture: Callable[[], OpGraph]
    cluster: Cluster
    config: SearchConfig
    calibration: Calibration
    name: str


class Elsewhere:
    """Hands proposals to an executor.

    Args:
        executor: Runs functions elsewhere.
        question: What they are about.
        width: So many proposals are looked at side by side.
    """

    def __init__(self, executor: Executor, question: Question, width: int = _DEFAULT_WIDTH) -> None:
        self.width = width
        self._executor = executor
        self._question = question

    def look(self, decisions: Decisions, limits: Mapping[str, float]) -> Future[Outcome]:
        """Begins to look at a proposal."""
        return self._executor.submit(look_at, self._question, decisions, dict(limits))


def answer_of(look: Future[Outcome]) -> Outcome:
    """What a look came to; of a look that was lost (its node died, say), that it failed.

    Raises:
        ConfigError: The executor runs nothing any more.
        Exception: What the capture or the look raised, if it is no error of raypar's.
    """
    try:
        return look.result()
    except (BrokenExecutor, CancelledError) as error:
        raise ConfigError(
            f"the executor of the search runs nothing any more ({type(error).__name__}: {error}): "
            "give a new one, or none"
        ) from error
    except TrainingError as error:
        return Outcome("failed", reason=str(error))


_JUDGES: dict[str, Judge] = {}
_TURN = threading.Lock()
"""Threads of one process share a judge, whose tables are for one at a time."""


def look_at(question: Question, decisions: Decisions, limits: Mapping[str, float]) -> Outcome:
    """Looks at a proposal in this process."""
    with _TURN:
        judge = _JUDGES.get(question.name)
        if judge is None:
            least = 1 if question.config.stages == "auto" else question.config.stages
            bench = Workbench(
                question.capture(),
                question.cluster,
                replace(question.config, storage=None),
                question.calibration,
                least=least,
            )
            _JUDGES.clear()  # of one question at a time: a model's tables are large
            judge = _JUDGES[question.name] = Judge(bench)
        return judge.look(decisions, limits)
