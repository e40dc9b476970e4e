"""Which devices stand by: they hold a shard's weights beside the device that serves it, and take over when it is lost.

The shards with most to load are covered first. A standby is sought at a site that the ring does not depend on, so that
one loss does not take both; among those, where the ring would become slowest by least if it took over. Devices are
matched to shards all at once (the assignment problem, scipy's solver).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

from topology.candidate import Candidate
from topology.cost import TOKEN_BYTES
from topology.model import ModelSpec
from topology.picture import Node, Picture
from topology.plan import Shard, Stage, Standby

#: What being at the same site, or at another site of the ring, counts as, in seconds a token: more than any real ring.
SAME_SITE_S: Final = 1e6
SAME_RING_S: Final = 1e3
#: No standby there at all.
_IMPOSSIBLE_S: Final = 1e9


def place(
    picture: Picture, model: ModelSpec, ring: Candidate, count: int, taken: Collection[str]
) -> tuple[Standby, ...] | None:
    """`count` standbys on devices other than those `taken`, in the order of the shards; None where there are fewer."""
    from scipy.optimize import linear_sum_assignment  # only plans with standbys wait for its import

    stages = ring.stages
    shards = [(index, rank) for index, stage in enumerate(stages) for rank in range(len(stage.shards))]
    shards.sort(key=lambda place: (-_shard(stages, place).memory_bytes, place))
    free = [n for name in picture.sites for n in picture.nodes[name] if n.key not in taken]
    found: list[Standby] = []
    while len(found) < count:
        wanted = shards[: count - len(found)]
        options = [node for node in free if node.key not in {each.key for each in found}]
        if not options:
            return None
        cost = [[_cost(picture, model, ring, place, node) for node in options] for place in wanted]
        matched = [
            (wanted[i], options[j])
            for i, j in zip(*linear_sum_assignment(cost), strict=True)
            if cost[i][j] < _IMPOSSIBLE_S
        ]
        if not matched:
            return None
        found += [
            Standby(node.site, node.name, *place, memory_bytes=_shard(stages, place).memory_bytes)
            for place, node in matched
        ]
    return tuple(sorted(found, key=lambda each: (each.stage, each.rank, each.key)))


def _shard(stages: Sequence[Stage], place: tuple[int, int]) -> Shard:
    return stages[place[0]].shards[place[1]]


def _cost(picture: Picture, model: ModelSpec, ring: Candidate, place: tuple[int, int], node: Node) -> float:
    """Seconds a token would take longer if the node took over, more where one loss could take both."""
    index, rank = place
    stages = ring.stages
    shard = _shard(stages, place)
    if node.real_bytes(node.usable_bytes) < shard.memory_bytes:
        return _IMPOSSIBLE_S
    fit = ring.fits[index]
    served = fit.nodes[rank]
    extra = ring.counts[index] * fit.layer_s * max(served.speed / node.speed - 1, 0.0)
    others = [n.site for n in fit.nodes if n is not served]
    neighbours = [stages[index - 1].lead.site, stages[(index + 1) % len(stages)].lead.site]
    if rank == 0 and len(stages) > 1:
        sizes = [TOKEN_BYTES if i == 0 else model.activation_bytes for i in (index, (index + 1) % len(stages))]
        for other, there, here, size in (
            (neighbours[0], True, node.site, sizes[0]),
            (neighbours[1], False, node.site, sizes[1]),
        ):
            now = picture.path(*((other, served.site) if there else (served.site, other))).transfer_s(size)
            then = picture.path(*((other, here) if there else (here, other))).transfer_s(size)
            extra += then - now
    for other in others:
        extra += 2 * ring.counts[index] * picture.path(other, node.site).one_way_s
    if not math.isfinite(extra):
        return _IMPOSSIBLE_S
    if node.site == shard.site:
        return extra + SAME_SITE_S
    return extra + (SAME_RING_S if node.site in ring.sites else 0.0)
