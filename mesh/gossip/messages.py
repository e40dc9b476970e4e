"""What gossip peers say to each other. `codec` turns these into datagrams and back."""

from __future__ import annotations

from typing import NamedTuple

from mesh.gossip.members import Claim


class Sender(NamedTuple):
    """The head of every datagram: the sender's claim about itself, and a fingerprint of all it knows."""

    site: str
    address: str
    incarnation: int
    left: bool
    fingerprint: bytes
    proof: bytes = b""


class Ping(NamedTuple):
    """Answer with `Ack(seq)` if you are `target` (empty: whoever you are)."""

    seq: int
    target: str


class Ack(NamedTuple):
    """The probe `seq` succeeded, directly or through the sender."""

    seq: int


class Nack(NamedTuple):
    """The sender is well, but did not hear from the target of the indirect probe `seq` in time."""

    seq: int


class PingRequest(NamedTuple):
    """Please ping `target` at `address` for me and pass on its answer; give up after `budget_ms`."""

    seq: int
    target: str
    address: str
    budget_ms: int


class Rumour(NamedTuple):
    """A claim about a member."""

    claim: Claim


class Digest(NamedTuple):
    """Part of an anti-entropy exchange: a live member and the versions the sender holds of that member's entries."""

    claim: Claim
    generation: int
    versions: dict[str, int]


class SyncRequest(NamedTuple):
    """The sender's digests are complete; answer with yours."""


class Page(NamedTuple):
    """One of the `parts` of the packed value of an entry; `part` counts from 0."""

    owner: str
    generation: int
    key: str
    version: int
    part: int
    parts: int
    data: bytes


class Taken(NamedTuple):
    """Your site name belongs to a living peer at `address`; choose another."""

    address: str


Message = Ping | Ack | Nack | PingRequest | Rumour | Digest | SyncRequest | Page | Taken
