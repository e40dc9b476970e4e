"""Who is asked for which block next: many sources, one set of blocks, no source waited for. Pure.

Sources pull: each holds a window of requests, and whoever has room takes the next block that it has and nobody was
asked for. So a fast source takes more, and a slow one costs nothing but its own window. When no such block is left,
a source that is idle takes over blocks from the one that would need longest for them (BitTorrent's end game). What was
asked of a source that is lost goes back to the others.

The window follows the link as TCP's does: twice what arrives within the least time from request to answer, so it
doubles from round trip to round trip until the link and not the window is the limit, and stays there.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

#: Blocks under way at a source: at first, and at most. 64 MiB fill 1 Gbit/s at 270 ms twice.
FIRST_WINDOW, MAX_WINDOW = 4, 64
#: How much of a measured rate the newest second is worth.
_SMOOTHING = 0.3
#: A source is stalled when for so long nothing came though much was asked; longer where its blocks take longer.
STALL_S, STALL_BLOCKS, MAX_STALL_S = 3.0, 8.0, 30.0
#: A block is taken over where its source would need so many times what the taker needs, and at least this
#: long: less is not worth a block sent twice.
_TAKE_OVER, _TAKE_OVER_S = 1.5, 0.1


@dataclass
class _Source:
    has: Callable[[int], bool]
    heard_at: float
    refused: set[int] = field(default_factory=set)
    asked: OrderedDict[int, float] = field(default_factory=OrderedDict)
    rate: float = 0.0
    latency_s: float = math.inf
    counted_at: float = 0.0
    counted_bytes: int = 0

    def gives(self, block: int) -> bool:
        return self.has(block) and block not in self.refused


class Puller:
    """The blocks of one fetch. `sizes(block)` gives bytes; times are seconds of any one clock."""

    def __init__(self, wanted: Iterable[int], sizes: Callable[[int], int]) -> None:
        self._left: OrderedDict[int, None] = OrderedDict.fromkeys(wanted)
        self._sizes = sizes
        self._sources: dict[str, _Source] = {}
        self._under_way: dict[int, set[str]] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(self._left)

    @property
    def done(self) -> bool:
        """Whether every block is there."""
        return not self._left

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that are asked now."""
        return tuple(self._sources)

    def add(self, source: str, has: Callable[[int], bool], now: float) -> None:
        """Take on a source that has the blocks for which `has` is true."""
        self._sources[source] = _Source(has, now, counted_at=now)

    def remove(self, source: str) -> None:
        """A source is lost: what it was asked for goes back, to the front."""
        lost = self._sources.pop(source, None)
        if lost is not None:
            for block in reversed(lost.asked):
                self._drop(source, block)

    def refuse(self, source: str, block: int) -> None:
        """The source does not have this block after all."""
        state = self._sources.get(source)
        if state is not None:
            state.refused.add(block)
            if state.asked.pop(block, None) is not None:
                self._drop(source, block)

    def window(self, source: str) -> int:
        """How many requests the source may hold now."""
        state = self._sources[source]
        if not state.rate or not math.isfinite(state.latency_s):
            return FIRST_WINDOW
        blocks = 2 * state.rate * state.latency_s / max(1, self._typical())
        return max(FIRST_WINDOW, min(MAX_WINDOW, math.ceil(blocks) + 2))

    def next(self, source: str, now: float) -> int | None:
        """The block to ask `source` for now, or None: its window is full, or it has nothing that is of use."""
        state = self._sources.get(source)
        if state is None or len(state.asked) >= self.window(source):
            return None
        block = next((free for free in self._free if state.gives(free)), None)
        if block is None and not state.asked:
            block = self._take_over(source, state, now)
        if block is None:
            return None
        if not state.asked:
            # What it did while nobody asked says nothing of its speed.
            state.heard_at = state.counted_at = now
            state.counted_bytes = 0
        self._free.pop(block, None)
        state.asked[block] = now
        self._under_way.setdefault(block, set()).add(source)
        return block

    def arrived(self, source: str, block: int, now: float) -> tuple[bool, tuple[str, ...]]:
        """A block came. Whether it is of use, and the other sources that were asked for it and need not send it.

        A block that was not asked for is of no use.
        """
        state = self._sources.get(source)
        if state is None or block not in state.asked:
            return False, ()
        self._measure(state, block, now)
        del state.asked[block]
        others = tuple(sorted(self._under_way.pop(block, set()) - {source}))
        for other in others:
            if other in self._sources:
                self._sources[other].asked.pop(block, None)
        if block not in self._left:
            return False, others
        del self._left[block]
        self._free.pop(block, None)
        return True, others

    def spoilt(self, block: int) -> None:
        """A block that arrived was not what it should be: it is wanted again, before all others."""
        self._left[block] = None
        self._free[block] = None
        self._free.move_to_end(block, last=False)

    def excuse(self, now: float) -> None:
        """Nothing was taken in until now, which is no fault of the sources."""
        for state in self._sources.values():
            state.heard_at = now

    def stalled(self, now: float) -> list[str]:
        """The sources that owe blocks and have sent none for too long."""
        return [
            name
            for name, state in self._sources.items()
            if state.asked and now - state.heard_at > self._patience_s(state)
        ]

    def _patience_s(self, state: _Source) -> float:
        if not state.rate:
            return MAX_STALL_S / 3
        return min(MAX_STALL_S, max(STALL_S, STALL_BLOCKS * self._typical() / state.rate))

    def _measure(self, state: _Source, block: int, now: float) -> None:
        size = self._sizes(block)
        state.heard_at = now
        state.latency_s = min(state.latency_s, max(now - state.asked[block], 1e-6))
        state.counted_bytes += size
        passed = now - state.counted_at
        # A window's worth or a quarter of a second: single blocks come in bursts.
        if passed > max(0.25, min(state.latency_s, 1.0)):
            rate = state.counted_bytes / passed
            # While the window opens the rate doubles: an average would hold it back.
            rises = rate > 1.5 * state.rate
            state.rate = rate if rises else state.rate + _SMOOTHING * (rate - state.rate)
            state.counted_at, state.counted_bytes = now, 0

    def _take_over(self, source: str, state: _Source, now: float) -> int | None:
        mine_s = state.latency_s if math.isfinite(state.latency_s) else 1.0
        worst: tuple[float, int] | None = None
        for name, other in self._sources.items():
            if name == source or not other.asked:
                continue
            pace = self._typical() / other.rate if other.rate else mine_s
            waited = max(0.0, now - other.heard_at - pace)
            for place, block in enumerate(other.asked, start=1):
                if len(self._under_way[block]) == 1 and state.gives(block):
                    due_s = place * pace + waited
                    if due_s > max(_TAKE_OVER * mine_s, _TAKE_OVER_S) and (worst is None or due_s > worst[0]):
                        worst = (due_s, block)
        return None if worst is None else worst[1]

    def _drop(self, source: str, block: int) -> None:
        askers = self._under_way.get(block)
        if askers is not None:
            askers.discard(source)
            if not askers:
                del self._under_way[block]
                if block in self._left:
                    self._free[block] = None
                    self._free.move_to_end(block, last=False)

    def _typical(self) -> int:
        return next((self._sizes(block) for block in self._left), 1)
