"""Steps of plans that really run, for a search: `raypar.search.measure.Measurer` on Ray.

It is a `StageProfiler` as well: one stage runs alone in one of the processes.

A search looks at many plans of one model. Their ranks are loaded into the same warm processes, one
on each device (`raypar.train._warm_pool`), so that a plan costs its own building and its steps.
Every plan starts from the seed: nothing of one is left for the next.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch

from raypar.compat import pytree
from raypar.errors import NonFiniteError, RayparError, StageDiedError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.mesh.devices import DeviceKind
from raypar.plan import Plan
from raypar.search.cost.stage_job import StageJob
from raypar.search.measure import Measured, ProfiledStage
from raypar.stages.compile import compile_plan
from raypar.stages.recipe import Recipe
from raypar.stages.spec import OptimizerFn
from raypar.train._measured import measured_of
from raypar.train._warm_pool import Loaded, PoolSettings, WarmPool
from raypar.train.config import ScalingConfig
from raypar.train.quiet import CountedRank, Step

_WARM_UP = 2  # the first steps allocate, and make the optimizer's states
_LEAST = 5  # steps that count, where a step is not longer than what is asked for
_FEW = 2
_LONG_S = 5.0  # the first of such steps is not that much longer than the others
_ROOM = 1.5  # free memory that a plan wants, as a multiple of what the last one took
_CALL_S = 0.4  # disturbance is told for the steps of one call together
_TURN = 3

OnTurn = Callable[[int, list[Step]], None]


class RayMeasurer:
    """Measures plans on stage actors of a Ray that this process is connected to.

    Nothing is started before the first plan. Processes stay for the next plans until `close`; use
    it as a context manager. It may be used from several threads: they take turns, since two plans
    that run at once measure each other.

    Args:
        graph: The captured model.
        cluster: The cluster that the plans' devices refer to.
        batch: A global batch (any pytree) that every step trains on.
        optimizer: Builds the optimizer from one rank's own parameters.
        seed: Seed of initialisation and of dropout.
        recipe: What else decides the numbers (`raypar.stages.recipe.Recipe`).
        scaling: What of the cluster a device is; default: a CPU core.
        step_timeout_s: Deadline of one step, in seconds (of loading a plan: 120). A plan that takes
            longer is ended, and counts as failed.
        at_once: Most plans that `measure_together` holds at a time.
        rounds: Turns that it gives each of them.
    """

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        batch: Any,
        optimizer: OptimizerFn,
        *,
        seed: int = 0,
        recipe: Recipe | None = None,
        scaling: ScalingConfig | None = None,
        step_timeout_s: float = 60.0,
        at_once: int = 8,
        rounds: int = 6,
    ) -> None:
        self._graph = graph
        self._cluster = cluster
        self._optimizer = optimizer
        self._seed = seed
        self._recipe = recipe
        self._scaling = scaling or ScalingConfig()
        self._step_timeout_s = step_timeout_s
        self._at_once = at_once
        self._rounds = rounds
        tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
        settings = PoolSettings(
            use_gpu=self._scaling.use_gpu,
            cpus_per_rank=self._scaling.cpus_per_worker,
            transfer_timeout_s=step_timeout_s,
            placement_timeout_s=self._scaling.placement_timeout_s,
        )
        self._pool = WarmPool(cluster, tensors, settings)
        self._turn = threading.Lock()
        self._closed = False

    def prepare(self) -> None:
        """Begins to start the processes of all devices, where there is room, and does not wait."""
        with self._exclusive():
            self._pool.begin(range(self._cluster.n_devices))

    def lacks(self, kind: DeviceKind) -> str:
        """Nothing: it profiles where plans would run; see `StageProfiler`."""
        return ""

    def profile_stage(self, job: StageJob, kind: DeviceKind, device: int) -> ProfiledStage:
        """Runs a stage's programs in the warm process of one device; see `StageProfiler`.

        Raises:
            RayparError: They did not run. The measurer can be used on.
        """
        with self._exclusive():
            try:
                return self._pool.profile(device, job, self._step_timeout_s)
            except StageDiedError:  # perhaps long ago, while nobody looked: there is a new one now
                return self._pool.profile(device, job, self._step_timeout_s)

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        """Runs a plan for about `seconds`; see `Measurer.measure`.

        Raises:
            RayparError: The plan did not load or run. The measurer can be used on.
        """
        with self._exclusive():
            running = self._start(plan)
            with _unloading({0: running}):
                end = time.monotonic() + seconds
                while running.wants_more(end, seconds):
                    running.go(running.steps_in(min(_CALL_S, seconds)))
                return running.result()

    def measure_together(
        self, plans: list[Plan], *, seconds: float, on_turn: OnTurn | None = None
    ) -> list[Measured | Exception]:
        """Runs plans in turns; see `Measurer.measure_together`.

        A plan that fails beside others is tried again alone: what failed may have been its
        neighbours' (memory that they filled, a process that they ended).

        Args:
            plans: Plans that are to be compared.
            seconds: About how long each runs in all.
            on_turn: Called after every turn with the plan's index and the steps that count.
        """
        found: list[Measured | Exception] = []
        while len(found) < len(plans):
            with self._exclusive():
                answers = self._in_turns(plans[len(found) :], seconds, len(found), on_turn)
            alone = len(answers) == 1
            for answer in answers:
                if isinstance(answer, Exception) and not alone:
                    try:
                        answer = self.measure(plans[len(found)], seconds=seconds)
                    except RayparError as error:
                        answer = error
                found.append(answer)
        return found

    def _in_turns(
        self, plans: Sequence[Plan], seconds: float, first: int, on_turn: OnTurn | None
    ) -> list[Measured | Exception]:
        """The first of `plans`, as many as there is room for at a time."""
        answers: dict[int, Measured | Exception] = {}
        running: dict[int, _Running] = {}
        taken = 0
        with _unloading(running):
            for index, plan in enumerate(plans):
                last = next(reversed(running.values()), None)
                if last and (len(running) == self._at_once or not last.leaves_room):
                    break
                taken = index + 1
                try:
                    running[index] = self._start(plan)
                except RayparError as error:
                    answers[index] = error
            for number in range(self._rounds):
                order = list(running)
                turn = number % max(1, len(order))
                for index in [*order[turn:], *order[:turn]]:
                    try:
                        steps = running[index].take_turn(seconds / self._rounds)
                        if steps and on_turn is not None:
                            on_turn(first + index, steps)
                    except RayparError as error:
                        answers[index] = error
                        running.pop(index).unload()
            for index, one in running.items():
                try:
                    answers[index] = one.result()
                except RayparError as error:
                    answers[index] = error
        return [answers[index] for index in range(taken)]

    def _start(self, plan: Plan) -> _Running:
        began = time.perf_counter()
        specs = compile_plan(
            self._graph,
            plan,
            optimizer=self._optimizer,
            seed=self._seed,
            recipe=self._recipe,
            threads=self._scaling.threads(plan),
            accelerator=self._scaling.use_gpu,
        )
        try:
            loaded = self._pool.load(specs, CountedRank)
        except StageDiedError:  # perhaps long ago, while nobody looked: there is a new one now
            loaded = self._pool.load(specs, CountedRank)
        return _Running(self._graph, plan, self._pool, loaded, self._step_timeout_s, began)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._turn:
            if self._closed:
                raise RayparError("the measurer is closed: make a new RayMeasurer to measure more")
            try:
                yield
            except Exception:
                raise
            except BaseException:  # Ctrl-C: whoever asked may be gone when it arrives
                self._close()
                raise

    def close(self) -> None:
        """Ends all processes and gives the devices back; safe to call twice.

        Waits for a measurement under way in another thread.
        """
        with self._turn:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Running:
    """A plan that is loaded, past its first steps, and what its steps took so far."""

    def __init__(
        self,
        graph: OpGraph,
        plan: Plan,
        pool: WarmPool,
        loaded: Loaded,
        step_timeout_s: float,
        began: float,
    ) -> None:
        self._graph = graph
        self._plan = plan
        self._pool = pool
        self._loaded = loaded
        self._step_timeout_s = step_timeout_s
        self._steps: list[Step] = []
        self._each = math.inf  # seconds of a step, about
        self._ended = False  # by a step that was not finite
        try:
            first = self._run(1)
            self._saved = [rank.most_saved for rank in first[0].ranks] if first else []
            if self._each < _LONG_S:
                self._run(_WARM_UP - 1)
            self._held = pool.held(loaded)
        except Exception:
            pool.unload(loaded)
            raise
        self._took = time.perf_counter() - began

    def go(self, count: int) -> None:
        """Trains `count` steps that count."""
        began = time.perf_counter()
        self._steps += self._run(count)
        self._took += time.perf_counter() - began

    def take_turn(self, seconds: float) -> list[Step]:
        """Trains some steps; the first, which finds the caches cold, does not count."""
        began = time.perf_counter()
        steps = self._run(1 + max(_TURN, self.steps_in(seconds)))[1:]
        self._steps += steps
        self._took += time.perf_counter() - began
        return steps

    def steps_in(self, seconds: float) -> int:
        """Steps that take about so long."""
        return max(1, round(seconds / self._each))

    def wants_more(self, end: float, seconds: float) -> bool:
        """Whether to go on: until `end`, and at least a few steps."""
        least = _LEAST if self._each < seconds else _FEW
        return not self._ended and (time.monotonic() < end or len(self._steps) < least)

    def _run(self, count: int) -> list[Step]:
        if self._ended:
            return []
        guess = 0.0 if math.isinf(self._each) else 10 * count * self._each
        steps = self._pool.run(self._loaded, count, self._step_timeout_s + guess)
        self._ended = len(steps) < count
        if steps:
            self._each = max(1e-6, min(s.seconds for s in steps))
        return steps

    def result(self) -> Measured:
        """The figures.

        Raises:
            NonFiniteError: Not a single step that counts was finite.
        """
        if not self._steps:
            raise NonFiniteError(
                f"step {self._loaded.done - 1} of the measured plan was not finite, so there are "
                "no steps to time: lower the learning rate, or set clip_norm (for example 1.0)"
            )
        return measured_of(
            self._graph, self._plan, self._steps, self._held, self._saved, self._took
        )

    @property
    def leaves_room(self) -> bool:
        """Whether one more plan of this size would have fitted when this one was loaded."""
        beside = len(self._held)  # ranks on one machine share what is free there
        for held, saved in zip(self._held, self._saved, strict=False):
            needed = held.peak or beside * (held.resident + saved)
            if held.free < _ROOM * needed:
                return False
        return True

    def unload(self) -> None:
        """Drops the plan."""
        self._pool.unload(self._loaded)


@contextmanager
def _unloading(running: Mapping[int, _Running]) -> Iterator[None]:
    """Unloads plans at the end; not after an interrupt, which ends their processes at once."""
    try:
        yield
    except Exception:
        for one in running.values():
            one.unload()
        raise
    for one in running.values():
        one.unload()
