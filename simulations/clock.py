"""Virtual time: a clock that jumps to the next thing that is due, so that an hour of a mesh takes seconds."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class VirtualClock:
    """Seconds that pass only when nothing is left to do now. Things due at one moment happen in the order of asking."""

    def __init__(self, start_s: float = 0.0) -> None:
        """`start_s`: what the clock shows at first."""
        self.now_s = start_s
        # Arguments stand in the entry, because a closure per datagram would cost more than the datagram.
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def __call__(self) -> float:
        """The present, in seconds."""
        return self.now_s

    def at(self, when_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Have `action(*arguments)` happen at `when_s`, or at once where that has passed."""
        self._count += 1
        heapq.heappush(self._agenda, (max(when_s, self.now_s), self._count, action, arguments))

    def step(self, until_s: float) -> bool:
        """Let the next thing happen. False, with the clock at `until_s`, if nothing is due by then."""
        if self._agenda and self._agenda[0][0] <= until_s:
            self.now_s, _, action, arguments = heapq.heappop(self._agenda)
            action(*arguments)
            return True
        self.now_s = max(self.now_s, until_s)
        return False

    def run(self, until_s: float) -> None:
        """Let everything happen that is due by `until_s`; the clock then shows that."""
        agenda, pop = self._agenda, heapq.heappop
        while agenda and agenda[0][0] <= until_s:
            self.now_s, _, action, arguments = pop(agenda)
            action(*arguments)
        self.now_s = max(self.now_s, until_s)
