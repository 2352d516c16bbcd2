"""Makes a problem smaller without losing its optimum: folds, merges, dominated options.

* A link between a decision and itself (a value that one layer hands to the next) is part of what
  the options of that decision cost.
* A value with one reader joins its maker and its reader into one decision over pairs of options, of
  which only the cheapest matters for every combination of states that the rest sees: dynamic
  programming along chains. Views vanish this way.
* An option goes where another costs less however everyone else decides.

With a memory limit, options that hold fewer bytes are kept as well.
"""

from __future__ import annotations

import numpy as np

from raypar.search.intra.problem import Decision, Floats, Indices, Link, Problem, Reader

_MOST_PAIRS = 160
"""A merge may leave at most this many options, or as many as one of the two had."""
_MOST_TRIED = 400_000


def reduce(problem: Problem, *, memory: bool, tied: bool = True) -> Problem:
    """The smaller problem; options keep track of what they mean (`Decision.picks`).

    Args:
        problem: Left as it is.
        memory: Whether bytes matter.
        tied: Whether all that a decision stands for decides alike. For a lower bound over free
            decisions only what is true for each of them by itself is done.
    """
    work = _Reduction(problem, memory, tied)
    work.run()
    return Problem(work.decisions, work.links)


class _Reduction:
    def __init__(self, problem: Problem, memory: bool, tied: bool) -> None:
        self.memory = memory
        self.tied = tied
        self.decisions = [
            Decision(d.name, d.count, d.seconds.copy(), d.nbytes.copy(), dict(d.picks))
            for d in problem.decisions
        ]
        self.links = [
            Link(x.name, x.count, x.source, x.states, [Reader(r.decision, r.wants, r.saves)
                 for r in x.readers], x.cost, x.saved)
            for x in problem.links
        ]  # fmt: skip
        self.touching: list[list[Link]] = [[] for _ in self.decisions]
        """Decision → its links, in their order."""
        self.kept_apart: set[Link] = set()
        """Links whose ends cannot be merged, as long as neither of them changes."""

    def run(self) -> None:
        self._fold(self.links)
        self.links = [link for link in self.links if self._matters(link)]
        for link in self.links:
            for at in link.members:
                self.touching[at].append(link)
        for at in range(len(self.decisions)):
            self._shrink(at)
        while self._merge_once():
            pass

    def _matters(self, link: Link) -> bool:
        return bool(np.any(link.cost)) or (self.memory and any(r.saves for r in link.readers))

    def _fold(self, links: list[Link]) -> None:
        """Those of some links that depend on one decision become part of its costs."""
        gone = set()
        for link in links:
            own = link.members == {link.source}
            if own and (self.tied or link.count == self.decisions[link.source].count == 1):
                self._fold_one(link)
                gone.add(link)
        if gone:
            self.links = [x for x in self.links if x not in gone]
            for at in {link.source for link in gone}:
                self.touching[at] = [x for x in self.touching[at] if x not in gone]

    def _fold_one(self, link: Link) -> None:
        decision = self.decisions[link.source]
        for k in range(len(decision)):
            wants = {int(r.wants[k]) for r in link.readers}
            kept = {int(r.wants[k]) for r in link.readers if r.saves}
            decision.seconds[k] += sum(link.cost[link.states[k], w] for w in wants)
            decision.nbytes[k] += sum(link.saved[w] for w in kept)

    def _signature(self, at: int, without: Link | None = None) -> Indices:
        """Per option the states that links see."""
        columns: list[Indices] = []
        for link in self.touching[at]:
            if link is without:
                continue
            if link.source == at:
                columns.append(link.states)
            columns += [r.wants for r in link.readers if r.decision == at]
        n = len(self.decisions[at])
        return np.stack(columns, 1) if columns else np.zeros((n, 1), dtype=np.intp)

    def _shrink(self, at: int) -> None:
        """Drops options that others beat: first among equal states, then by worst cases."""
        if len(self.decisions[at]) < 2:
            return
        decision = self.decisions[at]
        keep = np.flatnonzero(np.isfinite(decision.seconds))
        self._keep(at, keep)
        self._keep(at, self._cheapest(self._signature(at), decision.seconds, decision.nbytes))
        if self.tied and len(decision) > 1:
            self._keep(at, self._undominated(at))

    def _keep(self, at: int, kept: Indices) -> None:
        decision = self.decisions[at]
        if len(kept) == len(decision):
            return
        decision.seconds, decision.nbytes = decision.seconds[kept], decision.nbytes[kept]
        decision.picks = {d: p[kept] for d, p in decision.picks.items()}
        for link in self.touching[at]:
            if link.source == at:
                link.states = link.states[kept]
            for reader in link.readers:
                if reader.decision == at:
                    reader.wants = reader.wants[kept]

    def _cheapest(self, signature: Indices, seconds: Floats, nbytes: Floats) -> Indices:
        """Of options with equal states those on the front of (seconds, bytes)."""
        _, group = np.unique(signature, axis=0, return_inverse=True)
        group = group.reshape(-1)
        if not self.memory:
            order = np.lexsort((seconds, group))
            first = np.r_[True, np.diff(group[order]) != 0]
            return np.sort(order[first])
        order = np.lexsort((nbytes, seconds, group))
        kept: list[int] = []
        now, least = -1, np.inf
        for k in order:
            if group[k] != now:
                now, least = int(group[k]), np.inf
            if nbytes[k] < least:
                least = float(nbytes[k])
                kept.append(int(k))
        return np.sort(np.array(kept, dtype=np.intp))

    def _undominated(self, at: int) -> Indices:
        """Options that no other one beats whatever the rest decides."""
        decision = self.decisions[at]
        # worse[a, b]: most that b costs more than a; heavier: the same for bytes.
        worse = decision.seconds[None, :] - decision.seconds[:, None]
        heavier = decision.nbytes[None, :] - decision.nbytes[:, None]
        for link in self.touching[at]:
            more, bytes_more = _worst(link, at)
            worse = worse + more
            heavier = heavier + bytes_more
        beaten = worse <= 0
        if self.memory:
            beaten &= heavier <= 0
        np.fill_diagonal(beaten, False)
        alive = np.ones(len(decision), dtype=bool)
        for a in range(len(decision)):
            if np.any(beaten[a] & alive):
                alive[a] = False
        return np.flatnonzero(alive)

    def _merge_once(self) -> bool:
        for link in self.links:
            if len(link.readers) != 1 or link in self.kept_apart:
                continue
            if link.source == link.readers[0].decision:
                continue
            a, b = link.source, link.readers[0].decision
            counts = {link.count, self.decisions[a].count, self.decisions[b].count}
            if not self.tied and len(counts) > 1:
                continue
            self.kept_apart.add(link)
            left = _number(self._signature(a, link))
            right = _number(self._signature(b, link))
            pairs = (int(left.max()) + 1) * (int(right.max()) + 1)
            most = max(_MOST_PAIRS, len(self.decisions[a]), len(self.decisions[b]))
            if pairs <= most and len(self.decisions[a]) * len(self.decisions[b]) <= _MOST_TRIED:
                self._merge(link)
                return True
        return False

    def _merge(self, link: Link) -> None:
        """Joins a reader into the maker: pairs of options, the best of every signature."""
        a, b = link.source, link.readers[0].decision
        one, two = self.decisions[a], self.decisions[b]
        i, j = (m.ravel() for m in np.indices((len(one), len(two))))
        want = link.readers[0].wants[j]
        seconds = one.seconds[i] + two.seconds[j] + link.cost[link.states[i], want]
        nbytes = one.nbytes[i] + two.nbytes[j]
        if link.readers[0].saves:
            nbytes = nbytes + link.saved[want]
        fine = np.isfinite(seconds)
        i, j, seconds, nbytes = i[fine], j[fine], seconds[fine], nbytes[fine]
        left, right = _number(self._signature(a, link)), _number(self._signature(b, link))
        kept = self._cheapest(np.stack([left[i], right[j]], 1), seconds, nbytes)
        i, j = i[kept], j[kept]
        picks = {d: p[i] for d, p in one.picks.items()}
        picks |= {d: p[j] for d, p in two.picks.items()}
        self.links.remove(link)
        theirs = [x for x in self.touching[a] if x is not link]
        theirs += [x for x in self.touching[b] if x is not link and x not in theirs]
        for other in theirs:
            if other.source == a:
                other.states = other.states[i]
            elif other.source == b:
                other.states, other.source = other.states[j], a
            for reader in other.readers:
                if reader.decision == a:
                    reader.wants = reader.wants[i]
                elif reader.decision == b:
                    reader.wants, reader.decision = reader.wants[j], a
        self.decisions[a] = Decision(one.name, one.count, seconds[kept], nbytes[kept], picks)
        self.decisions[b] = Decision(two.name, two.count, np.zeros(0), np.zeros(0), {})
        at = {x: i for i, x in enumerate(self.links)}
        self.touching[a], self.touching[b] = sorted(theirs, key=at.__getitem__), []
        self._fold(self.touching[a])
        self._shrink(a)
        self.kept_apart.difference_update(self.touching[a])


def _number(signature: Indices) -> Indices:
    """Rows as numbers from 0, equal where rows are."""
    return np.unique(signature, axis=0, return_inverse=True)[1].reshape(-1)


def _worst(link: Link, at: int) -> tuple[Floats, Floats]:
    """By (a, b): the most that a link costs more (seconds, bytes) when `at` takes b, not a."""
    n = len(link.states) if link.source == at else -1
    mine = [r for r in link.readers if r.decision == at]
    if n < 0:
        n = len(mine[0].wants)
    more, heavier = np.zeros((n, n)), np.zeros((n, n))
    if link.source == at and mine:
        # Both ends move at once: only options that look the same here are compared.
        seen = np.stack([link.states, *(r.wants for r in mine)], 1)
        same = (seen[:, None, :] == seen[None, :, :]).all(2)
        return np.where(same, 0.0, np.inf), heavier
    with np.errstate(invalid="ignore"):
        if link.source == at:
            between = np.nan_to_num(
                link.cost[None, :, :] - link.cost[:, None, :],
                nan=0.0,
                posinf=np.inf,
                neginf=-np.inf,
            )
            most = between.max(axis=2)
            most = np.where(most > 0, most * len(link.readers), most)
            return most[np.ix_(link.states, link.states)], heavier
        for reader in mine:
            more = more + _reader_worst(link, reader)
            if reader.saves:
                alone = len(link.readers) == 1
                now = link.saved[reader.wants]
                change = now[None, :] - (now[:, None] if alone else 0.0)
                same = reader.wants[None, :] == reader.wants[:, None]
                heavier = heavier + np.where(same, 0.0, change)
    return more, heavier


def _reader_worst(link: Link, reader: Reader) -> Floats:
    cost = link.cost
    if len(link.readers) == 1:
        between = np.nan_to_num(
            cost[:, None, :] - cost[:, :, None], nan=0.0, posinf=np.inf, neginf=-np.inf
        )
        most = between.max(axis=0)
    else:  # the other readers may pay for a's state, and not for b's
        most = np.repeat(cost.max(axis=0)[None, :], cost.shape[1], axis=0)
        np.fill_diagonal(most, 0.0)
    result: Floats = most[np.ix_(reader.wants, reader.wants)]
    return result
