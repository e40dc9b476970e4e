"""Who is in the mesh, as far as one peer knows, and which of two claims about a member wins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from mesh.gossip.rtt import RttWindow
from mesh.gossip.suspicion import Suspicion
from mesh.gossip.timers import Timer

ALIVE, SUSPECT, DEAD, LEFT = STATES = ("alive", "suspect", "dead", "left")

#: At the same incarnation the graver claim wins (SWIM, section 4.2).
RANK = {state: rank for rank, state in enumerate(STATES)}


@dataclass(frozen=True, slots=True)
class Member:
    """A site as seen from here. `state` is "alive", "suspect", "dead" or "left"; `address` is "host:port"."""

    site: str
    address: str
    state: str
    incarnation: int


class Claim(NamedTuple):
    """Somebody says that a site is in a state. `accuser` names who found a suspect silent, else it is empty.

    `proof` is the site's own word for its farewell, or that it lived at this incarnation and address (see `proof`).
    """

    site: str
    address: str
    state: str
    incarnation: int
    accuser: str = ""
    proof: bytes = b""

    def beats(self, other: Claim) -> bool:
        """Whether this claim replaces `other`: higher incarnation first, graver state second. A total order."""
        return (self.incarnation, RANK[self.state]) > (other.incarnation, RANK[other.state])


@dataclass(slots=True)
class Probe:
    """One running check of a peer: direct ping first, then through helpers."""

    site: str
    timer: Timer | None = None
    helpers: list[str] = field(default_factory=list)
    nacked: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Peer:
    """Everything kept about one other site."""

    site: str
    address: str
    state: str
    incarnation: int
    proof: bytes = b""
    rtt: RttWindow = field(default_factory=RttWindow)
    probe: Probe | None = None
    suspicion: Suspicion | None = None
    contest: Timer | None = None
    defended_s: float = float("-inf")
    chore: Timer | None = None
    reaper: Timer | None = None
    retry_s: float = 0.0
    greetings: int = 0

    @property
    def live(self) -> bool:
        """Alive or suspect: counted as a member until proven dead."""
        return self.state in (ALIVE, SUSPECT)

    def claim(self, accuser: str = "") -> Claim:
        """What we say about this peer."""
        return Claim(self.site, self.address, self.state, self.incarnation, accuser, self.proof)

    def member(self) -> Member:
        """What a caller sees."""
        return Member(self.site, self.address, self.state, self.incarnation)
