"""A long message taken apart into frames and put together again. Pure: bytes in, bytes out.

Each piece of bulk is a frame of its own on the bulk lane, which has its own order and its own nonces, so that it may
arrive earlier or later than ordinary frames. A long sealed message of the ordinary lane is taken apart too: one piece
leaves while the next is sealed, and each stays in the processor's cache. A piece's metadata says what the whole is:
kind, offset, size; the first piece also carries the message's metadata.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from transport.base import MAX_MESSAGE_BYTES, Buffer, FrameError, Ticket
from transport.bulk import PIECE_BYTES
from transport.frames import CHUNK_BYTES, FIRST_INTERNAL_KIND, FRAGMENT, MAX_META_BYTES, PART, Frame, FrameWriter
from transport.tickets import flat, fresh

_PIECE = struct.Struct("<BQQ")


class Outgoing:
    """The source of one message in pieces, and its ticket. `payload` must not change until `done`."""

    def __init__(
        self, writer: FrameWriter | None, kind: int, meta: bytes, payload: Buffer, stamp: Callable[[], int]
    ) -> None:
        if len(meta) > MAX_META_BYTES - _PIECE.size:
            raise ValueError(f"metadata of {len(meta)} bytes; it describes a payload, it does not carry one")
        self._payload: memoryview | None = flat(payload)
        self._size = self._payload.nbytes
        if self._size > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {self._size} bytes exceeds {MAX_MESSAGE_BYTES}; send it in pieces")
        #: None until there is a key; nothing is pulled before.
        self.writer = writer
        self._kind = kind
        self._meta = meta
        self._stamp = stamp
        self._at = 0
        self._tickets: list[Ticket] = []

    @property
    def done(self) -> bool:
        """True once the payload is no longer needed."""
        if self._payload is not None:
            return False
        self._tickets = [ticket for ticket in self._tickets if not ticket.done]
        return not self._tickets

    @property
    def left_bytes(self) -> int:
        """Bytes not pulled yet."""
        return 0 if self._payload is None else self._size - self._at

    def pull(self, most_bytes: int = PIECE_BYTES) -> Sequence[Buffer] | None:
        """Seal the next piece."""
        return self._pull(FRAGMENT, min(most_bytes, PIECE_BYTES))

    def pull_part(self) -> Sequence[Buffer] | None:
        """As `pull`, for the ordinary lane."""
        return self._pull(PART, CHUNK_BYTES)

    def _pull(self, frame: int, most_bytes: int) -> Sequence[Buffer] | None:
        payload = self._payload
        if payload is None or self.writer is None:
            return None
        end = min(self._size, self._at + most_bytes)
        meta = _PIECE.pack(self._kind, self._at, self._size) + (self._meta if self._at == 0 else b"")
        parts = self.writer.write(frame, meta, payload[self._at : end], self._stamp())
        self._at = end
        if end == self._size:
            self._payload = None
        return parts

    def sent(self, ticket: Ticket) -> None:
        """Keep the ticket of the piece until its buffers are free."""
        if self.writer is not None:
            self.writer.sent(ticket)
        if not ticket.done:
            self._tickets.append(ticket)

    def cancel(self) -> None:
        """Let go of the payload."""
        self._payload = None
        self._tickets.clear()


class Incoming:
    """Puts the pieces of one direction together, one message after the other."""

    def __init__(self, allocate: Callable[[int], memoryview] = fresh) -> None:
        self._allocate = allocate
        self._kind = 0
        self._meta = b""
        self._body: memoryview | None = None
        self._filled = 0
        self._placed = False

    @property
    def waiting_bytes(self) -> int:
        """What is missing of the message in assembly; 0 between messages."""
        return 0 if self._body is None else self._body.nbytes - self._filled

    def place(self, meta: bytes, size_bytes: int) -> memoryview:
        """Where the payload of the next piece belongs, whose metadata this is: it may be opened right there, before the
        piece is added. Raises FrameError for pieces out of place.
        """
        if len(meta) < _PIECE.size:
            raise FrameError("a piece of a message that does not say of which")
        kind, offset, size = _PIECE.unpack_from(meta)
        if self._body is None:
            if offset != 0 or size > MAX_MESSAGE_BYTES or kind >= FIRST_INTERNAL_KIND:
                raise FrameError(f"a message of {size} bytes in pieces begins at {offset}")
            self._kind, self._meta = kind, meta[_PIECE.size :]
            self._body, self._filled = self._allocate(size), 0
        elif (kind, offset, size) != (self._kind, self._filled, self._body.nbytes) or not size_bytes:
            raise FrameError(f"a piece at {offset} of {size} where {self._filled} of {self._body.nbytes} was due")
        end = offset + size_bytes
        if end > size:
            raise FrameError(f"a piece ends at {end} of {size}")
        self._placed = True
        return self._body[offset:end]

    def add(self, frame: Frame) -> Frame | None:
        """The whole message with the stamp of its last piece, or None. Raises FrameError for pieces out of place."""
        if not self._placed:
            self.place(frame.meta, frame.payload.nbytes)[:] = frame.payload
        self._placed = False
        assert self._body is not None
        self._filled += frame.payload.nbytes
        if self._filled < self._body.nbytes:
            return None
        whole = Frame(self._kind, self._meta, self._body, frame.stamp_ns)
        self._body = None
        return whole
