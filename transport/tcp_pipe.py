"""The pipe of the TCP backend: records over one non-blocking connection. See `transport.tcp` for the whole."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transport.base import (
    FIRST_MESSAGE_BYTES,
    MAX_MESSAGE_BYTES,
    AddressError,
    Buffer,
    ChannelBroken,
    ChannelClosed,
    Ticket,
    TransportError,
)
from transport.tickets import DONE, Pending, again, flat, fresh, size_bytes

if TYPE_CHECKING:
    from transport.tcp import TcpFabric

_RECORD = struct.Struct("<Q")
_LENGTH_MASK = (1 << 56) - 1
_DATA, _GOODBYE = 1, 2

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

    def __init__(self, fabric: TcpFabric, sock: socket.socket, *, name: str, connecting: bool) -> None:
        self._fabric = fabric
        self._sock = sock
        self._name = name
        self._connect_by = time.monotonic() + CONNECT_S if connecting else None
        self._trusted = connecting
        self._out: deque[tuple[memoryview, Pending | None]] = deque()
        self._out_bytes = 0
        self._inbox: deque[memoryview] = deque()
        self._inbox_bytes = 0
        self._given = 0
        self._partial = bytearray()
        self._body: memoryview | None = None
        self._filled = 0
        self._ended: TransportError | None = None
        self._linger_by: float | None = None
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

    def take(self) -> memoryview | None:
        """The next whole message, or None."""
        if self._inbox:
            message = self._inbox.popleft()
            full = self._inbox_bytes >= _INBOX_BYTES
            self._inbox_bytes -= message.nbytes
            if full:
                self._watch()
            return message
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

    def close(self) -> None:
        """Say goodbye behind what was sent and leave the rest to the fabric."""
        self._inbox.clear()
        if self._ended is not None:
            self._release()
            return
        if self._linger_by is not None:
            return
        self._linger_by = time.monotonic() + self._fabric.linger_s
        self._queue(memoryview(_RECORD.pack(_GOODBYE << 56)), None)
        if self._connect_by is None:
            self._flush()
        self._watch()

    def abort(self) -> None:
        """Reset the connection."""
        self._inbox.clear()
        if self._ended is None:
            self._ended = ChannelBroken(f"{self._name}: aborted at this end")
            try:
                # A reset instead of a tidy end, so that the kernel keeps nothing.
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # the connection is gone already
        self._release()

    # -- driven by the fabric

    def _readable(self) -> bool:
        return self._connect_by is None and self._ended is None and not self._paused()

    def _paused(self) -> bool:
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
        if self._ended is None and not self._paused():
            moved = self._read() or moved
        if self._ended is None:
            self._watch()
        return moved

    def _connected(self) -> bool:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == errno.ECONNREFUSED:
            self._end(AddressError(f"{self._name}: nobody listens there; check that the neighbour still runs"))
            return False
        if code:
            self._broken(OSError(code, os.strerror(code)))
            return False
        try:
            self._sock.getpeername()
        except OSError:
            return False
        self._connect_by = None
        return True

    def _expire(self, now: float) -> None:
        if self._connect_by is not None and now >= self._connect_by:
            self._end(ChannelBroken(f"{self._name}: no connection within {CONNECT_S:g} s; is the address reachable?"))
        if self._linger_by is not None and now >= self._linger_by:
            self._release()

    def _queue(self, view: memoryview, ticket: Pending | None) -> None:
        self._out.append((view, ticket))
        self._out_bytes += view.nbytes

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
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._release()
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
                kind, length = word >> 56, word & _LENGTH_MASK
                if kind == _GOODBYE and length == 0:
                    self._end(ChannelClosed(f"{self._name}: the other end closed"))
                    return
                limit = MAX_MESSAGE_BYTES if self._trusted else FIRST_MESSAGE_BYTES
                if kind != _DATA or length > limit:
                    self._end(ChannelBroken(f"{self._name}: the other end broke the protocol (kind {kind})"))
                    return
                if length <= end - at:
                    self._give(memoryview(bytes(data[at : at + length])))
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
            self._give(body)

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
        if self._connect_by is not None or self._out:
            events |= selectors.EVENT_WRITE
        if self._readable():
            events |= selectors.EVENT_READ
        if events == self._events:
            return
        selector = self._fabric._gate.selector
        if not self._events:
            selector.register(self._sock, events, self)
        elif not events:
            selector.unregister(self._sock)
        else:
            selector.modify(self._sock, events, self)
        self._events = events

    def _release(self) -> None:
        if self not in self._fabric._pipes:
            return
        del self._fabric._pipes[self]
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
