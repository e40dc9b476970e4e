"""How fast bulk may go. Pure: the clock and the kernel's figures are arguments.

A sender that fills a link also fills the queue of the router before it, and every token then waits behind that queue:
at 100 ms of round trip, easily for 100 ms more. So while somebody waits for small messages, bulk is held at what the
link delivers and no more, found as LEDBAT (RFC 6817) and Copa (NSDI 2018) find it: the round trip above its least ever
is the queue. No queue: a little faster. A queue: as fast as bytes were delivered meanwhile, less what drains it. Bulk
that competes with streams that fill queues would be starved by this, so it never goes below half of what it once got.

While nobody waits, bulk is held too, but only where the queue grows to a good part of the round trip: many streams,
each within what the link could carry for one alone, fill it together until it overflows. Where the queue stays
although bulk gives way, it is somebody else's, and bulk does not give way to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class _Manner(NamedTuple):
    """How much of a queue is sought, and is too much: shares of the round trip, and at least seconds. What passes then:
    of what was delivered, once the limit is known, and while the queue is between the two. How deep a cut is, of the
    round trips that the queue has too many. How steps become larger, close to a limit that was seen not long ago: the
    first and the largest, as seconds of queue that they add in a round trip and as shares, and after how many.
    """

    low: tuple[float, float]
    high: tuple[float, float]
    share: float
    ease: float
    depth: float
    steps_s: tuple[float, float]
    steps: tuple[float, float]
    after: int


#: A token may be late by 5 ms; a part of that is for bursts. It is two to three round trips until the effect of a step
#: is seen. Where as many steps as lead back to the limit have met no queue, it was no limit, or is none any more.
_CAREFUL = _Manner((0.0, 1.5e-3), (0.0, 3.5e-3), 0.97, 0.985, 1.0, (0.5e-3, 2e-3), (0.005, 0.05), 16)
#: While nobody waits: a queue that is always there, and never so long that it runs over. BBR's own probing, 25 % for a
#: round trip, must not count as too much.
_LOOSE = _Manner((0.1, 2e-3), (0.35, 5e-3), 1.0, 1.0, 0.5, (2e-3, 10e-3), (0.01, 0.05), 8)
_QUICKER = 1.2
#: From which share of the limit on steps are those of a manner.
_CLOSE = 0.93
#: Far from it: the first, by how much they grow, and the largest: 1 % a round trip, soon 25 % (BBR probes by 25 %).
_FAR = (0.01, 1.5, 0.25)
#: Cuts in turn that did not shorten the queue: it is not ours, and is not looked at for so long.
_VAIN_CUTS, _LEAVE_S = 4, 10.0
_DEEPEST_CUT = 0.4
#: Of the rate, what must be delivered before it is raised.
_USED = 0.8
#: In shares of the limit that was known, what a new one may be.
_BELIEVED = (0.85, 1.05)
#: Where to begin: nothing known; of the best known.
_START_RATE, _START_SHARE = float(1 << 20), 0.8
_FLOOR_SHARE = 0.5
_LEAST_RATE = 128 * 1024.0
_FORGET_S = 30.0
_SMOOTH = 0.2


class Pace:
    """`rate`: bytes a second for all bulk of a pipe, or None while it needs no limit."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._best = 0.0
        self._best_at = 0.0
        self._usual = 0.0
        self._delivered = 0.0
        self._wait_until = 0.0
        #: Steps in turn that met no queue; and whether close to the limit.
        self._free, self._close = 0, False
        self._draining = False
        self._urgent = False
        self._cuts = 0
        #: What the link was seen to carry when it had a queue, and when.
        self._limit = self._limit_at = 0.0

    def begin(self, known: float = 0.0) -> None:
        """Bulk begins while somebody waits for small messages: start low, so that the limit is not found by passing it
        by far; from what is known, where something is: here, or bytes a second that the link has carried otherwise.
        """
        if self.rate is None:
            self.rate = max(_START_RATE, _START_SHARE * max(self._best, known))
            self._free = round(math.log(_FAR[2] / _FAR[0], _FAR[1]))

    def tick(self, now: float, *, rtt_s: float, least_rtt_s: float, delivered: float, urgent: bool = True) -> None:
        """Look once: now; the round trip and the least ever, seconds; bytes a second delivered since the last look;
        whether somebody waits for small messages.

        To be called about once a round trip, and not more often than the figures mean something (10 ms).
        """
        if urgent != self._urgent:
            self._urgent, self._cuts, self._draining = urgent, 0, False
            self._wait_until = min(self._wait_until, now)
            if not urgent:
                self.rate = None
        manner = _CAREFUL if urgent else _LOOSE
        low_s, high_s = (max(share * least_rtt_s, least_s) for share, least_s in (manner.low, manner.high))
        # Acknowledgements come in bursts where a machine is busy: a single look would make a floor above the link.
        self._usual += _SMOOTH * (delivered - self._usual)
        if now - self._best_at > _FORGET_S or self._usual > self._best:
            self._best, self._best_at = self._usual, now
        queue_s = rtt_s - least_rtt_s
        if now - self._limit_at > _FORGET_S:
            self._limit = 0.0
        if now < self._wait_until:
            return
        if queue_s > high_s:
            self._cuts += 1
            if not urgent and self._cuts > _VAIN_CUTS:
                self.rate, self._cuts, self._draining = None, 0, False
                self._wait_until = now + _LEAVE_S
                return
            # What is delivered while there is a queue is what the link can carry.
            carried = self._believed(delivered)
            if self._draining:
                carried = max(carried, self._delivered)
            self._delivered = carried
            self._limit, self._limit_at = carried, now
            cut = min(_DEEPEST_CUT, manner.depth * (queue_s - low_s) / max(least_rtt_s, 0.01))
            self._set(carried * (manner.share - cut))
            self._draining = True
            self._free = 0
            # The effect of a new rate is seen a round trip later, through the queue that is still there.
            self._wait_until = now + rtt_s + least_rtt_s / 2
        elif self._draining:
            self._set(self._delivered * manner.share)
            self._draining = False
            self._wait_until = now + rtt_s
        elif self.rate is not None and queue_s < low_s:
            self._cuts = 0
            if max(delivered, self._usual) > _USED * self.rate:  # else it is the sender, or its windows
                self._set(self.rate * (1 + self._step(self.rate, least_rtt_s, manner)))
            self._wait_until = now + least_rtt_s
        else:
            self._free = 0
            if self.rate is not None and queue_s >= low_s and self._limit > 0:
                # Not much of a queue, but it would grow: a little less than what passes.
                self._set(min(self.rate, manner.ease * self._usual))
                self._limit_at = now
                self._wait_until = now + rtt_s + least_rtt_s / 2

    def _step(self, rate: float, least_rtt_s: float, manner: _Manner) -> float:
        close = 0 < _CLOSE * self._limit < rate
        if close != self._close:
            self._close, self._free = close, 0
        first, quicker, largest = _FAR
        after = 0
        if close:
            trip_s = max(least_rtt_s, 0.01)
            first, largest = (min(step, s / trip_s) for step, s in zip(manner.steps, manner.steps_s, strict=True))
            quicker, after = _QUICKER, manner.after
        step = min(largest, first * quicker ** max(0, self._free - after))
        self._free += 1
        return step

    def _believed(self, delivered: float) -> float:
        """One look may be too high by a tenth, and a rate above the link fills the queue until it is noticed; or far
        too low, where the streams themselves paused (BBR's look for the least round trip stops each for 0.2 s).
        """
        least, most = _BELIEVED
        known = self._limit or self._best
        if self._limit:
            delivered = min(max(delivered, self._usual), most * max(known, self._usual))
        return max(least * known, delivered)

    def _set(self, rate: float) -> None:
        self.rate = max(rate, _FLOOR_SHARE * self._best, _LEAST_RATE)
