"""Who said it: what a site signs of its own words, and how the mesh holds others to theirs.

Two things carry a proof: an entry, which only its owner writes, and a claim of a site about itself (that it lives, at
an incarnation and an address, or that it has left). Whoever passes either on passes the proof on with it, so that
nobody can write another's entries, raise another's incarnation, move its address or say its farewell. A suspicion or a
death is said by others; such a claim carries the proof that its subject once lived at that incarnation, so that it
cannot be about an incarnation that never was.

`mesh.identity` implements `Prover` with the certificates of sites; `Unproven` is for loopback, without an identity.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Protocol

import msgpack

from mesh.gossip.members import LEFT, Claim
from mesh.gossip.messages import Sender

#: A signature: 64 bytes of Ed25519, at most 72 of ECDSA P-256 in DER.
MAX_PROOF_BYTES = 72
#: The owner of entries that the cluster's authority writes. No site's name may start like this.
CLUSTER = "@cluster"
RESERVED_PREFIX = "@"
#: Key of the entry by which third parties learn a site's key.
IDENTITY = "identity"
#: Proofs remembered: several per member of the largest mesh. The oldest go; checking again is all that it costs.
MAX_REMEMBERED = 32_768


class Prover(Protocol):
    """The keys of one site, and what it knows of others' keys."""

    def sign(self, message: bytes) -> bytes:
        """The proof that this site says `message`: at most `MAX_PROOF_BYTES`, empty where nothing is signed."""
        ...

    def verify(self, site: str, message: bytes, proof: bytes) -> bool:
        """Whether `proof` shows that `site` said `message`. `CLUSTER` stands for the cluster's authority."""
        ...

    def knows(self, site: str) -> bool:
        """Whether the key of `site` is known. While it is not, `verify` learns it from the site's `IDENTITY` entry."""
        ...


class Unproven:
    """No identity: signs nothing and believes everybody."""

    def sign(self, message: bytes) -> bytes:
        """Empty."""
        return b""

    def verify(self, site: str, message: bytes, proof: bytes) -> bool:
        """True."""
        return True

    def knows(self, site: str) -> bool:
        """True."""
        return True


class Statement(NamedTuple):
    """One entry as its owner signs it. `value` is packed (see `values`)."""

    owner: str
    generation: int
    key: str
    version: int
    value: bytes


def entry_message(cluster: str, statement: Statement) -> bytes:
    """What the owner of an entry signs."""
    packed: bytes = msgpack.packb(["isthmus entry", cluster, *statement], use_bin_type=True)
    return packed


def claim_message(cluster: str, site: str, address: str, incarnation: int, left: bool) -> bytes:
    """What a site signs about itself."""
    packed: bytes = msgpack.packb(["isthmus claim", cluster, site, address, incarnation, left])
    return packed


class Proofs:
    """Signs our own claims once, and checks those of others once."""

    def __init__(self, cluster: str, prover: Prover) -> None:
        """`cluster` binds every proof to one mesh."""
        self._cluster = cluster
        self._prover = prover
        self._believes = isinstance(prover, Unproven)
        self._own: tuple[Hashable, bytes] = (None, b"")
        self._held: dict[tuple[str, str, int, bool], bytes] = {}

    def prove(self, claim: Claim) -> Claim:
        """Our own claim, with its proof."""
        place = _place(claim)
        if self._own[0] != place:
            self._own = (place, self._prover.sign(claim_message(self._cluster, *place)))
        return claim._replace(proof=self._own[1])

    def holds(self, claim: Claim) -> bool:
        """Whether the subject of a claim once said what the claim rests on: that it lives there, or that it leaves."""
        return self._holds(_place(claim), claim.proof)

    def said(self, sender: Sender) -> bool:
        """The same for the head of a datagram."""
        return self._holds((sender.site, sender.address, sender.incarnation, sender.left), sender.proof)

    def _holds(self, place: tuple[str, str, int, bool], proof: bytes) -> bool:
        if self._held.get(place) == proof and self._prover.knows(place[0]):  # it may have been put out since
            return True
        if not self._prover.verify(place[0], claim_message(self._cluster, *place), proof):
            return False
        if len(self._held) >= MAX_REMEMBERED:
            del self._held[next(iter(self._held))]
        self._held[place] = proof
        return True

    def knows(self, site: str) -> bool:
        """Whether the key of a site is known."""
        return self._prover.knows(site)

    def sign_entry(self, statement: Statement) -> bytes:
        """The proof of an entry of our own."""
        return self._prover.sign(entry_message(self._cluster, statement))

    def entry_holds(self, statement: Statement, proof: bytes) -> bool:
        """Whether the owner, or the cluster's authority for `CLUSTER`, wrote this entry."""
        return self._believes or self._prover.verify(statement.owner, entry_message(self._cluster, statement), proof)


def _place(claim: Claim) -> tuple[str, str, int, bool]:
    return claim.site, claim.address, claim.incarnation, claim.state == LEFT
