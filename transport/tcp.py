"""Pipes over TCP: one connection each, non-blocking, driven by whoever calls `progress`.

On the wire a connector first sends a preface: the magic, the listener's cookie, the pipe's random name, and which of
its connections this is (0 for the first; see `transport.tcp_streams` for the others). The cookie is part of the
listener's address, so bytes from somebody who was not given the address never become a pipe. After it, both ways,
records: eight bytes, of which the top one is the kind and the rest the length, then the message.

Closing takes two steps, because a kernel answers data that arrives at a closed socket with a reset, and the reset
destroys what the other end has not read yet. So the closing end says goodbye, stops writing and reads on until the
other end hangs up too (at most `linger_s`). An end without a goodbye is a break.
"""

from __future__ import annotations

import hmac
import os
import selectors
import socket
import struct
import time
from collections import deque

from transport.base import AddressError
from transport.deadlines import LINK_S, PATIENCE_S
from transport.tcp_pipe import STAGING_BYTES, TcpPipe
from transport.waiting import SPIN_S, Gate, wait_any

_PREFIX = b"tcp1"
_MAGIC = b"ISTHMUS2"
_COOKIE_BYTES = 16
_NAME_BYTES = 16
_PREFACE_BYTES = len(_MAGIC) + _COOKIE_BYTES + _NAME_BYTES + 1
_ADDRESS = struct.Struct(f"!{_COOKIE_BYTES}sH")

#: Strangers between `accept` and the end of their preface, and how long they may take.
_STRANGERS = 64
_STRANGER_S = 10.0
_LINGER_S = 1.0
#: A neighbour that takes nothing, and one whose kernel is gone, end the connection after this at the latest (RFC 5482);
#: `transport.deadlines` and `TcpPipe` find both earlier where somebody looks.
_USER_TIMEOUT_MS = round(1.25e3 * PATIENCE_S)
#: An idle connection is asked after this many seconds, and again each as many, so that a path that swallows everything
#: is told from one on which nothing is said.
_KEEPALIVE_S = round(LINK_S / 4)


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
        at = len(_MAGIC) + _COOKIE_BYTES
        key, index = bytes(seen[at:-1]), seen[-1]
        known = self._fabric._names.get(key)
        if (
            not hmac.compare_digest(bytes(seen[len(_MAGIC) : at]), self._cookie)
            or (known is None) != (index == 0)
            or (known is not None and not known._trusted)
        ):
            self._drop(stranger)
            return True
        try:
            name = "tcp {}:{}".format(*stranger.getpeername()[:2])
            _tune(stranger)
        except OSError:  # hung up again
            self._drop(stranger)
            return True
        del self._strangers[stranger]
        self._fabric._gate.selector.unregister(stranger)
        if known is not None:
            if not known._bundle.join(stranger):
                stranger.close()
            return True
        pipe = TcpPipe(self._fabric, stranger, name=name, key=key, connecting=False)
        self._fabric._names[key] = pipe
        self._waiting.append(pipe)
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
        #: Accepted pipes by the name that their connector gave them, for further connections to find them.
        self._names: dict[bytes, TcpPipe] = {}
        #: Pipes that have bulk to send, or streams for it.
        self._bulky: dict[TcpPipe, None] = {}
        #: After how long a neighbour's kernel that says nothing at all counts as gone.
        self.link_s = LINK_S
        self._staging = memoryview(bytearray(STAGING_BYTES))
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
            sock = _connecting(host, port)
        except (ValueError, struct.error):
            raise AddressError(f"not a tcp address: {address[:16]!r}; give one from TcpFabric.listen") from None
        except OSError as error:
            raise AddressError(f"tcp {host}:{port}: {error.strerror or error}") from None
        key = os.urandom(_NAME_BYTES)
        preface = _MAGIC + cookie + key
        pipe = TcpPipe(self, sock, name=f"tcp {host}:{port}", key=key, connecting=True)

        def further(index: int) -> bool:
            try:
                return pipe._bundle.join(_connecting(host, port), preface + bytes([index]))
            except OSError:
                return False

        pipe._further = further
        pipe._queue(memoryview(preface + b"\0"), None)
        pipe._advance()  # inside a machine the connection stands already
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
        if self._bulky:
            now = time.monotonic()
            for pipe in tuple(self._bulky):
                pipe._bundle.tick(now)
        if not moved or self._bulky:
            for key, _ in self._gate.selector.select(0):
                if key.data is not None and key.data._advance():
                    moved = True
            now = time.monotonic()
            if now >= self._expiry:
                self._expiry = now + 0.05
                for pipe in tuple(pipes):
                    pipe._expire(now)
                for listener in self._listeners:
                    listener._expire(now)
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


def _connecting(host: str, port: int) -> socket.socket:
    """A socket that has begun to connect. Raises ValueError or AddressError for a host's name, OSError."""
    sock = socket.socket(_family(host), socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _tune(sock)
        sock.connect((host, port))
    except BlockingIOError:
        pass
    except OSError:
        sock.close()
        raise
    return sock


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), _KEEPALIVE_S)
