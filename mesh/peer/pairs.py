"""The links of a snapshot, from what both ends of every pair say, and from coordinates where nobody measured.

A round trip is one number that two ends measure. The larger is taken, so no end draws work to itself by claiming to be
near; where they are far apart, the pair counts as an estimate. One end alone is believed only as far as coordinates
bear it out, unless that end is ourselves. A coordinate is itself one site's claim: all estimates to a site are raised
by the median factor by which its measured pairs turned out longer than its coordinate says; and who disagrees with most
of the other ends is nowhere nearer than the median of what these say.

Either end may say that a direction is cut: an end that lies about that only loses its own links.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Final

import numpy as np

from mesh.gossip.coordinates import Coordinate, estimate_s
from mesh.gossip.links import LinkReport
from topology.picture import UNMEASURED_BANDWIDTH, UNMEASURED_RTT_S
from topology.snapshot import Link

#: Two ends agree when the larger round trip is at most so many times the smaller, and this much more.
AGREE_FACTOR, AGREE_S = 2.0, 0.01
#: Up to so many sites every pair is in the snapshot. Above, each site's nearest by estimate are, so that there are no
#: more links than that in all; the planner takes the longest measured round trip for the others.
EVERY_PAIR: Final = 128
#: The most by which estimates to a site are raised.
MAX_FACTOR: Final = 100.0
#: More is no loss but a cut, which is told apart; the planner takes no more for possible.
MAX_LOSS: Final = 0.99
#: Bandwidth of a measured link without a transfer yet: 1 Gbit/s (the default of `Link`).
USUAL_BANDWIDTH: Final = 125e6

Reports = Mapping[str, Mapping[str, LinkReport]]


@dataclass
class _Estimates:
    """Round trips from coordinates, raised for sites whose coordinates proved too near."""

    coordinates: Mapping[str, Coordinate]
    factors: dict[str, float] = field(default_factory=dict)
    floor_s: float = UNMEASURED_RTT_S
    floors_s: dict[str, float] = field(default_factory=dict)

    def learn(self, heard: Mapping[tuple[str, str], list[float]]) -> None:
        """`heard` are the words of one or both ends of measured pairs."""
        double = {pair: max(rtts) for pair, rtts in heard.items() if len(rtts) == 2}
        if double:
            self.floor_s = median(double.values())
        ratios: dict[str, list[float]] = {}
        found: dict[str, list[tuple[float, bool]]] = {}
        for (one, other), rtt_s in double.items():
            raw_s = self._raw(one, other)
            for site in (one, other):
                found.setdefault(site, []).append((rtt_s, _agree(heard[one, other])))
                if raw_s is not None:
                    ratios.setdefault(site, []).append(rtt_s / max(raw_s, 1e-6))
        self.factors = {site: min(MAX_FACTOR, max(1.0, median(each))) for site, each in ratios.items()}
        self.floors_s = {
            site: median(rtt_s for rtt_s, _ in each)
            for site, each in found.items()
            if 2 * sum(agrees for _, agrees in each) < len(each)
        }

    def of(self, one: str, other: str) -> float | None:
        """Seconds, or None without both coordinates."""
        raw_s = self._raw(one, other)
        if raw_s is None:
            return None
        factors = [self.factors.get(site) for site in (one, other)]
        known = [factor for factor in factors if factor is not None]
        rtt_s = raw_s * max(known, default=1.0)
        # Nobody has measured one of them together with it: nothing shows that it is where it says.
        floors_s = [self.floors_s.get(one, 0.0), self.floors_s.get(other, 0.0)]
        return max(rtt_s, *floors_s, 0.0 if len(known) == 2 else self.floor_s)

    def _raw(self, one: str, other: str) -> float | None:
        a, b = self.coordinates.get(one), self.coordinates.get(other)
        return None if a is None or b is None else estimate_s(a, b)


def links_between(
    sites: Collection[str], own: str, reports: Reports, coordinates: Mapping[str, Coordinate]
) -> tuple[Link, ...]:
    """The links between `sites`, as seen by the site `own`: both directions of each pair of which anything is known."""
    present = set(sites)
    said = {
        (source, target): report
        for source, found in reports.items()
        if source in present
        for target, report in found.items()
        if target in present and target != source
    }
    pairs = {(min(pair), max(pair)) for pair in said}
    heard = {pair: _rtts(said, *pair) for pair in sorted(pairs)}
    estimates = _Estimates({site: at for site, at in coordinates.items() if site in present})
    estimates.learn(heard)
    links = []
    for pair, rtts in heard.items():
        links += _pair(said, pair, rtts, own, estimates)
    known = {(link.source, link.target) for link in links}
    for one, other in _unmeasured(sorted(present & estimates.coordinates.keys()), known, estimates):
        rtt_s = estimates.of(one, other)
        if rtt_s is not None:
            links += _both(one, other, rtt_s)
    return tuple(links)


def _agree(rtts: list[float]) -> bool:
    return max(rtts) <= AGREE_FACTOR * min(rtts) + AGREE_S


def _rtts(said: Mapping[tuple[str, str], LinkReport], one: str, other: str) -> list[float]:
    found = (said.get((one, other)), said.get((other, one)))
    return [report.min_s for report in found if report is not None and report.min_s is not None]


def _pair(
    said: Mapping[tuple[str, str], LinkReport],
    pair: tuple[str, str],
    rtts: list[float],
    own: str,
    estimates: _Estimates,
) -> list[Link]:
    one, other = pair
    guess_s = estimates.of(one, other)
    measured = len(rtts) == 2 and _agree(rtts)
    if len(rtts) == 2:
        rtt_s = max(rtts)
    else:
        mine = said.get((own, other if own == one else one)) if own in pair else None
        if mine is not None and mine.min_s is not None:
            rtt_s, measured = mine.min_s, True
        elif guess_s is not None:
            rtt_s = max([guess_s, *rtts])
        else:
            rtt_s = max([estimates.floor_s, *rtts])
    reports = [report for report in (said.get((one, other)), said.get((other, one))) if report is not None]
    jitter_s = max(report.jitter_s for report in reports)
    loss = min(MAX_LOSS, max(report.loss for report in reports))
    ages_s = [report.age_s for report in reports if report.age_s is not None]
    age_s = min(ages_s) if measured and ages_s else None
    links = []
    for source, target in (pair, pair[::-1]):
        out, back = said.get((source, target)), said.get((target, source))
        cut = (out is not None and out.out is False) or (back is not None and back.into is False)
        rate = out.bandwidth if out is not None else None
        bandwidth = USUAL_BANDWIDTH if rate is None else rate
        if not measured:  # an unproven link is not a fast one either
            bandwidth = min(bandwidth, UNMEASURED_BANDWIDTH)
        links.append(
            Link(
                source,
                target,
                rtt_s,
                jitter_s,
                loss,
                bandwidth,
                measured,
                reachable=not cut,
                age_s=age_s,
                bandwidth_measured=measured and rate is not None,
                # Each end compares for itself. Who connects is the source, so its word comes first.
                transport=next((each.transport for each in (out, back) if each and each.transport), ""),
            )
        )
    return links


def _both(one: str, other: str, rtt_s: float) -> list[Link]:
    return [
        Link(source, target, rtt_s, bandwidth=UNMEASURED_BANDWIDTH, measured=False)
        for source, target in ((one, other), (other, one))
    ]


def _unmeasured(names: list[str], known: Collection[tuple[str, str]], estimates: _Estimates) -> list[tuple[str, str]]:
    """The pairs to estimate: all, or in a large mesh each site's nearest."""
    if len(names) <= EVERY_PAIR:
        return [pair for pair in combinations(names, 2) if pair not in known]
    places = np.array([estimates.coordinates[name].place for name in names])
    heights = np.array([estimates.coordinates[name].height_s for name in names])
    squares = (places * places).sum(-1)
    apart = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * places @ places.T, 0.0))
    apart += heights[:, None] + heights[None]
    np.fill_diagonal(apart, np.inf)
    each = max(1, EVERY_PAIR * EVERY_PAIR // (2 * len(names)))
    nearest = np.argpartition(apart, min(each, len(names) - 1), axis=1)[:, :each]
    pairs = {
        (names[min(row, int(column))], names[max(row, int(column))])
        for row, columns in enumerate(nearest)
        for column in columns
    }
    return sorted(pair for pair in pairs if pair not in known)
