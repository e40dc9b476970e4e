"""A timer wheel for sans-I/O cores: whoever runs the core asks when to wake it, and calls it then."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timer:
    """One scheduled call. `patient` timers condemn somebody when they fire, so a late wake-up delays them once."""

    when_s: float
    action: Callable[[float], None]
    patient: bool = False
    cancelled: bool = field(default=False, init=False)
    graced: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Make sure that the action is not called any more. Idempotent."""
        self.cancelled = True


class Timers:
    """Timers in order of time; those of the same moment fire in the order in which they were set."""

    def __init__(self, *, stall_s: float, grace_s: float) -> None:
        """`stall_s`: a wake-up later than this means this process slept; `grace_s` is then given to patient timers."""
        self._stall_s = stall_s
        self._grace_s = grace_s
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0

    def at(self, when_s: float, action: Callable[[float], None], *, patient: bool = False) -> Timer:
        """Call `action(now)` at `when_s`, unless cancelled."""
        timer = Timer(when_s, action, patient)
        self._push(timer)
        return timer

    def next_s(self) -> float | None:
        """When the earliest timer is due, or None."""
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def run(self, now: float) -> bool:
        """Fire everything that is due. True if the wake-up came so late that this process must have been asleep.

        After such a sleep the answers to our probes may still be on their way through our own queues: what would
        condemn a neighbour waits a little longer, once, so that a laptop that wakes up does not bury its whole mesh.
        """
        due = self.next_s()
        stalled = due is not None and now - due > self._stall_s
        while (due := self.next_s()) is not None and due <= now:
            timer = heapq.heappop(self._heap)[2]
            if stalled and timer.patient and not timer.graced:
                timer.graced = True
                timer.when_s = now + self._grace_s
                self._push(timer)
                continue
            timer.cancelled = True
            timer.action(now)
        return stalled

    def _push(self, timer: Timer) -> None:
        self._count += 1
        heapq.heappush(self._heap, (timer.when_s, self._count, timer))
