"""Layouts with much flow and little waiting: the front between the two, by annealing from chains of regions.

Starts are the chains of `topology.flow_chains`, one for every number of crossings that pays, and equal stages over all
machines (as in SWARM, Ryabinin et al., arXiv:2301.11913). From each, simulated annealing (Kirkpatrick et al., 1983)
improves flow * (1 - weight * network time), for several weights; whatever it meets that nothing else beats in both is
kept. The figures of an answer are measured anew with networkx.

Deterministic: equal pools, generators and iterations give equal answers, unless `stop` ends the search early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from topology.errors import TopologyError
from topology.flow import SINK, SOURCE, Pool, Throughput, bound_tokens_per_s, measure
from topology.flow_chains import Chain, Chains
from topology.flow_fast import Evaluator
from topology.flow_moves import Change, Moves
from topology.flow_thread import rejoined, threaded
from topology.flow_untangle import Ranges, untangled

#: Proposals in all: on one core of an AMD EPYC about 12 s for 24 machines and 80 layers.
ITERATIONS: Final = 120_000
#: How dear network time is, as the share of the flow given up to save all of it.
WEIGHTS: Final = (0.02, 0.2, 0.5)
#: Temperatures, in shares of the best score: from where a stage too slow by a layer is still taken to where it is not.
HOT: Final = 0.03
COLD: Final = 0.0005
#: A little is given for every layer that more machines could pass, not only for the narrowest: else a layout in which
#: several are equally narrow has no better neighbour.
SMOOTH: Final = 0.05
_SHARPNESS: Final = 6
#: Share of the proposals for layouts whose tokens never leave a region, where a region can hold the model.
APART: Final = 0.25
#: Share of the most flow that may be given up for less network time; and to stay within regions.
SLACK: Final = 0.02
STAYING: Final = 1 / 3
#: Points of the front, at most; they are spread over it.
FRONT: Final = 16


@dataclass(frozen=True)
class Placement:
    """A layout (machine name -> layers) and what it gives. `crossings` counts flow between regions: tokens/s."""

    layout: Mapping[str, tuple[int, int]]
    gives: Throughput
    crossing_tokens_per_s: float


@dataclass(frozen=True)
class Placements:
    """`front` has the most flow last, each entry less network time than the next. `chosen` is one of them."""

    front: tuple[Placement, ...]
    chosen: Placement
    bound_tokens_per_s: float
    tried: int


def place(
    pool: Pool,
    *,
    rng: Random,
    iterations: int = ITERATIONS,
    partial: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Placements:
    """Layouts of a pool. Pure but for `rng`; `stop` is asked between steps and ends the search early.

    Raises TopologyError where no layout passes a single token: the machines hold too few layers, or nothing joins them.
    """
    held = sum(len(machine.tokens_per_s) for machine in pool.machines)
    if held < pool.layers:
        raise TopologyError(f"the machines hold {held} layers together, and the model has {pool.layers}")
    search = _Search(pool, rng, partial, stop)
    apart = _Search(_apart(pool, search.chains.regions), rng, partial, stop) if len(search.chains.regions) > 1 else None
    if apart is not None and apart.starts:
        apart.run(round(iterations * APART))
        search.run(iterations - round(iterations * APART))
        layouts = [untangled(ranges, search.chains.regions, pool.layers, rng) for ranges in apart.layouts()]
    else:
        search.run(iterations)
        layouts = []
    return _answer(search, [*layouts, *search.layouts()])


def _apart(pool: Pool, regions: Sequence[Sequence[int]]) -> Pool:
    """The pool without its wires between regions."""
    region = {pool.machines[i].name: number for number, members in enumerate(regions) for i in members}
    inner = (w for w in pool.wires if w.source == SOURCE or w.target == SINK or region[w.source] == region[w.target])
    return replace(pool, wires=tuple(inner))


def crossing(pool: Pool, gives: Throughput, regions: Sequence[Sequence[int]]) -> float:
    """Tokens/s that a region hands to another one, added up over all wires between regions."""
    region = {pool.machines[i].name: number for number, members in enumerate(regions) for i in members}
    return math.fsum(
        flow for (a, b), flow in gives.flows.items() if a != SOURCE and b != SINK and region[a] != region[b]
    )


#: A layout met on the way: tokens/s, network ms, starts, ends.
Met = tuple[float, float, tuple[int, ...], tuple[int, ...]]


@dataclass(slots=True)
class _State:
    start: list[int]
    end: list[int]
    flow: float = 0.0
    ms: float = 0.0
    smooth: float = 0.0


class _Search:
    def __init__(self, pool: Pool, rng: Random, partial: bool, stop: Callable[[], bool]) -> None:
        self.pool = pool
        self.rng = rng
        self.partial = partial
        self.stop = stop
        self.evaluator = Evaluator(pool, partial=partial)
        self.chains = Chains(pool)
        self.most = [min(len(machine.tokens_per_s), pool.layers) for machine in pool.machines]
        wires = self.evaluator.wires
        reach: list[set[int]] = [set(found) for found in wires]
        for i, found in enumerate(wires):
            for j in found:
                reach[j].add(i)
        self.moves = Moves(pool.layers, self.most, [frozenset(r) for r in reach], rng)
        self.tried = 0
        self.met: list[Met] = []

        laid = [rejoined(self.evaluator, *self._laid(chains), stop) for chains in self.chains.best(stop)]
        self.starts = [layout for layout in laid if self.evaluator.flow(*layout)[0] > 0]
        if len(self.starts) < max(len(laid), 1) and (thread := threaded(self.evaluator)) is not None:
            self.starts.append(thread)

    def run(self, iterations: int) -> None:
        states = [self._state(start, end) for start, end in self.starts or [self._even()]]
        scale = max((state.ms for state in states), default=0.0) or 1.0
        rounds = [(state, weight / scale) for weight in WEIGHTS for state in reversed(states)]
        for state, weight in rounds:
            self._anneal(state, weight, iterations // len(rounds))

    def _state(self, start: list[int], end: list[int]) -> _State:
        state = _State(start, end)
        self._weigh(state)
        return state

    def _weigh(self, state: _State) -> None:
        flow, weighted = self.evaluator.flow(state.start, state.end)
        self.tried += 1
        state.flow, state.ms = flow, weighted / flow if flow > 0 else 0.0
        if flow > 0:
            self._meet(state)

    def _meet(self, state: _State) -> None:
        flow, ms = state.flow, state.ms
        for other in self.met:
            if other[0] >= flow - 1e-9 and other[1] <= ms + 1e-9:
                return
        self.met = [other for other in self.met if not (flow >= other[0] and ms <= other[1])]
        self.met.append((flow, ms, tuple(state.start), tuple(state.end)))

    def _anneal(self, begin: _State, weight: float, iterations: int) -> None:
        here = _State(list(begin.start), list(begin.end), begin.flow, begin.ms)
        covered = self.evaluator.coverage(here.start, here.end)
        ceiling = 2 * max(here.flow, 1.0)
        here.smooth = _smooth(covered, ceiling)
        score = here.flow * (1 - weight * here.ms) + SMOOTH * here.smooth
        scale = max(here.flow, bound_tokens_per_s(self.pool) / 4)
        for step in range(iterations):
            if step % 64 == 0 and self.stop():
                return
            temperature = scale * HOT * (COLD / HOT) ** (step / iterations)
            change = self.moves.propose(here.start, here.end)
            if not change:
                continue
            # What it must reach to be taken is drawn first: most proposals fail already by what could pass at best.
            wanted = score + temperature * math.log(1.0 - self.rng.random())
            there = _changed(here, change)
            covered = self.evaluator.coverage(there.start, there.end)
            narrowest = min(covered)
            if narrowest <= 0:
                continue
            there.smooth = _smooth(covered, ceiling)
            if narrowest + SMOOTH * there.smooth < wanted:
                continue
            self._weigh(there)
            reached = there.flow * (1 - weight * there.ms) + SMOOTH * there.smooth
            if reached >= wanted:
                here, score = there, reached

    def _laid(self, chains: Sequence[Chain]) -> tuple[list[int], list[int]]:
        """The layout of chains side by side. A machine in none of them stands at the first layer."""
        start, end = [0] * len(self.most), [min(1, held) for held in self.most]
        for chain in chains:
            at = 0
            for width, team in chain.stages:
                for i in team:
                    start[i], end[i] = at, at + width
                at += width
        return start, end

    def _even(self) -> tuple[list[int], list[int]]:
        """Equal stages as wide as most machines can hold, taken in turn in the order of the regions."""
        order = [i for members in self.chains.regions for i in members if self.most[i]]
        width = max(1, min(self.most[i] for i in order))
        stages = math.ceil(self.pool.layers / width)
        start, end = [0] * len(self.most), [min(1, held) for held in self.most]
        for place, i in enumerate(order):
            stage = place * stages // len(order) if len(order) >= stages else place
            start[i] = min(stage * self.pool.layers // stages, self.pool.layers - 1)
            end[i] = min((stage + 1) * self.pool.layers // stages, self.pool.layers, start[i] + self.most[i])
        return start, end

    def layouts(self) -> list[Ranges]:
        """What was met and nothing else beats, thinned out."""
        return [
            {i: (a, b) for i, (a, b) in enumerate(zip(start, end, strict=True)) if b > a}
            for _, _, start, end in _spread(sorted(self.met), FRONT)
        ]


def _answer(search: _Search, layouts: Sequence[Ranges]) -> Placements:
    pool = search.pool
    found: list[Placement] = []
    for ranges in layouts:
        layout = {pool.machines[i].name: layers for i, layers in sorted(ranges.items())}
        gives = measure(pool, layout, partial=search.partial)
        found.append(Placement(layout, gives, crossing(pool, gives, search.chains.regions)))
    front = _front(found)
    if not front:
        raise TopologyError("no layout found that passes a token from the source to the sink")
    return Placements(front, choose(front), bound_tokens_per_s(pool), search.tried)


def choose(front: Sequence[Placement]) -> Placement:
    """Nearly the most flow, unless staying within regions has the better power and most of the flow.

    Power is throughput over delay (Kleinrock, 1979): leaving a region is worth it where it gains more flow, in
    proportion, than it adds network time. Once tokens do cross, the most flow is taken, but for the last `SLACK` of it,
    which may cost as much time as all the rest.
    """
    most = front[-1].gives.tokens_per_s
    crossed = max((p for p in front if p.gives.tokens_per_s >= (1 - SLACK) * most), key=_power)
    staying = [placement for placement in front if placement.crossing_tokens_per_s == 0]
    if not staying or staying[-1].gives.tokens_per_s < (1 - STAYING) * most:
        return crossed
    return staying[-1] if _power(staying[-1]) >= _power(crossed) else crossed


def _power(placement: Placement) -> float:
    return placement.gives.tokens_per_s / max(placement.gives.network_ms, 1e-9)


def _front(found: Sequence[Placement]) -> tuple[Placement, ...]:
    """Those that no other beats in flow and network time, least flow first."""
    ranked = sorted(found, key=lambda p: (-p.gives.tokens_per_s, p.gives.network_ms))
    kept: list[Placement] = []
    for placement in ranked:
        if placement.gives.tokens_per_s > 0 and (not kept or placement.gives.network_ms < kept[-1].gives.network_ms):
            kept.append(placement)
    return tuple(reversed(kept))


def _spread(ranked: Sequence[Met], count: int) -> list[Met]:
    """At most `count` points of a front (least flow first): both ends, and between them in even steps of flow."""
    if len(ranked) <= count:
        return list(ranked)
    low, high = ranked[0][0], ranked[-1][0]
    wanted = [low + (high - low) * step / (count - 1) for step in range(count)]
    # The next point at or above each step; float steps may end a little above the last.
    found = {next((k for k, met in enumerate(ranked) if met[0] >= flow), len(ranked) - 1) for flow in wanted}
    return [ranked[k] for k in sorted(found)]


def _changed(state: _State, change: Change) -> _State:
    start, end = list(state.start), list(state.end)
    for i, (a, b) in change.items():
        start[i], end[i] = a, b
    return _State(start, end)


def _smooth(covered: Sequence[float], ceiling: float) -> float:
    """A mean that leans to the least, of tokens/s by layer."""
    total = math.fsum((ceiling / min(rate, ceiling)) ** _SHARPNESS if rate > 0 else 1e9 for rate in covered)
    return float(ceiling * (total / len(covered)) ** (-1 / _SHARPNESS))
