"""Frames: what a channel puts into one message of a pipe, sealed or not. Pure: bytes in, bytes out.

A frame is a header of 32 bytes and a body. Unsealed, the body is `meta` followed by `payload`, sent without a copy.
Sealed, the body is encrypted (see `seal`) with the header as associated data, under keys of this connection and
direction (see `handshake`): a short one as a whole; of a long one first `meta`, then `payload` by at most `CHUNK_BYTES`
a call, because a call holds the interpreter lock, into a buffer that is used again, then the tags of these calls. So
the payload lies in one piece, and is opened in the buffer in which it came.

A cutter that turned out to be in the wrong place is not repaired: after a FrameError the stream is finished.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from transport.base import MAX_MESSAGE_BYTES, Buffer, FrameError, Ticket
from transport.buffers import Buffers
from transport.seal import KEY_BYTES, TAG_BYTES, Seal
from transport.tickets import flat

CHUNK_BYTES = 1 << 20
#: Bodies up to here are joined and sealed by one call: a copy of 16 KiB costs what a second call does, 1 us.
JOINED_BYTES = 16 << 10
#: Metadata describes a payload; it does not carry one.
MAX_META_BYTES = 1 << 20

#: Kinds from here on belong to the channel; below 128 to whoever uses it; 128 to 199 are lanes asked for by kind.
FIRST_INTERNAL_KIND = 200
FIRST_LANE_KIND = 128
HEARTBEAT = 200
GOODBYE = 201
FRAGMENT = 202
PART = 203

#: The two orders of a channel: bulk is overtaken, so it counts, and is sealed, on its own.
ORDINARY_LANE, BULK_LANE = 0, 1
_BULK_INFO = b"isthmus bulk v1"

_HEADER = struct.Struct("<HBBIQQQ")
HEADER_BYTES = _HEADER.size
_KIND_AT = 3
_MAGIC = 0x4953  # "IS"
_VERSION = 2
_pack_header = _HEADER.pack

#: Given the metadata and the size of a payload: where it goes. May raise FrameError.
Place = Callable[[bytes, int], memoryview]


class Frame(NamedTuple):
    """An opened frame. `stamp_ns`: the sender's CLOCK_MONOTONIC at sending, meaningful on the same machine only."""

    kind: int
    meta: bytes
    payload: memoryview
    stamp_ns: int


def check_size(meta: bytes, payload: Buffer) -> int:
    """The bytes of `payload`. Raises ValueError where the frame would be longer than a neighbour accepts."""
    size = payload.nbytes if isinstance(payload, memoryview) else len(payload)
    if len(meta) > MAX_META_BYTES or size > MAX_MESSAGE_BYTES - (2 << 20):
        raise ValueError(f"a frame of {len(meta)} + {size} bytes is too long; send it in pieces")
    return size


def kind_of(message: memoryview) -> int:
    """The kind that a frame claims, before anything is checked; -1 for what is too short to be one."""
    return message[_KIND_AT] if message.nbytes >= HEADER_BYTES else -1


def _seal(key: bytes | None, lane: int) -> Seal | None:
    if key is None:
        return None
    if lane == ORDINARY_LANE:
        return Seal(key)
    return Seal(HKDFExpand(algorithm=SHA256(), length=KEY_BYTES, info=_BULK_INFO).derive(key))


class FrameWriter:
    """One direction of a channel, at the sender. `key`: 32 bytes for this direction only, or None for unsealed."""

    def __init__(self, key: bytes | None, lane: int = ORDINARY_LANE) -> None:
        self._seal = _seal(key, lane)
        self._sequence = 0
        self._buffers = Buffers()
        self._lends = False

    def write(self, kind: int, meta: bytes, payload: Buffer, stamp_ns: int) -> list[Buffer]:
        """The parts of the next frame, to be sent as one message. Unsealed, `payload` is one of them.

        Give the message's ticket to `sent`. Raises ValueError when the frame would be longer than a neighbour accepts.
        """
        size = check_size(meta, payload)
        header = _pack_header(_MAGIC, _VERSION, kind, len(meta), size, self._sequence, stamp_ns)
        self._sequence += 1
        seal = self._seal
        if seal is None:
            return [header + meta, payload] if size else [header + meta]
        if self._lends:
            self._buffers.forget()
            self._lends = False
        if len(meta) + size <= JOINED_BYTES:
            return [header, seal.seal(b"".join((meta, payload)) if size else meta, header)]
        first = seal.seal(meta, header)
        if not size:
            return [header, first]
        self._lends = True
        return [header + first, self._seal_long(header, flat(payload))]

    def sent(self, ticket: Ticket) -> None:
        """The frame written last was sent: its buffer is used again when `ticket` is done. Without this it is not."""
        if self._lends:
            self._buffers.lend(ticket)

    def _seal_long(self, header: bytes, payload: memoryview) -> memoryview:
        """The payload sealed chunk by chunk, the tags behind: each lies where the next chunk goes, and is moved."""
        assert self._seal is not None
        size = payload.nbytes
        chunks = _chunks(size)
        sealed = self._buffers.take(size + TAG_BYTES * len(chunks))
        tags = []
        for start, end in chunks:
            self._seal.seal_into(payload[start:end], header, sealed[start : end + TAG_BYTES])
            tags.append(bytes(sealed[end : end + TAG_BYTES]))
        sealed[size:] = b"".join(tags)
        return sealed


class FrameReader:
    """One direction of a channel, at the receiver."""

    def __init__(self, key: bytes | None, lane: int = ORDINARY_LANE) -> None:
        self._seal = _seal(key, lane)
        self._sequence = 0
        self._failed: str | None = None

    def read(self, message: memoryview, elsewhere: int = 0, place: Place | None = None) -> Frame:
        """Open the next message: where it is writable it is opened in place, and belongs to the frame.

        elsewhere: bytes of an unsealed payload that follow, but lie somewhere else. place: tells where a long sealed
        payload is opened instead; it is not asked for any other.

        Raises FrameError for anything that the honest writer did not write next.
        """
        if self._failed is not None:
            raise FrameError(self._failed)
        try:
            return self._read(message, elsewhere, place)
        except FrameError as error:
            self._failed = str(error)
            raise

    def _read(self, message: memoryview, elsewhere: int, place: Place | None) -> Frame:
        size = message.nbytes + elsewhere
        if message.nbytes < HEADER_BYTES:
            raise FrameError(f"frame of {size} bytes is shorter than a header")
        magic, version, kind, meta_bytes, payload_bytes, sequence, stamp_ns = _HEADER.unpack_from(message)
        if magic != _MAGIC or version != _VERSION:
            raise FrameError(f"not a frame of version {_VERSION} (magic {magic:#06x}, version {version})")
        if sequence != self._sequence:
            raise FrameError(f"frame {sequence} arrived where {self._sequence} was due")
        if meta_bytes > MAX_META_BYTES or payload_bytes > MAX_MESSAGE_BYTES:
            raise FrameError(f"frame claims {meta_bytes} + {payload_bytes} bytes")
        body = meta_bytes + payload_bytes
        if self._seal is None:
            if size != HEADER_BYTES + body:
                raise FrameError(f"frame of {size} bytes claims {HEADER_BYTES + body}")
            split = HEADER_BYTES + meta_bytes
            meta = bytes(message[HEADER_BYTES:split]) if meta_bytes else b""
            frame = Frame(kind, meta, message[split:], stamp_ns)
        else:
            header = bytes(message[:HEADER_BYTES])
            try:
                if body <= JOINED_BYTES:
                    if size != HEADER_BYTES + body + TAG_BYTES:
                        raise FrameError(f"sealed frame of {size} bytes claims a body of {body}")
                    plain = self._seal.open(message[HEADER_BYTES:], header)
                    frame = Frame(kind, plain[:meta_bytes], memoryview(plain)[meta_bytes:], stamp_ns)
                else:
                    meta, sealed = self._open_meta(message, header, meta_bytes, payload_bytes)
                    target = None if place is None else place(meta, payload_bytes)
                    frame = Frame(kind, meta, self._open_long(sealed, header, payload_bytes, target), stamp_ns)
            except InvalidTag:
                raise FrameError(f"the seal of frame {sequence} does not hold: tampered with, or another key") from None
        self._sequence += 1
        return frame

    def _open_meta(
        self, message: memoryview, header: bytes, meta_bytes: int, payload_bytes: int
    ) -> tuple[bytes, memoryview]:
        """The metadata of a long frame, and what is left of it."""
        assert self._seal is not None
        at = HEADER_BYTES + meta_bytes + TAG_BYTES
        if message.nbytes != at + payload_bytes + TAG_BYTES * len(_chunks(payload_bytes)):
            raise FrameError(f"sealed frame of {message.nbytes} bytes claims {meta_bytes} + {payload_bytes}")
        return self._seal.open(message[HEADER_BYTES:at], header), message[at:]

    def _open_long(
        self, sealed: memoryview, header: bytes, payload_bytes: int, target: memoryview | None
    ) -> memoryview:
        """The payload, opened in its place or into `target`."""
        assert self._seal is not None
        chunks = _chunks(payload_bytes)
        if target is not None and len(chunks) == 1:
            self._seal.open_into(sealed, header, target)
            return target
        if sealed.readonly:
            sealed = memoryview(bytearray(sealed))
        if target is None:
            target = sealed[:payload_bytes]
        tags = bytes(sealed[payload_bytes:])
        for index, (start, end) in enumerate(chunks):
            # A call wants the tag behind its chunk, where the next one begins: that is put back afterwards.
            behind = sealed[end : end + TAG_BYTES]
            kept = bytes(behind)
            behind[:] = tags[index * TAG_BYTES : (index + 1) * TAG_BYTES]
            self._seal.open_into(sealed[start : end + TAG_BYTES], header, target[start:end])
            behind[:] = kept
        return target


def _chunks(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK_BYTES, size)) for start in range(0, size, CHUNK_BYTES)]
