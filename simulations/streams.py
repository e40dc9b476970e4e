"""The reliable path of the virtual network: one request, one answer, over a connection that lives as long as those.

What TCP makes of a path, told by its legs: SYN, SYN-ACK, request, answer. Each takes the one-way latency of the pair.
A leg that is lost, or meets a path that is blocked at that moment, is sent again after a time-out that doubles, like
TCP's; so a stream survives what a datagram does not, and pays for it in seconds. Whoever asked hears of a failure
when `TIMEOUT_S` is over. A path that works one way only carries no stream, because every other leg goes back.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from mesh.gossip.codec import Malformed
from mesh.gossip.core import StreamRequest

if TYPE_CHECKING:
    from simulations.network import Node, VirtualNetwork

#: How long who asks waits for the answer.
TIMEOUT_S = 5.0
#: First time-out of a SYN (RFC 6298, section 2.1), and least time-out of what follows (Linux's TCP_RTO_MIN).
SYN_TIMEOUT_S = 1.0
DATA_TIMEOUT_S = 0.2
#: Bytes on the wire beside request and answer: seven segments' IPv4 and TCP headers.
HEADERS_BYTES = 7 * 40
#: Payload of one segment, for what is lost of a long request: every segment has to arrive.
SEGMENT_BYTES = 1400
#: More bytes than so many segments are lost and sent again together, so that the odds do not vanish.
MAX_SEGMENTS = 8


class Streams:
    """Carries what cores ask for with `streams()`."""

    def __init__(self, net: VirtualNetwork, chance: random.Random) -> None:
        """`chance` decides which leg is lost."""
        self._net = net
        self._chance = chance

    def ask(self, node: Node, request: StreamRequest) -> None:
        """Start what a core wants to ask over a stream."""
        _Exchange(self._net, self._chance, node, request)


class _Exchange:
    """One request under way."""

    def __init__(self, net: VirtualNetwork, chance: random.Random, node: Node, request: StreamRequest) -> None:
        self._net, self._chance, self._node, self._token = net, chance, node, request.token
        self._data: bytes = request.data
        self._done = False
        net.clock.at(net.clock.now_s + TIMEOUT_S, self._finish, None)
        target = net.at(request.address)
        if target is not None:
            self._target = target
            self._spend(node, HEADERS_BYTES + len(self._data))
            self._leg(0, 0)

    def _leg(self, number: int, tries: int) -> None:
        """Send one leg: 0 SYN, 1 SYN-ACK, 2 the request, 3 the answer."""
        net = self._net
        if self._done:
            return
        there = number % 2 == 0
        source, target = (self._node, self._target) if there else (self._target, self._node)
        segments = 1 if number < 2 else min(MAX_SEGMENTS, -(-max(1, len(self._data)) // SEGMENT_BYTES))
        arrives = 1.0 - net.loss_between(source, target)
        lost = self._chance.random() >= arrives**segments
        net.clock.at(net.clock.now_s + net.delay_s(source, target), self._arrived, number, tries, lost)

    def _arrived(self, number: int, tries: int, lost: bool) -> None:
        net = self._net
        if self._done:
            return
        source, target = (self._node, self._target) if number % 2 == 0 else (self._target, self._node)
        if lost or net.blocked(source, target):
            first_s = SYN_TIMEOUT_S if number < 2 else DATA_TIMEOUT_S + 2 * net.delay_s(source, target)
            net.clock.at(net.clock.now_s + first_s * 2**tries, self._leg, number, tries + 1)
        elif number < 2:
            self._leg(number + 1, 0)
        elif target.backlog is not None:  # the kernel has it; the process sees it when it runs again
            net.clock.at(net.clock.now_s + 0.05, self._arrived, number, tries, False)
        elif number == 2:
            net.note(source, target, self._data)
            try:
                self._data = target.core.serve_stream(self._data, source.address, net.clock.now_s)
            except Malformed:  # it hangs up on a request it does not understand
                self._finish(None)
                return
            self._spend(target, HEADERS_BYTES + len(self._data))
            net.settle(target)
            self._leg(3, 0)
        else:
            net.note(source, target, self._data)
            self._finish(self._data)

    def _finish(self, answer: bytes | None) -> None:
        if self._done:
            return
        if self._node.backlog is not None:
            self._net.clock.at(self._net.clock.now_s + 0.05, self._finish, answer)
            return
        self._done = True
        if self._node.running:
            self._node.core.stream_answered(self._token, answer, self._net.clock.now_s)
            self._net.settle(self._node)

    def _spend(self, node: Node, count: int) -> None:
        self._net.bytes += count
        node.sent_bytes += count
