"""Frames: what a channel puts into one message of a pipe, sealed or not. Pure: bytes in, bytes out.

A frame is a header of 32 bytes and a body. Unsealed, the body is `meta` followed by `payload`, sent without a copy.
Sealed, the body is encrypted (see `seal`), at most `CHUNK_BYTES` by one call because a call holds the interpreter lock,
with the header as associated data, under keys of this connection and direction (see `handshake`).

A cutter that turned out to be in the wrong place is not repaired: after a FrameError the stream is finished.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from transport.base import MAX_MESSAGE_BYTES, Buffer, FrameError
from transport.seal import KEY_BYTES, TAG_BYTES, Seal
from transport.tickets import flat, fresh

CHUNK_BYTES = 1 << 20
#: Metadata describes a payload; it does not carry one.
MAX_META_BYTES = 1 << 20

#: Kinds from here on belong to the channel; below 128 to whoever uses it; 128 to 199 are lanes asked for by kind.
FIRST_INTERNAL_KIND = 200
FIRST_LANE_KIND = 128
HEARTBEAT = 200
GOODBYE = 201
FRAGMENT = 202

#: The two orders of a channel: bulk is overtaken, so it counts, and is sealed, on its own.
ORDINARY_LANE, BULK_LANE = 0, 1
_BULK_INFO = b"isthmus bulk v1"

_HEADER = struct.Struct("<HBBIQQQ")
HEADER_BYTES = _HEADER.size
_KIND_AT = 3
_MAGIC = 0x4953  # "IS"
_VERSION = 1
_pack_header = _HEADER.pack


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

    def write(self, kind: int, meta: bytes, payload: Buffer, stamp_ns: int) -> list[Buffer]:
        """The parts of the next frame, to be sent as one message. Unsealed, `payload` is one of them.

        Raises ValueError when the frame would be longer than a neighbour accepts.
        """
        size = check_size(meta, payload)
        header = _pack_header(_MAGIC, _VERSION, kind, len(meta), size, self._sequence, stamp_ns)
        self._sequence += 1
        if self._seal is None:
            return [header + meta, payload] if size else [header + meta]
        if len(meta) + size <= CHUNK_BYTES:
            return [header, self._seal.seal(b"".join((meta, payload)) if size else meta, header)]
        return [header, *self._seal_long(header, meta, flat(payload))]

    def _seal_long(self, header: bytes, meta: bytes, payload: memoryview) -> list[Buffer]:
        assert self._seal is not None
        chunks = _chunks(payload.nbytes)
        sealed = fresh(payload.nbytes + TAG_BYTES * len(chunks))
        first = self._seal.seal(meta, header)
        at = 0
        for start, end in chunks:
            length = end - start + TAG_BYTES
            self._seal.seal_into(payload[start:end], header, sealed[at : at + length])
            at += length
        return [first, sealed]


class FrameReader:
    """One direction of a channel, at the receiver."""

    def __init__(self, key: bytes | None, lane: int = ORDINARY_LANE) -> None:
        self._seal = _seal(key, lane)
        self._sequence = 0
        self._failed: str | None = None

    def read(self, message: memoryview) -> Frame:
        """Open the next message. Raises FrameError for anything that the honest writer did not write next."""
        if self._failed is not None:
            raise FrameError(self._failed)
        try:
            return self._read(message)
        except FrameError as error:
            self._failed = str(error)
            raise

    def _read(self, message: memoryview) -> Frame:
        size = message.nbytes
        if size < HEADER_BYTES:
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
            frame = Frame(kind, bytes(message[HEADER_BYTES:split]), message[split:], stamp_ns)
        else:
            header = bytes(message[:HEADER_BYTES])
            try:
                if body <= CHUNK_BYTES:
                    if size != HEADER_BYTES + body + TAG_BYTES:
                        raise FrameError(f"sealed frame of {size} bytes claims a body of {body}")
                    plain = self._seal.open(message[HEADER_BYTES:], header)
                    frame = Frame(kind, plain[:meta_bytes], memoryview(plain)[meta_bytes:], stamp_ns)
                else:
                    meta, payload = self._open_long(message, header, meta_bytes, payload_bytes)
                    frame = Frame(kind, meta, payload, stamp_ns)
            except InvalidTag:
                raise FrameError(f"the seal of frame {sequence} does not hold: tampered with, or another key") from None
        self._sequence += 1
        return frame

    def _open_long(
        self, message: memoryview, header: bytes, meta_bytes: int, payload_bytes: int
    ) -> tuple[bytes, memoryview]:
        assert self._seal is not None
        chunks = _chunks(payload_bytes)
        at = HEADER_BYTES + meta_bytes + TAG_BYTES
        if message.nbytes != at + payload_bytes + TAG_BYTES * len(chunks):
            raise FrameError(f"sealed frame of {message.nbytes} bytes claims {meta_bytes} + {payload_bytes}")
        meta = self._seal.open(message[HEADER_BYTES:at], header)
        payload = fresh(payload_bytes)
        for start, end in chunks:
            length = end - start + TAG_BYTES
            self._seal.open_into(message[at : at + length], header, payload[start:end])
            at += length
        return meta, payload


def _chunks(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK_BYTES, size)) for start in range(0, size, CHUNK_BYTES)]
