"""How many layers each stage gets: the least total time that memory allows, then the least uneven way to reach it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def balance(
    layer_s: Sequence[float], extra_s: Sequence[float], capacity: Sequence[int], layers: int, *, slack: float = 0.0
) -> list[int] | None:
    """Layers by stage, each from 1 to its capacity, summing to `layers`; None where that is impossible.

    A stage takes n * layer_s + extra_s seconds. A token passes all stages one after the other, so its latency is the
    sum, which filling the fastest stage first makes least; but a rate over many requests is bound by the slowest stage.
    Among splits whose sum is within `slack` (a fraction) of the least, the one with the least slowest stage is taken:
    stages equally fast come out even. An infinite slack minimises the slowest stage alone.
    """
    if not layer_s or len(layer_s) > layers or min(capacity) < 1 or sum(capacity) < layers:
        return None
    capacity = [min(most, layers - len(layer_s) + 1) for most in capacity]  # every other stage has one at least
    fastest_first = sorted(range(len(layer_s)), key=lambda i: (layer_s[i], i))

    def fill(limit_s: float) -> list[int] | None:
        most = [_most(limit_s, layer_s[i], extra_s[i], capacity[i]) for i in range(len(layer_s))]
        if min(most) < 1 or sum(most) < layers:
            return None
        counts = [1] * len(most)
        left = layers - len(most)
        for index in fastest_first:
            taken = min(most[index] - 1, left)
            counts[index] += taken
            left -= taken
        return counts

    def total_s(counts: list[int]) -> float:
        return math.fsum(count * each for count, each in zip(counts, layer_s, strict=True))

    best = fill(math.inf)
    if best is None:
        return None
    allowed_s = total_s(best) * (1 + slack) * (1 + 1e-9)
    limits = sorted({extra_s[i] + n * layer_s[i] for i in range(len(layer_s)) for n in range(1, capacity[i] + 1)})
    low, high = 0, len(limits) - 1
    while low < high:  # a looser limit never makes the total worse, so bisection finds the tightest that will do
        middle = (low + high) // 2
        counts = fill(limits[middle])
        if counts is not None and total_s(counts) <= allowed_s:
            high = middle
        else:
            low = middle + 1
    tight = fill(limits[low])
    return tight if tight is not None and total_s(tight) <= allowed_s else best


def _most(limit_s: float, layer_s: float, extra_s: float, capacity: int) -> int:
    if math.isinf(limit_s):
        return capacity
    return min(capacity, math.floor((limit_s - extra_s) / layer_s * (1 + 1e-12) + 1e-9))
