"""Isthmus's own constants, and memberlist's on the same code, so that a comparison compares algorithms.

memberlist's are those of `DefaultLANConfig` and `DefaultWANConfig` (hashicorp/memberlist, config.go): fixed timeouts, a
probe that lasts a probe interval, `suspicion_mult - 2` confirmations wanted (none where the mesh is too small to give
them, and then the least suspicion holds), deaths believed to whoever says so, and nobody called again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from mesh.gossip.config import Timing

_LAN = Timing(
    fixed=True,
    probe_interval_s=1.0,
    probe_floor_s=1.0,
    probe_crowd_s=1.0,
    direct_default_s=0.5,
    suspicion_mult=4.0,
    suspicion_spread=6.0,
    confirmations=2,
    max_health=7,
    nack_share=1.0,
    helpers=3,
    fanout=3,
    push_gap_s=0.2,
    push_pull_s=30.0,
    dead_gossip_s=30.0,
    greetings=0,
)
_WAN = replace(
    _LAN,
    probe_interval_s=5.0,
    probe_floor_s=5.0,
    probe_crowd_s=5.0,
    direct_default_s=3.0,
    suspicion_mult=6.0,
    confirmations=4,
    fanout=4,
    push_gap_s=0.5,
    push_pull_s=60.0,
    dead_gossip_s=60.0,
)

#: Name -> constants.
PROFILES: Mapping[str, Timing] = MappingProxyType({"isthmus": Timing(), "memberlist-lan": _LAN, "memberlist-wan": _WAN})
