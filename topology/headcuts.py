"""Sharing query heads over more devices than there are KV heads, so that some KV heads lie on several of them.

A shard with `h` query heads from a certain one on holds `k` KV heads, `k` depending on where the cuts fall: it takes
h * (seconds a query head) + k * (seconds a KV head), and memory likewise. Shards follow each other in the order of the
devices. The least maximum over all cuts is found by bisection of a limit: under it every device takes as many heads as
it can. Among the cuts within a limit, the one with the least price is found by dynamic programming over where shards
end.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
#: Seconds of a query head and of a KV head on a device, by line.
Kind = tuple[tuple[float, float], ...]

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
        cut = self.frozen()
        if room is None:
            cut = replace(cut, head_bytes=0.0, kv_bytes=0.0)
        found = _fastest(cut, None if room is None else tuple(room))
        return None if found is None else list(found)

    def frozen(self) -> HeadCut:
        """The same with nothing in it that could change: a key to remember answers by."""
        return replace(self, lines=tuple((tuple(head_s), tuple(kv_s)) for head_s, kv_s in self.lines))

    def _fastest(self, room: Sequence[float] | None) -> list[int] | None:
        if self.devices > self.heads:
            return None
        kinds = self._kinds()
        limits = np.unique(np.concatenate([self._values(kind) for kind in dict.fromkeys(kinds)]))
        low, high = 0, len(limits) - 1
        if high < 0 or not self._reaches(kinds, room, float(limits[high])):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._reaches(kinds, room, float(limits[middle])):
                high = middle
            else:
                low = middle + 1
        limit_s = float(limits[low])

        def price(ways: _Ways) -> Floats:
            dear: Floats = (ways.kv * self.heads**2 * self.devices + ways.widths**2).astype(np.float64)
            return dear

        free = [math.inf] * len(kinds) if room is None else room
        return self._cheapest(list(zip(kinds, free, strict=True)), limit_s, price)

    def between(self, room: Sequence[float]) -> Iterator[list[int]]:
        """Some ways to cut, from the fastest to those that fill `room` bytes of each device most evenly."""
        best = self.fastest(room)
        if best is None:
            return
        least_s = self.slowest(best)
        sides = list(zip(self._kinds(), room, strict=True))
        for level in LEVELS:

            def price(ways: _Ways) -> Floats:
                part: Floats = (ways.taken / max(ways.room, 1.0)) ** 2
                return part

            found = self._cheapest(sides, level * least_s, price)
            if found is not None:
                yield found

    def _cheapest(
        self, sides: Sequence[tuple[Kind, float]], limit_s: float, price: Callable[[_Ways], Floats]
    ) -> list[int] | None:
        """Query heads by device with the least sum of prices, nobody above the limit or beyond its room; None: no way.

        `sides` are what a device is and its room. A device takes no more heads than it could as the first, which keeps
        the arrays narrow.
        """
        prices: dict[tuple[Kind, float], Floats] = {}
        for side in sides:
            if side not in prices:
                kind, room = side
                most = self._reach(self._rows(kind, room, limit_s), 0)
                if not most:
                    return None
                ways = _Ways.of(self, room, most)
                seconds = np.maximum.reduce([head_s * ways.widths + kv_s * ways.kv for head_s, kv_s in kind])
                allowed = (ways.starts >= 0) & (seconds <= limit_s) & np.isfinite(seconds) & (ways.taken <= room)
                prices[side] = np.where(allowed, price(ways), math.inf)
        total = np.full(self.heads + 1, math.inf)
        total[0] = 0.0
        rows = np.arange(self.heads + 1)
        taken = []
        for side in sides:
            each = prices[side]
            most = each.shape[1]
            before = np.concatenate([np.full(most, math.inf), total[:-1]])
            ways_s = sliding_window_view(before, most)[:, ::-1] + each
            best = ways_s.argmin(axis=1)  # of equal ways, later devices take less
            total = ways_s[rows, best]
            taken.append(best + 1)
        if not math.isfinite(total[-1]):
            return None
        shares, stop = [], self.heads
        for widths in reversed(taken):
            shares.append(int(widths[stop]))
            stop -= shares[-1]
        return shares[::-1]

    def _reaches(self, kinds: Sequence[Kind], room: Sequence[float] | None, limit_s: float) -> bool:
        """Whether the devices, one after the other, cover all heads with nobody above the limit.

        A range within another takes no more than that. So where devices can get to from the first head is a run of
        places without gaps, and each may go as far as it can.
        """
        done = 0
        for device, kind in enumerate(kinds):
            rows = self._rows(kind, math.inf if room is None else room[device], limit_s)
            if not self._reach(rows, 0):
                return False  # not even one head
            done += self._reach(rows, done)
        return done >= self.heads

    def _rows(self, kind: Kind, room: float, limit_s: float) -> list[tuple[float, float, float]]:
        """What bounds a device: (a query head, a KV head, most of both together)."""
        rows = [(head_s, kv_s, limit_s) for head_s, kv_s in kind]
        return rows if math.isinf(room) else [*rows, (self.head_bytes, self.kv_bytes, room)]

    def _reach(self, rows: Sequence[tuple[float, float, float]], start: int) -> int:
        """The most query heads from `start` on that keep within all bounds."""
        low, high, group, offset = 0, self.heads - start, self.group, start % self.group
        while low < high:
            middle = (low + high + 1) // 2
            kv = -(-(offset + middle) // group)
            if all(head * middle + each * kv <= most for head, each, most in rows):
                low = middle
            else:
                high = middle - 1
        return low

    def _values(self, kind: Kind) -> Floats:
        """Every time that a range of heads may take on such a device, with few besides; in seconds, finite."""
        widths = np.arange(1, self.heads + 1)
        fewest, most = -(-widths // self.group), -(-(widths + self.group - 1) // self.group)
        times = [np.maximum.reduce([head_s * widths + kv_s * kv for head_s, kv_s in kind]) for kv in (fewest, most)]
        values = np.concatenate(times)
        finite: Floats = values[np.isfinite(values)]
        return finite

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

    def _kinds(self) -> list[Kind]:
        """Seconds of a query head and of a KV head by line, by device: devices alike have equal ones."""
        return [tuple((head_s[i], kv_s[i]) for head_s, kv_s in self.lines) for i in range(self.devices)]


@dataclass(frozen=True, slots=True)
class _Ways:
    """Ranges of query heads by where they end and how long they are: arrays [end, width - 1]. `starts` may be < 0."""

    room: float
    starts: Whole
    widths: Whole
    kv: Whole
    taken: Floats

    @classmethod
    def of(cls, cut: HeadCut, room: float, most: int) -> _Ways:
        """Those of at most so many heads, with the bytes they take on a device of that room."""
        starts, widths, kv = _spans(cut.heads, cut.group, most)
        return cls(room, starts, widths, kv, cut.head_bytes * widths + cut.kv_bytes * kv)


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
def _spans(heads: int, group: int, most: int) -> tuple[Whole, Whole, Whole]:
    """First head, query heads and KV heads of every range of up to `most` heads; the first may be below 0."""
    ends, widths = np.arange(heads + 1)[:, None], np.arange(1, most + 1)[None, :]
    starts = ends - widths
    return starts, widths, -(-ends // group) - starts // group


@functools.lru_cache(maxsize=64)
def _compositions(total: int, parts: int) -> Whole:
    bars = np.array(list(itertools.combinations(range(1, total), parts - 1)), dtype=np.int64).reshape(-1, parts - 1)
    return np.diff(bars, axis=1, prepend=0, append=total)
