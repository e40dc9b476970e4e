"""What the two ends of a transfer of weights say to each other over one channel. Pure.

fetcher -> server   WANT(block)  CANCEL(block)  MANIFEST(chunk)
server  -> fetcher  HAVE(bits, or nothing for all blocks), first of all    BLOCK(block, bytes)  GONE(block)
                    MANIFEST(chunk, of how many; bytes)
either              HUSH: tokens travel at this site, or may: again and again as long as they do

Everything but HUSH is sent as bulk: a transport that sees small messages beside bulk holds the bulk back, and what is
said here is nobody's token.
"""

from __future__ import annotations

import struct

from mesh.errors import RequestError

#: Kinds of `transport.Channel` messages, one set for both directions.
HAVE, WANT, CANCEL, BLOCK, GONE, MANIFEST, HUSH = range(1, 8)
#: How often HUSH is said: well within the time for which the transport remembers small messages (5 s).
HUSH_S = 1.0
#: Manifests travel in pieces of so many bytes.
CHUNK_BYTES = 1 << 20

_NUMBERS = struct.Struct("!II")


def numbers(first: int, second: int = 0) -> bytes:
    """The metadata of a message."""
    return _NUMBERS.pack(first, second)


def read_numbers(meta: bytes) -> tuple[int, int]:
    """Both numbers of a message's metadata. Raises RequestError."""
    try:
        first, second = _NUMBERS.unpack(meta)
    except struct.error:
        raise RequestError(f"a message about weights with {len(meta)} bytes of metadata is none") from None
    return first, second
