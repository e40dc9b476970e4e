"""Emulated distance: a message becomes visible `delay_s` after it was sent, on a machine where it arrives at once.

The sender stamps every frame with CLOCK_MONOTONIC, which all processes of a machine share, and the receiver holds the
message back until the stamp plus the one-way delay. So the real transfer time counts against the delay instead of
adding to it, a burst is not stretched, and order holds. Between machines the stamps mean nothing: use no delay there.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class DelayLine(Generic[T]):
    """Holds items in order until each is due. Pure: the clock's reading is an argument."""

    def __init__(self, delay_s: float) -> None:
        if delay_s < 0:
            raise ValueError(f"a delay of {delay_s} s lies in the past")
        self.delay_ns = round(delay_s * 1e9)
        self._held: deque[tuple[int, T]] = deque()

    def put(self, item: T, stamp_ns: int, now_ns: int) -> None:
        """Hold an item sent at `stamp_ns`. A stamp from the future counts as now: a bad clock cannot stop the line."""
        due_ns = min(stamp_ns, now_ns) + self.delay_ns
        if self._held and due_ns < self._held[-1][0]:
            due_ns = self._held[-1][0]
        self._held.append((due_ns, item))

    def take(self, now_ns: int) -> T | None:
        """The next item that is due, or None."""
        if self._held and self._held[0][0] <= now_ns:
            return self._held.popleft()[1]
        return None

    @property
    def due_ns(self) -> int | None:
        """When the next item is due, or None if nothing is held."""
        return self._held[0][0] if self._held else None

    def __len__(self) -> int:
        return len(self._held)
