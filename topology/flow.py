"""Serving one model with many machines at once, as a flow of tokens: the problem, a layout, and what a layout gives.

Every machine holds one run of layers. A token enters at a machine that holds layer 0, goes on to one that starts where
the last one ended, and leaves behind the last layer. A machine passes as many tokens a second as it was measured to
with so many layers, a wire as many as fit through its bandwidth; the most that gets through is a maximum flow. This is
the objective of Helix (Mei et al., ASPLOS 2025, arXiv:2406.01566), which leaves out what a token waits for on its way.
Here it is said beside it: of all the ways to send the most tokens, the one with the least network time is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import networkx as nx

from topology.errors import TopologyError

#: Names of the two ends of every token's way, as in Helix' cases. No machine may be called so.
SOURCE: Final = "source"
SINK: Final = "sink"
#: The cheapest maximum flow is found in whole numbers (networkx' network simplex needs them): these make them fine
#: enough that rounding stays below a thousandth of a token a second and of a millisecond.
_FLOW_UNITS: Final = 1_000
_MS_UNITS: Final = 10_000

#: Machine name -> the layers `[start, end)` it holds. A machine that is not named holds none.
Layout = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Machine:
    """`tokens_per_s[k - 1]` is what it passes while it holds k layers; its length is the most layers it can hold."""

    name: str
    tokens_per_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Wire:
    """One direction between two machines, or from `SOURCE`, or to `SINK`: its capacity and one token's time on it."""

    source: str
    target: str
    tokens_per_s: float
    ms: float


@dataclass(frozen=True)
class Pool:
    """Machines and wires that serve a model of `layers` layers.

    Raises TopologyError where names repeat, a wire ends nowhere, or a figure is not finite or below zero.
    """

    layers: int
    machines: tuple[Machine, ...]
    wires: tuple[Wire, ...]

    def __post_init__(self) -> None:
        names = [machine.name for machine in self.machines]
        if self.layers < 1:
            raise TopologyError(f"a model has at least one layer, not {self.layers}")
        if len({*names, SOURCE, SINK}) != len(names) + 2:
            raise TopologyError("every machine needs a name of its own, other than 'source' and 'sink'")
        if any(not math.isfinite(value) or value < 0 for machine in self.machines for value in machine.tokens_per_s):
            raise TopologyError("what a machine passes must be finite and not below zero")
        known, seen = set(names), set[tuple[str, str]]()
        for wire in self.wires:
            if wire.source not in known | {SOURCE} or wire.target not in known | {SINK}:
                raise TopologyError(f"the wire {wire.source} -> {wire.target} ends at no machine of the pool")
            if (wire.source, wire.target) in seen:
                raise TopologyError(f"the wire {wire.source} -> {wire.target} is given twice")
            if not (math.isfinite(wire.tokens_per_s) and math.isfinite(wire.ms)) or min(wire.tokens_per_s, wire.ms) < 0:
                raise TopologyError(f"the wire {wire.source} -> {wire.target} has a figure not finite or below zero")
            seen.add((wire.source, wire.target))


@dataclass(frozen=True)
class Throughput:
    """What a layout gives: tokens/s through all machines, the mean network time of a token, and the flow by wire.

    `network_ms` sums latency and transmission over every wire of a token's way, from the source and to the sink, and
    is weighted by flow; 0 where nothing flows. It is that of the cheapest of all maximum flows.
    """

    tokens_per_s: float
    network_ms: float
    flows: Mapping[tuple[str, str], float]


def joins(end: int, start: int, stop: int, *, partial: bool) -> bool:
    """Whether a token that has passed layer `end` may go on to a machine that holds `[start, stop)`.

    `partial`: also into the middle of what it holds (Helix calls this partial inference); else only at its start.
    """
    return start <= end < stop if partial else start == end


def check_layout(pool: Pool, layout: Layout) -> None:
    """Raises TopologyError where a layout names a machine that is not there, or gives it what it cannot hold."""
    most = {machine.name: len(machine.tokens_per_s) for machine in pool.machines}
    for name, (start, end) in layout.items():
        if name not in most:
            raise TopologyError(f"the layout names {name!r}, which is no machine of the pool")
        if not 0 <= start < end <= pool.layers or end - start > most[name]:
            raise TopologyError(
                f"{name} cannot hold [{start}, {end}): it holds up to {most[name]} of {pool.layers} layers"
            )


def flow_graph(pool: Pool, layout: Layout, *, partial: bool = False) -> nx.DiGraph[str]:
    """The edges of a layout, with `capacity` (tokens/s) and `ms`. A machine is the edge `in NAME`, `out NAME`."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from((SOURCE, SINK))
    for machine in pool.machines:
        if machine.name in layout:
            start, end = layout[machine.name]
            capacity = machine.tokens_per_s[end - start - 1]
            graph.add_edge(f"in {machine.name}", f"out {machine.name}", capacity=capacity, ms=0.0)
    for wire in pool.wires:
        end = 0 if wire.source == SOURCE else layout.get(wire.source, (0, -1))[1]
        start, stop = (pool.layers, pool.layers + 1) if wire.target == SINK else layout.get(wire.target, (-2, -2))
        # A token enters at layer 0 whatever the rule: there is nothing before it that another machine could have done.
        if joins(end, start, stop, partial=partial):
            source = SOURCE if wire.source == SOURCE else f"out {wire.source}"
            target = SINK if wire.target == SINK else f"in {wire.target}"
            graph.add_edge(source, target, capacity=wire.tokens_per_s, ms=wire.ms)
    return graph


def tokens_per_s(pool: Pool, layout: Layout, *, partial: bool = False) -> float:
    """The maximum flow of a layout."""
    value, _ = nx.maximum_flow(flow_graph(pool, layout, partial=partial), SOURCE, SINK)
    return float(value)


def measure(pool: Pool, layout: Layout, *, partial: bool = False) -> Throughput:
    """The maximum flow of a layout, sent the way that waits least on the network.

    Raises TopologyError as `check_layout` does.
    """
    check_layout(pool, layout)
    graph = flow_graph(pool, layout, partial=partial)
    value, _ = nx.maximum_flow(graph, SOURCE, SINK)
    if value <= 0:
        return Throughput(0.0, 0.0, {})
    whole: nx.DiGraph[str] = nx.DiGraph()
    for source, target, edge in graph.edges(data=True):
        # No edge carries more than everything: keeps the whole numbers small.
        capacity = min(edge["capacity"], value)
        whole.add_edge(source, target, capacity=round(capacity * _FLOW_UNITS), weight=round(edge["ms"] * _MS_UNITS))
    cheapest = nx.max_flow_min_cost(whole, SOURCE, SINK)
    sent = sum(cheapest[SOURCE].values())
    if sent == 0:
        return Throughput(float(value), 0.0, {})
    used = {
        (source, target): units
        for source, targets in cheapest.items()
        for target, units in targets.items()
        if units and not (source.startswith("in ") and target.startswith("out "))
    }
    network_ms = math.fsum(units * graph[a][b]["ms"] for (a, b), units in used.items()) / sent
    flows = {(a.removeprefix("out "), b.removeprefix("in ")): units / _FLOW_UNITS for (a, b), units in used.items()}
    return Throughput(float(value), network_ms, flows)


def bound_tokens_per_s(pool: Pool) -> float:
    """No layout passes more: the least of what can come in, what can go out, and what the machines can compute.

    With F tokens/s in all, a machine with k layers does at most k * min(F, its tokens/s) layers a second, and
    `layers` * F are due. The largest F for which the machines' best add up to that is found by halving.
    """
    ends = [
        math.fsum(wire.tokens_per_s for wire in pool.wires if (wire.source if entering else wire.target) == end)
        for end, entering in ((SOURCE, True), (SINK, False))
    ]

    def enough(flow: float) -> bool:
        done = (
            max((k * min(flow, rate) for k, rate in enumerate(machine.tokens_per_s, start=1)), default=0.0)
            for machine in pool.machines
        )
        return math.fsum(done) >= pool.layers * flow

    low, high = 0.0, compute_bound_tokens_per_s(pool)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return min(high, *ends)


def compute_bound_tokens_per_s(pool: Pool) -> float:
    """Helix' own bound: every machine at its best number of layers, as if none ever waited for another."""
    best = (max((k * rate for k, rate in enumerate(m.tokens_per_s, 1)), default=0.0) for m in pool.machines)
    return math.fsum(best) / pool.layers
