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

import math
import selectors
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING

from transport.base import Source
from transport.bulk import PIECE_BYTES
from transport.pace import Pace
from transport.tcp_info import TcpInfo, tcp_info
from transport.tickets import Pending, flat, fresh, size_bytes
from transport.waiting import watch

if TYPE_CHECKING:
    from transport.tcp_pipe import TcpPipe

#: A round trip from which on further streams are worth their sockets: beyond a site.
WIDE_RTT_S = 2e-3
FIRST_STREAMS, MOST_STREAMS = 8, 32
#: What one connection carries in a round trip: half of Linux's least default for a send buffer, 4 MiB, holds data.
_STREAM_WINDOW_BYTES = 2 << 20
#: Beyond this share of segments sent again, a loss more than the window is what limits a stream.
_LOSSY = 0.003
_SEGMENTS = 1000
#: Without a loss for so long, a stream loses nothing. BBR pauses after 10 s.
_STEADY_S = 4.0
#: Losses behind a queue are congestion, which more streams make worse; they are told of for a while after it.
_QUEUE_S, _SETTLED_S = 3e-3, 1.0
_UNSENT_BYTES = 128 * 1024
_LEAST_PIECE_BYTES = 16 * 1024
#: A piece takes a stream this long at most, or the last ones of a message would be waited for.
_PIECE_S = 0.1
_FIRST_WINDOW_BYTES, _MOST_WINDOW_BYTES = 64 << 20, 256 << 20
_TRIPS = 4
#: A piece and its frame. Longer is a broken neighbour.
MOST_RECORD_BYTES = 4 << 20
_TICK_S, _LOOK_S, _LOOKS = (0.02, 0.25), 0.01, 4
_URGENT_S = 5.0
#: A hello and a welcome are nobody's tokens.
_HANDSHAKE = 2
_AGAIN_S = 10.0
#: How long bulk waits for streams of its own before it takes the first connection.
_APART_S = 1.0
_CONNECT_S = 10.0
_READS = 8
#: What the kernel collects before it wakes a reader in the middle of a piece.
WAKE_BYTES = 128 << 10
_PRIMARY_PIECES = 4
_SO_MAX_PACING_RATE = 47
_UNPACED = (1 << 32) - 1

_RECORD = struct.Struct("<QQ")
_NUMBER = struct.Struct("<Q")
_LENGTH_MASK = (1 << 56) - 1
BULK = 3


class BulkStream:
    """One further connection. Carries records of bulk both ways and nothing else."""

    def __init__(self, bundle: Bundle, sock: socket.socket, preface: bytes | None) -> None:
        self._bundle = bundle
        self._sock = sock
        self._connect_by = None if preface is None else time.monotonic() + _CONNECT_S
        self._out: deque[tuple[memoryview, Pending | None]] = deque()
        if preface is not None:
            self._out.append((memoryview(preface), None))
        self._head = memoryview(bytearray(_RECORD.size))
        self._body: memoryview | None = None
        self._number = 0
        self._filled = 0
        self._wakes_at = self._collects = 1
        self.finished = False
        #: A stream starts slowly: a long piece would be waited for by those after it.
        self.piece_bytes = _LEAST_PIECE_BYTES
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._steady = True
        self.steady(False)
        self._events = selectors.EVENT_READ | selectors.EVENT_WRITE
        bundle.selector.register(sock, self._events, self)

    @property
    def open(self) -> bool:
        """Whether it is connected and may carry more."""
        return self._connect_by is None and not self.finished

    @property
    def connecting(self) -> bool:
        """Whether the connection is being made."""
        return self._connect_by is not None

    @property
    def out_bytes(self) -> int:
        """Bytes that the kernel did not take yet."""
        return sum(view.nbytes for view, _ in self._out)

    @property
    def missing_bytes(self) -> int:
        """What is still to come of the piece in arrival."""
        return 0 if self._body is None else self._body.nbytes - self._filled

    def info(self) -> TcpInfo | None:
        """What the kernel knows of it."""
        return tcp_info(self._sock)

    def limit(self, bytes_per_s: int) -> None:
        """Let the kernel pace the stream; see `transport.pace`."""
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("=I", bytes_per_s))
        except OSError:
            pass  # a kernel without pacing: tokens wait longer

    def steady(self, steady: bool) -> None:
        """Whether the stream has found its rate and loses nothing.

        Until then BBR, which losses that are not congestion cost little (Cardwell et al., ACM Queue 2016). But every
        10 s that stops for 0.2 s to see the least round trip, all streams at once; afterwards `transport.pace` holds
        them to their rate, and any algorithm that keeps its window will do.
        """
        if steady == self._steady or not hasattr(socket, "TCP_CONGESTION"):
            return
        self._steady = steady
        for congestion in (b"cubic", b"reno") if steady else (b"bbr",):
            try:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion)
                return
            except OSError:
                pass  # this kernel has it not, or not for everybody: what it has will do

    def watch(self) -> None:
        """Ask the selector for what this stream waits for."""
        events = 0 if self.finished or self._connect_by is not None else selectors.EVENT_READ
        if self._out or self._connect_by is not None or (self.open and self._bundle.ready):
            events |= selectors.EVENT_WRITE
        self._events = watch(self._bundle.selector, self._sock, self, self._events, events)

    def close(self, *, reset: bool) -> None:
        """Release the socket."""
        if self._events:
            self._bundle.selector.unregister(self._sock)
            self._events = 0
        for _, ticket in self._out:
            if ticket is not None:
                ticket.done = True
        self._out.clear()
        self._body = None
        self.finished = True
        if reset:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # gone already
        self._sock.close()

    def expire(self, now: float) -> None:
        """Give up a connection that is not made in time."""
        if self._connect_by is not None and now >= self._connect_by:
            self._bundle.refused(self)

    def _advance(self) -> bool:
        if self._sock.fileno() < 0:
            return False  # closed with its pipe since the selector was asked
        if self._connect_by is not None and not self._connected():
            return False
        moved = self._read()
        if self._sock.fileno() >= 0:
            moved = self._write() or moved
        if self._sock.fileno() >= 0:
            self.watch()
        return moved

    def _connected(self) -> bool:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._bundle.refused(self)
            return False
        try:
            self._sock.getpeername()
        except OSError:
            return False
        self._connect_by = None
        return True

    def _write(self) -> bool:
        moved = False
        while True:
            if not self._out:
                if self.finished:
                    return moved
                piece = self._bundle.next(self.piece_bytes)
                if piece is None:
                    return moved
                self._out.extend(piece)
            try:
                sent = self._sock.sendmsg([view for view, _ in self._out])
            except BlockingIOError:
                return moved
            except OSError as error:
                self._bundle.broken(error)
                return True
            moved = True
            while self._out and sent >= self._out[0][0].nbytes:
                view, ticket = self._out.popleft()
                sent -= view.nbytes
                if ticket is not None:
                    ticket.done = True
            if sent:
                view, ticket = self._out[0]
                self._out[0] = (view[sent:], ticket)

    def _read(self) -> bool:
        moved = False
        for _ in range(_READS):
            if self.finished:
                return moved
            target = self._head if self._body is None else self._body
            try:
                count = self._sock.recv_into(target[self._filled :])
            except BlockingIOError:
                self._wake_at(min(target.nbytes - self._filled, self._collects))
                return moved
            except OSError as error:
                self._bundle.broken(error)
                return True
            moved = True
            if count == 0:
                if self._filled or self._body is not None:
                    self._bundle.broken(None)
                # Between records it is the other end's good order: a goodbye is on its way on the first connection.
                self.finished = True
                self._bundle.stream_ended()
                return True
            self._filled += count
            if self._filled < target.nbytes:
                continue
            self._filled = 0
            if self._body is None:
                word, self._number = _RECORD.unpack(self._head)
                length = (word & _LENGTH_MASK) - _NUMBER.size
                if word >> 56 != BULK or not 0 < length <= MOST_RECORD_BYTES:
                    self._bundle.dishonest(f"a bulk record of {length} bytes")
                    return True
                self._body = fresh(length)
                # More than fits twice into the kernel's buffer would fix the buffer's size (tcp_set_rcvlowat, Linux).
                self._collects = min(WAKE_BYTES, self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 8)
            else:
                body, self._body = self._body, None
                self._bundle.arrived(self._number, body)
        return moved

    def _wake_at(self, size_bytes: int) -> None:
        """Be told of no less: a fast stream brings some packets at a time, and each turn costs as much as 100 KiB."""
        if size_bytes != self._wakes_at:
            self._wakes_at = size_bytes
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)


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
        self.pace = Pace()
        self._paced: tuple[int, int] | None = None
        self._urgent_at = -math.inf
        self._urgent_seen = _HANDSHAKE
        self._tick_at = self._look_at = 0.0
        self._seen_s: deque[float] = deque(maxlen=_LOOKS)
        self._acked: tuple[float, dict[BulkStream, int]] = (0.0, {})
        self._segments = (0, 0)
        self._full_at = -math.inf
        self._lost = (time.monotonic(), 0)
        self._rate = 0.0
        self._more_at = self._apart_by = 0.0

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
        return self._rate

    @property
    def sent_pieces(self) -> int:
        """How many pieces there were so far: what a goodbye tells."""
        return self._number

    def add(self, source: Source) -> None:
        """Queue a source behind those before it."""
        if not self.sending:
            self._tick_at = self._look_at = 0.0
            if self._count_urgent(time.monotonic()):
                self.pace.begin()
                self._apply()
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
            head = _RECORD.pack(BULK << 56 | (length + _NUMBER.size), self._number)
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
        if self.streams or now < self._more_at or now < self._apart_by:
            return
        info = tcp_info(self._pipe._sock)
        if self._pipe._connect_by is None and info is not None and info.min_rtt_s >= WIDE_RTT_S:
            if self._pipe._open_streams(FIRST_STREAMS):
                self._more_at = now + 4 * info.min_rtt_s
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
        self._more_at = time.monotonic() + _AGAIN_S
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

    # -- adapting

    def expire(self, now: float) -> None:
        """Deadlines."""
        for stream in tuple(self.streams):
            stream.expire(now)

    def tick(self, now: float) -> None:
        """Look at the link some times a round trip, and once a round trip settle how many streams, how long a piece,
        how fast.
        """
        if now < self._look_at or not self.sending:
            return
        first = tcp_info(self._pipe._sock)
        if first is None or self._pipe._connect_by is not None:
            self._look_at = now + _TICK_S[1]
            return
        infos = {stream: info for stream in self.streams if stream.open and (info := stream.info()) is not None}
        least_s = min([first.min_rtt_s, *(info.min_rtt_s for info in infos.values() if info.min_rtt_s > 0)])
        trip_s = min(_TICK_S[1], max(_TICK_S[0], least_s))
        self._look_at = now + max(_LOOK_S, trip_s / _LOOKS)
        if infos:
            rtts = sorted(info.rtt_s for info in infos.values())
            self._seen_s.append(rtts[len(rtts) // 4])
        if now < self._tick_at:
            return
        self._tick_at = now + trip_s
        if least_s < WIDE_RTT_S and not self.streams:
            return
        since, before = self._acked
        self._acked = (now, {stream: info.acked_bytes for stream, info in infos.items()})
        acked = sum(info.acked_bytes - before.get(stream, 0) for stream, info in infos.items())
        delivered = acked / max(now - since, 1e-3) if since else 0.0
        self._rate += 0.3 * (delivered - self._rate)
        urgent = self._count_urgent(now)
        if infos and since:
            # A queue stays for a round trip; a machine that was busy for a moment is no queue.
            self.pace.tick(now, rtt_s=min(self._seen_s), least_rtt_s=least_s, delivered=delivered, urgent=urgent)
        self._apply()
        again = sum(info.retransmitted for info in infos.values())
        if again != self._lost[1]:
            self._lost = (now, again)
        for stream, info in infos.items():
            stream.steady(self.pace.rate is not None and now - self._lost[0] > _STEADY_S)
            own = (info.acked_bytes - before.get(stream, info.acked_bytes)) / max(now - since, 1e-3)
            stream.piece_bytes = round(min(PIECE_BYTES, max(_LEAST_PIECE_BYTES, own * _PIECE_S)))
        self._grow(now, least_s, infos)

    def _count_urgent(self, now: float) -> bool:
        seen = self._pipe._given + self._pipe._said
        if seen > self._urgent_seen:
            self._urgent_seen = seen
            self._urgent_at = now
        return now - self._urgent_at < _URGENT_S

    def _apply(self) -> None:
        carrying = [stream for stream in self.streams if stream.open]
        rate = self.pace.rate
        each = _UNPACED if rate is None or not carrying else min(_UNPACED - 1, max(1, int(rate / len(carrying))))
        if self._paced == (each, len(carrying)):
            return
        self._paced = (each, len(carrying))
        for stream in carrying:
            stream.limit(each)

    def _grow(self, now: float, least_s: float, infos: dict[BulkStream, TcpInfo]) -> None:
        if now < self._more_at or any(stream.connecting for stream in self.streams):
            return
        have = len(self.streams)
        sent = sum(info.sent_segments for info in infos.values())
        again = sum(info.retransmitted for info in infos.values())
        queue_s = min((info.rtt_s for info in infos.values()), default=0.0) - least_s
        if queue_s > max(_QUEUE_S, 0.1 * least_s):
            # The link is full, whatever the windows: more streams would only lengthen the queue.
            self._full_at = now
        if now - self._full_at < _SETTLED_S + 4 * least_s:
            self._segments = (sent, again)  # a queue that ran over, and not the way, may have lost them
            if now == self._full_at:
                return
        lossy = False
        if sent - self._segments[0] >= _SEGMENTS:
            lossy = again - self._segments[1] > _LOSSY * (sent - self._segments[0])
            self._segments = (sent, again)
        want = max(FIRST_STREAMS, math.ceil(self._rate * least_s / _STREAM_WINDOW_BYTES))
        if lossy:
            want = max(want, 2 * have)
        if want > have:
            want = min(max(want, 2 * have), MOST_STREAMS)  # few steps: each new stream starts slowly
        if want > have and self._pipe._open_streams(want):
            self._more_at = now + 4 * least_s


def number_of(body: memoryview) -> tuple[int, memoryview]:
    """A bulk record's body on the first connection: number, data."""
    (number,) = _NUMBER.unpack_from(body)
    return number, body[_NUMBER.size :]
