"""The maximum flow of many layouts of one pool, fast: what a search asks thousands of times.

A primal-dual minimum-cost flow (Ford and Fulkerson's, with the blocking flows of Dinic, 1970): cheapest ways first, all
ways of equal cost in one phase. Costs are latencies rounded to `unit_ms`, so that there are few phases: the flow is the
maximum, its network time close to the least. Whole figures for an answer come from `topology.flow.measure`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from topology.flow import SINK, SOURCE, Pool

#: Below this many tokens/s an edge counts as full: far above what float arithmetic leaves over.
_NOTHING: Final = 1e-6
_FAR: Final = 1 << 60

#: A wire as the search sees it: other end, tokens/s, rounded cost, ms.
Edge = tuple[int, float, int, float]

#: Edges by the vertex they leave; by edge its head, what it has left, its cost, its ms. Edge k ^ 1 is k reversed.
_Network = tuple[list[list[int]], list[int], list[float], list[int], list[float]]


class Evaluator:
    """Machines by index. `start[i]`, `end[i]` are the layers of machine i; equal ones leave it out."""

    def __init__(self, pool: Pool, *, partial: bool = False) -> None:
        self.pool = pool
        self.layers = pool.layers
        self.partial = partial
        self.count = len(pool.machines)
        index = {machine.name: i for i, machine in enumerate(pool.machines)}
        self.rates = [(0.0, *machine.tokens_per_s) for machine in pool.machines]
        # A quarter of the longest wait: finer adds phases, not better layouts.
        self.unit_ms = max((wire.ms for wire in pool.wires), default=0.0) / 4 or 1.0
        self.wires: list[dict[int, Edge]] = [{} for _ in range(self.count)]
        self.entry: dict[int, Edge] = {}
        self.exit: dict[int, Edge] = {}
        for wire in pool.wires:
            figures = (wire.tokens_per_s, round(wire.ms / self.unit_ms), wire.ms)
            if wire.source == SOURCE and wire.target == SINK:
                continue
            if wire.source == SOURCE:
                self.entry[index[wire.target]] = (index[wire.target], *figures)
            elif wire.target == SINK:
                self.exit[index[wire.source]] = (index[wire.source], *figures)
            else:
                self.wires[index[wire.source]][index[wire.target]] = (index[wire.target], *figures)

    def coverage(self, start: Sequence[int], end: Sequence[int]) -> list[float]:
        """Tokens/s by layer if no wire held anything up. Its least entry bounds the flow, unless `partial`."""
        steps = [0.0] * (self.layers + 1)
        rates = self.rates
        for i in range(self.count):
            rate = rates[i][end[i] - start[i]]
            steps[start[i]] += rate
            steps[end[i]] -= rate
        total, found = 0.0, []
        for step in steps[:-1]:
            total += step
            found.append(total)
        return found

    def flow(self, start: Sequence[int], end: Sequence[int]) -> tuple[float, float]:
        """(tokens/s, sum of tokens/s * ms over all wires)."""
        n = self.count
        source, sink = 2 * n, 2 * n + 1
        adjacent: list[list[int]] = [[] for _ in range(2 * n + 2)]
        heads: list[int] = []
        left: list[float] = []
        costs: list[int] = []
        waits: list[float] = []

        def join(a: int, b: int, capacity: float, cost: int, ms: float) -> None:
            adjacent[a].append(len(heads))
            adjacent[b].append(len(heads) + 1)
            heads.extend((b, a))
            left.extend((capacity, 0.0))
            costs.extend((cost, -cost))
            waits.extend((ms, -ms))

        following: dict[int, list[int]] = {}
        for i in range(n):
            if end[i] > start[i]:
                at = range(start[i], end[i]) if self.partial else (start[i],)
                for layer in at:
                    following.setdefault(layer, []).append(i)
        for i in range(n):
            if end[i] == start[i]:
                continue
            join(i, n + i, self.rates[i][end[i] - start[i]], 0, 0.0)
            if start[i] == 0 and i in self.entry:
                _, capacity, cost, ms = self.entry[i]
                join(source, i, capacity, cost, ms)
            if end[i] == self.layers:
                if i in self.exit:
                    _, capacity, cost, ms = self.exit[i]
                    join(n + i, sink, capacity, cost, ms)
                continue
            reached = self.wires[i]
            for j in following.get(end[i], ()):
                if j in reached:
                    _, capacity, cost, ms = reached[j]
                    join(n + i, j, capacity, cost, ms)
        return _cheapest((adjacent, heads, left, costs, waits), source, sink)


def _cheapest(network: _Network, source: int, sink: int) -> tuple[float, float]:
    adjacent, heads, left, costs, waits = network
    size = len(adjacent)
    flow = weighted = 0.0
    while True:
        distance = [_FAR] * size
        distance[source] = 0
        queue, queued = deque([source]), [False] * size
        while queue:
            at = queue.popleft()
            queued[at] = False
            here = distance[at]
            for k in adjacent[at]:
                if left[k] > _NOTHING and here + costs[k] < distance[heads[k]]:
                    distance[heads[k]] = here + costs[k]
                    if not queued[heads[k]]:
                        queued[heads[k]] = True
                        queue.append(heads[k])
        if distance[sink] == _FAR:
            return flow, weighted
        pointer, on_way = [0] * size, [False] * size

        def push(
            at: int,
            most: float,
            distance: list[int] = distance,
            pointer: list[int] = pointer,
            on_way: list[bool] = on_way,
        ) -> tuple[float, float]:
            if at == sink:
                return most, 0.0
            on_way[at] = True
            sent = cost = 0.0
            edges = adjacent[at]
            while pointer[at] < len(edges):
                k = edges[pointer[at]]
                head = heads[k]
                if left[k] > _NOTHING and not on_way[head] and distance[head] == distance[at] + costs[k]:
                    some, beyond = push(head, min(most - sent, left[k]))
                    if some > 0:
                        left[k] -= some
                        left[k ^ 1] += some
                        sent += some
                        cost += beyond + some * waits[k]
                        if most - sent <= _NOTHING:
                            break
                pointer[at] += 1
            on_way[at] = False
            return sent, cost

        sent, cost = push(source, float("inf"))
        if sent <= _NOTHING:
            return flow, weighted
        flow += sent
        weighted += cost
