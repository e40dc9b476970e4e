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
    """Answer with `Ack(seq)` if you are `target` (empty: whoever you are).

    A helper names for whom it pings: answer `asker` itself too, with `Ack(asker_seq)`, because the way back over the
    helper may be cut where the way to the asker is not.
    """

    seq: int
    target: str
    asker: str = ""
    asker_seq: int = 0


class Ack(NamedTuple):
    """The probe `seq` succeeded, directly or through the sender, whose packed coordinate is `where` (empty: none)."""

    seq: int
    where: bytes = b""


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
    """A claim about a member. Whoever it is news to passes it on, unless it is an old one that the receiver missed."""

    claim: Claim
    news: bool = True


class Buckets(NamedTuple):
    """Opens an anti-entropy exchange: `total` hashes of what the sender knows, three bytes each (see `fingerprint`)."""

    total: int
    hashes: bytes


class Summary(NamedTuple):
    """Some `buckets` of `total`, and a row (hashed name, mark: ten bytes) for every live site in them."""

    total: int
    buckets: bytes
    rows: bytes


class Want(NamedTuple):
    """The sender has never heard of these sites, given by hashed names of six bytes: tell it all."""

    names: bytes


class Digest(NamedTuple):
    """The versions the sender holds of a site's entries. One that is an `answer` is not answered with another."""

    site: str
    incarnation: int
    generation: int
    versions: dict[str, int]
    answer: bool


class Page(NamedTuple):
    """One of the `parts` of the packed value of an entry; `part` counts from 0.

    The first carries the owner's proof of the whole. Whoever it is news to passes it on while `hops` are left.
    """

    owner: str
    generation: int
    key: str
    version: int
    part: int
    parts: int
    data: bytes
    proof: bytes = b""
    hops: int = 0


class Taken(NamedTuple):
    """Your site name belongs to a living peer at `address`; choose another."""

    address: str


Message = Ping | Ack | Nack | PingRequest | Rumour | Buckets | Summary | Want | Digest | Page | Taken
