"""How fast bulk may go while somebody waits for small messages. Pure: the clock and the kernel's figures are arguments.

A sender that fills a link also fills the queue of the router before it, and every token then waits behind that queue:
at 100 ms of round trip, easily for 100 ms more. So while there is urgent traffic, bulk is held at what the link
delivers and no more, found as LEDBAT (RFC 6817) and Copa (NSDI 2018) find it: the round trip above its least ever is
the queue. No queue: a little faster. A queue: as fast as bytes were delivered meanwhile, less what drains it. Bulk that
competes with streams that fill queues would be starved by this, so it never goes below half of what it once got.
"""

from __future__ import annotations

#: The queue that is sought, and the one that is too much. A token may be late by 5 ms; a part of that is for bursts.
_LOW_S, _HIGH_S = 1.5e-3, 3.5e-3
#: A step faster: 1 % a round trip, growing up to 25 % while the link shows no limit (BBR probes by 25 %).
_STEP, _LARGEST_STEP = 0.01, 0.25
#: Close to a limit that was seen not long ago, steps are small: what a step puts into the queue in the two round trips
#: until its effect is seen must stay well below 5 ms, and 0.5 % of 200 ms is 1 ms.
_CLOSE, _BEYOND, _CLOSE_STEP = 0.93, 1.02, 0.005
#: Of the delivered rate, once its limit is known.
_SHARE = 0.97
_DEEPEST_CUT = 0.4
#: The same where the queue is short.
_EASE = 0.985
#: Where to begin: nothing known; of the best known.
_START_RATE, _START_SHARE = float(1 << 20), 0.8
_FLOOR_SHARE = 0.5
_LEAST_RATE = 128 * 1024.0
_FORGET_S = 30.0
_SMOOTH = 0.2


class Pace:
    """`rate`: bytes a second for all bulk of a pipe, or None while no limit of the link was seen."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._best = 0.0
        self._best_at = 0.0
        self._usual = 0.0
        self._delivered = 0.0
        self._wait_until = 0.0
        self._step = _STEP
        self._draining = False
        #: What the link was seen to carry when it had a queue, and when.
        self._limit = self._limit_at = 0.0

    def reset(self) -> None:
        """Nobody waits for small messages any more: no limit. What the link delivered is remembered."""
        self.rate = None
        self._draining = False

    def begin(self) -> None:
        """Bulk begins while somebody waits for small messages: start low, so that the limit is not found by passing it
        by far; from what is known, where something is.
        """
        if self.rate is None:
            self.rate = max(_START_RATE, _START_SHARE * self._best)
            self._step = _LARGEST_STEP

    def tick(self, now: float, *, rtt_s: float, least_rtt_s: float, delivered: float) -> None:
        """Look once: now; the round trip and the least ever, seconds; bytes a second delivered since the last look.

        To be called about once a round trip, and not more often than the figures mean something (10 ms).
        """
        # Acknowledgements come in bursts where a machine is busy: a single look would make a floor above the link.
        self._usual += _SMOOTH * (delivered - self._usual)
        if now - self._best_at > _FORGET_S or self._usual > self._best:
            self._best, self._best_at = self._usual, now
        queue_s = rtt_s - least_rtt_s
        if now - self._limit_at > _FORGET_S:
            self._limit = 0.0
        if now < self._wait_until:
            return
        if queue_s > _HIGH_S:
            # What is delivered while there is a queue is what the link can carry.
            carried = self._believed(delivered)
            if self._draining:
                carried = max(carried, self._delivered)
            self._delivered = carried
            self._limit, self._limit_at = max(self._best, carried), now
            cut = min(_DEEPEST_CUT, (queue_s - _LOW_S) / max(least_rtt_s, 0.01))
            self._set(carried * (_SHARE - cut))
            self._draining = True
            self._step = _STEP
            # The effect of a new rate is seen a round trip later, through the queue that is still there.
            self._wait_until = now + rtt_s + least_rtt_s / 2
        elif self._draining:
            self._set(self._delivered * _SHARE)
            self._draining = False
            self._wait_until = now + rtt_s
        elif self.rate is not None and queue_s < _LOW_S:
            if delivered > 0.7 * self.rate:  # else it is the sender, or its windows, that are the limit
                close = _CLOSE * self._limit < self.rate < _BEYOND * self._limit
                self._set(self.rate * (1 + (_CLOSE_STEP if close else self._step)))
                self._step = _STEP if close else min(_LARGEST_STEP, self._step * 1.5)
            self._wait_until = now + least_rtt_s
        else:
            self._step = _STEP
            if self.rate is not None and queue_s >= _LOW_S and self._limit > 0:
                # Not much of a queue, but it would grow: a little less than what passes.
                self._set(min(self.rate, _EASE * self._usual))
                self._limit_at = now
                self._wait_until = now + rtt_s + least_rtt_s / 2

    def _believed(self, delivered: float) -> float:
        """One look may be too high by a tenth, and a rate above the link fills the queue until it is noticed."""
        return delivered if not self._limit else min(delivered, self._usual)

    def _set(self, rate: float) -> None:
        self.rate = max(rate, _FLOOR_SHARE * self._best, _LEAST_RATE)
