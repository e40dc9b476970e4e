"""One connection that carries bulk and nothing else: see `transport.tcp_streams`."""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING

from transport.tcp_info import TcpInfo, tcp_info
from transport.tickets import Pending, fresh
from transport.waiting import watch

if TYPE_CHECKING:
    from transport.tcp_streams import Bundle

_UNSENT_BYTES = 128 * 1024
LEAST_PIECE_BYTES = 16 * 1024
#: A piece and its frame. Longer is a broken neighbour.
MOST_RECORD_BYTES = 4 << 20
_CONNECT_S = 10.0
_READS = 8
#: What the kernel collects before it wakes a reader in the middle of a piece.
WAKE_BYTES = 128 << 10
_SO_MAX_PACING_RATE = 47
UNPACED = (1 << 32) - 1

#: Kind and length of what follows, and the piece's number, which counts as a part of it.
RECORD = struct.Struct("<QQ")
NUMBER = struct.Struct("<Q")
_LENGTH_MASK = (1 << 56) - 1
BULK = 3


def connection_error(sock: socket.socket) -> int | None:
    """0 once the connection is made, None while it is being made, else the error (errno) that ended the attempt."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        return code
    try:
        sock.getpeername()
    except OSError:
        return None
    return 0


class BulkStream:
    """One further connection. Carries records of bulk both ways and nothing else."""

    def __init__(self, bundle: Bundle, sock: socket.socket, preface: bytes | None) -> None:
        self._bundle = bundle
        self._sock = sock
        self._connect_by = None if preface is None else time.monotonic() + _CONNECT_S
        self._out: deque[tuple[memoryview, Pending | None]] = deque()
        if preface is not None:
            self._out.append((memoryview(preface), None))
        self._head = memoryview(bytearray(RECORD.size))
        self._body: memoryview | None = None
        self._number = 0
        self._filled = 0
        self._wakes_at = self._collects = 1
        self.finished = False
        #: A stream starts slowly: a long piece would be waited for by those after it.
        self.piece_bytes = LEAST_PIECE_BYTES
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
        code = connection_error(self._sock)
        if code:
            self._bundle.refused(self)
        if code != 0:
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
                word, self._number = RECORD.unpack(self._head)
                length = (word & _LENGTH_MASK) - NUMBER.size
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
