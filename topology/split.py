"""Layers over given stages, exactly: the time of a stage by its layers may be any function of them.

`topology.balance` is quicker, and enough where a stage takes the same for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from topology.candidate import Assembler, Candidate
from topology.cost import Fit

Times = npt.NDArray[np.float64]


def times(steps: Sequence[Fit], layers: int, policy: str) -> Times:
    """Seconds of a stage with 0..`layers` layers, by the step of its ladder that is fastest; infinite where none fits.

    `policy` "prefill": seconds until the first token of a prompt, else seconds a token.
    """
    best = np.full(layers + 1, math.inf)
    counts = np.arange(layers + 1)
    for each in steps:
        most = min(each.capacity, layers)
        best[1 : most + 1] = np.minimum(
            best[1 : most + 1], (counts * layer_s(each, policy) + head_s(each))[1 : most + 1]
        )
    return best


def layer_s(each: Fit, policy: str) -> float:
    """Seconds of a layer, all-reduces included: an all-reduce holds a stage up just as computing does."""
    if policy == "prefill":
        return each.prefill_layer_s + each.prefill_layer_network_s
    return each.layer_s + each.layer_network_s


def head_s(each: Fit) -> float:
    """Seconds of the head."""
    return each.head_s + each.head_network_s


def least(tables: Sequence[Times], layers: int, limit_s: float = math.inf) -> tuple[float, list[int]] | None:
    """The least sum of stage times, each at most `limit_s`, and its layers by stage; None where that is impossible."""
    rows = np.arange(layers + 1)
    shift = rows[:, None] - rows[None, :]
    sums = np.full(layers + 1, math.inf)
    sums[0] = 0.0
    taken = []
    for table in tables:
        allowed = np.where(table > limit_s, math.inf, table)
        ways = sums[None, :] + np.where(shift >= 0, allowed[np.maximum(shift, 0)], math.inf)
        taken.append(ways.argmin(axis=1))
        sums = ways.min(axis=1)
    if not math.isfinite(sums[layers]):
        return None
    counts, left = [], layers
    for before in reversed(taken):
        counts.append(left - int(before[left]))
        left = int(before[left])
    return float(sums[layers]), counts[::-1]


def level_out(
    assembler: Assembler,
    ladders: Sequence[Sequence[Fit]],
    policy: str,
    *,
    limit_s: float = math.inf,
    slack: float = 0.0,
) -> Candidate | None:
    """The candidate on these stages with the least sum of stage times, and among those the least slowest stage.

    With `slack`, among those whose sum is within that fraction of the least.
    """
    layers = assembler.model.layers
    tables = [times(steps, layers, policy) for steps in ladders]
    found = least(tables, layers, limit_s)
    if found is None:
        return None
    allowed_s = found[0] * (1 + slack) * (1 + 1e-12)
    reached = sorted({float(each) for table in tables for each in table if each <= limit_s})
    low, high = 0, len(reached) - 1
    while low < high:
        middle = (low + high) // 2
        tighter = least(tables, layers, reached[middle])
        if tighter is not None and tighter[0] <= allowed_s:
            found, high = tighter, middle
        else:
            low = middle + 1
    fits = []
    for steps, count in zip(ladders, found[1], strict=True):
        able = [each for each in steps if each.capacity >= count]
        fits.append(min(able, key=lambda each: count * layer_s(each, policy) + head_s(each)))
    return assembler.priced(tuple(fits), tuple(found[1]))
