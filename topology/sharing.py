"""Who of an island takes how much, so that a stage takes the least time within the memory of each of its devices.

A layer of a stage takes max(attention) + max(MLP), and the last stage max(head) once a token (`topology.cost`): KV-head
groups, MLP columns and head rows are three separate sharings of a whole number of equal units over unequal devices,
each with the least maximum, that meet only in the devices' memory. Without a shortage of memory each is at its own
optimum. With one, the coarse KV-head groups are tried in every way (where there are few), columns and rows fill up.
Where there are more devices than groups, query heads are shared instead (`topology.headcuts`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from topology.headcuts import HeadCut

#: Ways to cut the KV-head groups that are all tried; with more, only cuts between the one by speed and that by room.
LISTED_CUTS: Final = 128
#: How much longer than at its best the head may take, to make room for columns.
HEAD_LEVELS: Final = (1.15, 1.4, 2.0, 4.0)

Shares = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be shared over the devices of an island. Lists are by device; a unit of columns or rows is a few.

    `*_s` are seconds a unit (of a layer; of a token for rows), `room` bytes before anything is taken, `*_bytes` what a
    unit takes for all `layers` together. No rows: `rows` is 0. `layers` 0: memory does not count. `heads`: instead of
    whole groups, query heads are shared; then groups stand for nothing.
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
    heads: HeadCut | None = None


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
    """Groups, columns and rows by device with the least stage time found that fits; None where nothing was found.

    Query heads in the place of groups where `demand.heads` says so.
    """
    found = _shared(*(_frozen(getattr(demand, f.name)) for f in fields(demand)))
    return None if found is None else (list(found[0]), list(found[1]), list(found[2]))


def _frozen(value: object) -> object:
    if isinstance(value, HeadCut):
        return value.frozen()
    return tuple(value) if isinstance(value, Sequence) else value


@functools.lru_cache(maxsize=1024)
def _shared(*parts: Any) -> Shares | None:
    """`share`, remembered: a mesh has the same devices at many sites, and planning again asks for much again."""
    demand = Demand(*parts)
    cut = demand.heads
    ideal = fair(demand.groups, demand.group_s) if cut is None else cut.fastest()
    columns = fair(demand.columns, demand.column_s)
    rows = fair(demand.rows, demand.row_s) if demand.rows else [0] * len(demand.room)
    if ideal is None or columns is None or rows is None:
        return None
    if not demand.layers:
        return ideal, columns, rows
    rows_s = _slowest(rows, demand.row_s)
    least_s = demand.layers * _slowest(columns, demand.column_s) + rows_s
    ideal_s = demand.layers * (_slowest(ideal, demand.group_s) if cut is None else cut.slowest(ideal)) + least_s
    best: Shares | None = None
    best_s = math.inf
    for groups, bound_s in _cuts(demand, ideal) if cut is None else _head_cuts(demand, cut):
        if bound_s and bound_s + rows_s >= best_s:
            break  # they come in the order of their bounds
        attention_s = demand.layers * (_slowest(groups, demand.group_s) if cut is None else cut.slowest(groups))
        if attention_s + least_s >= best_s:
            continue
        taken_bytes = [demand.group_bytes * g for g in groups] if cut is None else cut.bytes(groups)
        room = [free - taken for free, taken in zip(demand.room, taken_bytes, strict=True)]
        for filled, taken in _fillings(demand, room, columns, rows):
            took_s = attention_s + demand.layers * _slowest(filled, demand.column_s) + _slowest(taken, demand.row_s)
            if took_s < best_s:
                best, best_s = (list(groups), filled, taken), took_s
        if best_s <= ideal_s * (1 + 1e-12):
            break
    return best


def _slowest(shares: Sequence[int], seconds: Sequence[float]) -> float:
    return max(n * each for n, each in zip(shares, seconds, strict=True))


def _cuts(demand: Demand, ideal: list[int]) -> Iterator[tuple[Sequence[int], float]]:
    """Ways to cut the groups: all where they are few, the fastest first; else from the one by speed to that by room.

    With each a bound on the stage's time by which they are ordered, or 0.
    """
    count = len(demand.room)
    if math.comb(demand.groups - 1, count - 1) <= LISTED_CUTS:
        found = []
        for bars in itertools.combinations(range(1, demand.groups), count - 1):
            ends = (0, *bars, demand.groups)
            groups = [b - a for a, b in itertools.pairwise(ends)]
            found.append((_slowest(groups, demand.group_s), [-g for g in groups], groups))
        yield from ((groups, 0.0) for _, _, groups in sorted(found))
        return
    yield ideal, 0.0
    most = [int((free - demand.column_bytes) // demand.group_bytes) for free in demand.room]
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        seconds = [s ** (1 - weight) / max(r, 1.0) ** weight for s, r in zip(demand.group_s, demand.room, strict=True)]
        between = fair(demand.groups, seconds, most)
        if between is not None:
            yield between, 0.0


def _head_cuts(demand: Demand, cut: HeadCut) -> Iterator[tuple[Sequence[int], float]]:
    """The same for query heads. The bound is exact but for the head's rows, which take memory as well."""
    room = np.array([free - demand.column_bytes for free in demand.room])
    if not cut.listed():
        yield from ((shares, 0.0) for shares in cut.between(room.tolist()))
        return
    shares, attention_s, taken = cut.every()
    fits = (taken <= room).all(axis=1)
    shares, attention_s, free = shares[fits], attention_s[fits], room[None] - taken[fits] + demand.column_bytes
    if not len(shares):
        return
    most = np.minimum(free // demand.column_bytes, demand.columns)
    column_s = np.array(demand.column_s)
    limits = np.unique(np.arange(1, demand.columns + 1)[:, None] * column_s[None])
    low, high = np.zeros(len(shares), dtype=np.int64), np.full(len(shares), len(limits) - 1)
    while (low < high).any():  # every row its own bisection of the slowest device's time
        middle = (low + high) // 2
        held = np.minimum(most, limits[middle][:, None] * (1 + 1e-12) // column_s[None]).sum(axis=1)
        low, high = np.where(held < demand.columns, middle + 1, low), np.where(held < demand.columns, high, middle)
    bound_s = demand.layers * (attention_s + limits[np.minimum(low, len(limits) - 1)]) * (1 - 1e-12)
    bound_s[most.sum(axis=1) < demand.columns] = math.inf
    for index in np.lexsort((*shares.T, bound_s)):
        if math.isinf(bound_s[index]):
            return
        yield shares[index].tolist(), float(bound_s[index])


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
