"""Layouts of separate regions that share no boundary between layers, so that no token can stray from one to another.

Within a region the order of stages is free: their machines are joined alike. Two regions that both cut at some layer
offer a way across, which a flow need not take but a router may. Here stages change places until no such way is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from typing import Final

#: Exchanges of two stages to try: regions of ten stages over sixty layers need some tens.
TRIES: Final = 2_000

Ranges = dict[int, tuple[int, int]]


def untangled(ranges: Ranges, regions: Sequence[Sequence[int]], layers: int, rng: Random) -> Ranges:
    """The same stages in another order within each region, with as few boundaries as possible shared by two regions.

    Capacities stay what they are; so does the flow within a region where its wires are not what holds it up.
    """
    stages = [_stages({i: ranges[i] for i in members if i in ranges}, layers) for members in regions]
    movable = [number for number, found in enumerate(stages) if len(found) > 2]
    shared = _shared(stages, layers)
    for _ in range(TRIES):
        if not shared or not movable:
            break
        number = rng.choice(movable)
        tried = list(stages[number])
        a, b = rng.sample(range(len(tried)), 2)
        tried[a], tried[b] = tried[b], tried[a]
        there = [*stages[:number], tried, *stages[number + 1 :]]
        fewer = _shared(there, layers)
        if fewer <= shared:
            stages, shared = there, fewer
    found: Ranges = {}
    for members in stages:
        at = 0
        for width, inside in members:
            found.update({i: (at + a, at + b) for i, (a, b) in inside.items()})
            at += width
    return found


#: Layers of a stage, and what each of its machines holds, counted from its first layer.
_Stage = tuple[int, Ranges]


def _stages(ranges: Ranges, layers: int) -> list[_Stage]:
    """Cut where no machine holds layers on both sides."""
    cuts = {0, layers, *(a for a, _ in ranges.values()), *(b for _, b in ranges.values())}
    cuts = {cut for cut in cuts if not any(a < cut < b for a, b in ranges.values())}
    found: list[_Stage] = []
    ordered = sorted(cuts)
    for low, high in itertools.pairwise(ordered):
        inside = {i: (a - low, b - low) for i, (a, b) in ranges.items() if low <= a and b <= high}
        found.append((high - low, inside))
    return found


def _shared(regions: Sequence[Sequence[_Stage]], layers: int) -> int:
    """Pairs of regions where a machine of the one ends at a layer at which a machine of the other starts."""
    starts: list[set[int]] = []
    ends: list[set[int]] = []
    for stages in regions:
        at, first, last = 0, set[int](), set[int]()
        for width, inside in stages:
            first |= {at + a for a, _ in inside.values()}
            last |= {at + b for _, b in inside.values()}
            at += width
        starts.append(first - {0})
        ends.append(last - {layers})
    return sum(len(ends[a] & starts[b]) for a in range(len(regions)) for b in range(len(regions)) if a != b)
