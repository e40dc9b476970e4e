"""Sharing query heads over more devices than there are KV heads, so that some KV heads lie on several of them.

A shard with `h` query heads from a certain one on holds `k` KV heads, `k` depending on where the cuts fall: it takes
h * (seconds a query head) + k * (seconds a KV head), and memory likewise. Shards follow each other in the order of the
devices. The least maximum over all cuts is found by bisection of a limit and reachability: which heads can be where the
next device begins. Arrays are indexed [first head, head after the last].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

#: Ways to cut that are all weighed where memory is short; 16 query heads over 6 devices can be cut in 3,003.
LISTED_HEADS: Final = 4096
#: How much longer than at its best attention may take, where not all ways are weighed.
LEVELS: Final = (1.0, 1.15, 1.4, 2.0, 4.0, math.inf)


@dataclass(frozen=True, slots=True)
class HeadCut:
    """`heads` query heads, `group` of them to a KV head.

    `lines` bound a shard's time: each is (seconds a query head, seconds a KV head) by device, and the largest counts.
    `head_bytes` and `kv_bytes` are what one takes, for all layers together.
    """

    heads: int
    group: int
    lines: tuple[tuple[Sequence[float], Sequence[float]], ...]
    head_bytes: float = 0.0
    kv_bytes: float = 0.0

    @property
    def devices(self) -> int:
        """How many share the heads."""
        return len(self.lines[0][0])

    def slowest(self, shares: Sequence[int]) -> float:
        """Seconds of the slowest device, given the query heads of each."""
        counts = np.array([shares])
        return float(self._slowest(counts, touched(counts, self.group))[0])

    def bytes(self, shares: Sequence[int]) -> list[float]:
        """What each takes."""
        kv = touched(np.array([shares]), self.group)[0]
        return [self.head_bytes * n + self.kv_bytes * int(k) for n, k in zip(shares, kv, strict=True)]

    def fastest(self, room: Sequence[float] | None = None) -> list[int] | None:
        """The shares with the least maximum, of those the ones with fewest copies of KV heads, then the most even.

        With `room`, among those that fit into so many bytes by device. None: impossible.
        """
        lines = tuple((tuple(head_s), tuple(kv_s)) for head_s, kv_s in self.lines)
        free = None if room is None else tuple(room)
        taken = (0.0, 0.0) if room is None else (self.head_bytes, self.kv_bytes)
        found = _fastest(HeadCut(self.heads, self.group, lines, *taken), free)
        return None if found is None else list(found)

    def _fastest(self, room: Sequence[float] | None) -> list[int] | None:
        if self.devices > self.heads:
            return None
        widths, kv = _spans(self.heads, self.group)
        alike = {line: self._times(i, widths, kv) for i, line in reversed(list(enumerate(self._kinds())))}
        times = [alike[line] for line in self._kinds()]
        # A range's time depends on its query and KV heads alone, which few pairs of numbers are.
        pairs = _distinct(self.heads, self.group)
        limits = np.unique(np.concatenate([each[pairs] for each in alike.values()]))
        if room is not None:
            taken = self.head_bytes * widths + self.kv_bytes * kv
            times = [np.where(taken <= free, each, math.inf) for each, free in zip(times, room, strict=True)]
        low, high = 0, len(limits) - 1
        if high < 0 or not _reaches(times, float(limits[high])):
            return None
        while low < high:
            middle = (low + high) // 2
            if _reaches(times, float(limits[middle])):
                high = middle
            else:
                low = middle + 1
        price = (kv * self.heads**2 * self.devices + widths**2).astype(np.float64)
        return _cheapest([np.where(each <= limits[low], price, math.inf) for each in times])

    def between(self, room: Sequence[float]) -> Iterator[list[int]]:
        """Some ways to cut, from the fastest to those that fill `room` bytes of each device most evenly."""
        best = self.fastest(room)
        if best is None:
            return
        least_s = self.slowest(best)
        widths, kv = _spans(self.heads, self.group)
        taken = self.head_bytes * widths + self.kv_bytes * kv
        for level in LEVELS:
            prices = []
            for device, free in enumerate(room):
                times = self._times(device, widths, kv)
                allowed = (times <= level * least_s) & np.isfinite(times) & (taken <= free)
                prices.append(np.where(allowed, (taken / max(free, 1.0)) ** 2, math.inf))
            found = _cheapest(prices)
            if found is not None:
                yield found

    def listed(self) -> bool:
        """Whether all ways to cut may be weighed one by one."""
        return math.comb(self.heads - 1, self.devices - 1) <= LISTED_HEADS

    def every(self) -> tuple[Whole, Floats, Floats]:
        """All ways to cut: shares, seconds of the slowest device, bytes by device; listed ones only."""
        shares = _compositions(self.heads, self.devices)
        kv = touched(shares, self.group)
        return shares, self._slowest(shares, kv), self.head_bytes * shares + self.kv_bytes * kv

    def _slowest(self, shares: Whole, kv: Whole) -> Floats:
        each = [np.asarray(head_s) * shares + np.asarray(kv_s) * kv for head_s, kv_s in self.lines]
        slowest: Floats = np.maximum.reduce(each).max(axis=1)
        return slowest

    def _kinds(self) -> list[tuple[float, ...]]:
        """What a query head and a KV head take, by device: devices alike have equal ones."""
        return [tuple(s[i] for line in self.lines for s in line) for i in range(self.devices)]

    def _times(self, device: int, widths: Whole, kv: Whole) -> Floats:
        times = np.maximum.reduce([head_s[device] * widths + kv_s[device] * kv for head_s, kv_s in self.lines])
        return np.where(widths > 0, times, math.inf)


def touched(shares: Whole, group: int) -> Whole:
    """KV heads by device, for every row of shares of query heads."""
    stops = shares.cumsum(axis=1)
    starts = stops - shares
    kv: Whole = np.where(shares > 0, -(-stops // group) - starts // group, 0)
    return kv


@functools.lru_cache(maxsize=4096)
def _fastest(cut: HeadCut, room: tuple[float, ...] | None) -> tuple[int, ...] | None:
    """`HeadCut.fastest`, remembered: a mesh has the same devices at many sites."""
    found = cut._fastest(room)
    return None if found is None else tuple(found)


@functools.lru_cache(maxsize=64)
def _distinct(heads: int, group: int) -> tuple[Whole, Whole]:
    """First head and head after the last of one range for each pair of numbers of query and KV heads."""
    found = {
        (stop - start, -(-stop // group) - start // group): (start, stop)
        for start in range(min(group, heads))
        for stop in range(start + 1, heads + 1)
    }
    starts, stops = zip(*found.values(), strict=True)
    return np.array(starts), np.array(stops)


@functools.lru_cache(maxsize=64)
def _spans(heads: int, group: int) -> tuple[Whole, Whole]:
    """Query heads and KV heads of every range; not positive where there is none."""
    ends = np.arange(heads + 1)
    return ends[None, :] - ends[:, None], -(-ends[None, :] // group) - ends[:, None] // group


@functools.lru_cache(maxsize=64)
def _compositions(total: int, parts: int) -> Whole:
    bars = np.array(list(itertools.combinations(range(1, total), parts - 1)), dtype=np.int64).reshape(-1, parts - 1)
    return np.diff(bars, axis=1, prepend=0, append=total)


def _reaches(times: Sequence[Floats], limit_s: float) -> bool:
    """Whether the devices, one after the other, cover all heads with nobody above the limit."""
    here: npt.NDArray[np.bool_] = np.zeros(times[0].shape[0], dtype=np.bool_)
    here[0] = True
    for each in times:
        here = np.any(each[here] <= limit_s, axis=0)
    return bool(here[-1])


def _cheapest(prices: Sequence[Floats]) -> list[int] | None:
    """Query heads by device with the least sum of prices; None where every way has an infinite one."""
    total = np.full(prices[0].shape[0], math.inf)
    total[0] = 0.0
    taken = []
    for each in prices:
        ways = total[:, None] + each
        taken.append(len(ways) - 1 - ways[::-1].argmin(axis=0))  # of equal ways, later devices take less
        total = ways.min(axis=0)
    if not math.isfinite(total[-1]):
        return None
    shares, stop = [], len(total) - 1
    for before in reversed(taken):
        shares.append(stop - int(before[stop]))
        stop = int(before[stop])
    return shares[::-1]
