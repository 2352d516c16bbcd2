"""What a rank does with complete gradients: optimizer, learning rate, loss scale, average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from raypar.errors import OptimizerError
from raypar.stages.average import WeightAverage
from raypar.stages.holdings import Holdings
from raypar.stages.loss_scale import LossScaler
from raypar.stages.optimizers import build_optimizer, check_cut
from raypar.stages.plain import from_plain, to_plain
from raypar.stages.recipe import Recipe, SchedulerFn
from raypar.stages.spec import RankSpec

# How an optimizer computes, not what: the code that resumes decides (`fused` on a GPU, say).
_OF_THE_MACHINE = frozenset({"params", "param_names", "foreach", "fused", "capturable"})
# What a scheduler may move, and what it moves around: all of it follows the first learning rate.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


class Update:
    """The optimizer of one rank and what goes with it, by the recipe of its spec.

    Every rank steps through the same learning rates, loss scales and verdicts: they follow from
    numbers that all ranks share (the global loss and norm), without any further exchange.

    Args:
        spec: What the rank is.
        holdings: What it holds.

    Attributes:
        optimizer: Built on the stored parts (`build_optimizer`).
        scaler: Scale of the loss.
        average: Moving average of the weights, if the recipe has one.

    Raises:
        OptimizerError: Optimizer or scheduler cannot be built, or not on parts of parameters.
    """

    def __init__(self, spec: RankSpec, holdings: Holdings) -> None:
        recipe = spec.recipe
        made = build_optimizer(spec.optimizer, spec.forms, holdings.stored, holdings.device)
        check_cut(made, spec.params, spec.axes)
        self.optimizer = made
        self._recipe = recipe
        self._asked = [dict(group) for group in made.param_groups]  # before a scheduler moves them
        self.scaler = LossScaler(recipe.loss_scale)
        self._scheduler = None
        if recipe.scheduler is not None:
            self._scheduler = build_scheduler(recipe.scheduler, made)
        self._first_rates = [float(g.get("initial_lr", 0.0)) for g in made.param_groups]
        self.average = None
        if recipe.ema_decay is not None:
            self.average = WeightAverage(holdings, recipe.ema_decay)

    @property
    def learning_rate(self) -> float | None:
        """That of the first group in the next step; None where the optimizer has none."""
        rate = self.optimizer.param_groups[0].get("lr")
        return None if rate is None else float(rate)

    def step(self, step: int) -> None:
        """Applies the gradients that the parameters have.

        Raises:
            OptimizerError: The optimizer raised.
        """
        try:
            with torch.enable_grad():
                self.optimizer.step()
        except Exception as error:
            raise OptimizerError(
                f"step {step}: {type(self.optimizer).__name__}.step raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def applied(self, step: int, loss: float) -> None:
        """After `step`: what follows an optimizer step that was applied.

        Args:
            step: Its number.
            loss: The global loss of the step, equal on every rank.

        Raises:
            OptimizerError: The scheduler raised.
        """
        self.scaler.applied()
        if self.average is not None:
            self.average.update()
        if self._scheduler is None:
            return
        try:
            step_scheduler(self._scheduler, loss)
        except Exception as error:
            raise OptimizerError(
                f"after step {step}, {type(self._scheduler).__name__}.step raised "
                f"{type(error).__name__}: {error}; schedulers are stepped once for every optimizer "
                "step, so give it as many steps as the training has"
            ) from error

    # -- for checkpoints --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that is not in tensors of parameters: equal on every rank, and for every plan.

        Returns:
            JSON values: ``groups`` (what each parameter group says), ``scheduler``,
            ``loss_scale``, ``ema_updates``; None for what the recipe does not have.

        Raises:
            OptimizerError: A group or the scheduler holds what JSON cannot.
        """
        return {
            "optimizer": type(self.optimizer).__name__,
            "groups": [_group_state(g, i) for i, g in enumerate(self.optimizer.param_groups)],
            "scheduler": scheduler_state(self._scheduler),
            "loss_scale": self.scaler.state(),
            "ema_updates": None if self.average is None else self.average.updates,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave, here or under another plan.

        Raises:
            OptimizerError: The state is of another recipe (names what differs), or damaged.
        """
        self.check(state)
        with _damage_told():
            self._load(state)

    def renew_options(self) -> None:
        """After `load`: the options of the optimizer are those of this run again.

        What was loaded is kept but for them: the optimizer's tensors, and where a scheduler is on
        its way. Where there is a scheduler, its learning rates keep their course and are scaled to
        the first rate of this run; else the rates are those of this run. Momenta that a scheduler
        moves stay as loaded.
        """
        for index, (group, asked) in enumerate(
            zip(self.optimizer.param_groups, self._asked, strict=True)
        ):
            moved = {"betas", "momentum"} if "max_momentum" in group else set()
            for name, value in asked.items():
                if name not in _OF_THE_MACHINE and name not in _RATES and name not in moved:
                    group[name] = value
            if "lr" in asked:
                self._renew_rates(index, group, float(asked["lr"]))

    def _renew_rates(self, index: int, group: dict[str, Any], wanted: float) -> None:
        if self._scheduler is None or not group.get("initial_lr"):
            _put_rate(group, "lr", wanted)
            return
        first = self._first_rates[index] or wanted
        factor = first / float(group["initial_lr"])
        for name in _RATES:
            if name in group:
                _put_rate(group, name, float(group[name]) * factor)
        for scheduler in _nested(self._scheduler):
            bases = getattr(scheduler, "base_lrs", None)
            if bases is not None:
                bases[index] = float(bases[index]) * factor

    def check(self, state: dict[str, Any]) -> None:
        """Refuses what `load` could not go on from, before any tensor is read for it.

        Raises:
            OptimizerError: As `load`.
        """
        with _damage_told():
            wrong = differences(state, self.optimizer, self._scheduler, self._recipe)
        if wrong:
            raise OptimizerError(not_resumed(wrong, "what is to be resumed"))

    def _load(self, state: dict[str, Any]) -> None:
        if self._scheduler is not None:
            self._scheduler.load_state_dict(from_plain(state["scheduler"]["state"]))
        # After the scheduler: a scheduler's own state may set learning rates when it is loaded.
        for group, values in zip(self.optimizer.param_groups, state["groups"], strict=True):
            for name, value in from_plain(values).items():
                known = group.get(name)
                if name in _OF_THE_MACHINE:
                    raise KeyError(name)
                if isinstance(known, torch.Tensor):  # a learning rate that a graph reads
                    known.fill_(value)
                else:
                    group[name] = value
        if self.scaler.active:
            self.scaler.load(state["loss_scale"])
        if self.average is not None:
            self.average.updates = int(state["ema_updates"])


@contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise OptimizerError(
            "the saved state of optimizer and schedule is damaged, or of another version of "
            f"torch ({type(error).__name__}: {error}): resume from an earlier checkpoint, or "
            "start a new training from its weights (init_from)"
        ) from error


def differences(
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | ReduceLROnPlateau | None,
    recipe: Recipe,
) -> list[str]:
    """Why a saved `Update.state` cannot be gone on from, a line for each option that differs.

    Args:
        state: It.
        optimizer: What this run makes.
        scheduler: What this run makes, or None.
        recipe: This run's.
    """
    found = []
    name, saved = type(optimizer).__name__, state["optimizer"]
    if saved != name:
        found.append(f"optimizer: it was trained with {saved}, this run makes {name}: make {saved}")
    groups, count = len(optimizer.param_groups), len(state["groups"])
    if count != groups:
        found.append(
            f"optimizer: it has {count} parameter groups, those of this run are {groups}: make the "
            f"{count} groups that the run began with"
        )
    before = state["scheduler"] and state["scheduler"]["type"]
    own = None if scheduler is None else type(scheduler).__name__
    if before != own:
        found.append(
            f"scheduler: it holds the state of {before or 'none'}, this run sets {own or 'none'}: "
            + (f"set {before}, as the run began" if before else "leave scheduler out")
        )
    if (state["loss_scale"] is not None) != (recipe.loss_scale is not None):
        found.append(
            'loss_scale: it holds none, this run scales the loss (precision="fp16"): leave '
            "precision and loss_scale as the run began"
            if state["loss_scale"] is None
            else 'loss_scale: it holds one, this run scales no loss: set precision="fp16"'
        )
    if (state["ema_updates"] is not None) != (recipe.ema_decay is not None):
        found.append(
            "ema_decay: it holds no average of the weights, this run sets "
            f"ema_decay={recipe.ema_decay:g}: leave ema_decay out"
            if recipe.ema_decay is not None
            else "ema_decay: it holds an average of the weights, this run keeps none: set "
            "ema_decay, for example 0.999"
        )
    return found


def not_resumed(wrong: Sequence[str], what: str) -> str:
    """What to tell of `differences`; `what` names the checkpoint."""
    return (
        f"{what} is of another recipe: {'; '.join(wrong)}. Or begin a new training from its "
        "weights alone (init_from)"
    )


def build_scheduler(
    make: SchedulerFn, optimizer: torch.optim.Optimizer
) -> LRScheduler | ReduceLROnPlateau:
    """Makes the scheduler of an optimizer.

    Raises:
        OptimizerError: `make` raises, or makes no scheduler of that optimizer.
    """
    example = (
        "for example lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)"
    )
    try:
        made = make(optimizer)
    except Exception as error:
        raise OptimizerError(
            f"the scheduler callable raised {type(error).__name__}: {error}; it is called on every "
            f"rank with the rank's optimizer ({len(optimizer.param_groups)} parameter groups), "
            f"{example}"
        ) from error
    if not isinstance(made, (LRScheduler, ReduceLROnPlateau)):
        raise OptimizerError(
            f"the scheduler callable returned {type(made).__name__}, not a scheduler of "
            f"torch.optim.lr_scheduler; {example}"
        )
    if made.optimizer is not optimizer:
        raise OptimizerError(
            f"the scheduler callable returned a {type(made).__name__} of another optimizer than "
            f"the one it was given; {example}"
        )
    return made


def _nested(scheduler: Any) -> list[Any]:
    """A scheduler and all that it is made of (`SequentialLR`, `ChainedScheduler`)."""
    inner = getattr(scheduler, "_schedulers", ())
    return [scheduler, *(s for part in inner for s in _nested(part))]


def _put_rate(group: dict[str, Any], name: str, value: float) -> None:
    known = group.get(name)
    if isinstance(known, torch.Tensor):  # a learning rate that a graph reads
        known.fill_(value)
    else:
        group[name] = value


def step_scheduler(scheduler: LRScheduler | ReduceLROnPlateau, loss: float) -> None:
    """Steps a scheduler after an optimizer step with this global loss."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


def scheduler_state(scheduler: LRScheduler | ReduceLROnPlateau | None) -> dict[str, Any] | None:
    """``type`` and ``state`` of a scheduler as JSON values; functions are made anew on a resume.

    Raises:
        OptimizerError: It holds something that JSON cannot.
    """
    if scheduler is None:
        return None
    name = type(scheduler).__name__
    held = {k: v for k, v in scheduler.state_dict().items() if not callable(v)}
    return {"type": name, "state": to_plain(held, f"scheduler {name}")}


def _group_state(group: dict[str, Any], index: int) -> dict[str, Any]:
    return {
        k: to_plain(v, f"parameter group {index}: {k}")
        for k, v in group.items()
        if k not in _OF_THE_MACHINE
    }
