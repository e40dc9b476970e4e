"""Cutting a whole number of things into contiguous shares, by the method of largest remainders (Hamilton)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

#: MLP columns and head rows are cut at multiples of this: a cache line of float16 and a tile of most matrix kernels.
CUT_UNIT: Final = 8


def largest_remainder(total: int, weights: Sequence[float], *, minimum: int = 0) -> list[int]:
    """Whole shares of `total`, proportional to `weights`, each at least `minimum`; they sum to `total`.

    Ties go to the earlier entry. Raises ValueError where `minimum` cannot be given to all, or a weight is not a
    positive finite number.
    """
    if total < minimum * len(weights) or not weights:
        raise ValueError(f"cannot cut {total} into {len(weights)} shares of at least {minimum}")
    if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise ValueError(f"weights must be positive and finite, not {list(weights)}")
    scale = max(weights)
    parts = [weight / scale for weight in weights]
    whole = math.fsum(parts)
    exact = [total * part / whole for part in parts]
    shares = [max(math.floor(value), minimum) for value in exact]
    left = total - sum(shares)
    if left > 0:
        # One unit each for the shares furthest below their exact values: fewer are left than there are such shares.
        for index in sorted(range(len(shares)), key=lambda i: (shares[i] - exact[i], i))[:left]:
            shares[index] += 1
    while sum(shares) > total:
        # Raising small shares to the minimum took too many: the share furthest above its exact value gives one back.
        above = [i for i in range(len(shares)) if shares[i] > minimum]
        index = max(above, key=lambda i: (shares[i] - exact[i], i))
        shares[index] -= 1
    return shares


def cut(total: int, weights: Sequence[float], *, unit: int = 1) -> list[tuple[int, int]]:
    """Half-open contiguous ranges over `[0, total)`, proportional to `weights`, none of them empty.

    Boundaries fall on multiples of `unit` where there are enough units for everybody, else of 1. Raises ValueError as
    `largest_remainder` does.
    """
    if -(-total // unit) < len(weights):
        unit = 1
    shares = largest_remainder(-(-total // unit), weights, minimum=1)
    ranges, start = [], 0
    for share in shares:
        end = min(start + share * unit, total)
        ranges.append((start, end))
        start = end
    return ranges


def left_out(total: int, weights: Sequence[float]) -> list[int]:
    """Indices that would get nothing of `total`: devices too slow to hold even one KV-head group."""
    return [index for index, share in enumerate(largest_remainder(total, weights)) if share == 0]


def cut_unit(total: int, count: int) -> int:
    """Columns or rows are cut at multiples of `CUT_UNIT`, or its half where there are too few, and so on."""
    unit = CUT_UNIT
    while unit > 1 and -(-total // unit) < count:
        unit //= 2
    return unit


def ranges(shares: Sequence[int], unit: int, total: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges one after the other, of so many units each; the last ends at `total` at most."""
    ends = [min(end * unit, total) for end in itertools.accumulate(shares, initial=0)]
    return tuple(itertools.pairwise(ends))
