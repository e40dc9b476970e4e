"""How datagrams are protected: the seam to `mesh.identity`, and the ways in which one can be refused.

Every refusal is counted under its class's `counter`, which is also what metrics call it.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol


class Malformed(ValueError):
    """Bytes that no honest peer sends."""

    counter: ClassVar[str] = "malformed"
    #: To be sent back to where it came from, as in `Opened`.
    reply: bytes | None = None


class Foreign(Malformed):
    """A datagram of another cluster, another version, or another program."""

    counter = "foreign"


class Forged(Malformed):
    """Somebody speaks in another's name: a wrong seal, a wrong signature, a sender that is not who sealed."""

    counter = "forged"


class Replayed(Malformed):
    """A datagram that was here before."""

    counter = "replayed"


class Revoked(Malformed):
    """From a peer that the cluster has put out."""

    counter = "revoked"


class Skewed(Malformed):
    """Sealed at a time that is too far from ours."""

    counter = "skewed"


class Stale(Malformed):
    """An entry or a claim that its owner has replaced since."""

    counter = "stale"


#: Every way in which something that arrived is refused.
REFUSALS = tuple(kind.counter for kind in (Malformed, Foreign, Forged, Replayed, Revoked, Skewed, Stale))


class Opened(NamedTuple):
    """What came out of a seal.

    `body` is empty where there is nothing for the core (beside a `site` or a `reply`). `site` is who provably sent it,
    None where nobody proved it. `reply` is to be sent back to where it came from; like the result of `Sealer.seal` it
    stands behind the header.
    """

    body: bytes
    site: str | None = None
    reply: bytes | None = None


class Sealer(Protocol):
    """Authenticates and hides the bodies of datagrams."""

    overhead_bytes: int

    def seal(self, body: bytes, *, address: str, site: str, now: float) -> bytes:
        """What stands behind the header: at most `overhead_bytes` longer than `body`.

        `address` is where it goes, `site` who should be there ("" where nobody knows yet). Where no key is agreed with
        that peer the result may be a greeting instead, and `body` is lost, as datagrams are.
        """
        ...

    def open(self, data: bytes, *, source: str, now: float) -> Opened:
        """The inverse. Raises Malformed, or the subclass that fits, for whatever no member sealed."""
        ...


class Unsealed:
    """No protection: for loopback, without an identity."""

    overhead_bytes = 0

    def seal(self, body: bytes, *, address: str, site: str, now: float) -> bytes:
        """The body as it is."""
        return body

    def open(self, data: bytes, *, source: str, now: float) -> Opened:
        """The body as it is, from nobody in particular."""
        return Opened(data)
