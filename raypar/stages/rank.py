"""One rank between steps: what it holds, and what it answers about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from raypar.comm.group import Group
from raypar.comm.mesh import MeshGroups
from raypar.errors import OptimizerError
from raypar.stages.accounts import measured_memory
from raypar.stages.evaluation import ForwardRunner, ForwardSpec, Outcome, Parcel, weights_in_use
from raypar.stages.gradients import GradientStore
from raypar.stages.holdings import Holdings, Workshop
from raypar.stages.layouts import reported_names
from raypar.stages.snapshot import RankState
from raypar.stages.spec import RankSpec
from raypar.stages.update import Update


class Rank:
    """Holds one rank's stages, gradients and optimizer, and evaluates on them.

    Args:
        spec: What the rank is.
        world: All ranks of the run; subgroups are made here, by all ranks in the same order.
        workshop: Shared by the ranks of one process.
    """

    def __init__(self, spec: RankSpec, world: Group, workshop: Workshop | None) -> None:
        self.spec = spec
        self._world = world
        self._device = _device_of(spec)
        self._holdings = Holdings(spec, self._device, workshop)
        self._mesh = MeshGroups(world, spec.meshes, spec.bases, spec.group)
        self._gradients = GradientStore(spec, self._holdings, world, self._mesh)
        self._update = Update(spec, self._holdings)
        self._kept = RankState(spec, self._holdings, self._update, self._gradients.all_arrived)
        self._forwards = ForwardRunner(spec, world, self._mesh, self._holdings)

    def state(self) -> dict[str, torch.Tensor]:
        """Own parts of parameters, and owned buffers, by the model's own names, on the CPU."""
        held = self._holdings
        found = {n: _on_cpu(held.stored[n]) for n in reported_names(self.spec)}
        found.update({n: _on_cpu(held.buffers[n]) for n in self.spec.owned_buffers})
        return found

    def ema_state(self) -> dict[str, torch.Tensor]:
        """The moving average in the form of `state`: own parts, and owned buffers.

        Raises:
            OptimizerError: The recipe has no ``ema_decay``.
        """
        average = self._update.average
        if average is None:
            raise OptimizerError(
                "there is no moving average of the weights: set ema_decay, for example 0.999"
            )
        found = {n: _on_cpu(average.stored[n]) for n in reported_names(self.spec)}
        found.update({n: _on_cpu(average.buffers[n]) for n in self.spec.owned_buffers})
        return found

    def recipe_state(self) -> dict[str, Any]:
        """Schedule, loss scale and parameter groups as JSON values; see `Update.state`."""
        return self._update.state()

    def load_recipe_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `recipe_state` gave, under this plan or another.

        Raises:
            OptimizerError: It is of another recipe.
        """
        self._update.load(state)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Own parts of the last step's gradients, before clipping (with ``keep_gradients``)."""
        kept = self._gradients.kept
        return {n: kept[n].cpu() for n in reported_names(self.spec) if n in kept}

    def load_evaluation(
        self, key: str, specs: Mapping[int, ForwardSpec], forget: Sequence[str] = ()
    ) -> None:
        """Makes the programs that evaluate one form of batch; see `ForwardRunner.load`."""
        self._forwards.load(key, specs, forget)

    def evaluate_steps(
        self, key: str, first: int, batches: Sequence[Sequence[Parcel]], weights: str = "live"
    ) -> list[Outcome]:
        """Evaluates batches of one form between two steps; see `ForwardRunner.run`.

        Args:
            key: What `load_evaluation` called the form.
            first: Number of the first batch in its data source.
            batches: For every rank its rows of each batch.
            weights: ``live``, or ``ema`` for the moving average of the recipe.

        Raises:
            OptimizerError: The recipe has no ``ema_decay``, or `weights` is something else.
        """
        average = self._update.average
        self._gradients.all_arrived()
        with weights_in_use(weights, self._holdings, average, self._spread) as held:
            return self._forwards.run(key, first, batches[self.spec.rank], *held)

    def _spread(self) -> None:
        """Brings stored parts to every rank whose programs take them, at once."""
        self._gradients.spread()
        self._gradients.all_arrived()

    def visit(self, visitor: Callable[[RankState], Any]) -> Any:
        """Shows a visitor the training state, between steps, and returns what it answers."""
        return visitor(self._kept)

    def memory(self) -> dict[str, int]:
        """Bytes held from step to step, measured on the tensors themselves.

        Returns:
            ``parameters``, ``gradients``, ``optimizer`` (its states, and the weights' moving
            average), ``total``; compare
            `raypar.stages.accounts.predicted_memory`.
        """
        held = self._holdings
        states = self._update.optimizer.state.values()
        average = self._update.average
        return measured_memory(
            parameters=[*held.params.values(), *held.stored.values()],
            gradients=self._gradients.tensors(),
            optimizer=[
                *(t for s in states for t in s.values() if isinstance(t, torch.Tensor)),
                *([] if average is None else average.tensors()),
            ],
        )

    @property
    def note(self) -> str | None:
        """Why the whole model had to be built here, or None."""
        return self._holdings.note

    def abort(self, reason: str) -> None:
        """Makes every transfer under way raise; safe from any thread."""
        self._world.abort(reason)

    def close(self) -> None:
        """Drops everything held."""
        self._world.close()


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _device_of(spec: RankSpec) -> torch.device:
    return torch.device("cuda" if spec.accelerator and torch.cuda.is_available() else "cpu")
