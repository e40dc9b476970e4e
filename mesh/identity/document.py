"""The cluster document: what the authority tells every site. Who is put out, which ring keys count, which tokens ended.

It travels as the gossip entry "document" of owner "@cluster", and with the answer to an enrolment. Its version only
rises, so an old one cannot bring a revoked key back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesh.identity.certificate import NAME, Anchor
from mesh.identity.errors import Damaged
from mesh.identity.keys import FINGERPRINT_BYTES, SIGNATURE_BYTES, PrivateKey, sign, verified
from mesh.identity.packing import blob, listing, moment, number, pack, unpack

#: Key of the gossip entry, and the only one that "@cluster" may have.
ENTRY = "document"
#: 32 + 63 bytes each and two bytes of packing: 25 KB, below gossip's 32 KiB for a value.
MAX_REVOKED = 256
MAX_REVOKED_TOKENS = 256
TOKEN_ID_BYTES = 8
#: Ring keys that count at a time: the one in use, and those that are being brought in.
MAX_RING_KEYS = 4
MAX_DOCUMENT_BYTES = 32_000
MAX_VERSION = 2**40
_CONTEXT = "cluster document 1"
_WHAT = "cluster document"


@dataclass(frozen=True)
class ClusterDocument:
    """One version. `revoked` is fingerprint -> site; `ring` holds commitments to the ring's keys, the newest last."""

    version: int
    issued_s: int
    ring_version: int
    ring: tuple[bytes, ...]
    rotated_s: int
    revoked: dict[bytes, str] = field(default_factory=dict)
    revoked_tokens: tuple[bytes, ...] = ()
    signature: bytes = b""

    def signed(self, key: PrivateKey, anchor: Anchor) -> bytes:
        """The document as it travels, signed by the authority. Raises Damaged where it is out of bounds."""
        body = pack(
            [
                anchor.cluster_id,
                self.version,
                self.issued_s,
                self.ring_version,
                list(self.ring),
                self.rotated_s,
                [[mark, site] for mark, site in self.revoked.items()],
                list(self.revoked_tokens),
            ]
        )
        data = pack([body, sign(key, _CONTEXT, body)])
        ClusterDocument.check(data, anchor)
        return data

    @classmethod
    def check(cls, data: bytes, anchor: Anchor) -> ClusterDocument:
        """Read a document and hold it to the authority's signature. Raises Damaged."""
        body, signature = unpack(data, 2, _WHAT, MAX_DOCUMENT_BYTES)
        blob(body, _WHAT, 1, MAX_DOCUMENT_BYTES)
        blob(signature, _WHAT, SIGNATURE_BYTES)
        if not verified(anchor.public_key, _CONTEXT, body, signature):
            raise Damaged(f"{_WHAT}: not signed by this cluster's authority")
        cluster_id, version, issued_s, ring_version, ring, rotated_s, revoked, tokens = unpack(
            body, 8, _WHAT, MAX_DOCUMENT_BYTES
        )
        if cluster_id != anchor.cluster_id:
            raise Damaged(f"{_WHAT}: of another cluster")
        keys = tuple(blob(mark, _WHAT, FINGERPRINT_BYTES) for mark in listing(ring, _WHAT, MAX_RING_KEYS))
        if not keys:
            raise Damaged(f"{_WHAT}: without a ring key")
        return cls(
            number(version, _WHAT, 1, MAX_VERSION),
            moment(issued_s, _WHAT),
            number(ring_version, _WHAT, 1, MAX_VERSION),
            keys,
            moment(rotated_s, _WHAT),
            dict(_revoked(item) for item in listing(revoked, _WHAT, MAX_REVOKED)),
            tuple(blob(item, _WHAT, TOKEN_ID_BYTES) for item in listing(tokens, _WHAT, MAX_REVOKED_TOKENS)),
            signature,
        )


def _revoked(item: Any) -> tuple[bytes, str]:
    if type(item) is not list or len(item) != 2 or type(item[1]) is not str or not NAME.fullmatch(item[1]):
        raise Damaged(f"{_WHAT}: a revoked site is not readable")
    return blob(item[0], _WHAT, FINGERPRINT_BYTES), item[1]
