"""The order of the stages: the round trip through all of them with the least latency. A travelling salesman's problem.

Costs may be asymmetric; an infinite cost is a pair that cannot exchange traffic. Few stages are ordered exactly, by the
dynamic program of Held and Karp (1962); many by networkx' greedy tour, improved by threshold accepting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

import networkx as nx

#: Up to here every ring is listed, so that the next best one can be tried where memory forbids the best.
LISTED: Final = 5
#: Up to here the best ring is exact: Held-Karp takes n^2 * 2^n steps, about 15 ms at 9 in Python.
EXACT: Final = 9
#: Stands for infinity in networkx' tours, whose arithmetic needs finite weights. Seconds: far above any real ring.
_CUT_S: Final = 1e6

Matrix = Sequence[Sequence[float]]


def ring_s(cost: Matrix, order: Sequence[int]) -> float:
    """Cost of going once through `order` and back to its start; a single stage has no hop."""
    if len(order) < 2:
        return 0.0
    return math.fsum(cost[a][b] for a, b in zip(order, [*order[1:], order[0]], strict=True))


def rings(cost: Matrix) -> list[tuple[int, ...]]:
    """Feasible rings, best first, each starting at stage 0: all up to `LISTED` stages, else only the best found.

    Empty where no ring avoids the infinite costs (or, beyond `EXACT` stages, none was found).
    """
    count = len(cost)
    if count <= LISTED:
        orders = [(0, *rest) for rest in itertools.permutations(range(1, count))]
        ranked = sorted((round(ring_s(cost, order), 12), order) for order in orders)
        return [order for total, order in ranked if math.isfinite(total)]
    order = _held_karp(cost) if count <= EXACT else _tour(cost)
    return [order] if order and math.isfinite(ring_s(cost, order)) else []


def _held_karp(cost: Matrix) -> tuple[int, ...]:
    """The cheapest ring, or () where there is none. Of equally cheap ones the first in a fixed order."""
    count = len(cost)
    full = (1 << count) - 1
    best: list[dict[int, tuple[float, int]]] = [{} for _ in range(full + 1)]
    best[1][0] = (0.0, -1)
    for visited in range(1, full + 1, 2):
        for last, (spent, _) in best[visited].items():
            row = cost[last]
            for following in range(1, count):
                if visited >> following & 1 or math.isinf(row[following]):
                    continue
                entry = (spent + row[following], last)
                table = best[visited | 1 << following]
                if following not in table or entry < table[following]:
                    table[following] = entry
    ends = [(spent + cost[last][0], last) for last, (spent, _) in best[full].items() if math.isfinite(cost[last][0])]
    if not ends:
        return ()
    order, visited, last = [], full, min(ends)[1]
    while last != -1:
        order.append(last)
        visited, last = visited & ~(1 << last), best[visited][last][1]
    return tuple(reversed(order))


def _tour(cost: Matrix) -> tuple[int, ...]:
    """A good ring of many stages. The seed is fixed: the same costs give the same ring."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    for a, b in itertools.permutations(range(len(cost)), 2):
        graph.add_edge(a, b, weight=min(cost[a][b], _CUT_S))
    greedy = nx.approximation.greedy_tsp(graph, source=0)
    tours = [
        greedy,
        nx.approximation.threshold_accepting_tsp(graph, greedy, source=0, move="1-0", seed=0, threshold=0),
        nx.approximation.threshold_accepting_tsp(graph, greedy, source=0, move="1-1", seed=0, threshold=0),
    ]
    return min((tuple(tour[:-1]) for tour in tours), key=lambda order: (ring_s(cost, order), order))
