"""Joins items of a placement problem that some best solution keeps together.

Let T be a bound: solutions with a largest load of T or more are of no interest. Let W(p, q) be the
cost of all tensors that hold both p and q, A(p, q) that of those that hold nothing else, and Y(v|w)
the cost of the tensors that hold v and not w. Three rules, applied until none does anything:

1. *Dear tensors.* Where p and q are apart, each of them on an accelerator pays W(p, q) beside its
   own latency. If p can bear that neither on an accelerator (latency + W ≥ T) nor, for want of a
   CPU that runs p below T, anywhere else, p and q are together in every solution below T.
2. *Followers.* Let latency(v) + Y(v|w) ≤ A(v, w). Moving v from wherever it is to w's device, if
   that is an accelerator, changes no load for the worse. w's device pays A less, and for nothing
   new but latency(v) and tensors of v without w. The device that v leaves, if an accelerator, pays
   A and latency(v) less, and more only for tensors that it held whole, which are without w. Any
   other device pays for the tensors of v before and after. So some best solution has v with w,
   provided that w is on no CPU (or v costs a CPU nothing), that no memory limit is in the way, and
   that the devices of w run v.
3. In a contiguous split the order of devices must survive that move as well: v may only follow w
   if every order relation of v is with w. Joining items that lie on a cycle of order relations
   is free: they are in one stage anyway.

Each rule keeps a best solution of the problem it is applied to; so does their repetition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raypar.search.exact.placement_problem import PlacementProblem

_MANY_ITEMS = 12


def reduced(problem: PlacementProblem, limit: float, contiguous: bool) -> PlacementProblem:
    """A smaller problem whose best solution is one of `problem`'s, if that is below `limit`.

    Args:
        problem: The problem.
        limit: T: the largest load from which on solutions do not matter.
        contiguous: Whether solutions are contiguous splits.
    """
    while True:
        if contiguous:
            problem = problem.merged(_components(problem.n_items, problem.before))
        pairs = [*_dear(problem, limit), *_followers(problem, limit, contiguous)]
        if not pairs:
            return problem
        problem = problem.merged(_joined_groups(problem.n_items, pairs))


def together(problem: PlacementProblem) -> PlacementProblem:
    """The problem with all items on a cycle of order relations joined."""
    return problem.merged(_components(problem.n_items, problem.before))


def _shared(problem: PlacementProblem) -> tuple[dict[tuple[int, int], float], list[float]]:
    """Cost of the tensors that each pair of items shares, and of all tensors of each item.

    Of a tensor with many items only the pairs with its first one are counted: sums of other pairs
    come out too small, which only makes the rules find less.
    """
    shared: dict[tuple[int, int], float] = {}
    touching = [0.0] * problem.n_items
    for items, cost in zip(problem.tensors, problem.cost.tolist(), strict=True):
        for item in items:
            touching[item] += cost
        some = items if len(items) <= _MANY_ITEMS else items[:1]
        for i, p in enumerate(some):
            for q in items[i + 1 :]:
                shared[p, q] = shared.get((p, q), 0.0) + cost
    return shared, touching


def _dear(problem: PlacementProblem, limit: float) -> list[tuple[int, int]]:
    """Rule 1: pairs that cannot be apart below `limit`."""
    latency, cpu_s, foreign = problem.accelerator_s, problem.cpu_s, problem.only_cpu

    def bears(item: int, weight: float) -> bool:
        """Whether the item can be apart from another that shares so much with it."""
        if problem.cpus and cpu_s[item] < limit:
            return True
        return not foreign[item] and bool(latency[item] + weight < limit)

    shared, _ = _shared(problem)
    return [
        pair
        for pair, weight in shared.items()
        if not (bears(pair[0], weight) and bears(pair[1], weight))
    ]


def _followers(problem: PlacementProblem, limit: float, contiguous: bool) -> list[tuple[int, int]]:
    """Rule 2 (and 3): pairs of an item and the one it may as well be with.

    A pair is only taken if neither item is in one already: the proof moves one item at a time.
    """
    if problem.size.sum() > problem.memory:
        return []
    alone: dict[tuple[int, ...], float] = {}
    for items, cost in zip(problem.tensors, problem.cost.tolist(), strict=True):
        if len(items) == 2:
            alone[items] = alone.get(items, 0.0) + cost
    related: list[set[int]] = [set() for _ in range(problem.n_items)]
    if contiguous:
        for u, v in problem.before:
            related[u].add(v)
            related[v].add(u)
    shared, touching = _shared(problem)
    taken: set[int] = set()
    found: list[tuple[int, int]] = []
    for pair, weight in sorted(shared.items(), key=lambda entry: -entry[1]):
        for v, w in (pair, pair[::-1]):
            if v in taken or w in taken or related[v] - {w}:
                continue
            if problem.only_cpu[v] or (problem.only_cpu[w] and problem.cpu_s[v] > 0):
                continue
            on_cpu = problem.cpus > 0 and problem.cpu_s[w] < limit and problem.cpu_s[v] > 0
            # What rounding leaves of a difference of equal sums is no cost.
            others = max(touching[v] - weight - 1e-12 * touching[v], 0.0)
            if on_cpu or problem.accelerator_s[v] + others > alone.get(pair, 0.0):
                continue
            taken |= {v, w}
            found.append((v, w))
    return found


def _joined_groups(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Per item the smallest item that pairs lead to."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for p, q in pairs:
        a, b = sorted((root(p), root(q)))
        parent[b] = a
    return [root(item) for item in range(count)]


def _components(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """Per item its strongly connected component, by Tarjan's algorithm without recursion."""
    after: Mapping[int, list[int]] = {item: [] for item in range(count)}
    for u, v in sorted(edges):
        after[u].append(v)
    low, index, component = [0] * count, [0] * count, [-1] * count
    stack: list[int] = []
    clock = 0
    for start in range(count):
        if index[start]:
            continue
        walk = [(start, iter(after[start]))]
        clock += 1
        index[start] = low[start] = clock
        stack.append(start)
        while walk:
            item, rest = walk[-1]
            step = next((v for v in rest if component[v] < 0), None)
            if step is None:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[item])
                if low[item] == index[item]:
                    while component[item] < 0:
                        component[stack.pop()] = item
            elif index[step]:
                low[item] = min(low[item], index[step])
            else:
                clock += 1
                index[step] = low[step] = clock
                stack.append(step)
                walk.append((step, iter(after[step])))
    return component
