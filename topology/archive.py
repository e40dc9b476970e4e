"""What a search has priced, kept small: the Pareto front of latency and rate, and the next best plans.

The front is over seconds a token (least) and tokens a second over many requests (most). A candidate that misses a limit
is not kept. Everything is ordered by figures and then by names, so the order of arrival does not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from topology.plan import Choice

if TYPE_CHECKING:
    from topology.candidate import Candidate

#: Points of a front that a plan carries at most: the ends and the widest spaced between them.
MAX_POINTS: Final = 12
#: Next best candidates remembered, and how many more may gather before they are cut back to these.
KEPT, SLOP = 64, 192
#: Next best plans that a plan carries.
MAX_ALTERNATIVES: Final = 3


class Archive:
    """Candidates by their devices: the best of each, and the front of all."""

    def __init__(self, wish: str) -> None:
        self._wish = wish
        self._best: dict[tuple[object, ...], Candidate] = {}
        self._front: dict[tuple[object, ...], Candidate] = {}
        self._bounds: list[tuple[int, int]] = []

    def add(self, candidate: Candidate) -> None:
        """Take a priced candidate in."""
        if candidate.excess:
            return
        devices = tuple(each.nodes for each in candidate.fits)
        known = self._best.get(devices)
        if known is None or candidate.cost(self._wish) < known.cost(self._wish):
            self._best[devices] = candidate
            if len(self._best) > KEPT + SLOP:
                self._best = dict(sorted(self._best.items(), key=lambda entry: entry[1].cost(self._wish))[:KEPT])
        token, gap = figures(candidate)
        if not any(t <= token and g <= gap for t, g in self._bounds):
            self._bounds = [(t, g) for t, g in self._bounds if not (token <= t and gap <= g)] + [(token, gap)]
            kept = set(self._bounds)
            self._front = {key: c for key, c in self._front.items() if figures(c) in kept}
            self._front[token, gap] = candidate
        elif (token, gap) in self._front and candidate.cost("latency") < self._front[token, gap].cost("latency"):
            self._front[token, gap] = candidate

    def merge(self, other: Archive) -> None:
        """Take in what another archive kept."""
        for candidate in (*other.front, *other.best):
            self.add(candidate)

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The candidates that no other beats in both figures, the least latency first."""
        return tuple(self._front[key] for key in sorted(self._bounds))

    @property
    def best(self) -> tuple[Candidate, ...]:
        """The best candidates by the wish, at most `KEPT`, no two of the same devices in the same order."""
        return tuple(sorted(self._best.values(), key=lambda candidate: candidate.cost(self._wish))[:KEPT])


def figures(candidate: Candidate) -> tuple[int, int]:
    """Nanoseconds a token, and nanoseconds between tokens over many requests."""
    return round(candidate.token_s * 1e9), round(1e9 / candidate.rate)


def pareto(front: Iterable[Candidate], chosen: Candidate) -> tuple[Choice, ...]:
    """The front as a plan carries it, thinned out; the chosen plan is marked where it is on it."""
    points = list(front)
    taken = next((i for i, c in enumerate(points) if figures(c) == figures(chosen)), None)
    if taken is not None:
        points[taken] = chosen
    while len(points) > MAX_POINTS:
        # The inner point nearest to its neighbours on a logarithmic scale says least.
        inner = [i for i in range(1, len(points) - 1) if points[i] is not chosen]
        points.pop(min(inner, key=lambda i: (_gap(points[i - 1], points[i + 1]), i)))
    return tuple(candidate.choice(chosen=candidate is chosen) for candidate in points)


def alternatives(best: Iterable[Candidate], chosen: Candidate) -> tuple[Choice, ...]:
    """The next best plans on other devices, and what taking each instead would cost."""
    held = _devices(chosen)
    found, seen = [], {held}
    for candidate in best:
        devices = _devices(candidate)
        if devices not in seen:
            seen.add(devices)
            found.append(candidate.choice(costs=difference(candidate, chosen)))
        if len(found) == MAX_ALTERNATIVES:
            break
    return tuple(found)


def difference(candidate: Candidate, chosen: Candidate) -> str:
    """The figures of a candidate against the chosen one: "+12.0 % ms a token, -3.1 % tokens/s, 1 site more"."""
    parts = [
        f"{candidate.token_s / chosen.token_s - 1:+.1%} ms a token",
        f"{candidate.rate / chosen.rate - 1:+.1%} tokens/s over many requests",
    ]
    if chosen.price_per_hour != candidate.price_per_hour:
        parts.append(f"{candidate.price_per_hour - chosen.price_per_hour:+.3g} an hour")
    more = len(candidate.sites) - len(chosen.sites)
    if more:
        parts.append(f"{abs(more)} site{'' if abs(more) == 1 else 's'} {'more' if more > 0 else 'fewer'}")
    return ", ".join(parts)


def _devices(candidate: Candidate) -> frozenset[str]:
    return frozenset(node.key for each in candidate.fits for node in each.nodes)


def _gap(before: Candidate, after: Candidate) -> float:
    return math.log(after.token_s / before.token_s) + math.log(after.rate / before.rate)
