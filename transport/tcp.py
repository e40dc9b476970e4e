"""Pipes over TCP: one connection each, non-blocking, driven by whoever calls `progress`.

On the wire a connector first sends a preface, the magic and the listener's cookie. The cookie is part of the
listener's address, so bytes from somebody who was not given the address never become a pipe. After it, both ways,
records: eight bytes, of which the top one is the kind and the rest the length, then the message.

Closing takes two steps, because a kernel answers data that arrives at a closed socket with a reset, and the reset
destroys what the other end has not read yet. So the closing end says goodbye, stops writing and reads on until the
other end hangs up too (at most `linger_s`). An end without a goodbye is a break.
"""

from __future__ import annotations

import errno
import hmac
import os
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

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
from transport.tickets import DONE, Pending, again, flat, size_bytes
from transport.waiting import SPIN_S, Gate, wait_any

_PREFIX = b"tcp1"
_MAGIC = b"ISTHMUS1"
_COOKIE_BYTES = 16
_PREFACE_BYTES = len(_MAGIC) + _COOKIE_BYTES
_ADDRESS = struct.Struct(f"!{_COOKIE_BYTES}sH")

_RECORD = struct.Struct("<Q")
_LENGTH_MASK = (1 << 56) - 1
_DATA, _GOODBYE = 1, 2

#: Messages up to here are joined and sent by one call; above, scattered without a copy. A copy of 64 KiB costs 5 us.
_JOIN_BYTES = 64 * 1024
#: Reads go through a staging buffer of this size; longer messages are read in place.
_STAGING_BYTES = 256 * 1024
#: An inbox that nobody empties stops being filled here; then the neighbour's kernel, then its `pending_bytes`, fill up.
_INBOX_BYTES = 64 << 20
#: Reads of one pipe in one `progress`, so that a fast neighbour does not starve the others.
_READS = 16
#: Strangers between `accept` and the end of their preface, and how long they may take.
_STRANGERS = 64
_STRANGER_S = 5.0
_CONNECT_S = 10.0
_LINGER_S = 1.0
#: Data that the neighbour's kernel has not acknowledged for this long is lost (RFC 5482).
_USER_TIMEOUT_MS = 20_000


class TcpPipe:
    """One connection. States: connecting, open, closing (goodbye said, reading on), ended."""

    def __init__(self, fabric: TcpFabric, sock: socket.socket, *, name: str, connecting: bool) -> None:
        self._fabric = fabric
        self._sock = sock
        self._name = name
        self._connect_by = time.monotonic() + _CONNECT_S if connecting else None
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
            self._end(ChannelBroken(f"{self._name}: no connection within {_CONNECT_S:g} s; is the address reachable?"))
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
            direct = body is not None and (not self._trusted or body.nbytes - self._filled >= _STAGING_BYTES)
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
            if not direct and count < _STAGING_BYTES and self._trusted:
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
                self._body, self._filled = memoryview(np.empty(length, np.uint8)), 0  # not zeroed: 8 MiB cost 1 ms
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


class TcpListener:
    """A listening socket and the strangers that have not shown the cookie yet."""

    def __init__(self, fabric: TcpFabric, sock: socket.socket, cookie: bytes) -> None:
        self._fabric = fabric
        self._sock = sock
        self._cookie = cookie
        self._waiting: deque[TcpPipe] = deque()
        self._strangers: dict[socket.socket, tuple[bytearray, float]] = {}
        host, port = sock.getsockname()[:2]
        self.address = _PREFIX + _ADDRESS.pack(cookie, port) + str(host).encode()
        fabric._listeners[self] = None
        fabric._gate.selector.register(sock, selectors.EVENT_READ, self)

    def accept(self) -> TcpPipe | None:
        """The next pipe whose connector showed the cookie, or None."""
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Stop accepting and drop the strangers; pipes nobody accepted break."""
        if self not in self._fabric._listeners:
            return
        del self._fabric._listeners[self]
        self._fabric._gate.selector.unregister(self._sock)
        self._sock.close()
        for stranger in tuple(self._strangers):
            self._drop(stranger)
        while self._waiting:
            self._waiting.popleft().abort()

    def _advance(self) -> bool:
        moved = False
        while True:
            try:
                stranger, _ = self._sock.accept()
            except OSError:  # nobody waits, or hung up again, or descriptors ran out: the next call tries again
                break
            stranger.setblocking(False)
            if len(self._strangers) >= _STRANGERS:
                self._drop(next(iter(self._strangers)))
            self._strangers[stranger] = (bytearray(), time.monotonic() + _STRANGER_S)
            self._fabric._gate.selector.register(stranger, selectors.EVENT_READ, self)
            moved = True
        for stranger in tuple(self._strangers):
            moved = self._preface(stranger) or moved
        return moved

    def _preface(self, stranger: socket.socket) -> bool:
        seen, _ = self._strangers[stranger]
        try:
            data = stranger.recv(_PREFACE_BYTES - len(seen))
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        seen += data
        if not data or not (_MAGIC.startswith(seen[: len(_MAGIC)])):
            self._drop(stranger)
            return True
        if len(seen) < _PREFACE_BYTES:
            return True
        if not hmac.compare_digest(bytes(seen[len(_MAGIC) :]), self._cookie):
            self._drop(stranger)
            return True
        name = "tcp {}:{}".format(*stranger.getpeername()[:2]) if stranger.fileno() >= 0 else "tcp"
        del self._strangers[stranger]
        self._fabric._gate.selector.unregister(stranger)
        _tune(stranger)
        self._waiting.append(TcpPipe(self._fabric, stranger, name=name, connecting=False))
        return True

    def _drop(self, stranger: socket.socket) -> None:
        del self._strangers[stranger]
        self._fabric._gate.selector.unregister(stranger)
        stranger.close()

    def _expire(self, now: float) -> None:
        for stranger, (_, deadline) in tuple(self._strangers.items()):
            if now >= deadline:
                self._drop(stranger)


class TcpFabric:
    """The TCP backend of one thread. linger_s: how long a closed pipe may take to say goodbye."""

    name = "tcp"

    def __init__(self, *, spin_s: float = SPIN_S, linger_s: float = _LINGER_S) -> None:
        self.spin_s = spin_s
        self.linger_s = linger_s
        self._gate = Gate()
        self._pipes: dict[TcpPipe, None] = {}
        self._listeners: dict[TcpListener, None] = {}
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._expiry = 0.0
        self._closed = False

    def listen(self, host: str = "127.0.0.1") -> TcpListener:
        """Listen on a port of the kernel's choice. Raises AddressError when the host is not one of this machine."""
        sock = socket.socket(_family(host), socket.SOCK_STREAM)
        try:
            sock.bind((host, 0))
            sock.listen(128)
        except OSError as error:
            sock.close()
            raise AddressError(f"cannot listen on {host}: {error.strerror or error}; give an address of it") from None
        sock.setblocking(False)
        return TcpListener(self, sock, os.urandom(_COOKIE_BYTES))

    def connect(self, address: bytes) -> TcpPipe:
        """Begin to connect. Raises AddressError when the address is not one of `TcpListener.address`."""
        try:
            if not address.startswith(_PREFIX):
                raise ValueError
            cookie, port = _ADDRESS.unpack_from(address, len(_PREFIX))
            host = address[len(_PREFIX) + _ADDRESS.size :].decode("ascii")
            sock = socket.socket(_family(host), socket.SOCK_STREAM)
        except (ValueError, struct.error):
            raise AddressError(f"not a tcp address: {address[:16]!r}; give one from TcpFabric.listen") from None
        sock.setblocking(False)
        _tune(sock)
        try:
            sock.connect((host, port))
        except BlockingIOError:
            pass
        except OSError as error:
            sock.close()
            raise AddressError(f"tcp {host}:{port}: {error.strerror or error}") from None
        pipe = TcpPipe(self, sock, name=f"tcp {host}:{port}", connecting=True)
        pipe._queue(memoryview(_MAGIC + cookie), None)
        return pipe

    def progress(self) -> bool:
        """Read, write, accept; once around."""
        moved = False
        pipes = self._pipes
        if len(pipes) <= 4:
            # Asking each socket costs less than asking the selector and then the sockets.
            for pipe in tuple(pipes):
                if pipe._advance():
                    moved = True
        if not moved:
            for key, _ in self._gate.selector.select(0):
                if key.data is not None and key.data._advance():
                    moved = True
            now = time.monotonic()
            if now >= self._expiry:
                self._expiry = now + 0.05
                for owner in (*pipes, *self._listeners):
                    owner._expire(now)
        return moved

    def wait(self, timeout_s: float) -> None:
        """Spin, then sleep until a socket is ready."""
        wait_any((self,), timeout_s, spin_s=self.spin_s)

    def wake(self) -> None:
        """Interrupt a wait."""
        self._gate.wake()

    def take_wake(self) -> bool:
        """Consume a wake-up."""
        return self._gate.take_wake()

    def fileno(self) -> int:
        """Readable when a socket is ready or `wake` was called."""
        return self._gate.fileno()

    def arm(self) -> bool:
        """False when a socket is ready already."""
        return not self._gate.ready()

    def close(self) -> None:
        """Let closed pipes finish their goodbye (at most `linger_s`), abort the others, stop listening."""
        if self._closed:
            return
        self._closed = True
        for pipe in tuple(self._pipes):
            if pipe._linger_by is None:
                pipe.abort()
        for listener in tuple(self._listeners):
            listener.close()
        while self._pipes:
            self.wait(0.05)
            now = time.monotonic()
            for pipe in tuple(self._pipes):
                pipe._expire(now)
        self._gate.close()


def _family(host: str) -> socket.AddressFamily:
    """Numeric hosts only: a lookup would block the step loop. Raises ValueError for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family
    raise AddressError(f"{host!r} is not a numeric IP address; resolve it before")


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
