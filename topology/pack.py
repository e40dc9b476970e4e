"""Rings for throughput on meshes of any size: how many layers each site carries at a given pace, and sites in a tour.

At a pace of `T` seconds between tokens an island whose layer takes `t` carries floor(T / t) layers, as far as its
memory goes. A site may be one island of all its devices, or two, three and so on; the number that carries most counts.
So what all sites carry is quickly told for any pace, and the least pace at which that is the whole model is found by
bisection. Several rings side by side are the tour over all sites, cut into arcs that carry a model each. Links that
would take longer than the pace for a hidden state are avoided: only sites that reach each other over others make up a
ring.

A heuristic, since sites are tried as wholes; `topology.bounds` says how far it may be from the best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from topology.candidate import Assembler, Candidate, Island
from topology.cost import slowest_path
from topology.model import LOGIT_BYTES
from topology.ring import rings

Whole = npt.NDArray[np.int64]

#: Steps of bisection: a pace is found to 0.1 %, from the pace of a single device to that of all of them.
STEPS: Final = 24
#: The first pace leaves out the head, the embedding and what else only some stages have: so much slower is tried next.
EASE: Final = 1.03
EASED: Final = 10
#: Numbers of islands of a site: all up to here, and then those that make islands of another size.
FEW: Final = 4
#: Seconds that stand for a hop over a link too narrow for the pace: more than any other way round costs.
NARROW_S: Final = 1e3


@dataclass(frozen=True)
class _Site:
    """The ways to make islands of a site: from `first` to before `last` among all ways."""

    name: str
    first: int
    last: int


class Packer:
    """What the sites of one assembler's picture carry at any pace."""

    def __init__(self, assembler: Assembler, *, single: bool = False) -> None:
        """`single`: every island is one device."""
        self.assembler, self.layers = assembler, assembler.model.layers
        self._sites: dict[str, _Site] = {}
        self._ways: list[tuple[Island, ...]] = []
        self._islands_flat: list[Island] = []
        layer_s: list[float] = []
        head_s: list[float] = []
        most: list[int] = []
        starts: list[int] = []
        for name in assembler.picture.sites:
            first = len(self._ways)
            for way in self._islands(name, single):
                fits = [(island, fit) for island in way if (fit := assembler.middle(island)) is not None]
                if fits:
                    self._islands_flat += [island for island, _ in fits]
                    self._ways.append(tuple(island for island, _ in fits))
                    starts.append(len(layer_s))
                    layer_s += [fit.layer_s + fit.layer_network_s for _, fit in fits]
                    head_s += [self._head_s(island) for island, _ in fits]
                    most += [fit.capacity for _, fit in fits]
            if len(self._ways) > first:
                self._sites[name] = _Site(name, first, len(self._ways))
        self._layer_s, self._head_s_by_island, self._starts = np.array(layer_s), np.array(head_s), np.array(starts)
        self._most = np.array(most, dtype=np.int64)
        self._names = sorted(self._sites)
        self._at = {name: place for place, name in enumerate(self._names)}
        size = assembler.model.activation_bytes
        path = assembler.picture.path
        self._carried_s = np.array(
            [
                [size / path(a, b).bandwidth if a != b and path(a, b).reachable else math.inf for b in self._names]
                for a in self._names
            ]
        ).reshape(len(self._names), len(self._names))

    def ring(self, names: Collection[str] | None = None) -> Candidate | None:
        """The ring with the least pace that is found on these sites, or on all; None where it does not fit."""
        found = self.rings_of(sorted(self._sites if names is None else names))
        return min(found, key=lambda candidate: candidate.cost(self.assembler.constraints.wish), default=None)

    def rings_of(self, names: Sequence[str], *, paces: Sequence[float] = (1.0,)) -> Iterator[Candidate]:
        """Rings on some of these sites at the least pace and, where asked, at multiples of it on fewer sites."""
        names = [name for name in names if name in self._sites]
        pace_s = self._least_s(lambda s: self._carries(names, s)[1] >= self.layers)
        if pace_s is None:
            return
        for factor in paces:
            for step in range(EASED):
                candidate = self._assembled(names, pace_s * factor * EASE**step)
                if candidate is not None:
                    yield candidate
                    break

    def rings(self, count: int) -> list[Candidate] | None:
        """So many rings on disjoint sites, each the best found on its arc of a tour over all; None: they do not fit."""
        tour = self._whole
        if tour is None:
            return None

        def arcs(pace_s: float) -> list[list[str]]:
            carried, _ = self._carried(pace_s)
            found: list[list[str]] = [[]]
            held = 0
            for name in tour:
                found[-1].append(name)
                held += carried[name]
                if held >= self.layers and len(found) < count + 1:
                    found.append([])
                    held = 0
            return found

        pace_s = self._least_s(lambda s: len(arcs(s)) > count)
        for step in range(EASED if pace_s is not None else 0):
            assert pace_s is not None
            parts = arcs(pace_s * EASE**step)
            if len(parts) <= count:
                continue
            over = parts.pop()
            parts[-1] += over  # what is left helps the last ring
            candidates = [self.ring(part) for part in parts[:count]]
            good = [candidate for candidate in candidates if candidate is not None]
            if len(good) == count:
                return good
        return None

    @cached_property
    def _whole(self) -> tuple[str, ...] | None:
        """The tour over all sites, whatever its links carry."""
        return self._tour(self._names, math.inf)

    def _islands(self, name: str, single: bool) -> Iterator[tuple[Island, ...]]:
        """A site's devices, fastest first, in so and so many islands as equally large as can be."""
        nodes = self.assembler.picture.nodes[name]
        widest = min(self.assembler.model.heads, self.assembler.model.intermediate)
        counts = [len(nodes)] if single else range(1, len(nodes) + 1)
        sizes: set[int] = set()
        for count in counts:
            size = -(-len(nodes) // count)
            if size > widest or (count > FEW and size in sizes):
                continue
            sizes.add(size)
            ends = [len(nodes) * i // count for i in range(count + 1)]
            yield tuple(nodes[a:b] for a, b in itertools.pairwise(ends))

    def _head_s(self, island: Island) -> float:
        """About what the head takes on an island that is the last of a ring."""
        model, picture = self.assembler.model, self.assembler.picture
        rows_a_second = math.fsum(1 / node.row_s if node.row_s > 0 else math.inf for node in island)
        gather_s = slowest_path(picture, island).transfer_s(model.vocab * LOGIT_BYTES) if len(island) > 1 else 0.0
        return model.vocab / rows_a_second + gather_s

    def _counts(self, pace_s: float, *, head: bool = False) -> Whole:
        """Layers by island at a pace, beside the head where asked, of all ways of all sites one after the other.

        An island that can do the head alone takes none; one that cannot even do that has less than none.
        """
        left_s = np.maximum(pace_s - self._head_s_by_island, -1.0) if head else pace_s
        able = np.minimum(np.floor(left_s / self._layer_s * (1 + 1e-12)), self.layers)
        return np.minimum(np.where(able < 1, -self.layers, able) if head else able, self._most).astype(np.int64)

    def _carried(self, pace_s: float) -> tuple[dict[str, int], dict[str, int]]:
        """Layers by site at a pace, by the way that carries most; and how many fewer, where it has the head too."""
        counts = self._counts(pace_s)
        if not len(counts):
            return {}, {}
        by_way = np.add.reduceat(counts, self._starts)
        lost = np.minimum.reduceat(counts - self._counts(pace_s, head=True), self._starts)
        most = {name: int(by_way[site.first : site.last].max()) for name, site in self._sites.items()}
        with_head = by_way - lost
        return most, {n: most[n] - int(with_head[site.first : site.last].max()) for n, site in self._sites.items()}

    def _carries(self, names: Sequence[str], pace_s: float) -> tuple[list[str], int]:
        """Those of the sites that make up a ring at that pace, and the layers they carry together."""
        carried, lost = self._carried(pace_s)
        able = [name for name in names if carried[name]]
        best: tuple[list[str], int] = ([], 0)
        for group in self._together(able, pace_s):
            ranked = sorted(group, key=lambda name: (-carried[name], name))[: self.assembler.constraints.max_sites]
            held = sum(carried[name] for name in ranked) - min(lost[name] for name in ranked)
            if held > best[1]:
                best = (sorted(ranked), held)
        return best

    def _together(self, names: Sequence[str], pace_s: float) -> list[list[str]]:
        """Sites that reach one another, over others, by links which carry a hidden state within the pace."""
        places = [self._at[name] for name in names]
        wide = self._carried_s[np.ix_(places, places)] <= pace_s
        if not places or (wide | np.eye(len(places), dtype=np.bool_)).all():
            return [list(names)] if names else []
        from scipy.sparse.csgraph import connected_components  # only meshes with narrow links wait for its import

        count, of = connected_components(wide, directed=True, connection="strong")
        return [[name for name, each in zip(names, of, strict=True) if each == group] for group in range(count)]

    def _least_s(self, enough: Callable[[float], bool]) -> float | None:
        """The least pace found at which that is so; None where no pace will do."""
        if not len(self._layer_s):
            return None
        low, high = float(self._layer_s.min()), float(self._layer_s.max()) * self.layers
        high = max(high, float(self._carried_s[np.isfinite(self._carried_s)].max(initial=0.0)))
        if not enough(high):
            return None
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def _assembled(self, names: Sequence[str], pace_s: float) -> Candidate | None:
        """The candidate on as many of the sites as are needed at that pace."""
        able, held = self._carries(names, pace_s)
        if held < self.layers:
            return None
        carried, lost = self._carried(pace_s)
        home = min(able, key=lambda name: (lost[name], name))  # where the ring ends, and the head is
        for name in sorted(able, key=lambda name: (carried[name] / self._dear(name), name)):
            if held - carried[name] >= self.layers and name != home:
                able.remove(name)
                held -= carried[name]
        tour = self._tour(able, pace_s)
        if tour is None:
            return None
        counts, heads = self._counts(pace_s), self._counts(pace_s, head=True)
        begin = (tour.index(home) + 1) % len(tour)
        islands: list[Island] = []
        for name in tour[begin:] + tour[:begin]:
            best: tuple[int, list[int]] = (0, [])
            for way in range(self._sites[name].first, self._sites[name].last):
                at = self._starts[way]
                used = [i for i in range(at, at + len(self._ways[way])) if counts[i]]
                held = int(counts[used].sum())
                if name == home:
                    used.sort(key=lambda i: (heads[i] - counts[i], i))  # the one that loses least is the last
                    held += int(heads[used[-1]] - counts[used[-1]]) if used else 0
                if held > best[0]:  # of equally good ways the one of fewest islands
                    best = (held, [int(i) for i in used])
            islands += [self._islands_flat[i] for i in best[1]]
        if not 0 < len(islands) <= self.layers:
            return None
        found = [self.assembler.ordered(islands, policy) for policy in ("speed", "memory")]
        return next((candidate for candidate in found if candidate is not None), None)

    def _dear(self, name: str) -> float:
        """What a site counts for where some are left out: its price, where that is what plans are compared by."""
        picture = self.assembler.picture
        price = picture.price_per_hour(picture.nodes[name]) if self.assembler.constraints.wish == "cost" else 0.0
        return price or 1.0

    def _tour(self, names: Sequence[str], pace_s: float) -> tuple[str, ...] | None:
        """The sites in the order of a short way round, over links that are wide enough where there is such a way."""
        if len(names) < 2:
            return tuple(names) or None
        size = self.assembler.model.activation_bytes
        narrow = self._carried_s > pace_s

        def cost_s(a: str, b: str) -> float:
            return self.assembler.hop_s(a, b, size) + (NARROW_S if narrow[self._at[a], self._at[b]] and a != b else 0.0)

        self.assembler.work += len(names) ** 2 * 0.08
        orders = rings([[cost_s(a, b) for b in names] for a in names])
        return tuple(names[i] for i in orders[0]) if orders else None
