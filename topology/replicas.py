"""Several rings of one model: which devices make up each, and how the requests are split over them.

Rings hold no device in common. They are made one after the other on what the former left, in a few ways (by the
objective itself, compact, quick), and the way whose rings together serve the objective best is taken: a heuristic,
which the bound in a plan's reasons puts into proportion. The split is exact: a linear program (HiGHS) gives the
rings the largest sum of rates that their stages, and links which several rings share, allow.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from topology.candidate import Assembler, Candidate
from topology.constraints import Constraints
from topology.cost import TOKEN_BYTES
from topology.pack import Packer
from topology.picture import Picture
from topology.search import Search, is_large

#: Rings that "auto" tries at most.
MAX_RINGS: Final = 8
#: Objectives of single rings that are tried besides the asked one, where rates count.
WAYS: Final = ("fewest_sites", "latency", "balanced")

#: Numbers of rings that are laid out side by side on a large mesh.
PACKED: Final = (2, 3, 4, 6, 8, 12, 16, 32)
#: How many times the rate of one ring several have to give, where nobody asked for them.
WORTH: Final = 1.25

MakeSearch = Callable[[Picture, Constraints], Search]


@dataclass(frozen=True)
class Fleet:
    """Rings of one model, the first leads; tokens a second of each, and the searches that found them."""

    rings: tuple[Candidate, ...]
    rates: tuple[float, ...]
    searches: tuple[Search, ...]

    @property
    def rate(self) -> float:
        """Tokens a second of all rings."""
        return math.fsum(self.rates)

    @property
    def shares(self) -> tuple[float, ...]:
        """Which part of the requests each ring takes."""
        return tuple(rate / self.rate for rate in self.rates)

    @property
    def sites(self) -> frozenset[str]:
        """Every site of every ring."""
        return frozenset().union(*(ring.sites for ring in self.rings))

    def price_per_hour(self, picture: Picture) -> float:
        """Of all devices and sites."""
        return picture.price_per_hour(node for ring in self.rings for each in ring.fits for node in each.nodes)

    def worth(self, wish: str, picture: Picture) -> tuple[object, ...]:
        """Sorts the better fleet first."""
        token_s = math.fsum(s * ring.token_s for s, ring in zip(self.shares, self.rings, strict=True))
        first_s = math.fsum(s * ring.first_token_s for s, ring in zip(self.shares, self.rings, strict=True))
        figure = {
            "latency": token_s,
            "fewest_sites": float(len(self.sites)),
            "throughput": 1 / self.rate,
            "first_token": first_s,
            "cost": self.price_per_hour(picture) / self.rate,
            "balanced": token_s / self.rate,
        }[wish]
        return (round(figure * 1e9), round(token_s * 1e9), len(self.sites), tuple(ring.identity for ring in self.rings))


def fleet(
    picture: Picture, wishes: Constraints, make: MakeSearch, accept: Callable[[Fleet], bool] = lambda found: True
) -> Fleet | None:
    """The rings that `replicas` asks for, or None where there are not as many or they miss a limit together.

    `accept` may refuse rings, for example where they leave no room for standbys.
    """
    asked = wishes.replicas
    counts = range(1, MAX_RINGS + 1) if asked == "auto" else [int(asked or 1)]
    rates_count = wishes.wish in ("throughput", "cost", "balanced")
    best: Fleet | None = None
    ways = tuple(dict.fromkeys((wishes.wish, *WAYS)))
    devices = max((len(nodes) for nodes in picture.nodes.values()), default=0)
    if is_large(len(picture.sites), devices) and not wishes.forced:
        # Every ring takes a search of its own here: the rings of many come from one tour over all sites instead.
        fleet_of_all = _large(picture, wishes, make, accept)
        if fleet_of_all is not None:
            return fleet_of_all
        ways = ways[:1]
    for count in counts:
        found = [_rings(picture, wishes, way, count, make) for way in ways]
        good = [each for each in found if each is not None]
        if count == 1 and wishes.standbys:
            good += [other for each in good for other in _smaller(each, wishes)]
        for each in good:
            enough = wishes.min_tokens_per_s is None or each.rate >= wishes.min_tokens_per_s * (1 - 1e-12)
            if (
                enough
                and accept(each)
                and (best is None or each.worth(wishes.wish, picture) < best.worth(wishes.wish, picture))
            ):
                best = each
        if (best is not None and not rates_count) or (not good and wishes.concurrency is None):
            break  # more rings do not help, or do not fit
    return best


def packed(search: Search, counts: Sequence[int], accept: Callable[[Fleet], bool] = lambda found: True) -> Fleet | None:
    """The best fleet of so many rings on arcs of a tour over all sites (`topology.pack`); None where none fits.

    `search` looks for one ring; what it asks of that, each of the rings meets.
    """
    asked, best = search.constraints, None
    if asked.max_sites is not None or asked.private or asked.forced:
        return None
    packer = search.packer
    for count in counts:
        if asked.concurrency is not None or asked.min_tokens_per_s is not None:
            requests = None if asked.concurrency is None else -(-asked.concurrency // count)
            each = replace(asked, min_tokens_per_s=None, concurrency=requests)
            assembler = Assembler(search.picture, search.model, search.assembler.context, each)
            packer = Packer(assembler, single=search.strategy == "pipeline")
        rings = packer.rings(count)
        if rings is None:
            break  # still less of the mesh for each
        rings.sort(key=lambda ring: ring.cost(asked.wish))
        if any(ring.excess for ring in rings):
            continue
        own = rates(search.picture, search.model.activation_bytes, rings)
        found = Fleet(tuple(rings), own, (search,) * count)
        better = best is None or found.worth(asked.wish, search.picture) < best.worth(asked.wish, search.picture)
        enough = asked.min_tokens_per_s is None or found.rate >= asked.min_tokens_per_s * (1 - 1e-12)
        if better and enough and accept(found):
            best = found
    return best


def _large(picture: Picture, wishes: Constraints, make: MakeSearch, accept: Callable[[Fleet], bool]) -> Fleet | None:
    """The best fleet of a large mesh that one search and a tour over all sites give; None where there is none."""
    if wishes.wish not in ("throughput", "cost", "balanced"):
        return None
    search = make(picture, replace(wishes, replicas=1))
    single = search.run().best
    several = packed(search, PACKED if wishes.replicas == "auto" else (int(wishes.replicas or 1),), accept)
    if single is None or wishes.replicas != "auto":
        return several
    alone = Fleet((single,), (single.rate,), (search,))
    if several is not None and several.worth(wishes.wish, picture) < alone.worth(wishes.wish, picture):
        return several
    return alone if accept(alone) else several


def _smaller(found: Fleet, wishes: Constraints) -> list[Fleet]:
    """Single rings next best to the one found: they may leave the room that standbys need."""
    (search,) = found.searches
    most = wishes.max_sites
    rings = [ring for ring in search.assembler.archive.best if most is None or len(ring.sites) <= most]
    return [Fleet((ring,), (ring.rate,), (search,)) for ring in rings]


def _rings(picture: Picture, wishes: Constraints, way: str, count: int, make: MakeSearch) -> Fleet | None:
    rings: list[Candidate] = []
    searches: list[Search] = []
    requests = None if wishes.concurrency is None else -(-wishes.concurrency // count)
    left = picture
    for _ in range(count):
        used = frozenset(node.key for ring in rings for each in ring.fits for node in each.nodes)
        sites = frozenset(name for ring in rings for name in ring.sites)
        left = picture.without(used)
        asked = replace(
            wishes,
            objective=None if way == "fewest_sites" else way,
            min_latency="medium",
            replicas=1,
            standbys=0,
            min_tokens_per_s=None,
            concurrency=requests,
        )
        if wishes.max_sites is not None and sites:
            if len(sites) >= wishes.max_sites:
                left = replace(left, nodes={name: nodes for name, nodes in left.nodes.items() if name in sites})
            else:
                asked = replace(asked, max_sites=wishes.max_sites - len(sites))
        if wishes.max_price_per_hour is not None:
            spent = picture.price_per_hour(n for ring in rings for each in ring.fits for n in each.nodes)
            if spent >= wishes.max_price_per_hour:
                return None
            asked = replace(asked, max_price_per_hour=wishes.max_price_per_hour - spent)
        search = make(left, asked)
        ring = search.run().best
        if ring is None:
            return None
        rings.append(ring)
        searches.append(search)
    return Fleet(tuple(rings), rates(picture, searches[0].model.activation_bytes, rings), tuple(searches))


def rates(picture: Picture, activation_bytes: int, rings: Sequence[Candidate]) -> tuple[float, ...]:
    """Tokens a second of each ring when all run: the largest sum that stages and shared links allow."""
    links: dict[tuple[str, str], Counter[int]] = {}  # bytes of a token, by link and ring
    for index, ring in enumerate(rings):
        leads = [each.nodes[0].site for each in ring.fits]
        for pair in itertools.pairwise(leads):
            links.setdefault(pair, Counter())[index] += activation_bytes
        if len(leads) > 1:
            links.setdefault((leads[-1], leads[0]), Counter())[index] += TOKEN_BYTES
    shared = sorted((pair, uses) for pair, uses in links.items() if len(uses) > 1)
    own = [ring.rate for ring in rings]
    if not shared:
        return tuple(own)
    rows = [[uses[index] for index in range(len(rings))] for _, uses in shared]
    most = [picture.path(*pair).bandwidth for pair, _ in shared]
    from scipy.optimize import linprog  # only plans with replicas wait for its import

    found = linprog([-1.0] * len(rings), A_ub=rows, b_ub=most, bounds=[(0.0, each) for each in own], method="highs")
    solved = own if found.x is None else [float(value) for value in found.x]
    return tuple(max(value, 1e-9) for value in solved)
