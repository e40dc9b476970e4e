"""Abstract requirements instead of hardware names: "matmul-throughput" rather than a vendor's product.

Each need is a figure of a device, measured or stated. A device meets it where its figure is within a factor of two of
the best among the devices that the other constraints allow; it has to meet every need that is asked.

| need | figure of a device |
|---|---|
| `matmul-throughput` | FLOP/s of matrix products in the model's dtype |
| `memory-bandwidth` | bytes/s |
| `memory` | free bytes |
| `low-latency` | the median round trip from its site to the other allowed sites that were measured, low |
| `low-price` | price an hour, low |

A factor of two, because measured figures repeat to some per cent and generations of hardware differ by more than two.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from topology.snapshot import Device, Link, Site

#: How far from the best a device may be.
FACTOR: Final = 2.0

Candidates = Sequence[tuple[Site, Device]]


def meeting(
    devices: Candidates, links: Collection[Link], needs: Collection[str], dtype: str
) -> tuple[frozenset[tuple[str, str]], tuple[str, ...]]:
    """(site, device) pairs that meet all needs, and a note for each need on how many are left and at what figure."""
    kept = frozenset((site.name, device.name) for site, device in devices)
    notes = []
    for need in sorted(needs):
        figures, unit, low = _figures(devices, links, need, dtype)
        if not figures:
            continue
        best = min(figures.values()) if low else max(figures.values())
        bound = best * FACTOR if low else best / FACTOR
        good = {pair for pair, value in figures.items() if (value <= bound if low else value >= bound)}
        kept &= good
        side = "at most" if low else "at least"
        notes.append(f"needs {need}: {len(good)} of {len(devices)} devices have {side} {bound:.3g} {unit}")
    return kept, tuple(notes)


def _figures(
    devices: Candidates, links: Collection[Link], need: str, dtype: str
) -> tuple[Mapping[tuple[str, str], float], str, bool]:
    """The figure of every device, its unit, and whether low is good."""
    if need == "low-latency":
        sites = sorted({site.name for site, _ in devices})
        medians = {name: _median_ms(name, sites, links) for name in sites}
        known = [value for value in medians.values() if value is not None]
        worst = max(known, default=0.0)
        # A site nobody measured is taken for the farthest.
        far = {name: worst if value is None else value for name, value in medians.items()}
        return {(site.name, device.name): far[site.name] for site, device in devices}, "ms", True
    if need == "low-price":
        return {(site.name, device.name): device.price_per_hour for site, device in devices}, "an hour", True

    def figure(device: Device) -> float:
        if need == "matmul-throughput":
            return device.flops.get(dtype, min(device.flops.values()))
        return float(device.memory_bandwidth if need == "memory-bandwidth" else device.free_bytes)

    unit = {"matmul-throughput": f"FLOP/s in {dtype}", "memory-bandwidth": "bytes/s", "memory": "free bytes"}[need]
    return {(site.name, device.name): figure(device) for site, device in devices}, unit, False


def _median_ms(name: str, sites: Collection[str], links: Collection[Link]) -> float | None:
    others = set(sites) - {name}
    ends = [
        (link.target if link.source == name else link.source, link.rtt_s * 1e3)
        for link in links
        if name in (link.source, link.target) and link.measured and link.reachable
    ]
    rtts: dict[str, float] = {}
    for other, rtt_ms in ends:
        if other in others:
            rtts[other] = max(rtt_ms, rtts.get(other, 0.0))
    return statistics.median(rtts.values()) if rtts else None
