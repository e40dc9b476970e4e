"""The entries of all sites: owner -> (generation, key -> (version, packed value)), merged without conflicts.

Only the owner writes. A higher generation (a new start of the owner) replaces everything of the older one; within a
generation the higher version of a key wins. Both are maxima over total orders, so merging is commutative, associative
and idempotent: peers that saw the same entries, in any order and any number of times, hold the same state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mesh.gossip import config
from mesh.gossip.messages import Page
from mesh.gossip.values import pack_value, unpack_value

#: What one owner may occupy: enough for one value of the largest size and several ordinary ones.
MAX_OWNER_BYTES = 2 * config.MAX_VALUE_BYTES
#: Values that may be waiting for their remaining pages, and how long they wait.
MAX_ASSEMBLIES = 64
ASSEMBLY_S = 10.0


class Entry(NamedTuple):
    """One packed value and its version."""

    version: int
    data: bytes


@dataclass(slots=True)
class Owner:
    """All entries of one site."""

    generation: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)

    def versions(self) -> dict[str, int]:
        """Key -> version."""
        return {key: entry.version for key, entry in self.entries.items()}


@dataclass(slots=True)
class _Assembly:
    generation: int
    version: int
    count: int
    started_s: float
    pages: dict[int, bytes] = field(default_factory=dict)


class State:
    """Everything published by anybody, as far as this peer has heard."""

    def __init__(self, site: str, generation: int) -> None:
        """`site` is our own name; `generation` must rise with every start (and is raised when it did not)."""
        self._site = site
        self._owners: dict[str, Owner] = {site: Owner(generation)}
        self._assemblies: dict[tuple[str, str], _Assembly] = {}
        self.rejected = 0
        self.changes = 0

    def publish(self, key: str, value: dict[str, Any]) -> bool:
        """Write an entry of our own. False if it holds that value already. Raises ValueError if it is out of bounds."""
        if not config.valid_name(key, config.MAX_KEY_BYTES):
            raise ValueError(f"gossip key {key!r}: use 1 to {config.MAX_KEY_BYTES} printable characters without spaces")
        data = pack_value(value)
        own = self._owners[self._site]
        old = own.entries.get(key)
        if old is not None and old.data == data:
            return False
        if not self._fits(own, key, data):
            limits = f"{config.MAX_KEYS_PER_SITE} keys and {MAX_OWNER_BYTES} bytes"
            raise ValueError(f"gossip key {key!r}: a site may publish {limits} in all")
        self.changes += 1
        own.entries[key] = Entry(max((entry.version for entry in own.entries.values()), default=0) + 1, data)
        return True

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
        """Take an entry of another site. True if it was news. The value must have been checked."""
        if site == self._site:
            return False
        owner = self._owners.setdefault(site, Owner())
        if generation < owner.generation:
            return False
        if generation > owner.generation:
            owner.generation, owner.entries = generation, {}
            self.changes += 1
        old = owner.entries.get(key)
        if (old is not None and old >= entry) or not self._fits(owner, key, entry.data):
            return False
        self.changes += 1
        owner.entries[key] = entry
        return True

    def defend(self, generation: int, versions: dict[str, int]) -> bool:
        """Somebody holds entries of ours that we did not write: an earlier start with a lost counter. True if so.

        Our generation then rises above theirs, so that our entries win everywhere.
        """
        own = self._owners[self._site]
        ours = own.versions()
        stale = generation == own.generation and any(version > ours.get(key, 0) for key, version in versions.items())
        if (generation > own.generation or stale) and generation < config.MAX_COUNTER:
            own.generation = generation + 1
            self.changes += 1
            return True
        return False

    def newer_than(self, site: str, generation: int, versions: dict[str, int]) -> list[str]:
        """Keys of `site` of which we hold something newer than a peer with these versions."""
        owner = self.owner(site)
        if owner.generation < generation:
            return []
        if owner.generation > generation:
            return sorted(owner.entries)
        return sorted(key for key, entry in owner.entries.items() if entry.version > versions.get(key, 0))

    def pages(self, site: str, key: str) -> list[Page]:
        """An entry cut to the size of datagrams; empty if there is none."""
        owner = self.owner(site)
        entry = owner.entries.get(key)
        if entry is None:
            return []
        size = config.PAGE_BYTES
        cuts = [entry.data[start : start + size] for start in range(0, len(entry.data), size)]
        return [Page(site, owner.generation, key, entry.version, part, len(cuts), cut) for part, cut in enumerate(cuts)]

    def take(self, page: Page, now: float) -> bool:
        """Take one page. True when it completes an entry that is news. Counts values that are not fit to be read."""
        owner = self.owner(page.owner)
        held = owner.entries.get(page.key)
        if page.owner == self._site or page.generation < owner.generation:
            return False
        if page.generation == owner.generation and held is not None and held.version >= page.version:
            return False
        data = page.data if page.parts == 1 else self._assemble(page, now)
        if data is None:
            return False
        try:
            unpack_value(data)
        except ValueError:
            self.rejected += 1
            return False
        return self.merge(page.owner, page.generation, page.key, Entry(page.version, data))

    def forget(self, site: str) -> None:
        """Drop everything of a site that was reaped."""
        self._owners.pop(site, None)
        self.changes += 1
        for place in [place for place in self._assemblies if place[0] == site]:
            del self._assemblies[place]

    def _assemble(self, page: Page, now: float) -> bytes | None:
        place = (page.owner, page.key)
        assembly = self._assemblies.get(place)
        mark = (page.generation, page.version)
        if assembly is None or mark > (assembly.generation, assembly.version) or now - assembly.started_s > ASSEMBLY_S:
            self._assemblies.pop(place, None)
            while len(self._assemblies) >= MAX_ASSEMBLIES:
                del self._assemblies[next(iter(self._assemblies))]
            assembly = self._assemblies[place] = _Assembly(*mark, page.parts, now)
        if mark != (assembly.generation, assembly.version) or page.parts != assembly.count:
            return None
        assembly.pages[page.part] = page.data
        if len(assembly.pages) < assembly.count:
            return None
        del self._assemblies[place]
        return b"".join(assembly.pages[index] for index in range(assembly.count))

    @staticmethod
    def _fits(owner: Owner, key: str, data: bytes) -> bool:
        others = [len(entry.data) for name, entry in owner.entries.items() if name != key]
        return len(others) < config.MAX_KEYS_PER_SITE and sum(others) + len(data) <= MAX_OWNER_BYTES
