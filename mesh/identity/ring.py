"""The ring of gossip keys, and how it turns without an outage.

Everybody opens with every key of the ring. A new key is first only held; it seals once every live member has said that
it holds it, or after `SWITCH_S`; the old one is dropped `DROP_S` after that. The cluster document commits to each key,
so that no peer can hand out a key of its own making.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.identity.document import MAX_RING_KEYS, MAX_VERSION, ClusterDocument
from mesh.identity.errors import Damaged
from mesh.identity.packing import blob, listing, moment, number, pack, unpack

KEY_BYTES = 32
ID_BYTES = 4
#: A new key is used by then even if a live member never said that it has it: gossip reaches everybody in seconds.
SWITCH_S = 60.0
#: Time for the last to switch, whatever it missed.
DROP_S = 60.0
MAX_RING_BYTES = 512
_WHAT = "key ring"


def commitment(cluster_id: bytes, secret: bytes) -> bytes:
    """32 bytes that tell which key is meant and nothing about it. The first `ID_BYTES` are its id in datagrams."""
    return hashlib.sha256(b"isthmus ring key\0" + cluster_id + secret).digest()


@dataclass
class KeyRing:
    """The keys by id, in order of age; `active` is the id of the one that seals. Times are in seconds since 1970."""

    cluster_id: bytes
    version: int
    keys: dict[bytes, bytes]
    active: bytes
    received_s: int = 0
    switched_s: int = 0

    @classmethod
    def of(cls, cluster_id: bytes, version: int, secrets: Iterable[bytes], now: float) -> KeyRing:
        """A ring that seals with the first of its keys."""
        keys = {commitment(cluster_id, secret)[:ID_BYTES]: secret for secret in secrets}
        return cls(cluster_id, version, keys, next(iter(keys)), int(now), int(now))

    @property
    def newest(self) -> bytes:
        """The id of the key that is to be used in the end."""
        return list(self.keys)[-1]

    def commitments(self) -> tuple[bytes, ...]:
        """What the cluster document says of this ring."""
        return tuple(commitment(self.cluster_id, secret) for secret in self.keys.values())

    def progress(self, now: float, announced: Iterable[int] | None = None) -> bool:
        """Switch or drop where it is time. True if something changed.

        `announced` are the ring versions that all live members say they hold; None where nobody can tell.
        """
        self.received_s = min(self.received_s, int(now))  # a clock that was set back must not stop the ring
        self.switched_s = min(self.switched_s, int(now))
        if self.active != self.newest:
            everybody = announced is not None and all(version >= self.version for version in announced)
            late = now - self.received_s >= SWITCH_S
            if not everybody and not late:
                return False
            # who slept through the switch is not to start the next minute only now
            self.active, self.switched_s = self.newest, int(self.received_s + SWITCH_S) if late else int(now)
            return True
        if len(self.keys) > 1 and now - self.switched_s >= DROP_S:
            self.keys = {self.newest: self.keys[self.newest]}
            return True
        return False

    def replaced_by(self, other: KeyRing, now: float) -> KeyRing:
        """The ring after a newer one came in: the key that seals stays the same as long as the new ring has it."""
        active = self.active if self.active in other.keys else other.active
        return KeyRing(self.cluster_id, other.version, dict(other.keys), active, int(now), int(now))

    def to_bytes(self) -> bytes:
        """For a file, or for sealing to another site."""
        index = list(self.keys).index(self.active)
        return pack([self.version, list(self.keys.values()), index, self.received_s, self.switched_s])

    @classmethod
    def check(cls, data: bytes, cluster_id: bytes, document: ClusterDocument | None) -> KeyRing:
        """Read a ring. With a document its version and its keys must be the announced ones. Raises Damaged."""
        version, secrets, index, received_s, switched_s = unpack(data, 5, _WHAT, MAX_RING_BYTES)
        held = [blob(secret, _WHAT, KEY_BYTES) for secret in listing(secrets, _WHAT, MAX_RING_KEYS)]
        keys = {commitment(cluster_id, secret)[:ID_BYTES]: secret for secret in held}
        if not keys or len(keys) != len(held):
            raise Damaged(f"{_WHAT}: no keys, or the same twice")
        active = list(keys)[number(index, _WHAT, 0, len(keys) - 1)]
        ring = cls(
            cluster_id,
            number(version, _WHAT, 1, MAX_VERSION),
            keys,
            active,
            moment(received_s, _WHAT),
            moment(switched_s, _WHAT),
        )
        if document is not None:
            marks = ring.commitments()
            if (
                ring.version != document.ring_version
                or marks[-1] != document.ring[-1]
                or not {*marks} <= {*document.ring}
            ):
                raise Damaged(f"{_WHAT}: not the keys that the cluster's authority announced")
        return ring
