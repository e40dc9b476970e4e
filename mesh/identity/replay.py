"""Which datagrams were here before: a sliding window for each start of each sender (as in RFC 4303, 3.4.3).

Memory is bounded by forgetting the oldest windows. What a forgotten one had seen stays refused all the same: its latest
timestamp becomes a floor, and nothing sealed before the floor opens a window again.
"""

from __future__ import annotations

from collections import OrderedDict

#: Datagrams of one sender that may overtake each other, over all its receivers.
WINDOW = 1024
#: Starts of one sender that are remembered; more within five minutes is a crash loop, and the floor takes over.
MAX_BOOTS = 4
#: More senders than the largest mesh has members.
MAX_SENDERS = 8192
_MASK = (1 << WINDOW) - 1


class _Window:
    """The highest counter seen, and which of the `WINDOW` below it were. Bit 0 is the highest."""

    __slots__ = ("latest_s", "seen", "top")

    def __init__(self) -> None:
        self.top = 0
        self.seen = 0
        self.latest_s = 0

    def take(self, counter: int) -> bool:
        ahead = counter - self.top
        if ahead > 0:
            self.seen = ((self.seen << min(ahead, WINDOW)) | 1) & _MASK
            self.top = counter
            return True
        bit = 1 << -ahead
        if -ahead >= WINDOW or self.seen & bit:
            return False
        self.seen |= bit
        return True


class _Sender:
    __slots__ = ("boots", "floor_s")

    def __init__(self, floor_s: int) -> None:
        self.boots: OrderedDict[bytes, _Window] = OrderedDict()
        self.floor_s = floor_s


class ReplayGuard:
    """The windows of all senders."""

    def __init__(self, max_senders: int = MAX_SENDERS) -> None:
        """`max_senders` bounds the memory: about 1 KB each at most."""
        self._senders: OrderedDict[bytes, _Sender] = OrderedDict()
        self._max_senders = max_senders
        self._floor_s = 0

    def take(self, sender: bytes, boot: bytes, counter: int, sealed_s: int) -> bool:
        """Whether this datagram is new. Call it for datagrams that are proven to be the sender's, and for no others."""
        held = self._senders.get(sender)
        if held is None:
            if sealed_s <= self._floor_s:
                return False
            held = self._senders[sender] = _Sender(self._floor_s)
            while len(self._senders) > self._max_senders:
                _, gone = self._senders.popitem(last=False)
                self._floor_s = max(self._floor_s, gone.floor_s, *(window.latest_s for window in gone.boots.values()))
        else:
            self._senders.move_to_end(sender)
        window = held.boots.get(boot)
        if window is None:
            if sealed_s <= held.floor_s:
                return False
            window = held.boots[boot] = _Window()
            while len(held.boots) > MAX_BOOTS:
                _, old = held.boots.popitem(last=False)
                held.floor_s = max(held.floor_s, old.latest_s)
        else:
            held.boots.move_to_end(boot)
        window.latest_s = max(window.latest_s, sealed_s)
        return window.take(counter)


class Once:
    """Things that count once within a time: nonces of greetings. Bounded in the same way."""

    def __init__(self, most: int) -> None:
        """`most` are remembered."""
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._most = most
        self._floor_s = 0

    def take(self, nonce: bytes, sealed_s: int) -> bool:
        """Whether it is new."""
        if nonce in self._seen or sealed_s <= self._floor_s:
            return False
        self._seen[nonce] = sealed_s
        if len(self._seen) > self._most:
            self._floor_s = max(self._floor_s, self._seen.popitem(last=False)[1])
        return True
