"""The pipe of the TCP backend: records over one non-blocking connection, and bulk beside it.

See `transport.tcp` for the whole and `transport.tcp_streams` for bulk.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transport.base import (
    FIRST_MESSAGE_BYTES,
    MAX_MESSAGE_BYTES,
    AddressError,
    Buffer,
    ChannelBroken,
    ChannelClosed,
    Source,
    Ticket,
    TransportError,
)
from transport.tcp_adapt import MOST_STREAMS
from transport.tcp_info import tcp_info
from transport.tcp_stream import BULK, MOST_RECORD_BYTES, WAKE_BYTES, connection_error
from transport.tcp_streams import Bundle, number_of
from transport.tickets import DONE, Pending, again, flat, fresh, size_bytes
from transport.waiting import watch

if TYPE_CHECKING:
    from transport.tcp import TcpFabric

_RECORD = struct.Struct("<Q")
_LENGTH_MASK = (1 << 56) - 1
_DATA, _GOODBYE, _BULK, _CREDIT, _STREAMS = 1, 2, BULK, 4, 5
_FIGURE = struct.Struct("<Q")

#: Messages up to here are joined and sent by one call; above, scattered without a copy. A copy of 64 KiB costs 5 us.
_JOIN_BYTES = 64 * 1024
#: Reads go through a staging buffer of this size; longer messages are read in place.
STAGING_BYTES = 256 * 1024
#: An inbox that nobody empties stops being filled here; then the neighbour's kernel, then its `pending_bytes`, fill up.
_INBOX_BYTES = 64 << 20
#: Reads of one pipe in one `progress`, so that a fast neighbour does not starve the others.
_READS = 16
#: How long a connection may take to be made.
CONNECT_S = 10.0


class TcpPipe:
    """One connection. States: connecting, open, closing (goodbye said, reading on), ended."""

    def __init__(self, fabric: TcpFabric, sock: socket.socket, *, name: str, key: bytes, connecting: bool) -> None:
        self._fabric = fabric
        self._key = key
        self._sock = sock
        self._name = name
        self._connect_by = time.monotonic() + CONNECT_S if connecting else None
        self._trusted = connecting
        self._out: deque[tuple[memoryview, Pending | None]] = deque()
        self._out_bytes = self._queued_bytes = 0
        self._heard_at = 0.0
        self._inbox: deque[memoryview] = deque()
        self._inbox_bytes = 0
        self._given = 0
        self._partial = bytearray()
        self._body: memoryview | None = None
        self._filled = 0
        self._kind = _DATA
        self._said = 0
        self._ended: TransportError | None = None
        self._linger_by: float | None = None
        self._farewell = False
        self._last_piece: int | None = None
        #: The other end said all it had to on the first connection; bulk may still be on its way on others.
        self._silent = False
        #: How to make a further connection to where this one leads, at the connecting end: (index) -> success.
        self._further: Callable[[int], bool] | None = None
        self._bundle = Bundle(self, fabric._gate.selector)
        self._events = selectors.EVENT_WRITE if connecting else selectors.EVENT_READ
        fabric._gate.selector.register(sock, self._events, self)
        fabric._pipes[self] = None

    # -- the seam

    def send(self, parts: Sequence[Buffer]) -> Ticket:
        """Queue a message and push as much as the kernel takes."""
        if self._ended is not None or self._linger_by is not None:
            raise self._ended_error()
        length = size_bytes(parts)
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes exceeds {MAX_MESSAGE_BYTES}; send it in pieces")
        record = _RECORD.pack(_DATA << 56 | length)
        self._said += 1
        ticket: Ticket
        if length <= _JOIN_BYTES:
            joined = b"".join((record, *parts))
            ticket = DONE
            if not self._out and self._connect_by is None:
                # The common case of a step loop: nothing queued, the kernel takes it whole.
                try:
                    sent = self._sock.send(joined)
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    self._broken(error)
                    raise self._ended_error() from None
                if sent == len(joined):
                    return ticket
                self._queue(memoryview(joined)[sent:], None)
            else:
                self._queue(memoryview(joined), None)
        else:
            ticket = pending = Pending()
            views = [view for view in map(flat, parts) if view.nbytes]
            self._queue(memoryview(record), None)
            for view in views[:-1]:
                self._queue(view, None)
            self._queue(views[-1], pending)
        if self._connect_by is None:
            self._flush()
        self._watch()
        return ticket

    def send_bulk(self, source: Source) -> None:
        """Queue what may wait. Raises ChannelClosed or ChannelBroken when the pipe has ended."""
        if self._ended is not None or self._linger_by is not None:
            raise self._ended_error()
        self._fabric._bulky[self] = None
        self._bundle.add(source)

    def take(self, bulk: bool = True) -> memoryview | None:
        """The next whole message, or None. bulk: also of what came as bulk, behind what is urgent."""
        if self._inbox:
            message = self._inbox.popleft()
            full = self._inbox_bytes >= _INBOX_BYTES
            self._inbox_bytes -= message.nbytes
            if full:
                self._watch()
            return message
        if bulk and (piece := self._bundle.take()) is not None:
            return piece
        if self._ended is not None or self._linger_by is not None:
            raise self._ended_error()
        return None

    def trust(self) -> None:
        """Take any number of messages of any legal size from here on."""
        self._trusted = True
        self._watch()

    @property
    def pending_bytes(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self._out_bytes

    @property
    def bulk_pending_bytes(self) -> int:
        """Bytes of bulk that the kernel has not taken yet."""
        return self._bundle.pending_bytes

    @property
    def left_bytes(self) -> int:
        """Bytes that the kernel took of those it could not take at once."""
        return self._queued_bytes - self._out_bytes

    @property
    def missing_bytes(self) -> int:
        """What is still to come of the message in arrival, and of pieces of bulk."""
        if self._ended is not None or self._paused():
            return 0
        first = len(self._partial) % _RECORD.size if self._body is None else self._body.nbytes - self._filled
        return first + self._bundle.missing_bytes

    @property
    def grain_bytes(self) -> int:
        """What the kernel collects of a piece of bulk; of all else it takes and gives bytes."""
        return WAKE_BYTES if self._bundle.streams else 0

    @property
    def bytes_per_s(self) -> float | None:
        """What the kernel, or all streams together, delivered last; None where nobody tells."""
        info = None if self._ended is not None else tcp_info(self._sock)
        return None if info is None else max(info.bytes_per_s, self._bundle.bytes_per_s)

    @property
    def least_rtt_s(self) -> float | None:
        """The least round trip that the kernel saw, seconds; None where it tells none."""
        info = None if self._ended is not None else tcp_info(self._sock)
        return None if info is None else info.min_rtt_s

    def close(self) -> None:
        """Say goodbye behind what was sent and leave the rest to the fabric."""
        self._inbox.clear()
        self._bundle.forget()
        if self._ended is not None:
            self._release()
            return
        if self._linger_by is not None:
            return
        self._linger_by = time.monotonic() + self._fabric.linger_s
        self._say_farewell()
        if self._connect_by is None:
            self._flush()
        self._watch()

    def abort(self) -> None:
        """Reset the connection."""
        self._inbox.clear()
        self._bundle.forget()
        if self._ended is None:
            self._ended = ChannelBroken(f"{self._name}: aborted at this end")
            try:
                # A reset instead of a tidy end, so that the kernel keeps nothing.
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # the connection is gone already
        self._release(reset=True)

    # -- driven by the fabric

    def _say_farewell(self) -> None:
        """The goodbye leaves behind everything else, bulk too, and tells how much of that there was."""
        if not self._farewell and not self._bundle.sending:
            self._farewell = True
            self._queue(memoryview(_RECORD.pack(_GOODBYE << 56 | _FIGURE.size)), None)
            self._queue(memoryview(_FIGURE.pack(self._bundle.sent_pieces)), None)

    def _say(self, kind: int, figure: int) -> None:
        if self._ended is None and not self._farewell:
            self._queue(memoryview(_RECORD.pack(kind << 56 | _FIGURE.size) + _FIGURE.pack(figure)), None)
            if self._connect_by is None:
                self._flush()
            self._watch()

    def _send_credit(self, limit_bytes: int) -> None:
        self._say(_CREDIT, limit_bytes)

    def _open_streams(self, count: int) -> bool:
        """Have `count` streams for bulk: only the connecting end can make them, so the other one asks. False: later."""
        if self._further is None:
            self._say(_STREAMS, count)
            return True
        if not self._given or self._linger_by is not None:
            return False  # the other end knows this pipe once it has answered
        self._fabric._bulky[self] = None
        while len(self._bundle.streams) < min(count, MOST_STREAMS):
            if not self._further(len(self._bundle.streams) + 1):
                return False
        return True

    def _bulk_arrived(self) -> None:
        if self._linger_by is not None:
            self._bundle.forget()
        if self._last_piece is not None and self._bundle.due >= self._last_piece:
            self._end(ChannelClosed(f"{self._name}: the other end closed"))
        elif self._silent and self._bundle.exhausted:
            self._broken(None)

    def _dishonest(self, what: str) -> None:
        self._end(ChannelBroken(f"{self._name}: the other end broke the protocol ({what})"))

    def _readable(self) -> bool:
        return self._connect_by is None and self._ended is None and not self._paused()

    def _paused(self) -> bool:
        if self._silent:
            return True
        if self._linger_by is not None:
            return False
        return self._inbox_bytes >= _INBOX_BYTES or (not self._trusted and self._given > 0)

    def _advance(self) -> bool:
        """Connect, flush, read. True if anything moved."""
        if self._ended is not None:
            return False
        if self._connect_by is not None and not self._connected():
            return False
        moved = self._flush() if self._out else False
        if self._ended is None and not self._out:
            if self._bundle.for_first:
                moved = self._bundle.feed_first() or moved
            elif self._linger_by is not None and not self._farewell:
                self._say_farewell()
                moved = self._flush() or moved
        if self._ended is None and not self._paused():
            moved = self._read() or moved
        if self._ended is None:
            self._watch()
        return moved

    def _connected(self) -> bool:
        code = connection_error(self._sock)
        if code == errno.ECONNREFUSED:
            self._end(AddressError(f"{self._name}: nobody listens there; check that the neighbour still runs"))
        elif code:
            self._broken(OSError(code, os.strerror(code)))
        if code != 0:
            return False
        self._connect_by = None
        return True

    def _expire(self, now: float) -> None:
        if self._connect_by is not None and now >= self._connect_by:
            self._end(ChannelBroken(f"{self._name}: no connection within {CONNECT_S:g} s; is the address reachable?"))
        if self._linger_by is not None and now >= self._linger_by:
            self._release()
        elif self._ended is None:
            self._bundle.expire(now)
            if now >= self._heard_at:
                self._heard_at = now + self._fabric.link_s / 16
                self._listen_for_life()
            if self._linger_by is not None and not self._farewell:
                self._advance()

    def _listen_for_life(self) -> None:
        """A neighbour's kernel answers whatever its processes do: where it does not, it is gone, or the path is."""
        infos = (tcp_info(self._sock), *(stream.info() for stream in self._bundle.streams if stream.open))
        silent_s = max((info.heard_s for info in infos if info is not None and not info.probing), default=0.0)
        if self._connect_by is None and self._ended is None and silent_s > self._fabric.link_s:
            self._end(ChannelBroken(f"{self._name}: its machine has said nothing for {silent_s:.0f} s; is it cut off?"))

    def _queue(self, view: memoryview, ticket: Pending | None) -> None:
        self._out.append((view, ticket))
        self._out_bytes += view.nbytes
        self._queued_bytes += view.nbytes

    def _flush(self) -> bool:
        moved = False
        while self._out:
            batch = [self._out[i][0] for i in range(min(len(self._out), 64))]
            try:
                sent = self._sock.sendmsg(batch)
            except BlockingIOError:
                break
            except OSError as error:
                self._broken(error)
                return True
            moved = True
            self._out_bytes -= sent
            while sent or (self._out and not self._out[0][0].nbytes):
                view, ticket = self._out[0]
                if sent < view.nbytes:
                    self._out[0] = (view[sent:], ticket)
                    break
                sent -= view.nbytes
                self._out.popleft()
                if ticket is not None:
                    ticket.done = True
        if not self._out and self._linger_by is not None:
            if self._farewell:
                try:
                    self._sock.shutdown(socket.SHUT_WR)
                    self._bundle.shut()
                except OSError:
                    self._release()
            else:
                self._say_farewell()
                if self._farewell:
                    return self._flush() or moved
        return moved

    def _read(self) -> bool:
        moved = False
        staging = self._fabric._staging
        for _ in range(_READS):
            body = self._body
            direct = body is not None and (not self._trusted or body.nbytes - self._filled >= STAGING_BYTES)
            try:
                if direct and body is not None:
                    count = self._sock.recv_into(body[self._filled :])
                elif self._trusted:
                    count = self._sock.recv_into(staging)
                else:  # not one byte further than the first message
                    count = self._sock.recv_into(staging[: _RECORD.size - len(self._partial)])
            except BlockingIOError:
                return moved
            except OSError as error:
                self._broken(error)
                return True
            moved = True
            if count == 0:
                self._silent = True
                if self._last_piece is None or self._bundle.exhausted:
                    self._broken(None)
                return True
            if direct:
                self._filled += count
                self._complete()
            else:
                self._parse(staging[:count])
            if self._ended is not None or self._paused():
                return True
            if not direct and count < STAGING_BYTES and self._trusted:
                return True  # the kernel's buffer is empty; asking again would cost a system call
        return moved

    def _parse(self, data: memoryview) -> None:
        at, end = 0, data.nbytes
        while at < end and self._ended is None:
            if self._body is None:
                if not self._partial and end - at >= _RECORD.size:
                    (word,) = _RECORD.unpack_from(data, at)
                    at += _RECORD.size
                else:
                    need = min(_RECORD.size - len(self._partial), end - at)
                    self._partial += data[at : at + need]
                    at += need
                    if len(self._partial) < _RECORD.size:
                        return
                    (word,) = _RECORD.unpack(self._partial)
                    self._partial.clear()
                self._kind, length = word >> 56, word & _LENGTH_MASK
                if length > self._longest(self._kind):
                    self._dishonest(f"a record of kind {self._kind} and {length} bytes")
                    return
                if length <= end - at:
                    self._got(memoryview(bytearray(data[at : at + length])))
                    at += length
                    continue
                self._body, self._filled = fresh(length), 0
            count = min(self._body.nbytes - self._filled, end - at)
            self._body[self._filled : self._filled + count] = data[at : at + count]
            self._filled += count
            at += count
            self._complete()

    def _complete(self) -> None:
        if self._body is not None and self._filled == self._body.nbytes:
            body, self._body = self._body, None
            self._got(body)

    def _longest(self, kind: int) -> int:
        """The most bytes a record of this kind may have; -1 where it may not be at all."""
        if kind == _DATA:
            return MAX_MESSAGE_BYTES if self._trusted else FIRST_MESSAGE_BYTES
        if kind == _GOODBYE:
            return _FIGURE.size
        if not self._trusted:
            return -1
        return {_BULK: MOST_RECORD_BYTES, _CREDIT: _FIGURE.size, _STREAMS: _FIGURE.size}.get(kind, -1)

    def _got(self, body: memoryview) -> None:
        if self._kind == _DATA:
            self._give(body)
        elif body.nbytes < _FIGURE.size:
            self._dishonest(f"a record of kind {self._kind} cut short")
        elif self._kind == _BULK:
            self._bundle.arrived(*number_of(body))
        else:
            (figure,) = _FIGURE.unpack(body)
            if self._kind == _CREDIT:
                self._bundle.credit(figure)
            elif self._kind == _STREAMS:
                self._open_streams(figure)
            else:
                self._last_piece = figure
                self._bulk_arrived()

    def _give(self, message: memoryview) -> None:
        if self._linger_by is not None:
            return  # closed at this end: read only to let the other end finish
        self._given += 1
        self._inbox_bytes += message.nbytes
        self._inbox.append(message)

    def _broken(self, error: OSError | None) -> None:
        if self._linger_by is not None:
            self._release()
            return
        why = "the connection ended without a goodbye" if error is None else error.strerror or str(error)
        self._end(ChannelBroken(f"{self._name}: {why}; the neighbour is gone"))

    def _end(self, error: TransportError) -> None:
        self._ended = error
        self._release()

    def _ended_error(self) -> TransportError:
        return ChannelClosed(f"{self._name}: closed at this end") if self._ended is None else again(self._ended)

    def _watch(self) -> None:
        if self not in self._fabric._pipes:
            return
        events = 0
        if self._connect_by is not None or self._out or (self._bundle.for_first):
            events |= selectors.EVENT_WRITE
        if self._readable():
            events |= selectors.EVENT_READ
        self._events = watch(self._fabric._gate.selector, self._sock, self, self._events, events)

    def _release(self, *, reset: bool = False) -> None:
        if self not in self._fabric._pipes:
            return
        del self._fabric._pipes[self]
        self._fabric._names.pop(self._key, None)
        self._fabric._bulky.pop(self, None)
        self._bundle.release(reset=reset or isinstance(self._ended, ChannelBroken))
        if self._events:
            self._fabric._gate.selector.unregister(self._sock)
            self._events = 0
        if self._ended is None:
            self._ended = ChannelClosed(f"{self._name}: closed at this end")
        for _, ticket in self._out:
            if ticket is not None:
                ticket.done = True
        self._out.clear()
        self._out_bytes = 0
        self._body = None
        self._sock.close()
