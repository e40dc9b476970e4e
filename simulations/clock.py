"""Virtual time: a clock that jumps to the next thing that is due, so that an hour of a mesh takes seconds."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class VirtualClock:
    """Seconds that pass only when nothing is left to do now. Things due at one moment happen in the order of asking."""

    def __init__(self, start_s: float = 0.0) -> None:
        """`start_s`: what the clock shows at first."""
        self._now_s = start_s
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def __call__(self) -> float:
        """The present, in seconds."""
        return self._now_s

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        """Have `action` happen at `when_s`, or at once where that has passed."""
        self._count += 1
        heapq.heappush(self._agenda, (max(when_s, self._now_s), self._count, action))

    def step(self, until_s: float) -> bool:
        """Let the next thing happen. False, with the clock at `until_s`, if nothing is due by then."""
        if self._agenda and self._agenda[0][0] <= until_s:
            self._now_s, _, action = heapq.heappop(self._agenda)
            action()
            return True
        self._now_s = max(self._now_s, until_s)
        return False
