"""Where a search for layouts starts: chains of regions, each region cut into groups of machines by an integer program.

What costs a token its time is the wide area, so a good layout visits each region once. A *chain* is an order of
regions; within a region the layers are cut into stages, each held by a *group* of machines that all hold the same
layers and share the tokens. How many layers can regions hold at F tokens/s? Machines of one kind are counted, not
named, so that this is a small integer program over kinds of groups (solved by HiGHS); the largest F that reaches all
layers is found by halving. Where a chain crosses between regions, the groups at both ends must be large enough that
the wires between them carry F. Several chains side by side add up.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import networkx as nx
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from topology.flow import SINK, SOURCE, Pool

#: Regions are told apart where the latencies of wires, sorted, make a leap of at least this factor.
LEAP: Final = 3.0
#: Kinds of groups considered in a region, and machines in one. More kinds of machines: smaller groups.
KINDS: Final = 400
LARGEST_GROUP: Final = 6
#: Sets of regions that chains are looked for on, nearest first.
SETS: Final = 24
#: Halvings of the interval in which the best F of a chain lies: 2**-9 of it is below what a layer more or less makes.
HALVINGS: Final = 9
#: The integer program need not be proved best: what it finds is improved on anyway. Nodes, not seconds, so that equal
#: questions have equal answers.
NODE_LIMIT: Final = 200
#: Of them, those that go into the program: inside a region, and for each pair of sizes at an end of it.
INSIDE: Final = 120
ENDS: Final = 12
#: More groups than a region ever has.
_MANY: Final = 1000


def regions(pool: Pool) -> list[list[int]]:
    """Machines by region, as indices: those that wires of a short latency join. One region where nothing leaps."""
    index = {machine.name: i for i, machine in enumerate(pool.machines)}
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(pool.machines)))
    inner = [wire for wire in pool.wires if wire.source != SOURCE and wire.target != SINK]
    waits = sorted({max(wire.ms, 1e-3) for wire in inner})
    leaps = [(b / a, a) for a, b in itertools.pairwise(waits) if b / a >= LEAP]
    limit = max(leaps)[1] if leaps else math.inf
    graph.add_edges_from((index[w.source], index[w.target]) for w in inner if max(w.ms, 1e-3) <= limit)
    return sorted(sorted(part) for part in nx.connected_components(graph))


@dataclass(frozen=True, slots=True)
class Group:
    """A kind of group: how many machines of each kind, and the layers each of them holds."""

    counts: tuple[tuple[int, int], ...]
    layers: int

    @property
    def size(self) -> int:
        """Machines in it."""
        return sum(count for _, count in self.counts)


@dataclass(frozen=True, slots=True)
class _Option:
    """A group at a place in the order; sizes of the groups it faces in the regions before and after, or 0."""

    place: int
    group: Group
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Stages in order: the layers of each and its machines, by index. `tokens_per_s` is what it was made for."""

    stages: tuple[tuple[int, tuple[int, ...]], ...]
    tokens_per_s: float
    visits: tuple[int, ...]


class Chains:
    """Chains of one pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.regions = regions(pool)
        index = {machine.name: i for i, machine in enumerate(pool.machines)}
        self._region = {i: number for number, members in enumerate(self.regions) for i in members}
        # Machines that pass the same at every number of layers are of one kind.
        rates = sorted({machine.tokens_per_s for machine in pool.machines})
        self._rates = rates
        self._kind = [rates.index(machine.tokens_per_s) for machine in pool.machines]
        across: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for wire in pool.wires:
            if wire.source == SOURCE or wire.target == SINK:
                continue
            pair = (self._region[index[wire.source]], self._region[index[wire.target]])
            across.setdefault(pair, []).append((wire.tokens_per_s, wire.ms))
        self._capacity = {pair: math.fsum(c for c, _ in found) / len(found) for pair, found in across.items()}
        self._ms = {pair: min(ms for _, ms in found) for pair, found in across.items()}

    def best(self, stop: Callable[[], bool] = lambda: False) -> Iterator[list[Chain]]:
        """For each number of crossings between regions the most that chains side by side pass, fewest crossings first.

        Each region belongs to at most one of the chains. Empty where no chain holds all layers. Once `stop` says so, no
        further set of regions is looked at; all together come first.
        """
        found: dict[frozenset[int], Chain] = {}
        for names in sorted(self._sets(), key=lambda names: len(names) < len(self.regions)):
            if found and stop():
                break
            chain = self._chain(names, stop)
            if chain is not None:
                found[names] = chain
        # (regions used, crossings) -> best choice of disjoint chains
        table: dict[tuple[frozenset[int], int], tuple[float, list[Chain]]] = {(frozenset(), 0): (0.0, [])}
        for names, chain in found.items():
            for (used, crossings), (total, chosen) in list(table.items()):
                if not used & names:
                    key = (used | names, crossings + len(names) - 1)
                    if key not in table or table[key][0] < total + chain.tokens_per_s:
                        table[key] = (total + chain.tokens_per_s, [*chosen, chain])
        best: dict[int, tuple[float, list[Chain]]] = {}
        for (_, crossings), choice in table.items():
            if choice[1] and (crossings not in best or best[crossings][0] < choice[0]):
                best[crossings] = choice
        most = 0.0
        for crossings in sorted(best):
            if best[crossings][0] > most:
                most = best[crossings][0]
                yield best[crossings][1]

    def _sets(self) -> list[frozenset[int]]:
        """Sets of regions worth a chain: each alone, all, and from each region the nearest one after the other."""
        every = range(len(self.regions))
        if 2 ** len(self.regions) <= SETS:
            return [frozenset(s) for size in every for s in itertools.combinations(every, size + 1)]
        sets = {frozenset([r]) for r in every} | {frozenset(every)}
        for size in every:
            for first in every:
                grown = [first]
                while len(grown) <= size:
                    rest = [r for r in every if r not in grown]
                    if not rest:
                        break
                    grown.append(min(rest, key=lambda r: (min(self._wait(a, r) for a in grown), r)))
                if len(sets) < SETS + len(self.regions):
                    sets.add(frozenset(grown))
        return sorted(sets, key=lambda s: (len(s), sorted(s)))

    def _wait(self, a: int, b: int) -> float:
        return min(self._ms.get((a, b), math.inf), self._ms.get((b, a), math.inf))

    def _order(self, names: frozenset[int]) -> tuple[int, ...]:
        """The way through the regions that waits least."""
        if len(names) > 7:
            order = [min(names)]
            while len(order) < len(names):
                rest = sorted(names - set(order))
                order.append(min(rest, key=lambda r: self._ms.get((order[-1], r), math.inf)))
            return tuple(order)
        return min(
            itertools.permutations(sorted(names)),
            key=lambda order: sum(self._ms.get(pair, math.inf) for pair in itertools.pairwise(order)),
        )

    def _chain(self, names: frozenset[int], stop: Callable[[], bool]) -> Chain | None:
        order = self._order(names)
        members = [i for r in order for i in self.regions[r]]
        most = sum(len(self._rates[self._kind[i]]) for i in members)
        if most < self.pool.layers or any(pair not in self._capacity for pair in itertools.pairwise(order)):
            return None
        low, high = (
            0.0,
            math.fsum(max((k * r for k, r in enumerate(self._rates[self._kind[i]], 1)), default=0.0) for i in members),
        )
        high /= self.pool.layers
        best: list[list[Group]] | None = None
        reached = 0.0
        for _ in range(HALVINGS):
            if best is not None and stop():
                break
            middle = (low + high) / 2
            groups = self._grouped(order, middle)
            if groups is None:
                high = middle
            else:
                best, low, reached = groups, middle, middle
        return None if best is None else self._named(order, best, reached)

    def _kinds(self, region: int) -> list[Counter[int]]:
        """Every kind of group in a region, none too large."""
        counts = Counter(self._kind[i] for i in self.regions[region])
        size = LARGEST_GROUP
        while size > 1 and math.comb(len(counts) + size, size) > KINDS:
            size -= 1
        chosen = (
            Counter(members)
            for number in range(1, size + 1)
            for members in itertools.combinations_with_replacement(sorted(counts), number)
        )
        return [group for group in chosen if all(count <= counts[kind] for kind, count in group.items())]

    def _holds(self, group: Counter[int], flow: float, limit: float = math.inf) -> int:
        """The most layers with which a group passes `flow` where each machine's wires carry `limit`; 0 for none."""
        most = min((len(self._rates[kind]) for kind in group), default=0)
        passing = (
            k
            for k in range(most, 0, -1)
            if math.fsum(n * min(self._rates[kind][k - 1], limit) for kind, n in group.items()) >= flow
        )
        return next(passing, 0)

    def _options(self, order: Sequence[int], flow: float) -> list[_Option]:
        """Groups by the part they take: inside a region, first of it, last of it, or (in small regions) both."""
        found: list[_Option] = []
        for place, region in enumerate(order):
            come = self._pairs(order[place - 1], region, flow) if place > 0 else []
            go = self._pairs(region, order[place + 1], flow) if place < len(order) - 1 else []
            for group in self._kinds(region):
                held = self._holds(group, flow)
                if not held:
                    continue
                size = group.total()
                counts = tuple(sorted(group.items()))
                # Inside a region a machine more must hold a layer more; at its ends it may be there for its wires.
                least = min(group, key=lambda kind: self._rates[kind][0])
                if size == 1 or self._holds(group - Counter([least]), flow) < held:
                    found.append(_Option(place, Group(counts, held), 0, 0))
                before = [(p, self._capacity[order[place - 1], region]) for p, q in come if q == size]
                after = [(q, self._capacity[region, order[place + 1]]) for p, q in go if p == size]
                ways: list[tuple[int, int, float]] = [(p, 0, p * wire) for p, wire in before]
                ways += [(0, q, q * wire) for q, wire in after]
                if len(self.regions[region]) <= LARGEST_GROUP:
                    ways += [(p, q, min(p * a, q * b)) for p, a in before for q, b in after]
                for p, q, limit in ways:
                    if layers := self._holds(group, flow, limit):
                        found.append(_Option(place, Group(counts, layers), p, q))
        return self._thrifty(found, flow)

    def _thrifty(self, options: list[_Option], flow: float) -> list[_Option]:
        """Of the options of each part those that waste least of what their machines could do at this flow."""
        worth = [max((k * min(rate, flow) for k, rate in enumerate(rates, 1)), default=0.0) for rates in self._rates]
        parts: dict[tuple[int, int, int, int], list[_Option]] = {}
        for option in options:
            size = option.group.size if option.before or option.after else 0
            parts.setdefault((option.place, option.before, option.after, size), []).append(option)

        def waste(option: _Option) -> float:
            return math.fsum(n * worth[kind] for kind, n in option.group.counts) / option.group.layers

        return [
            option
            for (_, before, after, _), found in parts.items()
            for option in sorted(found, key=waste)[: ENDS if before or after else INSIDE]
        ]

    def _pairs(self, a: int, b: int, flow: float) -> list[tuple[int, int]]:
        """Sizes of the groups at both ends of a crossing whose wires carry `flow`."""
        sizes = range(1, LARGEST_GROUP + 1)
        return [(p, q) for p in sizes for q in sizes if p * q * self._capacity[a, b] >= flow]

    def _grouped(self, order: Sequence[int], flow: float) -> list[list[Group]] | None:
        """Groups of each region in the order of their stages, or None where they do not hold all layers."""
        program = _Program()
        options = [(option, program.variable(option.group.layers)) for option in self._options(order, flow)]
        for place, region in enumerate(order):
            here = [(option, v) for option, v in options if option.place == place]
            for kind, count in Counter(self._kind[i] for i in self.regions[region]).items():
                program.constrain([(v, dict(o.group.counts).get(kind, 0)) for o, v in here], -math.inf, count)
            if place > 0:
                program.constrain([(v, 1) for o, v in here if o.before], 1, 1)
            if place < len(order) - 1:
                program.constrain([(v, 1) for o, v in here if o.after], 1, 1)
            # A group that is both the first and the last of its region is the only one there.
            inside = [(v, 1) for o, v in here if not o.before and not o.after]
            both = [(v, _MANY) for o, v in here if o.before and o.after]
            program.constrain([*inside, *both], -math.inf, _MANY)
        for place, (a, b) in enumerate(itertools.pairwise(order)):
            for p, q in self._pairs(a, b, flow):
                going = [(v, 1) for o, v in options if o.place == place and (o.group.size, o.after) == (p, q)]
                coming = [(v, -1) for o, v in options if o.place == place + 1 and (o.before, o.group.size) == (p, q)]
                program.constrain([*going, *coming], 0, 0)
        program.constrain([(v, option.group.layers) for option, v in options], self.pool.layers, math.inf)
        chosen = program.solve()
        if chosen is None:
            return None
        found: list[list[Group]] = []
        for place in range(len(order)):
            taken = [option for option, v in options if option.place == place for _ in range(round(chosen[v]))]
            # First the group that tokens come in by, last the one they leave by.
            taken.sort(key=lambda option: (not option.before, bool(option.after)))
            found.append([option.group for option in taken])
        return found if all(found) else None

    def _named(self, order: Sequence[int], groups: list[list[Group]], flow: float) -> Chain:
        """Machines for the groups; too many layers are taken back where least passes, machines left over help there."""
        widths: list[int] = []
        teams: list[list[int]] = []
        places: list[int] = []
        left: list[tuple[int, int]] = []
        for place, region in enumerate(order):
            free = {kind: [i for i in self.regions[region] if self._kind[i] == kind] for kind in set(self._kind)}
            for group in groups[place]:
                widths.append(group.layers)
                teams.append([free[kind].pop(0) for kind, count in group.counts for _ in range(count)])
                places.append(place)
            left += [(place, i) for members in free.values() for i in members]

        def passes(stage: int) -> float:
            return math.fsum(self.pool.machines[i].tokens_per_s[widths[stage] - 1] for i in teams[stage])

        while sum(widths) > self.pool.layers:
            shrinking = [s for s in range(len(widths)) if widths[s] > 1]
            least = min(shrinking or range(len(widths)), key=passes)
            widths[least] -= 1
        for place, i in left:
            most = len(self.pool.machines[i].tokens_per_s)
            can = [s for s in range(len(widths)) if places[s] == place and 0 < widths[s] <= most]
            if can:
                teams[min(can, key=passes)].append(i)
        stages = tuple((width, tuple(sorted(team))) for width, team in zip(widths, teams, strict=True) if width)
        return Chain(stages, flow, tuple(order))


class _Program:
    """An integer program that maximises, built a variable and a row at a time."""

    def __init__(self) -> None:
        self._gains: list[float] = []
        self._most: list[float] = []
        self._rows: list[tuple[list[tuple[int, int]], float, float]] = []

    def variable(self, gain: float, *, most: float = _MANY) -> int:
        self._gains.append(gain)
        self._most.append(most)
        return len(self._gains) - 1

    def constrain(self, terms: Sequence[tuple[int, int]], low: float, high: float) -> None:
        self._rows.append(([term for term in terms if term[1]], low, high))

    def solve(self) -> list[float] | None:
        entries = [(row, v, factor) for row, (terms, _, _) in enumerate(self._rows) for v, factor in terms]
        if not entries:
            return None
        rows, columns, factors = zip(*entries, strict=True)
        matrix = coo_array((factors, (rows, columns)), shape=(len(self._rows), len(self._gains)))
        limits = LinearConstraint(matrix, [low for _, low, _ in self._rows], [high for _, _, high in self._rows])
        answer = milp(
            -np.array(self._gains),
            constraints=limits,
            integrality=np.ones(len(self._gains), dtype=np.int64),
            bounds=Bounds(0, np.array(self._most)),
            options={"node_limit": NODE_LIMIT, "mip_rel_gap": 1.0},
        )
        return None if answer.x is None else [float(value) for value in answer.x]
