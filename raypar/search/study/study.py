"""The study: Optuna proposes outer decisions, solvers carry them out, and the best plan wins.

Plans of the exact planners come first, as seeds. Every proposal goes through fidelities: the
solvers' own sums, a simulated step (by the learned cost model where there are measurements), and
for those that could be the best, one stage run alone (`raypar.search.study.profiles`), then steps
that really run (`raypar.search.study.finals`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import replace

from raypar._version import __version__
from raypar.errors import ConfigError, NothingFitsError, PlanError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.search.bounds import certificate, lower_bound
from raypar.search.config import SearchConfig
from raypar.search.interop.workbench import Workbench
from raypar.search.measure import Measurer, StageProfiler
from raypar.search.need import does_not_fit
from raypar.search.plan import Found, Progress
from raypar.search.record import SearchRecord
from raypar.search.study.elsewhere import Elsewhere, Question, answer_of
from raypar.search.study.finals import Finals
from raypar.search.study.judge import Judge, Outcome
from raypar.search.study.ledger import Ledger
from raypar.search.study.profiles import Profiles
from raypar.search.study.proposals import Asked, Proposals
from raypar.search.study.samplers import quiet_optuna
from raypar.search.study.seeding import Seeding, best_of
from raypar.search.study.space import Decisions

_TRIALS, _BUDGET_S = 96, 90.0
_SLACK, _UNSURE = 1.1, 1.5
"""Cheap figures rule out what is so much slower than the best; the second where plans are run,
since a simulated step can be as far from a real one."""
_PATIENCE = 40
"""Proposals in a row without gain that end a search without a given number of trials."""
_REPEATED = 100
"""Known proposals in a row after which nothing new is expected."""
_GAIN = 0.002
"""Relative: what counts as gain, and a gap to the bound at which nothing is left to find."""


class StudySearch:
    """One search.

    Args:
        graph: The captured model.
        cluster: The devices.
        config: What is fixed and what is free, sampler and budget.
        calibration: What the cluster reaches; None: what is on disk for it, else the device table.
        measurer: Runs plans that could be the best; None: nothing is measured.
        profiler: Runs single stages; None: this process, if the options say how many.
        executor: Looks at proposals elsewhere, side by side; None: here, one after the other.
        capture: Captures the model where the executor runs functions.
        progress: Is told of every trial.

    Raises:
        PlanError: The options leave nothing.
        ConfigError: There is no such sampler, or the journal cannot be written.
    """

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        config: SearchConfig,
        *,
        calibration: Calibration | None = None,
        measurer: Measurer | None = None,
        profiler: StageProfiler | None = None,
        executor: Executor | None = None,
        capture: Callable[[], OpGraph] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.began = time.perf_counter()
        if "optuna" in config.seeds:
            raise ConfigError(
                "search.seeds names planner optuna, which is the one that asks for seeds: name "
                "others, for example ['alpa'], or auto"
            )
        least = 1 if config.stages == "auto" else config.stages
        self.config = config
        self.bench = Workbench(graph, cluster, config, calibration, least=least)
        self.judge = Judge(self.bench)
        self.ledger = Ledger(_GAIN, progress, _UNSURE if measurer is not None else _SLACK)
        self.profiles = Profiles(self.judge, self.ledger, profiler, config)
        self.finals = Finals(self.judge, self.ledger, measurer, config, self.profiles)
        self.notes: list[str] = []
        self.stopped = ""
        self.bound = lower_bound(graph, cluster, self.bench.calibration, config)
        self._known: dict[Decisions, Outcome] = {}
        self._repeated = 0
        self._asked: dict[int, int] = {}  # number in the ledger → number in Optuna's study
        self._limited = config.budget_s != "auto" or config.trials == "auto"
        budget = _BUDGET_S if config.budget_s == "auto" else config.budget_s
        self._deadline = self.began + budget
        name = self._name()
        self.lookout: Elsewhere | None = None
        if executor is not None:
            if capture is None:
                raise ConfigError(
                    "a search with an executor needs `capture`: a picklable function without "
                    "arguments that captures the model"
                )
            question = Question(capture, cluster, config, self.bench.calibration, name)
            self.lookout = Elsewhere(executor, question)
        self.proposals = Proposals(config, name, self.judge.space, parallel=executor is not None)
        self.notes += [self.proposals.note] if self.proposals.note else []
        self.seeding = Seeding(
            self.judge,
            self.proposals,
            self._known,
            self._write,
            room=lambda: self._trials() - len(self.ledger.trials),
            best=lambda: self.ledger.best.plan if self.ledger.best else None,
            began=self.began,
            budget_s=budget if self._limited else float("inf"),
        )

    def _name(self) -> str:
        """Equal for equal questions: such a study is resumed.

        Choices and figures are those of one version and one calibration.
        """
        free = replace(
            self.config,
            trials="auto",
            budget_s="auto",
            storage=None,
            measure="auto",
            profile="auto",
            cache=False,
        )
        graph, cluster = self.bench.graph.hash, repr(self.bench.cluster)
        asked = (__version__, graph, cluster, self.bench.calibration.to_json(), repr(free))
        return "raypar " + hashlib.sha256(repr(asked).encode()).hexdigest()[:16]

    def run(self) -> Found:
        """Searches.

        Raises:
            PlanError: Nothing fits the memory.
        """
        with quiet_optuna():
            try:
                self._resume()
                self.seeding.exact()
                self.seeding.regular()
                if not self.finals.on and not self.profiles.on:
                    self._propose(self._trials())
                else:
                    # Half of the time is kept to measure what was proposed.
                    self._propose(self._trials() // 2, self._left() / 2)
                    self._measure(share=0.5)
                    self._propose(self._trials(), self._left() / 2)
                    self._measure()
                    self.finals.decide(self._left())
                if self.ledger.best is None and self._overfull():
                    self.seeding.frugal()
            except KeyboardInterrupt:
                if self.ledger.best is None:
                    raise
                self.stopped = "interrupted"
                self.notes.append("the search was interrupted: this is the best it had found")
            finally:
                self.proposals.close()
        return self._found()

    def _trials(self) -> int:
        return _TRIALS if self.config.trials == "auto" else self.config.trials

    def _left(self) -> float:
        """Seconds until time is out."""
        return self._deadline - time.perf_counter() if self._limited else float("inf")

    def _resume(self) -> None:
        """Takes up what a journal holds: the best of it is looked at again."""
        done = self.proposals.finished()
        if not done:
            return
        self.notes.append(f"resumed a study of {len(done)} trials")
        proposer, decisions = self.proposals.of(done[0])
        outcome = self._known[decisions] = self.judge.look(decisions)
        self._asked[self.ledger.add(proposer, decisions, outcome).number] = done[0].number

    def _overfull(self) -> bool:
        """Whether it may be memory that what was looked at wants: nothing that fits was run."""
        outcomes = self.ledger.outcomes.values()
        ran = any(outcome.state == "failed" and outcome.plan for outcome in outcomes)
        return not ran and any(outcome.state == "infeasible" for outcome in outcomes)

    def _propose(self, trials: int, kept_s: float = 0.0) -> None:
        """Proposals until the budget is spent, or nothing is left to gain.

        Args:
            trials: How many in all.
            kept_s: Seconds of the budget that are not for proposals.
        """
        waiting: dict[Future[Outcome], Asked] = {}
        width = self.lookout.width if self.lookout else 1
        try:
            while True:
                while len(waiting) < width and not self._over(trials - len(waiting), kept_s):
                    best = self.ledger.best
                    number = self._asked.get(self.ledger.best_number, -1)
                    asked = self.proposals.next(number, best.plan if best else None)
                    known = self._known.get(asked.decisions)
                    if known is None:
                        waiting[self._look(asked.decisions)] = asked
                        continue
                    self._tell(asked, known)
                    self._repeated += 1
                    if self._repeated >= _REPEATED:
                        self.stopped = "only known proposals were made"
                        break
                if not waiting:
                    return
                first = next(iter(waiting))  # whoever is done first: same seed, same plan
                outcome = answer_of(first)
                self._take(waiting.pop(first), outcome)
        finally:
            for future in waiting:  # after an interrupt, or an error
                future.cancel()

    def _take(self, asked: Asked, outcome: Outcome) -> None:
        """Writes down what became of a proposal."""
        self._known[asked.decisions] = outcome
        self._repeated = 0
        self._write(asked, [(asked.proposer, outcome)])

    def _write(self, asked: Asked, looked: list[tuple[str, Outcome]]) -> None:
        """Adds what was looked at for a proposal to the ledger; Optuna is told the best of it."""
        for proposer, outcome in looked:
            record = self.ledger.add(proposer, asked.decisions, outcome)
            self._asked[record.number] = asked.trial.number
        self._tell(asked, best_of(looked))

    def _tell(self, asked: Asked, outcome: Outcome) -> None:
        skipped = self.profiles.absent(outcome.plan) if outcome.state == "kept" else ""
        self.proposals.tell(asked, outcome, self.finals.expected_s(outcome), profile=skipped)

    def _look(self, decisions: Decisions) -> Future[Outcome]:
        if self.lookout is not None:
            return self.lookout.look(decisions, self.ledger.limits())
        done: Future[Outcome] = Future()
        done.set_result(self.judge.look(decisions, self.ledger.limits()))
        return done

    def _over(self, trials: int, kept_s: float) -> bool:
        """Whether to stop proposing."""
        best = self.ledger.best
        if len(self.ledger.trials) >= trials:
            self.stopped = "all trials were made"
        elif self._limited and self._left() <= (0.0 if best is None else kept_s):
            self.stopped = "the time was used up"
        elif best is not None and best.step_s["simulated"] <= self.bound.step_s * (1 + _GAIN):
            self.stopped = "the best plan reaches the lower bound"
        elif self.config.trials == "auto" and self.ledger.idle >= _PATIENCE:
            self.stopped = f"{_PATIENCE} proposals brought no gain"
        else:
            return False
        return True

    def _measure(self, share: float = 1.0) -> None:
        """Profiles and runs what may be the best, and lets Optuna know.

        Args:
            share: Of what may be measured, at most so much has been when this ends.
        """
        measured: Mapping[int, float] = {}
        if self.finals.on:  # profiles what it is about to run
            measured = self.finals.measure(self._left(), share=share)
        else:
            self.profiles.sharpen(self._left(), share=share)
        for number, step_s in self.profiles.news().items():
            if number in self._asked and number not in measured:
                words = self.ledger.trials[number].profile
                attributes: dict[str, str | bool] = {"profiled": True, "profile": words}
                self.proposals.learn(self._asked[number], step_s, attributes)
        for number, step_s in measured.items():
            if number in self._asked:
                self.proposals.learn(self._asked[number], step_s, {"measured": True})

    def _found(self) -> Found:
        """The winner, with its certificate and what else was looked at."""
        number = self.finals.winner
        if not self.ledger.trials:
            reasons = list(self.seeding.refused.values())
            if any(isinstance(reason, NothingFitsError) for reason in reasons):
                raise self._too_large()
            if reasons:
                raise PlanError(str(reasons[0]))
            budget = self._deadline - self.began
            raise PlanError(
                f"search.budget_s {budget:g} was used up before a single plan was looked at; give "
                f"more, for example {max(60.0, 4 * budget):g}, or set search.planner: uniform"
            )
        if number < 0:
            raise self._nothing()
        outcome = self.ledger.outcomes[number]
        assert outcome.plan is not None
        check_plan(outcome.plan, self.bench.graph, self.bench.cluster)
        plan = replace(
            outcome.plan,
            planner="optuna",
            alternatives=self.ledger.alternatives(outcome),
            certificate=certificate(outcome.step_s["simulated"], self.bound),
        )
        refused = self.seeding.refused.items()
        without = [f"no plan of planner {name}: {reason}" for name, reason in refused]
        record = SearchRecord(
            planner="optuna",
            sampler=self.config.sampler,
            seed=self.config.seed,
            trials=tuple(self.ledger.trials),
            winner=number,
            seconds=time.perf_counter() - self.began,
            measured_s=self.finals.seconds + self.profiles.seconds,
            bound_s=self.bound.step_s,
            bound_parts=dict(self.bound.parts),
            importance=self.proposals.importance(),
            stopped=self.stopped,
            notes=(*without, *self.notes, *self.profiles.notes, *self.finals.notes),
        )
        return Found(plan, record)

    def _nothing(self) -> PlanError:
        """Why there is no plan."""
        if self.finals.failed:
            return PlanError(
                f"none of the {self.finals.failed} plans that were to run could; the last: "
                f"{self.finals.notes[-1]}"
            )
        if all(t.state == "failed" for t in self.ledger.trials):
            return PlanError(
                f"all {len(self.ledger.trials)} plans that were looked at failed; the first: "
                f"{self.ledger.trials[0].reason}"
            )
        return self._too_large()

    def _too_large(self) -> PlanError:
        return does_not_fit(
            self.bench.graph, self.bench.cluster, self.config, self.bench.calibration
        )
