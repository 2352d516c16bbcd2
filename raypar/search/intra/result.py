"""What the search for a sharding gives back."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from raypar.sharding.rules.base import Strategy
from raypar.sharding.strategies import pattern_of


@dataclass(frozen=True)
class IntraPlan:
    """How the ops of one graph are sharded.

    Attributes:
        choices: Op id → strategy, of every op (pieces aside).
        objective_s: Predicted seconds of a step on this mesh: compute, conversions, gradient sync
            and optimizer, all microbatches; pipeline bubbles and sending to other stages aside.
        bound_s: No choice takes less; -inf where that was not worked out.
        parts: Seconds by kind; see `raypar.search.intra.evaluate.Estimate`.
        bytes: Bytes held by one device, by kind.
        stats: ``nodes`` (ops), ``decisions`` (after ties and merges), ``variables``,
            ``constraints``, ``enumerate_s``, ``build_s``, ``solve_s``, ``refine_s``, ``parts``
            (into how many each class of tied ops is split), ``gap`` (to `bound_s`; 0 where the
            tied program was solved and no limit binds).
    """

    choices: dict[str, Strategy]
    objective_s: float
    bound_s: float
    parts: dict[str, float]
    bytes: dict[str, float]
    stats: dict[str, float]

    def to_sharding(self) -> dict[str, str]:
        """The texts for `raypar.plan.StagePlan.sharding`.

        Ops that are whole on every rank are left out, and repeated layers are folded: a pattern
        says what most of its ops do, and the others have entries of their own.
        """
        alike: dict[str, list[str]] = defaultdict(list)
        for key in self.choices:
            alike[pattern_of(key)].append(key)
        found: dict[str, str] = {}
        for pattern, keys in alike.items():
            (common, _), *_ = Counter(self.choices[k] for k in keys).most_common(1)
            left_out = common.whole
            if len(keys) > 1 and not left_out:
                found[pattern] = str(common)
            for key in keys:
                strategy = self.choices[key]
                said = strategy.whole if left_out else len(keys) > 1 and strategy == common
                if not said:
                    found[key] = str(strategy)
        return found
