"""Which sites to fetch from: those that have most of what is missing and are nearest. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from topology.snapshot import Link

#: Sources asked at once: two fill most links, more only split them; a lost one is replaced.
MAX_SOURCES = 4


def nearest(here: str, sites: Iterable[str], links: Iterable[Link]) -> list[str]:
    """`sites` by how soon a block from them would be here, nearest first; those that cannot be reached come last.

    A block takes half a round trip and its bytes over the bandwidth of the link from there to here.
    """
    seconds: dict[str, float] = {}
    for link in links:
        if here in (link.source, link.target):
            other = link.target if link.source == here else link.source
            takes_s = link.rtt_s / 2 + (1 << 20) / max(link.bandwidth, 1.0) if link.reachable else math.inf
            if link.target == here or other not in seconds:
                seconds[other] = takes_s
    return sorted(set(sites) - {here}, key=lambda site: (seconds.get(site, 1e6), site))
