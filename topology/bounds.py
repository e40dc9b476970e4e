"""What no plan on certain devices can beat: seconds a token, tokens a second of one ring, and of any number of rings.

A layer reads `b` bytes for a token and takes `o` seconds besides. An island of speed `S` that carries `n` layers at a
pace of `T` seconds between tokens has n * (o + b / S) <= T. Hence, for one ring: the least T at which the sites' layers
add up to the model, where what a site carries is the best of all ways to make islands of its devices as if all were as
fast as its fastest, and no more than all its speed together allows. Speed that is left may go into islands across
sites, whose all-reduces take as long as to the nearest other site at least. For any number of rings: S / (b + o * S)
layers a second are most where every island is a single device, since the function is concave.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Final

from topology.cost import all_reduces_s, attention_bytes, kv_bytes, mlp_bytes, overhead_s
from topology.model import ModelSpec
from topology.picture import Picture

#: Steps of bisection for the pace of a ring: to 0.1 % over six orders of magnitude.
STEPS: Final = 26
#: Ways to make islands are weighed for sites of up to so many devices.
WEIGHED: Final = 64


@dataclass(frozen=True, slots=True)
class Bounds:
    """`token_s` is least, rates are tokens/s and most: of a single ring, and of rings without number."""

    token_s: float
    ring_rate: float
    rate: float


def bounds(picture: Picture, model: ModelSpec, context: int, requests: int = 1) -> Bounds:
    """The bounds on any plan of these devices, for KV caches of `context` tokens for so many requests."""
    token_s = _token_s(picture, model)
    read = attention_bytes(model, model.kv_heads) + mlp_bytes(model, model.intermediate)
    read_bytes = read + kv_bytes(model, model.kv_heads, context) / 2
    every = [node for nodes in picture.nodes.values() for node in nodes]
    layers_s = math.fsum(1 / (overhead_s([node]) + read_bytes / node.speed) for node in every)
    rate = layers_s / model.layers
    pace_s = _ring_s(picture, model, read_bytes, context * requests)
    return Bounds(token_s, min(1 / pace_s, rate) if pace_s else rate, rate)


def _ring_s(picture: Picture, model: ModelSpec, read_bytes: float, tokens: int) -> float:
    """The least seconds between tokens of one ring; 0.0 where memory alone forbids it."""
    held = model.layer_bytes + kv_bytes(model, model.kv_heads, tokens)
    sites = []
    for name, nodes in picture.nodes.items():
        reduces = tuple(all_reduces_s(picture, model, nodes[:1] * count) for count in range(1, len(nodes) + 1))
        least_s = min(overhead_s([node]) for node in nodes)
        speed, room = math.fsum(node.speed for node in nodes), sum(node.usable_bytes for node in nodes) / held
        sites.append((speed, room, least_s, nodes[0].speed, reduces, _across_s(picture, model, name)))

    def carried(pace_s: float) -> int:
        total, spare = 0, 0.0
        for speed, room, least_s, fastest, reduces, across_s in sites:
            left_s = max(pace_s - least_s, 0.0)
            most = math.floor(min(speed * left_s / read_bytes, room) * (1 + 1e-9))
            if most and len(reduces) <= WEIGHED:
                most = min(most, _carried(pace_s, least_s, read_bytes / fastest, reduces))
            total += most
            # What no whole layer took may take part in islands across sites, where a layer costs more than inside.
            if left_s > across_s:
                spare += max(speed - most * read_bytes / left_s, 0.0) * (left_s - across_s) / read_bytes
        return min(total + math.floor(spare * (1 + 1e-9)), math.floor(math.fsum(site[1] for site in sites)))

    low = read_bytes / math.fsum(site[0] for site in sites)
    high = max(site[2] + read_bytes / site[3] for site in sites) * model.layers
    if carried(high) < model.layers:
        return 0.0
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if carried(middle) >= model.layers else (middle, high)
    return low


def _across_s(picture: Picture, model: ModelSpec, name: str) -> float:
    """Seconds that all-reduces of a layer take at least in an island of this site's devices and another's."""
    size = model.activation_bytes
    return 2 * min(
        (
            max(picture.path(name, other).transfer_s(size), picture.path(other, name).transfer_s(size))
            for other in picture.nodes
            if other != name
        ),
        default=math.inf,
    )


@functools.lru_cache(maxsize=4096)
def _carried(pace_s: float, least_s: float, read_s: float, reduces_s: tuple[float, ...]) -> int:
    """Layers that equal devices carry at a pace, as the best islands: `read_s` is a layer's reading on one of them."""
    by_size = [
        math.floor(pace_s / (least_s + read_s / size + reduces_s[size - 1]) * (1 + 1e-9))
        for size in range(1, len(reduces_s) + 1)
    ]
    best = [0]
    for count in range(1, len(reduces_s) + 1):
        best.append(max(by_size[size - 1] + best[count - size] for size in range(1, count + 1)))
    return best[-1]


def _token_s(picture: Picture, model: ModelSpec) -> float:
    """Seconds a token that no plan comes below.

    A token reads every layer once: at best from all devices of a site at the sum of their speeds, the fastest sites
    first and as far as their memory goes; where an island could reach across sites, from all devices of the mesh. Sites
    that memory makes necessary are reached over the shortest hop of all.
    """
    layer = model.layer_bytes - 2 * model.row_bytes
    every = math.fsum(node.speed for nodes in picture.nodes.values() for node in nodes)
    sites = sorted(
        (-sum(n.speed for n in nodes), sum(n.usable_bytes for n in nodes)) for nodes in picture.nodes.values()
    )
    hops_s = [path.one_way_s for (a, b), path in picture.paths.items() if a != b]
    nearest_s = min(hops_s, default=0.0)
    least_s = model.layers * min(overhead_s([node]) for nodes in picture.nodes.values() for node in nodes)
    if 2 * nearest_s < layer / -sites[0][0]:
        return model.layers * layer / every + least_s
    total_s, left = least_s, model.layers
    for speed, room in sites:
        taken = min(left, room // layer)
        total_s += taken * layer / -speed
        left -= taken
    total_s += left * layer / -sites[0][0]
    rooms = itertools.accumulate(sorted((room for _, room in sites), reverse=True))
    needed = next((count for count, room in enumerate(rooms, 1) if room >= model.layers * layer), 1)
    return total_s + (needed * nearest_s if needed > 1 else 0.0)
