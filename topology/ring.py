"""The order of the stages: the round trip through all of them with the least latency. A travelling salesman's problem.

Costs may be asymmetric; an infinite cost is a pair that cannot exchange traffic. Few stages are ordered exactly, by the
dynamic program of Held and Karp (1962); many by nearest neighbours, improved by moving runs of stages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

#: Up to here every ring is listed, so that the next best one can be tried where memory forbids the best.
LISTED: Final = 5
#: Up to here the best ring is exact: Held-Karp takes n^2 * 2^n steps, about 15 ms at 9 in Python.
EXACT: Final = 9
#: Rings of many stages: starts that are tried, the longest run that is moved, and passes over all of them at most.
STARTS: Final = 4
RUN: Final = 3
PASSES: Final = 12
#: Stands for infinity where costs are subtracted. Seconds: far above any real ring.
_CUT_S: Final = 1e6

Matrix = Sequence[Sequence[float]]


def ring_s(cost: Matrix, order: Sequence[int]) -> float:
    """Cost of going once through `order` and back to its start; a single stage has no hop."""
    if len(order) < 2:
        return 0.0
    return math.fsum(cost[a][b] for a, b in zip(order, [*order[1:], order[0]], strict=True))


def turn_s(cost: Matrix, home: Matrix, order: Sequence[int]) -> float:
    """The same where the hop that closes the ring costs what `home` says, begun where that saves most."""
    hops = list(zip(order, [*order[1:], *order[:1]], strict=True))
    if len(order) < 2 or not all(math.isfinite(cost[a][b]) for a, b in hops):
        return ring_s(cost, order)
    return ring_s(cost, order) - max(cost[a][b] - home[a][b] for a, b in hops)


def rings(cost: Matrix, home: Matrix | None = None) -> list[tuple[int, ...]]:
    """Feasible rings, best first, each starting at stage 0: all up to `LISTED` stages, else only the best found.

    `home`, where given, is what a hop costs that closes the ring; it counts for rings that are listed. Empty where
    no ring avoids the infinite costs (or, beyond `EXACT` stages, none was found).
    """
    count = len(cost)
    if count <= LISTED:
        orders = [(0, *rest) for rest in itertools.permutations(range(1, count))]
        ranked = sorted((round(turn_s(cost, home or cost, order), 12), order) for order in orders)
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
    """A good ring of many stages: nearest neighbours from some starts, improved by moving runs of stages (Or 1976).

    Runs are never reversed: costs may be asymmetric. No randomness: the same costs give the same ring.
    """
    count = len(cost)
    bounded = [[min(each, _CUT_S) for each in row] for row in cost]
    starts = range(0, count, max(count // STARTS, 1))
    tours = [_moved(bounded, _nearest(bounded, start)) for start in starts]
    best = min(tours, key=lambda order: (ring_s(bounded, order), order))
    first = best.index(0)
    return (*best[first:], *best[:first])


def _nearest(cost: Matrix, start: int) -> list[int]:
    order, left = [start], set(range(len(cost))) - {start}
    while left:
        row = cost[order[-1]]
        order.append(min(left, key=lambda stage: (row[stage], stage)))
        left.remove(order[-1])
    return order


def _moved(cost: Matrix, order: list[int]) -> list[int]:
    """The ring with runs of up to `RUN` stages moved to where they shorten it, until none does."""
    count = len(order)
    table = np.array(cost)
    for _ in range(PASSES):
        improved = False
        for length in range(1, min(RUN, count - 2) + 1):
            for start in range(count):
                before, head = order[start - 1], order[start]
                tail, after = order[(start + length - 1) % count], order[(start + length) % count]
                saved = cost[before][head] + cost[tail][after] - cost[before][after]
                if saved <= 0:
                    continue
                turned = order[start:] + order[:start]
                run, rest = turned[:length], turned[length:]
                ways, stops = np.array(rest[:-1]), np.array(rest[1:])
                prices = table[ways, head] + table[tail, stops] - table[ways, stops]
                place = int(prices.argmin())
                if prices[place] < saved - 1e-12:
                    order = rest[: place + 1] + run + rest[place + 1 :]
                    improved = True
        if not improved:
            break
    return order
