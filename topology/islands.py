"""Which devices may form a stage together: the layouts of a site, and islands that reach across sites.

A *layout* is what one site (or a cluster of near sites) could contribute to a plan: a few islands, each a stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import networkx as nx

from topology.candidate import Island
from topology.constraints import Constraints
from topology.cost import decode_s, slowest_path
from topology.model import ModelSpec
from topology.picture import Node, Picture
from topology.shares import left_out

#: Clusters of near sites that are tried at most; the ones with the shortest round trip come first.
MAX_CLUSTERS: Final = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Islands of one site or cluster. `widest`: one tensor-parallel island of every device that can take part in it."""

    islands: tuple[Island, ...]
    widest: bool = False

    @property
    def alone(self) -> bool:
        """Whether this is a single device."""
        return len(self.islands) == 1 and len(self.islands[0]) == 1

    @property
    def usable_bytes(self) -> int:
        """Memory of all its devices."""
        return sum(node.usable_bytes for island in self.islands for node in island)


def site_layouts(nodes: Sequence[Node], model: ModelSpec, strategy: str) -> list[Layout]:
    """Layouts of one site: single devices, chains of them, tensor-parallel islands, several of those."""
    orders = _orders(nodes)
    layouts = [Layout(((node,),)) for node in _distinct(nodes)]
    for order in orders:
        layouts += [Layout(tuple((node,) for node in order[:count])) for count in range(2, len(order) + 1)]
    if strategy != "pipeline":
        widest = tensor_island(nodes, model)
        layouts.append(Layout((widest,), widest=True))
        for order in orders:
            for count in range(2, min(len(order), model.heads) + 1):
                layouts.append(Layout((tensor_island(order[:count], model),)))
                several = _chunks(order, count, model)
                layouts += [Layout(several[:many]) for many in range(2, len(several) + 1)]
    return _unique(layouts)


def cluster_layouts(members: Sequence[Sequence[Node]], model: ModelSpec) -> list[Layout]:
    """Tensor-parallel islands that hold at least one device of every member site."""
    layouts = []
    everyone = sorted(itertools.chain.from_iterable(members), key=lambda node: node.rank)
    leaders = sorted((nodes[0] for nodes in members), key=lambda node: node.rank)
    sites = {node.site for node in everyone}
    for group in [everyone[:count] for count in range(2, len(everyone) + 1)] + [leaders]:
        island = tensor_island(group, model)
        if {node.site for node in island} == sites:
            layouts.append(Layout((island,), widest=island == tensor_island(everyone, model)))
    return _unique(layouts)


def tensor_island(nodes: Iterable[Node], model: ModelSpec) -> Island:
    """The nodes fastest first, without those too slow for one KV-head group, or query head, of a share by speed."""
    island = sorted(nodes, key=lambda node: node.rank)[: model.heads]
    while len(island) > 1 and left_out(_units(model, len(island)), [node.speed for node in island]):
        island.pop()  # the slowest gets the least: leaving it out may be enough for the next slowest
    return tuple(island)


def _units(model: ModelSpec, count: int) -> int:
    """What is cut for so many shards: KV-head groups as long as there are enough of them."""
    return model.kv_heads if count <= model.kv_heads else model.heads


def clusters(picture: Picture, model: ModelSpec) -> list[frozenset[str]]:
    """Sets of two or more sites so near each other that tensor parallelism across them may pay for the model.

    It pays below r = T_decode * (1 - 1/n) / L (one-shot all-reduce). Here the sites are only chosen: n is the number of
    devices the set has, the cost model has the last word on each.
    """
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(picture.sites)
    most_s = {name: decode_s(model, picture.nodes[name][-1].speed) / model.layers for name in picture.sites}
    for a, b in itertools.combinations(picture.sites, 2) if model.heads > 1 else ():
        there, back = picture.path(a, b), picture.path(b, a)
        rtt_s = max(there.rtt_s, back.rtt_s)
        if rtt_s < max(most_s[a], most_s[b]) and there.reachable and back.reachable and there.measured:
            graph.add_edge(a, b, rtt=rtt_s)
    found: set[frozenset[str]] = set()
    # A dense mesh has more cliques than can be looked at: enough of them, in a fixed order.
    for clique in itertools.islice(nx.find_cliques(graph), MAX_CLUSTERS):
        for size in range(2, min(len(clique), model.heads, 4) + 1):
            groups = itertools.islice(itertools.combinations(sorted(clique), size), 4 * MAX_CLUSTERS)
            found.update(frozenset(group) for group in groups)
    nearest = sorted(
        found,
        key=lambda group: (
            max(graph.edges[pair]["rtt"] for pair in itertools.combinations(sorted(group), 2)),
            len(group),
            sorted(group),
        ),
    )
    # On a large mesh there are thousands: no more are weighed than are kept.
    paying = (group for group in nearest if _pays(picture, model, group))
    return list(itertools.islice(paying, MAX_CLUSTERS))


def tensor_parallel_rtt_s(model: ModelSpec, speed: float, count: int) -> float:
    """The round trip below which tensor parallelism over `count` devices of this speed pays, in seconds."""
    return decode_s(model, speed) * (1 - 1 / count) / model.layers


def _pays(picture: Picture, model: ModelSpec, group: frozenset[str]) -> bool:
    """The threshold for unequal devices: what the fastest alone needs, less what its share of the island needs."""
    fastest = max(picture.nodes[name][0].speed for name in group)
    every = sum(node.speed for name in group for node in picture.nodes[name])
    rtt_s = max(picture.path(a, b).rtt_s for a, b in itertools.permutations(group, 2))
    if rtt_s >= decode_s(model, fastest) * (1 - fastest / every) / model.layers:
        return False  # not even if all of them took part, which is soon told
    nodes = tensor_island((node for site in sorted(group) for node in picture.nodes[site]), model)
    worst = slowest_path(picture, nodes)
    if len(nodes) < 2 or {node.site for node in nodes} != group or not worst.reachable:
        return False
    share = nodes[0].speed / sum(node.speed for node in nodes)
    return worst.rtt_s < decode_s(model, nodes[0].speed) * (1 - share) / model.layers


def forced_layouts(nodes: Sequence[Node], model: ModelSpec, constraints: Constraints) -> list[Layout]:
    """Layouts under the overrides `stages` and `shards`: every choice of widths that the site's devices allow."""
    widths = _widths(constraints, min(len(nodes), model.heads))
    most = constraints.stages or len(nodes)
    layouts = []
    for order in _orders(nodes):
        for count in range(1, min(most, len(nodes)) + 1):
            for choice in itertools.combinations_with_replacement(sorted(widths, reverse=True), count):
                if sum(choice) <= len(order):
                    starts = itertools.accumulate(choice, initial=0)
                    pairs = zip(starts, choice, strict=False)
                    layouts.append(Layout(tuple(_island(order[start : start + size]) for start, size in pairs)))
    return _unique(layouts)


def forced_clusters(picture: Picture, model: ModelSpec, constraints: Constraints) -> dict[frozenset[str], list[Layout]]:
    """Islands across sites for forced widths that no single site can give, nearest sites first."""
    asked = constraints.shards
    wanted = {asked} if isinstance(asked, int) else set(asked or ())
    most = max((len(nodes) for nodes in picture.nodes.values()), default=0)
    result: dict[frozenset[str], list[Layout]] = {}
    for size in sorted(width for width in wanted if most < width <= model.heads):
        groups = []
        for count in range(2, min(size, len(picture.sites)) + 1):
            for names in itertools.islice(itertools.combinations(picture.sites, count), 4 * MAX_CLUSTERS):
                island = _across([picture.nodes[name] for name in names], size)
                worst = slowest_path(picture, island)
                if len(island) == size and worst.reachable:
                    groups.append((count, worst.rtt_s, names, island))
        for _, _, names, island in sorted(groups)[:MAX_CLUSTERS]:
            result.setdefault(frozenset(names), []).append(Layout((island,)))
    return result


def _across(members: Sequence[Sequence[Node]], size: int) -> Island:
    """The fastest device of every member, filled up with the fastest of the rest."""
    first = [nodes[0] for nodes in members]
    rest = sorted((node for nodes in members for node in nodes[1:]), key=lambda node: node.rank)
    return _island((first + rest)[:size])


def _island(nodes: Iterable[Node]) -> Island:
    return tuple(sorted(nodes, key=lambda node: node.rank))


def _widths(constraints: Constraints, most: int) -> list[int]:
    asked = constraints.shards
    wanted = range(1, most + 1) if asked is None else {asked} if isinstance(asked, int) else set(asked)
    return [width for width in wanted if width <= most]


def _orders(nodes: Sequence[Node]) -> list[list[Node]]:
    """Fastest first, and roomiest first: prefixes of these are the choices of devices that are tried."""
    return [
        sorted(nodes, key=lambda node: node.rank),
        sorted(nodes, key=lambda node: (-node.usable_bytes, node.rank)),
    ]


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    """One of each kind: of devices equally fast and roomy, the first by name stands for all."""
    kinds: dict[tuple[object, ...], Node] = {}
    for node in sorted(nodes, key=lambda node: node.rank):
        kinds.setdefault((node.speed, node.flops, node.usable_bytes, node.pace), node)
    return list(kinds.values())


def _chunks(order: Sequence[Node], count: int, model: ModelSpec) -> tuple[Island, ...]:
    """The order cut into islands of `count` devices; what remains at the end is an island too."""
    cuts = [order[start : start + count] for start in range(0, len(order), count)]
    return tuple(tensor_island(chunk, model) for chunk in cuts)


def _unique(layouts: Iterable[Layout]) -> list[Layout]:
    """Without repeats; a layout that is `widest` in one of its forms stays so."""
    seen: dict[tuple[Island, ...], Layout] = {}
    for layout in layouts:
        known = seen.get(layout.islands)
        seen[layout.islands] = Layout(layout.islands, layout.widest or (known is not None and known.widest))
    return list(seen.values())
