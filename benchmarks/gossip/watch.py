"""What all peers of a virtual mesh report, turned into figures as it comes.

A *pair* is (observer, subject). Everything here is counted per event, so that an hour of 490 sites costs no polling.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mesh.gossip.core import Event

UNKNOWN, ALIVE, SUSPECT, GONE = range(4)
_STATE_AFTER = {"joined": ALIVE, "refuted": ALIVE, "suspect": SUSPECT, "dead": GONE, "left": GONE}


class Report(NamedTuple):
    """`observer` called `subject` dead at `when_s`."""

    when_s: float
    observer: str
    subject: str


@dataclass(slots=True)
class Change:
    """An entry that was changed at `owner`, and when each other site had it."""

    owner: str
    when_s: float
    seen_s: dict[str, float] = field(default_factory=dict)


class Watch:
    """Follows the events of a mesh of known sites."""

    def __init__(self, sites: Sequence[str], key: str) -> None:
        """`key`: the entries whose spreading is timed."""
        self.deaths: list[Report] = []
        self.suspicions: list[Report] = []
        self.kinds: Counter[str] = Counter()
        self.changes: list[Change] = []
        self._key = key
        self._current: dict[str, Change] = {}
        self._numbers = {site: number for number, site in enumerate(sites)}
        self._states = np.zeros((len(sites), len(sites)), dtype=np.int8)
        self._alive = 0

    def event(self, now: float, observer: str, event: Event) -> None:
        """Take one event of one peer."""
        kind, subject, key = event
        self.kinds[kind] += 1
        if kind == "updated":
            if key == self._key and subject in self._current and subject != observer:
                change = self._current[subject]
                change.seen_s.setdefault(observer, now - change.when_s)
            return
        state = _STATE_AFTER.get(kind)
        if state is None or subject not in self._numbers:
            return
        pair = self._numbers[observer], self._numbers[subject]
        self._alive += (state == ALIVE) - (int(self._states[pair]) == ALIVE)
        self._states[pair] = state
        if kind == "dead":
            self.deaths.append(Report(now, observer, subject))
        elif kind == "suspect":
            self.suspicions.append(Report(now, observer, subject))

    def acquainted(self) -> None:
        """All see all alive now, whatever they reported."""
        self._states[:] = ALIVE
        np.fill_diagonal(self._states, UNKNOWN)
        self._alive = self._states.size - len(self._states)

    def changed(self, owner: str, now: float) -> None:
        """`owner` changes its entry now."""
        change = self._current[owner] = Change(owner, now)
        self.changes.append(change)

    @property
    def member_events(self) -> int:
        """Events about members (not about entries) so far."""
        return sum(count for kind, count in self.kinds.items() if kind != "updated")

    def alive_pairs(self) -> int:
        """Pairs whose observer sees the subject alive; n * (n - 1) once all see all."""
        return self._alive

    def sees_gone(self, observer: str, subject: str) -> bool:
        """Whether the observer holds the subject for dead or left now."""
        return bool(self._states[self._numbers[observer], self._numbers[subject]] == GONE)


def percentile(values: Sequence[float], share: float, missing: int = 0) -> float | None:
    """The nearest-rank percentile of values and of `missing` ones that are larger than all. None where it is one."""
    ordered = sorted(values)
    rank = max(1, math.ceil(share * (len(ordered) + missing)))
    return ordered[rank - 1] if rank <= len(ordered) else None


def first_reports(
    deaths: Iterable[Report], pairs: Collection[tuple[str, str]], since_s: float
) -> tuple[list[float], int]:
    """Seconds from `since_s` until each (observer, subject) of `pairs` was reported, and how many never were."""
    wanted = set(pairs)
    found: dict[tuple[str, str], float] = {}
    for when_s, observer, subject in deaths:
        if when_s >= since_s and (observer, subject) in wanted:
            found.setdefault((observer, subject), when_s - since_s)
    return list(found.values()), len(wanted) - len(found)


def spread(changes: Iterable[Change], observers: Collection[str]) -> tuple[list[float], int]:
    """Seconds until each of `observers` had each change of an owner among them, and how many never had it."""
    there = set(observers)
    found: list[float] = []
    missing = 0
    for change in changes:
        if change.owner in there:
            seen = [seconds for site, seconds in change.seen_s.items() if site in there]
            found += seen
            missing += len(there) - 1 - len(seen)
    return found, missing
