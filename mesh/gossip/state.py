"""The entries of all sites: owner -> (generation, key -> (version, packed value, proof)), merged without conflicts.

Only the owner writes. A higher generation (a new start of the owner) replaces everything of the older one; within a
generation the higher version of a key wins. Both are maxima over total orders, so merging is commutative, associative
and idempotent: peers that saw the same entries, in any order and any number of times, hold the same state.

Whatever arrives is checked in this order: is it news at all, is it whole, did its owner sign it, is it a value. The
proof is checked once, when a value is complete, and is kept and passed on with it. `CLUSTER` owns the entries of the
cluster's authority; it is no site, has one generation, and is never forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from mesh.gossip import config
from mesh.gossip.messages import Page
from mesh.gossip.proof import CLUSTER, Statement
from mesh.gossip.values import pack_value, unpack_value

#: What one owner may occupy: enough for one value of the largest size and several ordinary ones.
MAX_OWNER_BYTES = 2 * config.MAX_VALUE_BYTES
#: What all owners may occupy together: 16 KiB for each of the 8,192 members of the largest mesh.
MAX_STATE_BYTES = 128 * 1024 * 1024
#: Values that may be waiting for their remaining pages, and how long they wait.
MAX_ASSEMBLIES = 64
ASSEMBLY_S = 10.0
#: Two living peers of one name would outbid each other for ever; they may do so only this often.
DEFEND_GAP_S = 5.0
#: The authority has no restarts.
CLUSTER_GENERATION = 1


class Entry(NamedTuple):
    """One packed value, its version, and its owner's proof of both."""

    version: int
    data: bytes
    proof: bytes = b""


class Outcome(Enum):
    """What became of a page. `STALE` is strictly older than what we hold: overtaken on the way, or a replay."""

    NEWS = "news"
    WAITING = "waiting"
    KNOWN = "known"
    STALE = "stale"
    FORGED = "forged"
    MALFORMED = "malformed"
    FULL = "full"
    DEFENDED = "defended"


@dataclass(slots=True)
class Owner:
    """All entries of one site."""

    generation: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    size_bytes: int = 0

    def versions(self) -> dict[str, int]:
        """Key -> version."""
        return {key: entry.version for key, entry in self.entries.items()}


@dataclass(slots=True)
class _Assembly:
    generation: int
    version: int
    count: int
    started_s: float
    proof: bytes = b""
    pages: dict[int, bytes] = field(default_factory=dict)


class State:
    """Everything published by anybody, as far as this peer has heard."""

    def __init__(
        self,
        site: str,
        generation: int,
        *,
        sign: Callable[[Statement], bytes] = lambda _: b"",
        holds: Callable[[Statement, bytes], bool] = lambda _, __: True,
        touched: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`site` is our own name; `generation` must rise with every start (and is raised when it did not).

        `sign` and `holds` make and check proofs; `touched(site)` follows every change of what a site's versions are.
        """
        self.site = site
        self._sign = sign
        self._holds = holds
        self._touched = touched
        self._owners: dict[str, Owner] = {site: Owner(generation)}
        self._assemblies: dict[tuple[str, str, str], _Assembly] = {}
        self._disputed: dict[tuple[str, str], float] = {}
        self._defended_s = float("-inf")
        self.size_bytes = 0

    def publish(self, key: str, value: dict[str, Any]) -> bool:
        """Write an entry of our own. False if it holds that value already. Raises ValueError if it is out of bounds."""
        if not config.valid_name(key, config.MAX_KEY_BYTES):
            raise ValueError(f"gossip key {key!r}: use 1 to {config.MAX_KEY_BYTES} printable characters without spaces")
        data = pack_value(value)
        own = self._owners[self.site]
        old = own.entries.get(key)
        if old is not None and old.data == data:
            return False
        if not _fits(own, key, data):
            limits = f"{config.MAX_KEYS_PER_SITE} keys and {MAX_OWNER_BYTES} bytes"
            raise ValueError(f"gossip key {key!r}: a site may publish {limits} in all")
        version = max((entry.version for entry in own.entries.values()), default=0) + 1
        self._put(self.site, own, key, self._signed(own.generation, key, version, data))
        return True

    def publish_cluster(self, key: str, value: dict[str, Any], version: int, proof: bytes) -> bool:
        """Install an entry of the cluster's authority. False if we hold that version or a newer one already.

        Raises ValueError if the value is out of bounds, or the proof is not the authority's.
        """
        if not config.valid_name(key, config.MAX_KEY_BYTES) or not 0 < version <= config.MAX_COUNTER:
            raise ValueError(f"gossip key {key!r}, version {version}: out of bounds")
        entry = Entry(version, pack_value(value), proof)
        if not self._holds(Statement(CLUSTER, CLUSTER_GENERATION, key, version, entry.data), proof):
            raise ValueError(f"gossip key {key!r}: not signed by the cluster's authority")
        return self.merge(CLUSTER, CLUSTER_GENERATION, key, entry)

    def owner(self, site: str) -> Owner:
        """The entries of `site`; empty, at generation 0, if there are none. Not to be changed."""
        return self._owners.get(site) or Owner()

    def value(self, site: str, key: str) -> dict[str, Any] | None:
        """A fresh copy of a value, or None."""
        entry = self.owner(site).entries.get(key)
        return None if entry is None else unpack_value(entry.data)

    def keys(self, site: str) -> Iterator[str]:
        """The keys that `site` has published, sorted."""
        return iter(sorted(self.owner(site).entries))

    def merge(self, site: str, generation: int, key: str, entry: Entry) -> bool:
        """Take an entry of another owner. True if it was news. The value and its proof must have been checked."""
        if site == self.site:
            return False
        owner = self._owners.get(site) or Owner()
        if generation < owner.generation:
            return False
        fresh = Owner(generation) if generation > owner.generation else owner
        old = fresh.entries.get(key)
        if (old is not None and old >= entry) or not self._room(fresh, key, entry.data):
            return False
        if fresh is not owner:
            self.size_bytes -= owner.size_bytes
        self._owners[site] = fresh
        self._put(site, fresh, key, entry)
        return True

    def newer_than(self, site: str, generation: int, versions: dict[str, int]) -> list[str]:
        """Keys of `site` of which we hold something newer than a peer with these versions."""
        owner = self.owner(site)
        if owner.generation < generation:
            return []
        if owner.generation > generation:
            return sorted(owner.entries)
        return sorted(key for key, entry in owner.entries.items() if entry.version > versions.get(key, 0))

    def older_than(self, site: str, generation: int, versions: dict[str, int]) -> bool:
        """Whether a peer with these versions holds something of `site` that is newer than what we hold."""
        owner = self.owner(site)
        if owner.generation != generation:
            return owner.generation < generation
        held = owner.entries
        return any(key not in held or version > held[key].version for key, version in versions.items())

    def pages(self, site: str, key: str, hops: int = 0) -> list[Page]:
        """An entry cut to the size of datagrams; empty if there is none. The first page carries the proof."""
        owner = self.owner(site)
        entry = owner.entries.get(key)
        if entry is None:
            return []
        size = config.PAGE_BYTES
        cuts = [entry.data[start : start + size] for start in range(0, len(entry.data), size)]
        return [
            Page(site, owner.generation, key, entry.version, part, len(cuts), cut, b"" if part else entry.proof, hops)
            for part, cut in enumerate(cuts)
        ]

    def take(self, page: Page, now: float, source: str = "") -> Outcome:
        """Take one page, sent by the site `source`."""
        owner = self._owners.get(page.owner)
        if owner is not None:
            if page.generation < owner.generation:
                return Outcome.STALE
            held = owner.entries.get(page.key)
            if held is not None and page.generation == owner.generation and held.version >= page.version:
                return Outcome.KNOWN if held.version == page.version else Outcome.STALE
        if page.owner == CLUSTER and page.generation != CLUSTER_GENERATION:
            return Outcome.MALFORMED
        data, proof = (page.data, page.proof) if page.parts == 1 else self._assemble(page, now, source)
        if not data:
            return Outcome.WAITING
        if not self._holds(Statement(page.owner, page.generation, page.key, page.version, data), proof):
            self._dispute(page, now)
            return Outcome.FORGED
        try:
            unpack_value(data)
        except ValueError:
            return Outcome.MALFORMED
        if page.owner == self.site:
            if now < self._defended_s + DEFEND_GAP_S:
                return Outcome.KNOWN
            self._defended_s = now
            self._defend(page.generation)
            return Outcome.DEFENDED
        news = self.merge(page.owner, page.generation, page.key, Entry(page.version, data, proof))
        return Outcome.NEWS if news else Outcome.FULL

    def forget(self, site: str) -> None:
        """Drop everything of a site that was reaped."""
        if site in (CLUSTER, self.site):
            return
        owner = self._owners.pop(site, None)
        if owner is not None:
            self.size_bytes -= owner.size_bytes
            self._touched(site)
        for place in [place for place in self._assemblies if place[0] == site]:
            del self._assemblies[place]

    def _defend(self, generation: int) -> None:
        """Others hold entries that an earlier start of ours signed, with a counter we lost: rise above them all."""
        own = self._owners[self.site]
        own.generation = min(max(generation, own.generation) + 1, config.MAX_COUNTER)
        for key, entry in own.entries.items():
            own.entries[key] = self._signed(own.generation, key, entry.version, entry.data)
        self._touched(self.site)

    def _signed(self, generation: int, key: str, version: int, data: bytes) -> Entry:
        return Entry(version, data, self._sign(Statement(self.site, generation, key, version, data)))

    def _put(self, site: str, owner: Owner, key: str, entry: Entry) -> None:
        old = owner.entries.get(key)
        grown = len(entry.data) - (0 if old is None else len(old.data))
        owner.entries[key] = entry
        owner.size_bytes += grown
        self.size_bytes += grown
        self._touched(site)

    def _room(self, owner: Owner, key: str, data: bytes) -> bool:
        return _fits(owner, key, data) and self.size_bytes + len(data) <= MAX_STATE_BYTES

    def _assemble(self, page: Page, now: float, source: str) -> tuple[bytes, bytes]:
        """The whole value and its proof once the last page is there; empty before."""
        # A peer that forges pages spoils what others sent of the same value: then each is only pieced from one source.
        disputed = self._disputed.get((page.owner, page.key), now) > now
        place = (page.owner, page.key, source if disputed else "")
        assembly = self._assemblies.get(place)
        mark = (page.generation, page.version)
        if assembly is None or mark > (assembly.generation, assembly.version) or now - assembly.started_s > ASSEMBLY_S:
            self._assemblies.pop(place, None)
            while len(self._assemblies) >= MAX_ASSEMBLIES:
                del self._assemblies[next(iter(self._assemblies))]
            assembly = self._assemblies[place] = _Assembly(*mark, page.parts, now)
        if mark != (assembly.generation, assembly.version) or page.parts != assembly.count:
            return b"", b""
        assembly.pages[page.part] = page.data
        assembly.proof = assembly.proof or page.proof
        if len(assembly.pages) < assembly.count:
            return b"", b""
        del self._assemblies[place]
        return b"".join(assembly.pages[index] for index in range(assembly.count)), assembly.proof

    def _dispute(self, page: Page, now: float) -> None:
        if page.parts > 1:
            while len(self._disputed) >= MAX_ASSEMBLIES:
                del self._disputed[next(iter(self._disputed))]
            self._disputed[page.owner, page.key] = now + ASSEMBLY_S


def _fits(owner: Owner, key: str, data: bytes) -> bool:
    old = owner.entries.get(key)
    keys = len(owner.entries) + (old is None)
    size_bytes = owner.size_bytes + len(data) - (0 if old is None else len(old.data))
    return keys <= config.MAX_KEYS_PER_SITE and size_bytes <= MAX_OWNER_BYTES
