"""Which pairs of sites go through a third one, and through which.

A pair goes through a relay where the two cannot reach each other, in either direction, and where the round trip through
it is so much shorter that it pays: routes in the Internet violate the triangle inequality often, because they follow
contracts and not distances (Savage et al., "The end-to-end effects of Internet path selection", SIGCOMM 1999). The path
is the shortest of two links in the graph of measured ones. There is no third link: each relay costs its own line twice,
and nearly all that is to be gained is gained by one (the same paper; also RON, Andersen et al., SOSP 2001).

A pair that is relayed stays so, and with the same relay, until another way is clearly better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import networkx as nx

from topology.snapshot import Link, Snapshot

#: What a relay adds to a round trip: two processes that are woken, read and write. 0.14 ms for 64 bytes and 0.17 ms for
#: 16 KiB (medians of 380 round trips in turns with direct ones, on two cores of an AMD EPYC, a virtual machine), and as
#: much again for a peer that has other work.
RELAY_COST_S: Final = 0.3e-3
#: A detour is taken where it saves so much of the round trip, and at least so long; and left when it saves nothing.
GAIN, GAIN_S = 0.2, 5e-3
#: Another relay is taken when it is so much better than the one in use.
BETTER: Final = 0.2
#: Up to so many sites detours are looked for; above, only ways around what is broken.
LOOKED_THROUGH: Final = 64

Pair = tuple[str, str]


def relays(snapshot: Snapshot, before: Mapping[Pair, str] | None = None) -> dict[Pair, str]:
    """The relay of every pair that needs one; pairs are (lesser name, greater name). `before` is the last answer."""
    before = before or {}
    graph, broken = _measured(snapshot)
    willing = {site.name for site in snapshot.sites if site.relays}
    # Who was relayed stays so while nobody knows whether the direct way works: a site that restarted, say.
    pairs = broken | {pair for pair in before if pair[0] in graph and pair[1] in graph}
    if len(snapshot.sites) <= LOOKED_THROUGH:
        pairs |= {(min(pair), max(pair)) for pair in graph.edges}
    found = {}
    around = {site: {other: edge["rtt_s"] for other, edge in edges.items()} for site, edges in graph.adjacency()}
    for pair in sorted(pairs):
        via = _relay(around[pair[0]], around[pair[1]], willing, around[pair[0]].get(pair[1]), before.get(pair))
        if via is not None:
            found[pair] = via
    return found


def _measured(snapshot: Snapshot) -> tuple[nx.Graph[str], set[Pair]]:
    """The pairs that are measured and reach each other both ways, and those that are known not to."""
    links: dict[Pair, list[Link]] = {}
    for link in snapshot.links:
        links.setdefault((min(link.source, link.target), max(link.source, link.target)), []).append(link)
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(site.name for site in snapshot.sites)
    broken = set()
    for pair, both in links.items():
        if pair[0] not in graph or pair[1] not in graph:
            continue
        if not all(link.reachable for link in both):
            broken.add(pair)
        elif any(link.measured for link in both):
            graph.add_edge(*pair, rtt_s=max(link.rtt_s for link in both if link.measured))
    return graph, broken


def _relay(
    near: Mapping[str, float], far: Mapping[str, float], willing: set[str], direct_s: float | None, former: str | None
) -> str | None:
    ways = {site: near[site] + far[site] + RELAY_COST_S for site in near if site in far and site in willing}
    if not ways:
        return None
    best = min(ways, key=lambda site: (ways[site], site))
    if former in ways and ways[best] >= (1 - BETTER) * ways[former]:
        best = former
    if direct_s is None:
        return best
    if former is not None:
        return best if ways[best] < direct_s else None
    return best if direct_s - ways[best] > max(GAIN_S, GAIN * direct_s) else None
