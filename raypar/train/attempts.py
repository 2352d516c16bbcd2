"""A run over all its attempts: after a failure it starts again, on the devices that are left.

A node that is gone is noticed late: for some seconds Ray still lists it, and still takes placement
groups for it. So an attempt that fails before its ranks are up, soon after a failure, belongs to
that failure: the devices are looked at anew, and it is tried again until
``ScalingConfig.scale_up_timeout_s`` has passed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from raypar._plan_text import count_of
from raypar.errors import ClusterError, CommError, DataError, PlanError, StageDiedError
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.train.attempt import Attempt, Prepared
from raypar.train.data import peek
from raypar.train.devices import Devices, check_devices, suits
from raypar.train.metrics_file import told
from raypar.train.planning import find_plan, plan_words
from raypar.train.settings import Settings
from raypar.train.state import TrainState

_PAUSE_S = 1.0  # between two tries to start on devices of which some are dying

Lost = (StageDiedError, CommError)
"""What an attempt fails with when an actor or a node is lost."""


class Teller:
    """Tells callbacks and whoever looks on of what happens between attempts.

    Args:
        made: The run.
    """

    def __init__(self, made: Prepared) -> None:
        self._made = made

    def __call__(self, kind: str, text: str) -> None:
        """Tells it."""
        step = self._made.state.step
        self._made.callbacks.on_event({"kind": kind, "step": step, "text": text})
        self._made.display.say(f"{kind.replace('_', ' ')}: {text.splitlines()[0]}")


class Attempts:
    """Trains to the end, over failures that may pass.

    Args:
        settings: What the trainer was asked for.
        made: What all attempts share.
        devices: Where.
        tell: Told of failures and restarts, as of what `devices` does.
        attempt: Makes an attempt.
    """

    def __init__(
        self,
        settings: Settings,
        made: Prepared,
        devices: Devices,
        tell: Callable[[str, str], None],
        attempt: Callable[..., Attempt] = Attempt,
    ) -> None:
        self._settings = settings
        self._made = made
        self._devices = devices
        self._tell = tell
        self._attempt = attempt
        self._failures = 0
        self._patient_until = 0.0

    def go(self, plan: Plan | None) -> tuple[dict[str, Any], Plan]:
        """Trains.

        Args:
            plan: What to run; None searches.

        Returns:
            The run's metrics, and the plan that ran last.

        Raises:
            StageDiedError: An actor or node was lost more often than allowed, or too few devices
                are left.
        """
        attempt: Attempt | None = None
        while True:
            up = False
            try:
                cluster = self._devices.find(plan, lost=self._failures > 0)
                self._made.clock.mark("cluster")
                plan = self._planned(plan, cluster)
                attempt = self._attempt(
                    self._settings, self._made, plan, cluster, on_up=self._devices.settle
                )
                return attempt.go(), plan
            except (*Lost, ClusterError) as error:
                up = attempt is not None and attempt.up
                attempt = None
                if self._counts(error, up):
                    self._go_back()

    def _planned(self, plan: Plan | None, cluster: Cluster) -> Plan:
        settings, made = self._settings, self._made
        # A plan that the user gave is told, at first, what does not hold it.
        mend = self._failures > 0 or settings.plan == "auto"
        if plan is None or (mend and not suits(plan, cluster, settings)):
            found = self._search(cluster, plan)
            if plan is not None:
                self._tell(
                    "replan",
                    f"planned again for {cluster.n_devices} devices (per node {cluster.shape}), "
                    f"before it was {plan.cluster}",
                )
            plan = found
        elif not self._failures:
            whose = "of the checkpoint" if settings.plan == "auto" else "as given"
            made.display.say(f"plan {whose}: {plan_words(plan)}")
        check_devices(plan, cluster, settings.scaling)
        _check_precision(plan, settings, made)
        with told(made.folder):
            plan.save(made.folder / "plan.json")
        if settings.on_plan is not None:
            settings.on_plan(plan, made.graph, cluster)
        return plan

    def _search(self, cluster: Cluster, before: Plan | None) -> Plan:
        display = self._made.display
        try:
            with display.doing(f"planning for {count_of(cluster.n_devices, 'device')}") as tell:
                found = find_plan(self._settings, self._made, cluster, before, tell)
        except PlanError as error:
            if not self._failures:
                raise
            raise StageDiedError(
                f"devices were lost, and no plan was found for the {cluster.n_devices} that are "
                f"left: {error}"
            ) from error
        display.say(f"planned in {self._made.clock.mark('plan'):.1f} s: {plan_words(found)}")
        return found

    def _counts(self, error: Exception, up: bool) -> bool:
        """Whether it is a failure of its own, and no echo of the last one; raises the last."""
        allowed = self._settings.run.failure_config.max_failures
        if not up and self._failures and time.monotonic() < self._patient_until:
            self._tell("retry", f"could not start again yet: {_first_line(error)}")
            time.sleep(_PAUSE_S)
            return False
        if not isinstance(error, Lost):
            raise error
        self._failures += 1
        if self._failures > allowed >= 0:
            raise error
        self._patient_until = time.monotonic() + self._settings.scaling.scale_up_timeout_s
        of = "" if allowed < 0 else f" of {allowed}"
        self._tell("failure", f"failure {self._failures}{of}: {error}")
        return True

    def _go_back(self) -> None:
        """To the newest checkpoint, or to the beginning."""
        made = self._made
        made.resume = (made.store.latest() if made.store else None) or made.resume
        before, made.state = made.state.step, TrainState()
        if made.resume is not None:
            made.state = made.resume.state
            self._tell("restart", f"from checkpoint {made.resume.path} (step {made.state.step})")
        else:
            lost = f": {before} steps are lost" if before else ""
            self._tell("restart", f"from step 0, since there is no checkpoint yet{lost}")
        if made.opened.one_shot:
            # What the callable returned can be gone through once; it is called again.
            settings = self._settings
            made.opened = peek(
                settings.data,
                settings.seed,
                accumulate=settings.accumulate,
                batch_dims=settings.batch_dims,
            )


def check_restartable(settings: Settings, made: Prepared) -> None:
    """Refuses restarts for data that can be gone through only once.

    Raises:
        DataError: They can.
    """
    allowed = settings.run.failure_config.max_failures
    if allowed and made.opened.one_shot and not callable(settings.data):
        raise DataError(
            f"FailureConfig(max_failures={allowed}): a restart reads the data again from the "
            f"checkpoint's position, and data is a {type(settings.data).__name__}, which can be "
            "gone through only once; pass what can be iterated again (a DataLoader, a list, "
            "raypar.batches(...)) or a callable that returns the iterator, or set max_failures=0"
        )


def _check_precision(plan: Plan, settings: Settings, made: Prepared) -> None:
    """Tells why a plan that fits the model as written does not fit it under autocast.

    Raises:
        PlanError: It was made for the same parameters and other ops.
    """
    other = plan.graph_hash != made.graph.hash and plan.params_hash == made.graph.params_hash
    if settings.precision is not None and other:
        raise PlanError(
            f'precision="{settings.precision}" makes other ops of the model than the plan was made '
            'for: leave plan="auto", or plan what trains: raypar.capture(model, batch, loss) of '
            "model, loss = raypar.graph.autocast.under_autocast(model_fn, loss_fn, "
            f'"{settings.precision}")'
        )


def _first_line(error: Exception) -> str:
    with contextlib.suppress(IndexError):
        return str(error).splitlines()[0]
    return type(error).__name__
