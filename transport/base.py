"""The one seam of the transport: a *pipe* moves whole messages, in order, between two processes.

Three backends stand behind it (UCX, TCP, in-memory) and pass the same contract tests. A backend is driven from outside:
nothing happens unless somebody calls `Fabric.progress()`. That is what lets the same code serve two masters: the step
loop of a worker, which polls, and trio, which waits for `Fabric.fileno()` to become readable.

    Fabric      one per process and backend; owns the sockets or the UCX worker
      Listener  accepts pipes; its `address` is bytes that another process gives to `connect`
      Pipe      `send(parts)` takes a message; `take()` gives the next one that arrived, or None
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

#: Anything that exposes contiguous bytes: bytes, bytearray, memoryview, a numpy array, a CPU tensor's numpy view.
Buffer = bytes | bytearray | memoryview

#: The longest first message an accepted pipe takes before `Pipe.trust`: room for a hello, none for an attack.
FIRST_MESSAGE_BYTES = 4096

#: The longest message at all. A length above it is a broken or hostile neighbour, not a tensor.
MAX_MESSAGE_BYTES = 1 << 30


class TransportError(Exception):
    """The base of everything this package raises. One line: what is wrong, with whom, and what to do."""


class AddressError(TransportError):
    """The address is malformed, belongs to another backend, or nobody listens there."""


class ChannelClosed(TransportError):
    """The other end said goodbye, or this end was closed: nothing more can be sent or received."""


class ChannelBroken(TransportError):
    """The neighbour died, fell silent or broke the protocol. Everything in flight is lost."""


class DeadlineExceeded(TransportError):
    """The operation did not complete in time; the channel itself may still be alive."""


class FrameError(TransportError):
    """Bytes arrived that no honest neighbour sends: bad magic, length, seal or order."""


@runtime_checkable
class Ticket(Protocol):
    """The fate of one sent message. The buffers of the message must not change until `done` is True."""

    @property
    def done(self) -> bool:
        """True once the backend no longer needs the buffers."""
        ...


class Source(Protocol):
    """Where the pieces of one bulk message come from: see `transport.bulk`."""

    @property
    def left_bytes(self) -> int:
        """Bytes not pulled yet."""
        ...

    def pull(self, most_bytes: int) -> Sequence[Buffer] | None:
        """The next piece, of `most_bytes` of payload at most, as a message in parts, or None after the last."""
        ...

    def sent(self, ticket: Ticket) -> None:
        """The ticket of the piece pulled last: its buffers stay as they are until that is done."""
        ...

    def cancel(self) -> None:
        """The pipe has ended: nothing is pulled any more and no buffer is in use."""
        ...


class Pipe(Protocol):
    """An established, reliable, ordered, message-preserving link to one process."""

    def send(self, parts: Sequence[Buffer]) -> Ticket:
        """Queue one message made of `parts` (sent as if joined; not copied where the backend can avoid it).

        Raises ChannelClosed or ChannelBroken when the pipe has ended.
        """
        ...

    def send_bulk(self, source: Source) -> None:
        """Queue a message that may wait, by its source: pieces are pulled when there is room, behind what `send` got.

        Pieces arrive in order among themselves, and in no order with other messages. Raises as `send`.
        """
        ...

    def take(self, bulk: bool = True) -> memoryview | None:
        """The next whole message that arrived, or None.

        bulk: False where pieces of bulk must not be taken now, by a backend that can tell: they then wait, and the
        sender with them.

        Raises ChannelClosed or ChannelBroken once the pipe has ended and what arrived before is taken.
        """
        ...

    def trust(self) -> None:
        """Lift the limits of a stranger. Until then an accepted pipe gives one message of `FIRST_MESSAGE_BYTES` at most
        and reads no further, so that somebody without the key costs a bounded amount of memory. Pipes from `connect`
        are trusted from the start.
        """
        ...

    @property
    def pending_bytes(self) -> int:
        """Bytes accepted by `send` that have not left yet; what back-pressure is decided on."""
        ...

    @property
    def bulk_pending_bytes(self) -> int:
        """The same of bulk."""
        ...

    @property
    def left_bytes(self) -> int:
        """A running total: as `pending_bytes` falls without anything being sent, this rises by as much."""
        ...

    @property
    def missing_bytes(self) -> int:
        """Bytes still to come of messages that have begun to arrive, 0 where there are none or nobody takes them."""
        ...

    @property
    def grain_bytes(self) -> int:
        """The most bytes that may be moving without `left_bytes` or `missing_bytes` showing it."""
        ...

    @property
    def bytes_per_s(self) -> float | None:
        """What was delivered last, in bytes a second, or None where the backend does not know."""
        ...

    @property
    def least_rtt_s(self) -> float | None:
        """The least round trip ever seen, in seconds, or None where the backend does not know."""
        ...

    def close(self) -> None:
        """Flush what can be flushed without waiting, say goodbye, release everything. Idempotent, never blocks."""
        ...

    def abort(self) -> None:
        """Release everything at once, without a goodbye: the other end sees ChannelBroken. Idempotent."""
        ...


class Listener(Protocol):
    """Accepts pipes."""

    @property
    def address(self) -> bytes:
        """What `Fabric.connect` needs to reach this listener. Opaque; safe to carry in a control message."""
        ...

    def accept(self) -> Pipe | None:
        """The next pipe that a neighbour established, or None."""
        ...

    def close(self) -> None:
        """Stop accepting. Pipes already accepted live on. Idempotent."""
        ...


class Fabric(Protocol):
    """One backend in one process. Not thread safe: one thread drives it."""

    name: str

    def listen(self, host: str = "127.0.0.1") -> Listener:
        """Start accepting pipes on an address of `host`."""
        ...

    def connect(self, address: bytes) -> Pipe:
        """Begin to establish a pipe. Returns at once; failure shows as ChannelBroken or AddressError on use."""
        ...

    def progress(self) -> bool:
        """Move bytes without blocking. True if anything moved, so that a poller knows whether to call again."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Block the calling thread until something may have happened, `wake` is called, or the time is over."""
        ...

    def wake(self) -> None:
        """Make a `wait` in another thread return now. The only method that another thread may call."""
        ...

    def take_wake(self) -> bool:
        """Consume a `wake`. True if there was one since the last time."""
        ...

    def fileno(self) -> int:
        """A descriptor that turns readable when `progress` may have work. Valid between `arm` and the next progress."""
        ...

    def arm(self) -> bool:
        """Prepare to wait on `fileno`. False: there is work already, call `progress` instead of waiting."""
        ...

    def close(self) -> None:
        """Abort every pipe and listener and release the backend. Idempotent."""
        ...
