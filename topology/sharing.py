"""Who of an island takes how much, so that a stage takes the least time within the memory of each of its devices.

A layer of a stage takes max(attention) + max(MLP), and the last stage max(head) once a token (`topology.cost`): KV-head
groups, MLP columns and head rows are three separate sharings of a whole number of equal units over unequal devices,
each with the least maximum, that meet only in the devices' memory. Without a shortage of memory each is at its own
optimum. With one, the coarse KV-head groups are tried in every way (where there are few), columns and rows fill up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

#: Ways to cut the KV-head groups that are all tried; with more, only cuts between the one by speed and that by room.
LISTED_CUTS: Final = 128
#: How much longer than at its best the head may take, to make room for columns.
HEAD_LEVELS: Final = (1.15, 1.4, 2.0, 4.0)

Shares = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be shared over the devices of an island. Lists are by device; a unit of columns or rows is a few.

    `*_s` are seconds a unit (of a layer; of a token for rows), `room` bytes before anything is taken, `*_bytes` what a
    unit takes for all `layers` together. No rows: `rows` is 0. `layers` 0: memory does not count.
    """

    layers: int
    groups: int
    columns: int
    rows: int
    group_s: Sequence[float]
    column_s: Sequence[float]
    row_s: Sequence[float]
    room: Sequence[float]
    group_bytes: float
    column_bytes: float
    row_bytes: Sequence[float]


def fair(total: int, seconds: Sequence[float], most: Sequence[int] | None = None) -> list[int] | None:
    """Whole shares of `total`, each from 1 to its `most`, whose greatest share * seconds is least; None: impossible.

    Of equal choices the earlier device takes more.
    """
    count = len(seconds)
    limits = [total] * count if most is None else [min(each, total) for each in most]
    if count > total or min(limits) < 1 or sum(limits) < total:
        return None
    shares, rest, free = [0] * count, float(total), list(range(count))
    while free:  # the level that fills what is left, as if units could be cut; who is full below it drops out
        level = rest / math.fsum(1 / seconds[i] for i in free)
        full = [i for i in free if limits[i] <= level / seconds[i]]
        for i in full or free:
            shares[i] = limits[i] if full else max(int(level / seconds[i]), 1)
            rest -= shares[i]
        free = [i for i in free if i not in full] if full else []
    excess = sum(shares) - total
    while excess > 0:
        worst = max((i for i in range(count) if shares[i] > 1), key=lambda i: (shares[i] * seconds[i], i))
        shares[worst] -= 1
        excess -= 1
    while excess < 0:
        best = min((i for i in range(count) if shares[i] < limits[i]), key=lambda i: ((shares[i] + 1) * seconds[i], i))
        shares[best] += 1
        excess += 1
    return shares


def share(demand: Demand) -> Shares | None:
    """Groups, columns and rows by device with the least stage time found that fits; None where nothing was found."""
    ideal = fair(demand.groups, demand.group_s)
    columns = fair(demand.columns, demand.column_s)
    rows = fair(demand.rows, demand.row_s) if demand.rows else [0] * len(demand.room)
    if ideal is None or columns is None or rows is None:
        return None
    if not demand.layers:
        return ideal, columns, rows
    least_s = demand.layers * _slowest(columns, demand.column_s) + _slowest(rows, demand.row_s)
    best: Shares | None = None
    best_s = math.inf
    for groups in _cuts(demand, ideal):
        attention_s = demand.layers * _slowest(groups, demand.group_s)
        if attention_s + least_s >= best_s:
            continue
        room = [free - demand.group_bytes * g for free, g in zip(demand.room, groups, strict=True)]
        for filled, taken in _fillings(demand, room, columns, rows):
            took_s = attention_s + demand.layers * _slowest(filled, demand.column_s) + _slowest(taken, demand.row_s)
            if took_s < best_s:
                best, best_s = (list(groups), filled, taken), took_s
    return best


def _slowest(shares: Sequence[int], seconds: Sequence[float]) -> float:
    return max(n * each for n, each in zip(shares, seconds, strict=True))


def _cuts(demand: Demand, ideal: list[int]) -> Iterator[Sequence[int]]:
    """Ways to cut the groups: all where they are few, the fastest first; else from the one by speed to that by room."""
    count = len(demand.room)
    if math.comb(demand.groups - 1, count - 1) <= LISTED_CUTS:
        found = []
        for bars in itertools.combinations(range(1, demand.groups), count - 1):
            ends = (0, *bars, demand.groups)
            groups = [b - a for a, b in itertools.pairwise(ends)]
            found.append((_slowest(groups, demand.group_s), [-g for g in groups], groups))
        yield from (groups for _, _, groups in sorted(found))
        return
    yield ideal
    most = [int((free - demand.column_bytes) // demand.group_bytes) for free in demand.room]
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        seconds = [s ** (1 - weight) / max(r, 1.0) ** weight for s, r in zip(demand.group_s, demand.room, strict=True)]
        between = fair(demand.groups, seconds, most)
        if between is not None:
            yield between


def _fillings(
    demand: Demand, room: Sequence[float], columns: list[int], rows: list[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Columns and rows that fit into `room`: rows at their best first, columns at their best first, and in between."""
    if not demand.rows:
        filled = fair(demand.columns, demand.column_s, [int(free // demand.column_bytes) for free in room])
        if filled is not None:
            yield filled, rows
        return
    each = demand.row_bytes
    spare = [free - demand.column_bytes for free in room]  # a unit of columns must find room beside the rows
    most = [_whole(free, size, demand.rows) for free, size in zip(spare, each, strict=True)]
    choices = [fair(demand.rows, demand.row_s, most)]
    left = [free - demand.column_bytes * n for free, n in zip(room, columns, strict=True)]
    best_s = _slowest(rows, demand.row_s)
    for level in HEAD_LEVELS:
        limits = [min(m, int(level * best_s / s)) for m, s in zip(most, demand.row_s, strict=True)]
        choices.append(fair(demand.rows, [1 / max(free, 1.0) for free in left], limits))
    for taken in choices:
        if taken is not None:
            free = [r - size * n for r, size, n in zip(room, each, taken, strict=True)]
            filled = fair(demand.columns, demand.column_s, [int(f // demand.column_bytes) for f in free])
            if filled is not None:
                yield filled, taken
    kept = [int((free - size) // demand.column_bytes) for free, size in zip(room, each, strict=True)]
    filled = fair(demand.columns, demand.column_s, kept)
    if filled is not None:
        free = [r - demand.column_bytes * n for r, n in zip(room, filled, strict=True)]
        last = fair(
            demand.rows, demand.row_s, [_whole(f, size, demand.rows) for f, size in zip(free, each, strict=True)]
        )
        if last is not None:
            yield filled, last


def _whole(free: float, size: float, total: int) -> int:
    return total if size <= 0 and free >= 0 else int(free // size) if size > 0 else 0
