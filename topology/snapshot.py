"""The picture a plan is made from: sites, devices and links at one moment, as an immutable networkx graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import networkx as nx


@dataclass(frozen=True, slots=True)
class Held:
    """Weights that a device has in memory or on its disk: layers `[start, end)` of a model, by name and dtype.

    `kv_heads`, `columns` and `heads` are ranges as in `topology.plan.Shard`. An empty dtype is any: files are cast when
    they are loaded.
    """

    model: str
    dtype: str
    start: int
    end: int
    kv_heads: tuple[int, int]
    columns: tuple[int, int]
    heads: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Decoding:
    """What one-row products cost a device in one dtype, fitted to layers of several widths that it really computed.

    A layer takes `layer_s` whatever its size, `row_s` for each output row of its matrices, and its bytes at `bandwidth`
    bytes/s: short rows are slower a byte than long ones. `together` times as long, 1 or more, where another device of
    the site computes at the same time: cores share memory bandwidth and caches. A step that the device had to wait for
    takes `waking_s` longer: a core that slept is slow at first, and its caches are cold.
    """

    layer_s: float
    row_s: float
    bandwidth: float
    together: float = 1.0
    waking_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Device:
    """A device and its measured speed. `flops` is matrix-product FLOP/s by dtype name; `memory_bandwidth` is bytes/s.

    `memory_bytes` is what jobs may use in all, `free_bytes` what is left of it now. `reserve` is the fraction of
    `memory_bytes` kept back so that the loss of another site can be absorbed; a plan uses it only if nothing else fits.
    `decoding` is by dtype name, and empty where nobody measured it: then decoding is taken to be bound by
    `memory_bandwidth`. `price_per_hour` is in any currency, one for the whole mesh. `load`: the share of its time
    others take. `pace`: how many times as long as measured it takes now, as work shows. `held` is what lies there
    already: of plans equally good, the one that moves less is taken.
    """

    name: str
    kind: str
    vendor: str
    memory_bytes: int
    free_bytes: int
    flops: dict[str, float] = field(hash=False)
    memory_bandwidth: float = 0.0
    reserve: float = 0.2
    price_per_hour: float = 0.0
    load: float = 0.0
    pace: float = 1.0
    held: tuple[Held, ...] = ()
    decoding: dict[str, Decoding] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Site:
    """A site with its devices. `local_rtt_s` and `local_bandwidth` (bytes/s) describe the link between its devices.

    `trusted` is False for a site that must not see what the user keeps to trusted sites. `price_per_hour` is paid where
    any of its devices is used. `relays`: whether it hands on what others cannot send each other directly.
    """

    name: str
    region: str
    devices: tuple[Device, ...]
    local_rtt_s: float = 20e-6
    local_bandwidth: float = 2e9
    trusted: bool = True
    price_per_hour: float = 0.0
    relays: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A directed pair of sites. `rtt_s` is the minimum measured, `jitter_s` its spread, `bandwidth` bytes/s.

    `measured` is False where the RTT is an estimate; `reachable` is False where the pair cannot exchange traffic.
    `age_s` is how long ago the RTT was measured, or last told by who measures it (who tells it again when it changes);
    None for an estimate. It does not count when links are compared. `bandwidth_measured` is False where no transfer has
    shown the bandwidth yet; `transport` is the backend that proved best, empty where none were compared. `via` is the
    site that the pair goes through (`topology.relays`), empty where it goes directly; the figures are the direct ones.
    `directed`: the figures are of this direction alone, from a hand that knows both, and `rtt_s` is twice the one-way
    latency. Otherwise they are one end's word on the pair, to be weighed against the other end's.
    """

    source: str
    target: str
    rtt_s: float
    jitter_s: float = 0.0
    loss: float = 0.0
    bandwidth: float = 125e6
    measured: bool = True
    reachable: bool = True
    directed: bool = False
    age_s: float | None = field(default=None, compare=False)
    bandwidth_measured: bool = False
    transport: str = ""
    via: str = ""


@dataclass(frozen=True)
class Snapshot:
    """Sites and links at one moment. The same sites and links give an equal snapshot, whatever order they came in."""

    sites: tuple[Site, ...]
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(sorted(self.sites, key=lambda site: site.name)))
        object.__setattr__(self, "links", tuple(sorted(self.links, key=lambda link: (link.source, link.target))))

    @property
    def graph(self) -> nx.DiGraph[str]:
        """A frozen digraph: node attribute `site` is the Site, edge attribute `link` the Link."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        for site in self.sites:
            graph.add_node(site.name, site=site)
        for link in self.links:
            if link.source in graph and link.target in graph:
                graph.add_edge(link.source, link.target, link=link)
        nx.freeze(graph)
        return graph

    def without(self, names: Collection[str]) -> Snapshot:
        """The snapshot as if the sites of those names did not exist."""
        kept = tuple(site for site in self.sites if site.name not in names)
        left = {site.name for site in kept}
        return Snapshot(kept, tuple(link for link in self.links if link.source in left and link.target in left))

    def with_freed(self, held_bytes: Mapping[str, int]) -> Snapshot:
        """The snapshot with memory given back: `held_bytes` by `site/device`, never more than a device has."""

        def freed(site: Site, device: Device) -> Device:
            free = device.free_bytes + held_bytes.get(f"{site.name}/{device.name}", 0)
            return replace(device, free_bytes=min(device.memory_bytes, free))

        sites = (replace(site, devices=tuple(freed(site, device) for device in site.devices)) for site in self.sites)
        return Snapshot(tuple(sites), self.links)

    def to_dict(self) -> dict[str, Any]:
        """A JSON document, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Snapshot:
        """Rebuild a snapshot. Raises KeyError or TypeError where the document is not one."""
        sites = tuple(
            Site(**{**site, "devices": tuple(device_from(device) for device in site["devices"])})
            for site in document["sites"]
        )
        return cls(sites, tuple(Link(**link) for link in document["links"]))


_RANGES = ("kv_heads", "columns", "heads")


def device_from(document: dict[str, Any]) -> Device:
    """Rebuild a device from `asdict`. Raises KeyError or TypeError where the document is not one."""
    held = tuple(
        Held(**{**entry, **{key: tuple(entry[key]) for key in _RANGES if entry.get(key) is not None}})
        for entry in document.get("held", ())
    )
    decoding = {dtype: Decoding(**figures) for dtype, figures in document.get("decoding", {}).items()}
    return Device(**{**document, "held": held, "decoding": decoding})
