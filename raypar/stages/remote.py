"""A run on Ray: the client's side. It holds the driver actor's handle, and reads its reports."""

from __future__ import annotations

import contextlib
import pickle
import secrets
import time
import warnings
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    OwnerDiedError,
    RayError,
)

from raypar.comm.group import DEFAULT_TIMEOUT_S
from raypar.comm.network import NetworkSettings
from raypar.errors import ClusterError, RayparError, StageDiedError, TrainingError
from raypar.mesh.bundles import BundleRange
from raypar.mesh.cluster import Cluster
from raypar.mesh.discover import lost_head
from raypar.plan import Plan
from raypar.stages.actor import actor_class
from raypar.stages.driver import Driver, DriverSettings, Ended, Rows, RunFailure
from raypar.stages.faults import KILLED, Failure, cause_of, to_exception
from raypar.stages.orphans import driver_name, remove_groups_of
from raypar.stages.rescue import ACTOR_LOST
from raypar.stages.run import (
    START_TIMEOUT_S,
    OnReport,
    Run,
    StepResult,
    merge_notes,
    merge_reports,
    raise_if_not_finite,
)
from raypar.stages.seats import SeatSettings
from raypar.stages.spec import RankSpec, StepReport
from raypar.stages.worker import FeedFactory, RunnerFactory, info_of

_POLL_S = 10.0
_CLOSE_S = 15.0
_LOOKS = 4  # after a driver that did not answer


class RayRun(Run):
    """Runs a plan's ranks on Ray actors, one per device.

    Args:
        specs: One per rank, by rank.
        plan: The plan of `specs`, for its meshes; None puts the ranks wherever there is room.
        cluster: The cluster that the plan's devices refer to.
        feed: Makes every rank's input feed; None for programs without inputs. If it has a method
            ``for_rank(rank)``, each rank is sent what that gives.
        runner: Makes every rank's runner; None for the interpreter.
        name: Beginning of the names of actors and placement groups.
        use_gpu: Whether a device is a GPU, else a CPU core.
        cpus_per_rank: CPUs reserved for each rank.
        timeout_s: Deadline of every transfer, in seconds.
        start_timeout_s: Deadline of bringing all ranks up and together, in seconds.
        build_timeout_s: Deadline of their building what they hold, in seconds; None: the same.
        placement_timeout_s: Deadline of reserving the devices, in seconds.
        network: Interface, ports and NCCL's environment; default: the address that Ray uses.
        steps_per_call: Steps in one actor call; None to fit calls of about 1.5 s.
        lent: Bundles of somebody else's placement group, which `cluster` describes, to run on;
            None for groups of its own.
    """

    def __init__(
        self,
        specs: Sequence[RankSpec],
        *,
        plan: Plan | None = None,
        cluster: Cluster | None = None,
        feed: FeedFactory | None = None,
        runner: RunnerFactory | None = None,
        name: str = "raypar",
        use_gpu: bool = False,
        cpus_per_rank: float = 1.0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
        build_timeout_s: float | None = None,
        placement_timeout_s: float = 30.0,
        network: NetworkSettings | None = None,
        steps_per_call: int | None = None,
        lent: BundleRange | None = None,
    ) -> None:
        super().__init__(specs)
        self.infos = [info_of(spec, needs_gpu=use_gpu) for spec in specs]
        self.name = f"{name}-{secrets.token_hex(3)}"
        self.driver_share: float | None = None
        self._feed = feed
        self._runner = runner
        where: dict[str, Any] = {
            "run": self.name,
            "cpus_per_rank": cpus_per_rank,
            "deadline_s": placement_timeout_s,
        }
        if plan is not None and lent is not None:
            seats = SeatSettings.on_lent(plan, lent, self.infos, run=self.name)
        elif plan is not None and cluster is not None:
            seats = SeatSettings.of_plan(plan, cluster, self.infos, **where)
        else:
            seats = SeatSettings.anywhere(self.infos, **where)
        self._settings = DriverSettings(
            self.name,
            "nccl" if use_gpu else "gloo",
            timeout_s,
            start_timeout_s,
            build_timeout_s or start_timeout_s,
            seats,
            network or NetworkSettings(),
            steps_per_call,
        )
        self._driver: Any = None

    def start(self) -> dict[str, float]:
        """Starts the driver actor, which starts the stage actors; see `Run.start`."""
        if not ray.is_initialized():
            raise ClusterError(
                "this process is not connected to Ray: call ray.init() or "
                "raypar.train.session.connect(address) first"
            )
        began = time.perf_counter()
        make = actor_class(Driver, {"poll": 1, "control": 2})
        self._driver = make.options(
            num_cpus=0, max_restarts=0, max_task_retries=0, name=driver_name(self.name)
        ).remote(self.infos, self._settings)
        specs = [ray.put(spec) for spec in self._specs]
        feeds = self._feed_refs()
        runner = ray.put(self._runner)
        started = self._ask(self._driver.start.remote(specs, feeds, [runner] * len(specs)))
        if isinstance(started, RunFailure):
            self._raise(started)
        self.infos = list(started.infos)
        self.notes = merge_notes(started.notes)
        driver = (
            time.perf_counter()
            - began
            - sum(seconds for part, seconds in started.seconds.items() if "." not in part)
        )
        return {"driver": driver, **started.seconds}

    def _feed_refs(self) -> list[Any]:
        cut = getattr(self._feed, "for_rank", None)
        if cut is not None:
            return [ray.put(cut(spec.rank)) for spec in self._specs]
        return [ray.put(self._feed)] * len(self._specs)

    def train(
        self,
        first_step: int,
        steps: int,
        on_report: OnReport | None = None,
        *,
        horizon: int | None = None,
    ) -> int:
        """See `Run.train`."""
        driver = self._open()
        driver.train.remote(first_step, steps, horizon or first_step + steps)
        bad: StepResult | None = None
        following = first_step
        while True:
            for event in self._ask(driver.poll.remote(_POLL_S)):
                if isinstance(event, Ended):
                    self.driver_share = event.cpu_s / max(event.wall_s, 1e-9)
                    if bad is not None:
                        raise_if_not_finite(bad)
                    if event.failure is not None:
                        self._raise(event.failure)
                    return following
                for result in _results(event, len(self._specs)):
                    bad = result if result.ends_run else bad
                    following = result.step + 1
                    if on_report is not None:
                        on_report(result)

    def request_stop(self) -> None:
        """See `Run.request_stop`."""
        self._open().request_stop.remote()

    def call(self, method: str, *args: Any) -> list[Any]:
        """See `Run.call`."""
        # In a list Ray leaves the reference as it is: what is in the arguments is none of the
        # driver's business, which would import torch to hold it.
        refs = self._ask(self._open().call.remote(method, [ray.put(args)]))
        answers = self._ask(refs)
        failures = tuple(a for a in answers if isinstance(a, Failure))
        if failures:
            self._raise(RunFailure(failures))
        return list(answers)

    def close(self) -> None:
        """Ends all actors of the run and gives its devices back; see `Run.close`."""
        driver, self._driver = self._driver, None
        if driver is None or not ray.is_initialized():
            return
        lost = lost_head()
        if lost:
            # Every call of Ray would wait for the head: what was trained is to be told first.
            warnings.warn(
                f"run {self.name} cannot give its devices back: {lost}. Its actors end with the "
                "nodes of that cluster, about a minute after its head",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        looks = _LOOKS
        try:
            with contextlib.suppress(RayError, GetTimeoutError):
                ray.get(driver.close.remote(), timeout=_CLOSE_S)
                looks = 1
        finally:
            ray.kill(driver, no_restart=True)
            remove_groups_of(self.name, looks)

    def _open(self) -> Any:
        if self._driver is None:
            raise RayparError("the run is not started, or closed: use it before close()")
        return self._driver

    def _ask(self, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayError as error:
            name, message = cause_of(str(error))
            text = f"{name}: {message}" if name else message
            if isinstance(error, OwnerDiedError):  # the driver owns what ranks answer
                raise StageDiedError(
                    f"lost the driver actor of run {self.name}.{KILLED}"
                ) from error
            if isinstance(error, (*ACTOR_LOST, ObjectLostError)):
                who = self._whose(ref) or "the driver actor"
                raise StageDiedError(f"lost {who} of run {self.name}: {text}") from error
            raise TrainingError(f"run {self.name}: an actor raised {text}") from error

    def _whose(self, refs: Any) -> str | None:
        """The rank whose answer, of a list by rank, is lost."""
        for info, ref in zip(self.infos, refs, strict=True) if isinstance(refs, list) else ():
            try:
                ray.get(ref, timeout=0)
            except GetTimeoutError:
                continue
            except RayError:
                return str(info)
        return None

    def _raise(self, failure: RunFailure) -> None:
        infos = list(failure.infos) or self.infos
        raise to_exception(failure.failures, infos, failure.positions)


def _results(rows: Rows, world: int) -> list[StepResult]:
    """The steps that every rank has reported."""
    by_rank: list[list[StepReport]] = [pickle.loads(data) for data in rows.by_rank]
    assert len(by_rank) == world
    return [merge_reports(row) for row in zip(*by_rank, strict=False)]
