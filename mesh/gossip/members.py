"""Who is in the mesh, as far as one peer knows, and which of two claims about a member wins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from mesh.gossip.rtt import RttWindow
from mesh.gossip.suspicion import Suspicion
from mesh.gossip.timers import Timer

ALIVE, SUSPECT, DEAD, LEFT = STATES = ("alive", "suspect", "dead", "left")

_LIVE = frozenset({ALIVE, SUSPECT})

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


#: Direct pings in a row without an answer after which a path counts as broken. At 2 % loss each way that happens to a
#: good path once in 400,000 rows of pings; where 80 % are lost, to 85 of 100.
BROKEN_MISSES = 4


@dataclass(slots=True)
class Reach:
    """Whether the direct path to a peer works, each way, as far as we can tell. Nobody is dead because of it.

    `sent` and `answered` count direct pings; times are of our clock, -inf for never.
    """

    sent: int = 0
    answered: int = 0
    misses: int = 0
    answered_s: float = float("-inf")
    heard_s: float = float("-inf")
    missing_s: float = float("-inf")

    def missed(self, now: float) -> None:
        """A direct ping stayed without an answer."""
        if self.misses == 0:
            self.missing_s = now
        self.misses += 1

    def came_back(self, now: float) -> None:
        """A direct ping was answered: both ways work."""
        self.answered += 1
        self.misses = 0
        self.answered_s = self.heard_s = now

    @property
    def broken(self) -> bool:
        """Whether pings do not come back, though the peer may well live."""
        return self.misses >= BROKEN_MISSES

    @property
    def out(self) -> bool | None:
        """Whether what we send arrives: True if it was answered, False if we hear the peer but it never answers."""
        if self.broken:
            return False if self.heard_s > self.missing_s else None
        return True if self.answered else None

    @property
    def into(self) -> bool | None:
        """Whether we hear what the peer sends; None before there was anything to hear."""
        if self.broken:
            return self.heard_s > self.missing_s
        return True if self.heard_s > float("-inf") else None


@dataclass(slots=True)
class Probe:
    """One running check of a peer: direct ping first, then through helpers and over a stream.

    `nacked`: helpers that did not reach it either, our witnesses. `again`: more helpers were asked, because the first
    said nothing at all.
    """

    site: str
    started_s: float = 0.0
    timer: Timer | None = None
    helpers: list[str] = field(default_factory=list)
    nacked: set[str] = field(default_factory=set)
    again: bool = False


@dataclass(slots=True)
class Peer:
    """Everything kept about one other site.

    `alive_s` is when we last had evidence of its life, directly or through a helper. `returns` counts how often it came
    back from a death that was none. `acquitted` are accusers that our own check proved wrong, at this incarnation;
    who was acquitted again and again is spared further suspicion until `spared_s`.
    """

    site: str
    address: str
    state: str
    incarnation: int
    proof: bytes = b""
    rtt: RttWindow = field(default_factory=RttWindow)
    reach: Reach = field(default_factory=Reach)
    probe: Probe | None = None
    suspicion: Suspicion | None = None
    contest: Timer | None = None
    defended_s: float = float("-inf")
    chore: Timer | None = None
    recheck: Timer | None = None
    reaper: Timer | None = None
    greetings: int = 0
    alive_s: float = float("-inf")
    told_s: float = float("-inf")
    died_s: float = float("-inf")
    returns: int = 0
    guides: tuple[str, ...] = ()
    acquitted: frozenset[str] = frozenset()
    acquitted_s: float = float("-inf")
    acquittals: int = 0
    spared_s: float = float("-inf")

    @property
    def live(self) -> bool:
        """Alive or suspect: counted as a member until proven dead."""
        return self.state in _LIVE

    def claim(self, accuser: str = "") -> Claim:
        """What we say about this peer."""
        return Claim(self.site, self.address, self.state, self.incarnation, accuser, self.proof)

    def member(self) -> Member:
        """What a caller sees."""
        return Member(self.site, self.address, self.state, self.incarnation)
