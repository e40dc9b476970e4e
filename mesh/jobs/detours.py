"""When a running job leaves the ways that its channels have: a relay for the direct way, or the other way round.

A ring keeps the ways it was opened over. The mesh may come to hold another for better, by its own hysteresis
(`topology.relays`); once it has held to that for a while, the ring is opened anew over the better ways: a new epoch of
the same plan. Where no request is live that costs nothing. Otherwise the live ones are replayed; so a busy job waits
for an idle moment, but not for ever, and not where most of the round trip is to be saved.

`Detours` is pure: times and snapshots in, a decision out. `next_move` is its shell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from mesh.errors import MeshError
from mesh.jobs.peers import View
from mesh.jobs.routes import Pair, Routes, Way, pair_of
from topology.relays import RELAY_COST_S
from topology.snapshot import Link, Snapshot

#: How often a job looks, and how long another way must have been the better one: four looks, while the mesh answers
#: anew every two seconds (`mesh.peer.view.RELAYS_S`).
LOOK_S: Final = 2.0
STEADY_S: Final = 6.0
#: How long a busy job waits for an idle moment.
BUSY_S: Final = 60.0
#: A busy job does not wait where so much of the round trip is saved, and so long: a move that costs two seconds has
#: paid after a hundred tokens.
LARGE: Final = 0.5
LARGE_S: Final = 20e-3
#: After a move that requests had to wait for, no other such move for so long.
REST_S: Final = 120.0
#: A way that proved to be none is not tried again for so long.
BARRED_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Better:
    """The way that a pair is to go, through `via` or directly, and whether it saves much of the round trip."""

    via: str
    large: bool = False


@dataclass(frozen=True)
class Move:
    """The pairs that are to go otherwise, and whether that may wait for an idle moment."""

    pairs: Mapping[Pair, Better]
    may_wait: bool

    def __str__(self) -> str:
        parts = [f"{a} - {b} {f'through {to.via}' if to.via else 'directly'}" for (a, b), to in self.pairs.items()]
        return ", ".join(parts)


class Detours:
    """The ways of one job's ring, over all of its epochs."""

    def __init__(self) -> None:
        self.ways: tuple[Way, ...] = ()
        self._since: dict[Pair, tuple[str, float]] = {}
        self._kept: dict[Pair, tuple[str, float]] = {}
        self._rest_s = -math.inf

    def begin(self, ways: Iterable[Way]) -> None:
        """The ring was opened over these."""
        self.ways = tuple(ways)
        self._since = {}

    def kept(self, now: float) -> dict[Pair, str]:
        """The relay (empty: none) of each pair whose other way proved to be none."""
        return {pair: via for pair, (via, until_s) in self._kept.items() if now < until_s}

    def failed(self, move: Move, now: float) -> None:
        """The ring could not be opened as `move` says: its pairs stay with what they have."""
        used = {way.pair: way.via for way in self.ways}
        self._kept |= {pair: (used[pair], now + BARRED_S) for pair in move.pairs if pair in used}

    def moved(self, now: float, *, busy: bool) -> None:
        """A move begins; `busy` where requests wait for it."""
        if busy:
            self._rest_s = now + REST_S

    def look(self, snapshot: Snapshot, now: float) -> Move | None:
        """What has been better for long enough."""
        kept = self.kept(now)
        better = {pair: to for pair, to in _better(snapshot, self.ways).items() if pair not in kept}
        self._since = {
            pair: former if (former := self._since.get(pair)) and former[0] == to.via else (to.via, now)
            for pair, to in better.items()
        }
        due = {pair: to for pair, to in better.items() if now - self._since[pair][1] >= STEADY_S}
        if not due:
            return None
        waited_s = now - min(self._since[pair][1] for pair in due)
        hurry = waited_s >= STEADY_S + BUSY_S or any(to.large for to in due.values())
        return Move(due, may_wait=now < self._rest_s or not hurry)


def _better(snapshot: Snapshot, ways: Iterable[Way]) -> dict[Pair, Better]:
    """The pairs for which the mesh holds another way for better than the one in use."""
    links: dict[Pair, list[Link]] = {}
    for link in snapshot.links:
        links.setdefault(pair_of(link.source, link.target), []).append(link)
    found = {}
    for way in ways:
        both = links.get(way.pair)
        if both is not None and both[0].via != way.via:
            now_s, then_s = (_rtt_s(links, way.pair, via) for via in (way.via, both[0].via))
            saved_s = now_s - then_s if math.isfinite(now_s) else 0.0
            found[way.pair] = Better(both[0].via, saved_s > max(LARGE_S, LARGE * now_s))
    return found


def _rtt_s(links: Mapping[Pair, list[Link]], pair: Pair, via: str) -> float:
    """Round trip of a pair through `via`, or directly; infinite where it is not known to work."""
    legs = (pair,) if not via else (pair_of(pair[0], via), pair_of(via, pair[1]))
    known = [[link for link in links.get(leg, ()) if link.reachable and link.measured] for leg in legs]
    if not all(known):
        return math.inf
    return sum(max(link.rtt_s for link in leg) for leg in known) + (RELAY_COST_S if via else 0.0)


class Requests(Protocol):
    """What is needed of `mesh.jobs.serving.Serving`."""

    @property
    def live(self) -> tuple[object, ...]: ...
    async def idle(self) -> None: ...


async def next_move(view: View, detours: Detours, requests: Requests) -> Move:
    """Wait until the ring is to be opened anew, over ways that were found to be there."""
    waiting = False
    proven: dict[Pair, str] = {}
    while True:
        with trio.move_on_after(LOOK_S):
            if waiting:
                await requests.idle()
            else:
                await trio.sleep_forever()
        move = detours.look(view.recent(), trio.current_time())
        waiting = False
        if move is None:
            continue
        wanted = {pair: to.via for pair, to in move.pairs.items()}
        if wanted != proven and not await _exists(view, detours.ways, move):
            detours.failed(move, trio.current_time())
            continue
        proven = wanted
        waiting = move.may_wait and bool(requests.live)
        if not waiting:
            detours.moved(trio.current_time(), busy=bool(requests.live))
            return move


async def _exists(view: View, ways: Iterable[Way], move: Move) -> bool:
    """Whether a channel would go otherwise now: relays may refuse. What has to be started or measured is, meanwhile."""
    routes, other = Routes(view), False
    for way in ways:
        if way.pair in move.pairs:
            try:
                route = await routes.find(way.connector, way.acceptor, way.wanted, way.offered)
            except MeshError:
                return False
            other = other or route.via != way.via
    return other
