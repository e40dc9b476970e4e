"""The seal of one direction: AES-256-GCM under a counter, with a key that is replaced before it has done much. Pure.

After `REKEY_CALLS` seals or `REKEY_BYTES` both ends, which count the same, replace the key by a hash of it (as TLS 1.3
does in RFC 8446, 7.2, but without a message, and so without a pause) and forget the old one: who takes a process apart
later finds nothing that opens what went before. The nonce is the number of the key and a counter under it; neither is
sent. What was lost, repeated, reordered, cut short or sent back does not open.
"""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from transport.base import Buffer

KEY_BYTES = 32
TAG_BYTES = 16

#: Far below what AES-GCM bears (RFC 8446, 5.5: 2^24 records), and rare enough that its 30 us are nothing: a step loop
#: sends some thousand frames a second, a bulk transfer a gigabyte.
REKEY_CALLS = 1 << 16
REKEY_BYTES = 1 << 30

_NONCE = struct.Struct("<IQ")
_pack_nonce = _NONCE.pack
_INFO = b"isthmus rekey v1"


class Seal:
    """Seals or opens in one direction, one after the other. The two ends of a direction have to do the same calls.

    lane: 0 to 255, for several seals under one key: the high byte of every nonce, so that none is used twice.
    """

    def __init__(self, key: bytes, *, lane: int = 0, calls: int = REKEY_CALLS, size_bytes: int = REKEY_BYTES) -> None:
        self._key = key
        self._aead = AESGCM(key)
        self._most_calls = calls
        self._most_bytes = size_bytes
        self._number = lane << 24
        self._calls = self._bytes = 0

    def seal(self, plain: Buffer, header: bytes) -> bytes:
        """`plain` encrypted, with the tag, which also covers `header`."""
        nonce = self._next(plain)
        return self._aead.encrypt(nonce, plain, header)

    def seal_into(self, plain: memoryview, header: bytes, target: memoryview) -> None:
        """As `seal`, into `target`, which has TAG_BYTES more."""
        nonce = self._next(plain)
        self._aead.encrypt_into(nonce, plain, header, target)

    def open(self, sealed: memoryview, header: bytes) -> bytes:
        """What `seal` was given. Raises InvalidTag; this seal is then of no more use."""
        nonce = self._next(sealed, TAG_BYTES)
        return self._aead.decrypt(nonce, sealed, header)

    def open_into(self, sealed: memoryview, header: bytes, target: memoryview) -> None:
        """As `open`, into `target`, which has TAG_BYTES less."""
        nonce = self._next(sealed, TAG_BYTES)
        self._aead.decrypt_into(nonce, sealed, header, target)

    def _next(self, data: Buffer, overhead: int = 0) -> bytes:
        """The nonce of the next call, under a new key where one is due."""
        if self._calls >= self._most_calls or self._bytes >= self._most_bytes:
            self._key = HKDFExpand(algorithm=SHA256(), length=KEY_BYTES, info=_INFO).derive(self._key)
            self._aead = AESGCM(self._key)
            self._number += 1
            self._calls = self._bytes = 0
        nonce = _pack_nonce(self._number, self._calls)
        self._calls += 1
        self._bytes += (data.nbytes if isinstance(data, memoryview) else len(data)) - overhead
        return nonce
