"""Pipes inside one process: for tests, simulations and two engines side by side, also in two threads.

Every pipe end has one inbox, a deque, appended to by the other end only. A goodbye and a break are entries of the
inbox, so they keep their place behind the messages. Counters have one writer each, so no lock is held on the way.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence

from transport.base import (
    FIRST_MESSAGE_BYTES,
    MAX_MESSAGE_BYTES,
    AddressError,
    Buffer,
    ChannelBroken,
    ChannelClosed,
    Source,
    TransportError,
)
from transport.bulk import BulkQueue
from transport.tickets import DONE, Done, again
from transport.waiting import SPIN_S, Gate, wait_any

_PREFIX = b"mem1"
_registry: dict[bytes, MemoryListener] = {}
_registry_lock = threading.Lock()
_numbers = itertools.count(1)


class MemoryPipe:
    """One end of a pair of inboxes."""

    def __init__(self, fabric: MemoryFabric, *, trusted: bool) -> None:
        self._fabric = fabric
        self._other: MemoryPipe | None = None
        self._inbox: deque[memoryview | type[TransportError]] = deque()
        self._limit_bytes = MAX_MESSAGE_BYTES if trusted else FIRST_MESSAGE_BYTES
        self._trusted = trusted
        self._given = 0
        self._sent_bytes = 0
        self._taken_bytes = 0
        self._ended: TransportError | None = None
        self._bulk = BulkQueue()
        fabric._pipes.add(self)

    def send(self, parts: Sequence[Buffer]) -> Done:
        """Copy the message into the other end's inbox; the buffers are free at once."""
        if self._ended is not None:
            raise again(self._ended)
        if self._inbox and isinstance(farewell := self._inbox[-1], type):
            raise farewell("memory pipe: the other end has left")
        assert self._other is not None
        message = memoryview(b"".join(parts))
        self._sent_bytes += message.nbytes
        self._other._deliver(message)
        return DONE

    def send_bulk(self, source: Source) -> None:
        """Queue a source; its pieces go when the other end has taken enough of those before."""
        if self._ended is not None:
            raise again(self._ended)
        self._bulk.add(source, self)

    def take(self, bulk: bool = True) -> memoryview | None:
        """The next message, or None. There is one queue, so bulk makes no difference here."""
        if self._inbox and self._ended is None and (self._trusted or not self._given):
            message = self._inbox.popleft()
            if isinstance(message, type):
                self._end(message)
            elif message.nbytes > self._limit_bytes:
                self.abort()
                self._ended = ChannelBroken(f"memory pipe: a message of {message.nbytes} bytes exceeds the limit")
            else:
                self._given += 1
                self._taken_bytes += message.nbytes
                if self._other is not None and self._other._bulk:
                    self._other._fabric._notify()
                return message
        if self._ended is not None:
            raise again(self._ended)
        return None

    def trust(self) -> None:
        """Take any number of messages of any legal size from here on."""
        self._trusted = True
        self._limit_bytes = MAX_MESSAGE_BYTES
        self._fabric._notify()

    @property
    def pending_bytes(self) -> int:
        """Bytes sent that the other end has not taken."""
        return 0 if self._other is None or self._ended is not None else self._sent_bytes - self._other._taken_bytes

    @property
    def bulk_pending_bytes(self) -> int:
        """Bytes of bulk that wait for the other end to take."""
        return self._bulk.pending_bytes

    @property
    def left_bytes(self) -> int:
        """Bytes that the other end has taken."""
        return 0 if self._other is None else self._other._taken_bytes

    @property
    def missing_bytes(self) -> int:
        """A message is here, or is not."""
        return 0

    @property
    def grain_bytes(self) -> int:
        """A message moves whole, but in no time."""
        return 0

    @property
    def bytes_per_s(self) -> float | None:
        """Nobody counts."""
        return None

    @property
    def least_rtt_s(self) -> float | None:
        """Nothing to speak of."""
        return 0.0

    def close(self) -> None:
        """Say goodbye behind the messages sent so far."""
        self._finish(ChannelClosed, ChannelClosed("memory pipe: closed at this end"))

    def abort(self) -> None:
        """End without a goodbye."""
        self._finish(ChannelBroken, ChannelBroken("memory pipe: aborted at this end"))

    def _finish(self, farewell: type[TransportError], ended: TransportError) -> None:
        self._fabric._pipes.discard(self)
        self._bulk.clear()
        other, self._other = self._other, None
        if self._ended is None:
            self._ended = ended
            if other is not None:
                other._deliver(farewell)
        self._inbox.clear()

    def _end(self, kind: type[TransportError]) -> None:
        said = "the other end closed" if kind is ChannelClosed else "the other end is gone"
        self._ended = kind(f"memory pipe: {said}")
        self._bulk.clear()
        self._fabric._pipes.discard(self)
        self._other = None

    def _deliver(self, message: memoryview | type[TransportError]) -> None:
        self._inbox.append(message)
        self._fabric._notify()


class MemoryListener:
    """Accepts pipes from any memory fabric of this process."""

    def __init__(self, fabric: MemoryFabric, address: bytes) -> None:
        self._fabric = fabric
        self.address = address
        self._waiting: deque[MemoryPipe] = deque()

    def accept(self) -> MemoryPipe | None:
        """The next pipe, or None."""
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Stop accepting; pipes nobody accepted break."""
        with _registry_lock:
            _registry.pop(self.address, None)
        self._fabric._listeners.discard(self)
        while self._waiting:
            self._waiting.popleft().abort()


class MemoryFabric:
    """The in-memory backend. Threads may differ between fabrics, never within one."""

    name = "memory"

    def __init__(self, *, spin_s: float = SPIN_S) -> None:
        self.spin_s = spin_s
        self._gate = Gate()
        self._pipes: set[MemoryPipe] = set()
        self._listeners: set[MemoryListener] = set()
        self._moved = False

    def listen(self, host: str = "127.0.0.1") -> MemoryListener:
        """Accept pipes; the host plays no part in memory."""
        listener = MemoryListener(self, _PREFIX + str(next(_numbers)).encode())
        self._listeners.add(listener)
        with _registry_lock:
            _registry[listener.address] = listener
        return listener

    def connect(self, address: bytes) -> MemoryPipe:
        """Join a listener of this process. Raises AddressError when there is none."""
        if not address.startswith(_PREFIX):
            raise AddressError(f"not a memory address: {address[:16]!r}; give one from MemoryFabric.listen")
        with _registry_lock:
            listener = _registry.get(address)
            if listener is None:
                raise AddressError(f"nobody listens at {address!r} in this process")
            near = MemoryPipe(self, trusted=True)
            far = MemoryPipe(listener._fabric, trusted=False)
            near._other, far._other = far, near
            listener._waiting.append(far)
        listener._fabric._notify()
        return near

    def progress(self) -> bool:
        """True if something arrived since the last call."""
        moved, self._moved = self._moved, False
        for pipe in tuple(self._pipes):
            if pipe._bulk and pipe._ended is None:
                try:
                    moved = pipe._bulk.pump(pipe) or moved
                except TransportError:
                    pipe._bulk.clear()  # the end is in the inbox, for whoever takes
        return moved

    def wait(self, timeout_s: float) -> None:
        """Sleep until something arrives."""
        wait_any((self,), timeout_s, spin_s=self.spin_s)

    def wake(self) -> None:
        """Interrupt a wait."""
        self._gate.wake()

    def take_wake(self) -> bool:
        """Consume a wake-up."""
        return self._gate.take_wake()

    def fileno(self) -> int:
        """Readable when something arrived or `wake` was called."""
        return self._gate.fileno()

    def arm(self) -> bool:
        """False when something arrived already."""
        return not self._moved and not self._gate.ready()

    def close(self) -> None:
        """Break every pipe and stop every listener."""
        for listener in tuple(self._listeners):
            listener.close()
        for pipe in tuple(self._pipes):
            pipe.abort()
        self._gate.close()

    def _notify(self) -> None:
        self._moved = True
        self._gate.wake()
