"""How long an operation may take, from its size and the link, and whether what is under way keeps to it. Pure.

Every operation has a deadline. What waits for a message gives it to the wait; what is under way (a message that leaves,
or arrives in part, or is asked for by a hello) is watched by its channel, in one place for all backends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

#: What any operation is given beside the time on the wire. A neighbour looks at its channels between two steps, and a
#: chunk of a prompt through the layers of a large model takes a CPU tens of seconds.
PATIENCE_S: Final = 60.0
#: A machine whose kernel acknowledges nothing for this long, whatever its processes do, is gone or cut off: a sender
#: that begins to repeat after 0.3 s and doubles that has asked six times.
LINK_S: Final = 20.0
#: Slow start of a connection, losses, a handshake: round trips that pass whatever the size.
_ROUND_TRIPS = 20
#: A link slower than 1 Mbit/s is not one that a model is served over.
_LEAST_BYTES_PER_S = 125_000.0
#: Of a known rate, what a link may fall to before it counts as stalled.
_SHARE = 0.1
#: A rate is learned from at least so much: less says more of buffers and of round trips.
_LEARN_BYTES = 1 << 20
#: How often to look: so late may be what is noticed, and an eighth of the patience where that is less.
_LOOK_S = 0.25


def allowance_s(
    size_bytes: int, rtt_s: float = 0.0, bytes_per_s: float | None = None, patience_s: float = PATIENCE_S
) -> float:
    """Seconds after which an operation that moves `size_bytes` has failed.

    rtt_s: the link's round trip. bytes_per_s: what it is known to carry, or None.
    """
    rate = max(_LEAST_BYTES_PER_S, _SHARE * (bytes_per_s or 0.0))
    return patience_s + _ROUND_TRIPS * rtt_s + size_bytes / rate


class Way(NamedTuple):
    """One thing that is under way on a channel, as it stands now.

    waiting: bytes that have yet to move, 0 when there is nothing. moved: any running total of bytes that moved.
    turn: changes when what waited is over and something else waits. grain: bytes that may be moving without showing it.
    """

    waiting: int
    moved: int
    turn: int = 0
    grain: int = 0


class Watch:
    """Looks at one way again and again: `late` says what is wrong, if something is.

    What waits at one look must have moved within the allowance for so many bytes, and in any case something must move
    within the patience. So a message is found late after at most twice its allowance, and a stall much earlier.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._turn = 0
        self._target: int | None = None
        self._armed = (0.0, 0)
        self._due = self._allowed = 0.0
        self._moved = (0.0, 0)
        #: The most bytes a second that went this way while something always waited.
        self.rate = 0.0

    def restart(self) -> None:
        """Forget how long it has been waited: that was not the neighbour's doing."""
        self._target = None

    def late(self, now: float, way: Way, rtt_s: float, bytes_per_s: float | None) -> str | None:
        """One line on what has taken too long, or None."""
        if way.waiting <= 0:
            self._target = None
            return None
        if self._target is not None and (way.moved >= self._target or way.turn != self._turn):
            since, before = self._armed
            if way.turn == self._turn and way.moved - before >= _LEARN_BYTES and now > since:
                self.rate = max(self.rate, (way.moved - before) / (now - since))
            self._target = None
        rate = max(self.rate, bytes_per_s or 0.0)
        if self._target is None:
            self._target, self._turn, self._armed = way.moved + way.waiting, way.turn, (now, way.moved)
            self._allowed = allowance_s(way.waiting, rtt_s, rate, self._patience_s)
            self._due, self._moved = now + self._allowed, (now, way.moved)
            return None
        if way.moved != self._moved[1]:
            self._moved = (now, way.moved)
        stall_s = allowance_s(way.grain, rtt_s, rate, self._patience_s)
        if now - self._moved[0] > stall_s:
            return f"{way.waiting} bytes wait and none moved for {stall_s:.3g} s"
        if now > self._due:
            return f"{way.waiting} bytes of {self._target - self._armed[1]} still wait after {self._allowed:.3g} s"
        return None


class Watches:
    """The ways of one channel, and how often to look at them."""

    def __init__(self, patience_s: float, names: Iterable[str]) -> None:
        self.patience_s = patience_s
        self.every_s = min(_LOOK_S, patience_s / 8)
        self._watches = {name: Watch(patience_s) for name in names}
        self._looked = -math.inf

    @property
    def rate(self) -> float:
        """The most bytes a second that any way has carried, 0 while none is known."""
        return max(watch.rate for watch in self._watches.values())

    def late(self, now: float, ways: Iterable[Way], rtt_s: float, bytes_per_s: float | None) -> str | None:
        """What has taken too long, or None. `ways`: in the order of the names.

        Who looks seldom was busy elsewhere, and nothing moves unless somebody drives: not the neighbour's doing.
        """
        idle_s, self._looked = now - self._looked, now
        if idle_s > max(self.patience_s / 2, 4 * _LOOK_S):
            for watch in self._watches.values():
                watch.restart()
        for (name, watch), way in zip(self._watches.items(), ways, strict=True):
            if (what := watch.late(now, way, rtt_s, bytes_per_s)) is not None:
                return f"{name}: {what}"
        return None
