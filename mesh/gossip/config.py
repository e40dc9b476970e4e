"""What a gossip peer can be told, the constants of the protocol, and where the constants come from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from mesh.address import split_address
from mesh.errors import ConfigError

T = TypeVar("T")

#: Largest datagram sent or accepted: what crosses 1500-byte paths with room for tunnels (memberlist's choice too).
MAX_DATAGRAM_BYTES = 1400
#: Bytes of a value in one datagram, beside the longest names and addresses allowed.
PAGE_BYTES = 750
#: A request over a reliable stream, and its answer.
MAX_STREAM_BYTES = 256 * 1024
MAX_NAME_BYTES = 64
MAX_KEY_BYTES = 32
MAX_ADDRESS_BYTES = 128
#: A site with sixteen devices publishes about 10 KB of capabilities.
MAX_VALUE_BYTES = 32 * 1024
MAX_PAGES = -(-MAX_VALUE_BYTES // PAGE_BYTES)
MAX_KEYS_PER_SITE = 16
MAX_MEMBERS = 8192
#: Counters stay far below 2**64 so that they can always still be raised.
MAX_COUNTER = 2**62


class Randomness(Protocol):
    """The part of `random.Random` that the cores use."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...

    def getrandbits(self, k: int, /) -> int:
        """`k` random bits."""
        ...

    def shuffle(self, x: MutableSequence[Any]) -> None:
        """Shuffle in place."""
        ...

    def sample(self, population: Sequence[T], k: int) -> list[T]:
        """`k` different elements."""
        ...


@dataclass(frozen=True, slots=True)
class Timing:
    """The protocol's constants, in seconds. The defaults give detection in about 2 s on paths up to 200 ms.

    `probe_interval_s`: every peer is probed this often while `probe_floor_s` between two probes allows it (4 others);
    beyond 16 others the floor rises with the root of their number up to `probe_crowd_s`, so that a large mesh is quiet.
    `direct_*`: bounds of the wait for a direct answer; within them it follows the pair's RTT and its spread.
    `suspicion_floor_s`: least time to refute; otherwise three direct timeouts. The most is `suspicion_spread` times the
    least. `confirmations`: how many bring it to the least. `retry_*`: back-off of seeds that do not answer and of dead
    peers. `*_reap_s`: when dead and left are forgotten; `grave_s`: how long after that old claims are refused.

    `fixed` makes it memberlist, see `profiles`: `direct_default_s` is every timeout, a probe lasts a probe interval,
    `suspicion_mult` times the interval and the logarithm of the number of members is the least suspicion, and a
    member's death is believed to whoever says so.
    """

    fixed: bool = False
    probe_interval_s: float = 1.0
    probe_floor_s: float = 0.25
    probe_crowd_s: float = 0.8
    direct_floor_s: float = 0.2
    direct_default_s: float = 0.5
    direct_ceiling_s: float = 2.0
    suspicion_floor_s: float = 1.0
    suspicion_spread: float = 1.7
    suspicion_mult: float = 0.0
    confirmations: int = 3
    max_health: int = 3
    nack_share: float = 0.8
    buddy_s: float = 0.25
    helpers: int = 3
    fanout: int = 3
    push_gap_s: float = 0.1
    push_pull_s: float = 0.0
    dead_gossip_s: float = 0.0
    sync_gap_s: float = 0.2
    greet_s: float = 0.15
    greetings: int = 4
    links_s: float = 2.0
    links_first_s: float = 0.4
    retry_first_s: float = 0.25
    retry_factor: float = 1.3
    retry_max_s: float = 15.0
    dead_reap_s: float = 3600.0
    left_reap_s: float = 60.0
    grave_s: float = 3600.0
    stall_s: float = 0.3
    grace_s: float = 0.3


def spread(members: int) -> float:
    """How much longer news takes among `members` than among ten: the factor of memberlist's suspicion timeout."""
    return max(1.0, math.log10(max(1, members)))


def valid_name(name: object, limit_bytes: int = MAX_NAME_BYTES) -> bool:
    """Whether `name` can be a site or a key: 1 to `limit_bytes` bytes, printable, no spaces."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= limit_bytes
        and name.isprintable()
        and " " not in name
        and len(name.encode()) <= limit_bytes
    )


def valid_address(address: object) -> bool:
    """Whether `address` is a "host:port" that a datagram can be sent to."""
    if not isinstance(address, str) or not valid_name(address, MAX_ADDRESS_BYTES):
        return False
    try:
        return split_address(address)[1] > 0
    except ValueError:
        return False


@dataclass(frozen=True)
class GossipConfig:
    """One gossip peer.

    `site` is its name, unique in the mesh. `address` is where it listens, "host:port"; port 0 lets the system choose.
    `advertise` is what others are told, where that differs. `incarnation` must rise with every start (a counter in the
    data directory); the peer heals itself when it does not. `seeds` are addresses to join through. `delays` maps
    addresses to an emulated one-way delay in seconds that is added to what is sent there; with those in `cut` nothing
    is exchanged at all. `clock` gives seconds (None: trio's), `rng` is the only source of chance.

    Raises ConfigError naming the field that is wrong.
    """

    site: str
    address: str = "127.0.0.1:0"
    incarnation: int = 1
    seeds: Iterable[str] = ()
    cluster: str = "isthmus"
    advertise: str | None = None
    delays: Mapping[str, float] = field(default_factory=dict)
    cut: Collection[str] = ()
    rng: Randomness = field(default_factory=random.Random)
    clock: Callable[[], float] | None = None
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not valid_name(self.site) or self.site.startswith("@"):
            raise ConfigError(
                f"site {self.site!r}: use 1 to {MAX_NAME_BYTES} printable characters, no space, no @ first"
            )
        if not 0 < self.incarnation < 2**32:
            raise ConfigError(f"incarnation {self.incarnation}: must be between 1 and 2**32 - 1")
        try:
            split_address(self.address)
        except ValueError as error:
            raise ConfigError(f"address {self.address!r}: {error}") from None
        for name, address in [("advertise", self.advertise), *(("seeds", seed) for seed in self.seeds)]:
            if address is not None and not valid_address(address):
                raise ConfigError(f"{name}: {address!r} is not host:port, like 10.0.0.1:7700")
        for address, delay_s in self.delays.items():
            if not 0.0 <= delay_s <= 10.0:
                raise ConfigError(f"delays: {delay_s} s to {address} is not between 0 and 10 s")
