"""Planning again on a large mesh: only what is left of the plan and the sites near it are looked at first.

After a loss a user waits. What replaces the lost site is nearly always near those that stay, for the ring goes on
through them; where nothing is left, the most capable sites come first. Only where those will not do is the whole mesh
searched.
"""

from __future__ import annotations

import heapq
import math
from typing import Final

from topology.plan import Plan
from topology.snapshot import Site, Snapshot

#: Meshes with more sites than this are narrowed down, to what is left of the plan and so many sites more.
LARGE: Final = 16
NEAR: Final = 8
#: Work that planning again may spend, in units of about 0.1 ms (`topology.search`).
WORK: Final = 1_500


def around(snapshot: Snapshot, previous: Plan | None) -> Snapshot | None:
    """The snapshot of what is left of a plan and the sites nearest to it; None where that is no narrower."""
    if previous is None or len(snapshot.sites) <= LARGE:
        return None
    used = {shard.site for stage in previous.stages for shard in stage.shards}
    used |= {standby.site for standby in previous.standbys}
    present = {site.name for site in snapshot.sites}
    left = used & present
    if not left:
        return _capable(snapshot)
    others = {site.name for site in snapshot.sites if site.name not in left and _has_room(site)}
    nearest_s: dict[str, float] = {}
    for link in snapshot.links:
        if link.source in left and link.target in others and link.reachable and math.isfinite(link.rtt_s):
            nearest_s[link.target] = min(link.rtt_s, nearest_s.get(link.target, math.inf))
    near = heapq.nsmallest(NEAR + len(used) - len(left), nearest_s, key=lambda name: (nearest_s[name], name))
    kept = left | set(near)
    return snapshot.without(present - kept) if len(kept) < len(present) else None


def _has_room(site: Site) -> bool:
    """Whether any device has memory beyond its reserve."""
    return any(device.free_bytes > device.reserve * device.memory_bytes for device in site.devices)


def _capable(snapshot: Snapshot) -> Snapshot:
    """The sites with most memory bandwidth, and with most of it for their price: nothing is left to be near to."""
    speed, value = {}, {}
    for site in snapshot.sites:
        speed[site.name] = sum(device.memory_bandwidth for device in site.devices if device.free_bytes)
        price = site.price_per_hour + sum(device.price_per_hour for device in site.devices)
        value[site.name] = speed[site.name] / price if price > 0 else 0.0
    kept = {
        name
        for figures in (speed, value)
        for name in heapq.nsmallest(NEAR, figures, key=lambda name: (-figures[name], name))
    }
    return snapshot.without({site.name for site in snapshot.sites} - kept)
