"""Bulk over TCP: further connections of a pipe, opened when distance makes one too few.

One connection carries what its window carries: over 100 ms, Linux's default of 4 to 6 MiB is half a gigabit a second,
and a loss costs the whole of it. So bulk travels on streams of its own, eight at first and up to 32, as bandwidth times
delay, and losses, ask for. A stream that has room pulls the next piece; pieces are numbered and put in order at the
other end. What is unsent in the kernel is bounded (TCP_NOTSENT_LOWAT), so a slow stream holds little, and the first
connection stays free for small messages. Within a site there is one connection, and bulk takes turns with the rest.

Credits keep the sender within what the receiver will hold: it may send `limit` bytes in all, and the receiver raises
that as its user takes messages, by what is taken in four round trips: twice that in one is the rule (dynamic
right-sizing, Fisk and Feng 2001), and as much again lies behind the piece of a stream that has stopped for a moment.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from typing import TYPE_CHECKING

from transport.base import Source
from transport.bulk import PIECE_BYTES
from transport.tcp_adapt import FIRST_STREAMS, MOST_STREAMS, Adapting
from transport.tcp_info import TcpInfo, tcp_info
from transport.tcp_stream import BULK, MOST_RECORD_BYTES, NUMBER, RECORD, BulkStream
from transport.tickets import Pending, flat, size_bytes

if TYPE_CHECKING:
    from transport.tcp_pipe import TcpPipe

#: A round trip from which on further streams are worth their sockets: beyond a site.
WIDE_RTT_S = 2e-3
_FIRST_WINDOW_BYTES, _MOST_WINDOW_BYTES = 64 << 20, 256 << 20
_TRIPS = 4
_AGAIN_S = 10.0
#: How long bulk waits for streams of its own before it takes the first connection.
_APART_S = 1.0
_PRIMARY_PIECES = 4


class Bundle:
    """The bulk of one pipe, both ways, and the streams that carry it."""

    def __init__(self, pipe: TcpPipe, selector: selectors.BaseSelector) -> None:
        self.selector = selector
        self._pipe = pipe
        self.streams: list[BulkStream] = []
        self._sources: deque[Source] = deque()
        self._number = 0
        self._sent_bytes = 0
        self._limit_bytes = _FIRST_WINDOW_BYTES
        self._due = 0
        self._early: dict[int, memoryview] = {}
        self._arrived: deque[memoryview] = deque()
        self._held_bytes = 0
        self._taken_bytes = 0
        self._window_bytes = _FIRST_WINDOW_BYTES
        self._granted_bytes = _FIRST_WINDOW_BYTES
        self._mark = (time.monotonic(), 0)
        self.adapting = Adapting(self)
        self._apart_by = 0.0

    # -- sending

    @property
    def ready(self) -> bool:
        """Whether there is a piece to send, and credit for it."""
        return bool(self._sources) and self._sent_bytes < self._limit_bytes

    @property
    def sending(self) -> bool:
        """Whether bulk has not left entirely."""
        return bool(self._sources) or any(stream._out for stream in self.streams)

    @property
    def pending_bytes(self) -> int:
        """Bytes that no kernel took yet."""
        waiting = sum(source.left_bytes for source in self._sources)
        return waiting + sum(stream.out_bytes for stream in self.streams if stream.open)

    @property
    def missing_bytes(self) -> int:
        """What is still to come of pieces that have begun to arrive."""
        return sum(stream.missing_bytes for stream in self.streams)

    @property
    def bytes_per_s(self) -> float:
        """What all streams together deliver."""
        return self.adapting.bytes_per_s

    @property
    def sent_pieces(self) -> int:
        """How many pieces there were so far: what a goodbye tells."""
        return self._number

    def add(self, source: Source) -> None:
        """Queue a source behind those before it."""
        if not self.sending:
            self.adapting.begin()
        self._sources.append(source)
        self._begin_apart()
        self.refresh()

    def next(self, most_bytes: int) -> list[tuple[memoryview, Pending | None]] | None:
        """The next piece as a record, sealed now; None when there is none or no credit."""
        while self._sources and self._sent_bytes < self._limit_bytes:
            source = self._sources[0]
            parts = source.pull(most_bytes)
            if parts is None:
                self._sources.popleft()
                continue
            length, ticket = size_bytes(parts), Pending()
            source.sent(ticket)
            head = RECORD.pack(BULK << 56 | (length + NUMBER.size), self._number)
            self._number += 1
            self._sent_bytes += length
            views = [(memoryview(head), None), *((flat(part), None) for part in parts if len(part))]
            return [*views[:-1], (views[-1][0], ticket)]
        return None

    def feed_first(self) -> bool:
        """Send bulk over the first connection, where there is no other to be had."""
        pipe = self._pipe
        moved = False
        for _ in range(_PRIMARY_PIECES):
            if pipe._out or not self.for_first:
                break
            piece = self.next(PIECE_BYTES)
            if piece is None:
                break
            for view, ticket in piece:
                pipe._queue(view, ticket)
            pipe._flush()
            moved = True
        return moved

    @property
    def for_first(self) -> bool:
        """Whether the first connection has to carry bulk: there is some, and no other stream is there or to come."""
        if not self.ready or any(stream.open or stream.connecting for stream in self.streams):
            return False
        return time.monotonic() >= self._apart_by

    def _begin_apart(self) -> None:
        """On a wide link wait a moment for streams, or what would fill the first connection would delay tokens."""
        now = time.monotonic()
        if self.streams or not self.adapting.may_grow(now) or now < self._apart_by:
            return
        info = self.first_info()
        if info is not None and self.wide(info.min_rtt_s):
            if self.open(FIRST_STREAMS):
                self.adapting.wait(now + 4 * info.min_rtt_s)
            self._apart_by = now + _APART_S + 4 * info.min_rtt_s

    def credit(self, limit_bytes: int) -> None:
        """The other end takes more."""
        if limit_bytes > self._limit_bytes:
            self._limit_bytes = limit_bytes
            self.refresh()

    def refresh(self) -> None:
        """What there is to send has changed."""
        for stream in self.streams:
            stream.watch()
        self._pipe._watch()

    # -- receiving

    def arrived(self, number: int, data: memoryview) -> None:
        """A piece came, in whatever order. Pieces nobody was allowed to send break the pipe."""
        self._held_bytes += data.nbytes
        if number < self._due or number in self._early or self._overdrawn():
            self.dishonest(f"bulk piece {number} where {self._due} was due")
            return
        self._early[number] = data
        while (ready := self._early.pop(self._due, None)) is not None:
            self._due += 1
            self._arrived.append(ready)
        self._pipe._bulk_arrived()

    def _overdrawn(self) -> bool:
        return self._taken_bytes + self._held_bytes > self._granted_bytes + MOST_RECORD_BYTES

    @property
    def due(self) -> int:
        """The number of the piece that comes next."""
        return self._due

    def take(self) -> memoryview | None:
        """The next piece in order, and credit for another."""
        if not self._arrived:
            return None
        data = self._arrived.popleft()
        self._held_bytes -= data.nbytes
        self._taken_bytes += data.nbytes
        if self._taken_bytes + self._window_bytes - self._granted_bytes >= self._window_bytes // 4:
            self._widen()
            self._granted_bytes = self._taken_bytes + self._window_bytes
            self._pipe._send_credit(self._granted_bytes)
        return data

    def _widen(self) -> None:
        now = time.monotonic()
        info = tcp_info(self._pipe._sock)
        rtt_s = max(0.01, info.min_rtt_s if info is not None else 0.0)
        since, before = self._mark
        if now - since >= rtt_s:
            in_a_trip = (self._taken_bytes - before) * rtt_s / (now - since)
            self._window_bytes = min(_MOST_WINDOW_BYTES, max(self._window_bytes, int(_TRIPS * in_a_trip) + PIECE_BYTES))
            self._mark = (now, self._taken_bytes)

    # -- streams

    def join(self, sock: socket.socket, preface: bytes | None = None) -> bool:
        """A further connection: accepted, or being made where there is a preface to send. False: there are enough."""
        if len(self.streams) >= MOST_STREAMS:
            return False
        self.streams.append(BulkStream(self, sock, preface))
        return True

    def refused(self, stream: BulkStream) -> None:
        """A further connection was not to be had: live with what there is, and ask again after a while."""
        stream.close(reset=False)
        self.streams.remove(stream)
        self.adapting.wait(time.monotonic() + _AGAIN_S)
        self._apart_by = 0.0
        self.refresh()

    def broken(self, error: OSError | None) -> None:
        """A stream ended in the middle: what it carried is lost, and with it the pipe."""
        self._pipe._broken(error)

    @property
    def exhausted(self) -> bool:
        """Whether no stream can bring anything more."""
        return all(stream.finished for stream in self.streams)

    def stream_ended(self) -> None:
        """A stream has brought all it will."""
        self._pipe._bulk_arrived()

    def dishonest(self, what: str) -> None:
        """The other end broke the protocol."""
        self._pipe._dishonest(what)

    def shut(self) -> None:
        """Nothing more is going to be sent."""
        for stream in self.streams:
            if stream.open:
                try:
                    stream._sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # gone: the first connection notices

    def forget(self) -> None:
        """Drop what arrived: nobody is going to take it."""
        while self._arrived:
            self._held_bytes -= self._arrived.popleft().nbytes

    def release(self, *, reset: bool) -> None:
        """Let go of every socket and buffer."""
        for stream in self.streams:
            stream.close(reset=reset)
        self.streams.clear()
        while self._sources:
            self._sources.popleft().cancel()
        self._early.clear()

    # -- what adapting needs to know

    def first_info(self) -> TcpInfo | None:
        """What the kernel knows of the pipe's first connection, once it is made."""
        return None if self._pipe._connect_by is not None else tcp_info(self._pipe._sock)

    def wide(self, rtt_s: float) -> bool:
        """Whether a round trip is that of a link that streams of its own pay on."""
        return rtt_s >= WIDE_RTT_S

    @property
    def small_messages(self) -> int:
        """How many messages that are not bulk have gone either way so far."""
        return self._pipe._given + self._pipe._said

    def open(self, count: int) -> bool:
        """Have `count` streams. False where that cannot be now."""
        return self._pipe._open_streams(count)

    def tick(self, now: float) -> None:
        """Follow the link."""
        self.adapting.tick(now)

    def expire(self, now: float) -> None:
        """Deadlines."""
        for stream in tuple(self.streams):
            stream.expire(now)


def number_of(body: memoryview) -> tuple[int, memoryview]:
    """A bulk record's body on the first connection: number, data."""
    (number,) = NUMBER.unpack_from(body)
    return number, body[NUMBER.size :]
