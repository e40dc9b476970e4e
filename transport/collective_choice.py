"""Which algorithm an all-reduce takes: a function of ranks, size and measured costs, and so the same at every rank.

Costs are those of the alpha-beta model (Hockney 1994; Thakur, Rabenseifner, Gropp 2005): a message takes a latency, a
fixed amount of work at either end, and time by its bytes. All algorithms add in the order of the ranks, so the choice
changes the time and not one bit of the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

ONE_SHOT, SCATTER, TREE, RING, HIERARCHY = "one-shot", "scatter", "tree", "ring", "hierarchy"

#: A ring passes a tensor on in pieces of this size, so that all its links are busy at once; and the other algorithms
#: add what is in the cache.
PIECE_BYTES = 512 * 1024


class Costs(NamedTuple):
    """What messages cost, in seconds: `latency_s` on the way, `work_s` of an end for each, `byte_s` for each byte.

    The defaults are of two processes of one machine (docs/benchmarks.md, "Transport").
    """

    latency_s: float = 8e-6
    work_s: float = 6e-6
    byte_s: float = 2e-10


def choose(nbytes: int, size: int, costs: Costs, island: int = 0) -> str:
    """The algorithm for an all-reduce of `nbytes` bytes over `size` ranks. island: ranks that are near each other."""
    times = predict(nbytes, size, costs, island)
    return min(times, key=lambda name: times[name])  # the first of equals: simplest first


def predict(nbytes: int, size: int, costs: Costs, island: int = 0) -> dict[str, float]:
    """Seconds by algorithm, simplest first; only those that make sense."""
    latency, work, byte = costs
    n, way = size, latency + 2 * work
    near, far = nbytes * byte / 10, nbytes * byte
    islands = -(-n // island) if 1 < island < n else 0
    data = far * island if islands else far  # the ranks of an island share its line
    times = {ONE_SHOT: latency + (n - 1) * (2 * work + data)}
    if nbytes >= n:
        times[SCATTER] = 2 * (latency + (n - 1) * (2 * work + data / n))
    if n > 2:
        rounds = math.ceil(math.log2(n))
        times[TREE] = 2 * rounds * way + (n - 1 + rounds) * data
        pieces = max(1, -(-nbytes // PIECE_BYTES))
        times[RING] = (2 * (n - 1) + pieces - 1) * (way + 2 * far / pieces)
    if islands:
        times[HIERARCHY] = 2 * (way + (island - 1) * (2 * work + near)) + 2 * (islands - 1) * (way + far)
    return times
