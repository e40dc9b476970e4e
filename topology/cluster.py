"""The file format of a cluster that is planned for without a mesh: sites, their devices, the links between them.

    {"sites": [{"name": "fra", "region": "eu-central",
                "devices": [{"name": "gpu0", "vendor": "nvidia", "kind": "cuda", "memory_bytes": 85899345920,
                             "flops": {"bfloat16": 3e14}, "memory_bandwidth_bytes_per_s": 2e12, "price_per_hour": 2.5}],
                "local_link": {"rtt_ms": 0.02, "bandwidth_bytes_per_s": 2e11}}, ...],
     "links": [{"from": "fra", "to": "nyc", "rtt_ms": 88, "bandwidth_bytes_per_s": 1.25e8, "loss": 0.001}, ...]}

A link counts for both directions unless the other one is listed too. A pair of sites that is not listed cannot exchange
traffic: a plan never depends on a link that nobody stated. `rtt_ms` is twice the one-way latency of the direction.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from topology.constraints import nearest
from topology.document import Document, FormatError, Name, Whole, check
from topology.picture import (
    MAX_FLOPS,
    MAX_LINK_BANDWIDTH,
    MAX_LOAD,
    MAX_MEMORY_BANDWIDTH,
    MAX_MEMORY_BYTES,
    MAX_PRICE,
    MAX_RTT_S,
)
from topology.snapshot import Device, Link, Site, Snapshot

#: As in `topology.picture`: a link that loses more than this is none.
MAX_LOSS: Final = 0.99

#: The link inside a site that does not state its own: as `topology.snapshot.Site`.
LOCAL_RTT_MS: Final = 0.02
LOCAL_BANDWIDTH: Final = 2e9
#: Bounds on sizes, far above any mesh that could be planned: a file with more is a mistake.
MAX_SITES: Final = 10_000
MAX_DEVICES: Final = 1_000

Rtt = Annotated[float, Field(ge=0, le=MAX_RTT_S * 1e3)]
Bandwidth = Annotated[float, Field(gt=0, le=MAX_LINK_BANDWIDTH)]


class DeviceEntry(Document):
    """A device. `flops` is matrix-product FLOP/s by dtype, all figures as measured; memory is what jobs may use."""

    name: Name
    vendor: str = Field("", max_length=200)
    kind: str = Field("", max_length=200)
    memory_bytes: Whole = Field(ge=0, le=MAX_MEMORY_BYTES, description="0: nothing of the device may be used")
    free_bytes: Whole | None = Field(None, ge=0, le=MAX_MEMORY_BYTES, description="Left of memory_bytes; default: all")
    flops: dict[str, Annotated[float, Field(gt=0, le=MAX_FLOPS)]] = Field(min_length=1)
    memory_bandwidth_bytes_per_s: float = Field(gt=0, le=MAX_MEMORY_BANDWIDTH)
    price_per_hour: float = Field(0.0, ge=0, le=MAX_PRICE)
    load: float = Field(0.0, ge=0, le=MAX_LOAD, description="Share of its time that others take")
    reserve: float = Field(0.0, ge=0, lt=1, description="Share of memory_bytes kept free unless nothing else fits")

    def device(self) -> Device:
        """The value that plans are made from."""
        return Device(
            name=self.name,
            kind=self.kind,
            vendor=self.vendor,
            memory_bytes=self.memory_bytes,
            free_bytes=self.memory_bytes if self.free_bytes is None else min(self.free_bytes, self.memory_bytes),
            flops=dict(self.flops),
            memory_bandwidth=self.memory_bandwidth_bytes_per_s,
            reserve=self.reserve,
            price_per_hour=self.price_per_hour,
            load=self.load,
        )


class LocalLinkEntry(Document):
    """The link between any two devices of a site."""

    rtt_ms: Rtt = LOCAL_RTT_MS
    bandwidth_bytes_per_s: Bandwidth = LOCAL_BANDWIDTH


class SiteEntry(Document):
    """A site with its devices."""

    name: Name
    region: str = Field("", max_length=200)
    devices: list[DeviceEntry] = Field(min_length=1, max_length=MAX_DEVICES)
    local_link: LocalLinkEntry = Field(default_factory=LocalLinkEntry)
    trusted: bool = True
    price_per_hour: float = Field(0.0, ge=0, le=MAX_PRICE, description="paid where any of its devices is used")

    def site(self) -> Site:
        """The value that plans are made from."""
        return Site(
            name=self.name,
            region=self.region,
            devices=tuple(entry.device() for entry in self.devices),
            local_rtt_s=self.local_link.rtt_ms / 1e3,
            local_bandwidth=self.local_link.bandwidth_bytes_per_s,
            trusted=self.trusted,
            price_per_hour=self.price_per_hour,
        )


class LinkEntry(Document):
    """One direction of a pair of sites; both, where the other is not listed."""

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    rtt_ms: Rtt
    bandwidth_bytes_per_s: Bandwidth
    loss: float = Field(0.0, ge=0, le=MAX_LOSS)
    jitter_ms: Rtt = 0.0
    reachable: bool = True

    def link(self, *, back: bool = False) -> Link:
        """The value that plans are made from, or the same for the way back."""
        return Link(
            source=self.target if back else self.source,
            target=self.source if back else self.target,
            rtt_s=self.rtt_ms / 1e3,
            jitter_s=self.jitter_ms / 1e3,
            loss=self.loss,
            bandwidth=self.bandwidth_bytes_per_s,
            reachable=self.reachable,
            directed=True,
        )


class ClusterFile(Document):
    """The whole file."""

    version: Literal[1] = 1
    name: str = Field("", max_length=200)
    sites: list[SiteEntry] = Field(min_length=1, max_length=MAX_SITES)
    links: list[LinkEntry] = Field(default_factory=list)


def read_cluster(document: Any) -> tuple[Snapshot, tuple[str, ...]]:
    """The snapshot that a parsed file describes, and what is to be said about it: which pairs have no link.

    Raises FormatError, one line that names the place, for whatever does not belong in such a file.
    """
    parsed = check(ClusterFile, document)
    known: dict[str, int] = {}
    for index, site in enumerate(parsed.sites):
        if site.name in known:
            raise FormatError(f"sites[{index}].name", f"{site.name!r} is the name of sites[{known[site.name]}] already")
        known[site.name] = index
        devices: dict[str, int] = {}
        for place, device in enumerate(site.devices):
            if device.name in devices:
                raise FormatError(
                    f"sites[{index}].devices[{place}].name",
                    f"{device.name!r} is the name of devices[{devices[device.name]}] already",
                )
            devices[device.name] = place
    links = _links(parsed, known)
    missing = [pair for pair in itertools.combinations(sorted(known), 2) if pair not in links]
    for a, b in missing:
        for source, target in ((a, b), (b, a)):
            links[source, target] = Link(source, target, MAX_RTT_S, reachable=False, directed=True)
    notes: tuple[str, ...] = ()
    if missing:
        some = ", ".join(f"{a} - {b}" for a, b in missing[:3]) + (", ..." if len(missing) > 3 else "")
        pairs = len(known) * (len(known) - 1) // 2
        notes = (f"no link is given for {len(missing)} of {pairs} pairs of sites ({some}): they count as unreachable",)
    return Snapshot(tuple(entry.site() for entry in parsed.sites), tuple(links.values())), notes


def _links(parsed: ClusterFile, known: dict[str, int]) -> dict[tuple[str, str], Link]:
    """Every direction of every listed pair."""
    listed: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(parsed.links):
        for key, name in (("from", entry.source), ("to", entry.target)):
            if name not in known:
                hint = nearest(name, known, "known")
                raise FormatError(f"links[{index}].{key}", f"no site is named {name!r}: {hint}")
        if entry.source == entry.target:
            raise FormatError(f"links[{index}]", f"joins {entry.source!r} to itself: that is its local_link")
        pair = (entry.source, entry.target)
        if pair in listed:
            raise FormatError(f"links[{index}]", f"{pair[0]} -> {pair[1]} is links[{listed[pair]}] already")
        listed[pair] = index
    links = {(entry.target, entry.source): entry.link(back=True) for entry in parsed.links}
    return links | {(entry.source, entry.target): entry.link() for entry in parsed.links}
