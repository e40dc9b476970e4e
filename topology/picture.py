"""The planner's view of a snapshot: devices that can be used, what they hold and how fast, and the path of every pair.

Numbers in a snapshot come from other peers. Each is held to bounds before anything is computed from it; a device with
an impossible number is left out, a link with one counts as not measured, and both are named in `Picture.notes`. So one
broken or lying peer cannot stop the others from planning.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from topology.constraints import Constraints
from topology.eligible import allowed_device, allowed_sites
from topology.errors import TopologyError
from topology.model import DTYPE_BYTES, ModelSpec, in_float32
from topology.needs import meeting
from topology.relays import RELAY_COST_S
from topology.snapshot import Decoding, Device, Link, Site, Snapshot

#: Bounds of what is believed: a minute of round trip, 10 TB/s of link, 1 EB of memory, 1 PB/s, 1 ZFLOP/s.
MAX_RTT_S: Final = 60.0
MAX_LINK_BANDWIDTH: Final = 1e13
MAX_MEMORY_BYTES: Final = 2**60
MAX_MEMORY_BANDWIDTH: Final = 1e15
MAX_FLOPS: Final = 1e21
#: No link is as old as 30 years.
MAX_AGE_S: Final = 1e9
#: A device busier than this is no device to plan with.
MAX_LOAD: Final = 0.99
#: Nor is one that takes so many times as long as was measured.
MAX_PACE: Final = 100.0
#: Seconds of a layer, or of a row of a matrix, beside its bytes: more is no device to decode on.
MAX_LAYER_S: Final = 1.0
#: Devices of a site do not hold one another up more than this.
MAX_TOGETHER: Final = 8.0
#: Most that an hour of a device or a site is believed to cost.
MAX_PRICE: Final = 1e6

#: Round trip of a pair nobody measured, where no pair was: about the longest between AWS regions (Frankfurt-Sydney,
#: 282 ms; cloudping.co, January 2019). Where any pair was measured, the largest measured round trip is taken instead.
UNMEASURED_RTT_S: Final = 0.3
#: Bandwidth of a pair nobody measured: 100 Mbit/s.
UNMEASURED_BANDWIDTH: Final = 12.5e6
#: Link between devices of a site whose own figures are impossible: a slow local network.
LOCAL_RTT_S: Final = 1e-3
LOCAL_BANDWIDTH: Final = 125e6


@dataclass(frozen=True, slots=True)
class Node:
    """A usable device. `speed` is weight bytes/s in decoding, `flops` FLOP/s, `usable_bytes` what a plan may take.

    `layer_s` is what a layer costs beside its bytes, None where nobody measured it, and `row_s` a row of the head.
    `together`: how many times as long it takes beside another device of its site that computes at the same time.
    `waking_s`: what a token takes longer where the device had to wait for it.

    `dtype` is what it holds weights in where that is not the model's own. Its figures are then in the model's terms: a
    byte of the model's takes `scale` bytes there, and besides `extra_bytes` are taken by what is in float32 anyway.
    """

    site: str
    name: str
    speed: float
    flops: float
    usable_bytes: int
    price_per_hour: float = 0.0
    layer_s: float | None = None
    row_s: float = 0.0
    together: float = 1.0
    waking_s: float = 0.0
    dtype: str = ""
    scale: float = 1.0
    extra_bytes: int = 0
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.site, self.name)))

    def __hash__(self) -> int:
        """Of the names alone, which are unique in a picture: islands are looked up by the ten thousand."""
        return self._hash

    @property
    def key(self) -> str:
        """`site/device`, as `topology.plan.Shard.key`."""
        return f"{self.site}/{self.name}"

    def real_bytes(self, counted: int) -> int:
        """What so many bytes, counted in the model's dtype, take in this device's."""
        return counted if self.scale == 1 else math.ceil(counted * self.scale) + self.extra_bytes

    @property
    def pace(self) -> tuple[float | None, float, float]:
        """What is measured of its decoding beside `speed`: devices that are alike are alike in this too."""
        return self.layer_s, self.row_s, self.together

    @property
    def rank(self) -> tuple[float, str, str]:
        """Sorts fastest first, then by name."""
        return (-self.speed, self.site, self.name)


@dataclass(frozen=True, slots=True)
class Path:
    """One direction of a pair. `one_way_s` is expected latency with jitter and loss, infinite where unreachable.

    Where the pair goes through a relay the figures are of both links and the relay.
    """

    one_way_s: float
    bandwidth: float
    rtt_s: float
    measured: bool = True

    @property
    def reachable(self) -> bool:
        """Whether the pair can exchange traffic at all."""
        return math.isfinite(self.one_way_s)

    def transfer_s(self, size_bytes: float) -> float:
        """Seconds until `size_bytes` have arrived at the other end."""
        return self.one_way_s + size_bytes / self.bandwidth


@dataclass(frozen=True)
class Picture:
    """Usable devices by site (fastest first), paths between sites (a site to itself: between its devices), notes.

    `origin` is the site where the job was submitted, if known.
    """

    nodes: Mapping[str, tuple[Node, ...]]
    paths: Mapping[tuple[str, str], Path]
    notes: tuple[str, ...]
    origin: str | None = None
    site_prices: Mapping[str, float] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites with at least one usable device, sorted."""
        return tuple(sorted(self.nodes))

    def path(self, source: str, target: str) -> Path:
        """The path from one site to another."""
        return self.paths[source, target]

    def waking_s(self, site: str) -> float:
        """Seconds that a stage led from the site takes longer because it waits for the other stages."""
        return self.waking.get(site, 0.0)

    @cached_property
    def waking(self) -> Mapping[str, float]:
        """The same by site: that of its slowest device to wake."""
        return {name: max(node.waking_s for node in nodes) for name, nodes in self.nodes.items()}

    def without(self, keys: Collection[str]) -> Picture:
        """The picture as if the devices of those `site/device` keys did not exist."""
        kept = {name: tuple(node for node in nodes if node.key not in keys) for name, nodes in self.nodes.items()}
        return replace(self, nodes={name: nodes for name, nodes in kept.items() if nodes})

    def price_per_hour(self, nodes: Iterable[Node]) -> float:
        """What these devices and their sites cost an hour, together."""
        used = list(nodes)
        sites = {node.site for node in used}
        return math.fsum([n.price_per_hour for n in used] + [self.site_prices.get(name, 0.0) for name in sites])

    @property
    def usable_bytes(self) -> int:
        """What all usable devices may give, together."""
        return sum(node.usable_bytes for nodes in self.nodes.values() for node in nodes)


def look(
    snapshot: Snapshot,
    model: ModelSpec,
    constraints: Constraints,
    *,
    reserve: bool = True,
    ignore_unreachable: bool = False,
    origin: str | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Picture:
    """The picture under the constraints that choose sites and devices.

    `dtypes`: what devices hold weights in, by `site/device`; a device that was not measured in that is left out.

    `reserve`: keep each device's reserve free. `ignore_unreachable` treats cut pairs as not measured, to find out what
    they cost. Raises TopologyError where the snapshot names a site or a device twice.
    """
    allowed = allowed_sites(snapshot, constraints)
    sites = [site for site in snapshot.sites if site.name in allowed]
    notes: list[str] = []
    sound = [(site, device) for site in sites for device in _sound(site, constraints, notes)]
    if constraints.needs:
        met, said = meeting(sound, snapshot.links, constraints.needs, model.dtype)
        sound = [(site, device) for site, device in sound if (site.name, device.name) in met]
        notes += said
    nodes: dict[str, tuple[Node, ...]] = {}
    for site in sites:
        found = (
            _held(site, device, model, reserve, notes, (dtypes or {}).get(f"{site.name}/{device.name}", model.dtype))
            for owner, device in sound
            if owner is site
        )
        usable = tuple(sorted((node for node in found if node is not None), key=lambda node: node.rank))
        if usable:
            nodes[site.name] = usable
    prices = {site.name: site.price_per_hour for site in sites if _within(site.price_per_hour, MAX_PRICE, zero=True)}
    paths = _paths(snapshot, sorted(nodes), ignore_unreachable, notes)
    return Picture(nodes, paths, tuple(notes), origin, prices)


def _within(value: object, most: float, *, zero: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    return (value >= 0 if zero else value > 0) and value <= most


def _sound(site: Site, constraints: Constraints, notes: list[str]) -> list[Device]:
    """The devices that may be planned with, by name."""
    if len({device.name for device in site.devices}) != len(site.devices):
        raise TopologyError(f"site {site.name} names a device twice: give its devices different names")
    sound = []
    for device in sorted(site.devices, key=lambda device: device.name):
        problem = _problem(device)
        if problem:
            notes.append(f"{site.name}/{device.name} left out: {problem}")
        elif allowed_device(device, constraints):
            sound.append(device)
    return sound


def _held(  # noqa: PLR0917 - `_node` with one thing more
    site: Site, device: Device, model: ModelSpec, reserve: bool, notes: list[str], dtype: str
) -> Node | None:
    """The node of a device that holds the model's weights in `dtype`, its figures in terms of the model's own."""
    if dtype == model.dtype:
        return _node(site, device, model, reserve, notes)
    node = _node(site, device, replace(model, dtype=dtype), reserve, notes) if dtype in device.flops else None
    if node is None:
        return None
    scale = DTYPE_BYTES[dtype] / DTYPE_BYTES[model.dtype]
    # Norms compute in float32 and logits are in it, whatever the dtype: what is counted for them does not shrink.
    extra = math.ceil(max(1 - scale, 0.0) * in_float32(model))
    usable = max(math.floor((node.usable_bytes - extra) / scale), 0)
    if not usable:
        return None
    return replace(node, speed=node.speed / scale, usable_bytes=usable, dtype=dtype, scale=scale, extra_bytes=extra)


def _node(site: Site, device: Device, model: ModelSpec, reserve: bool, notes: list[str]) -> Node | None:
    flops = device.flops.get(model.dtype)
    if flops is None:
        flops, instead = _derived(device, model.dtype)
        notes.append(f"{site.name}/{device.name} has no measured {model.dtype} speed, {instead} is assumed")
    # At a batch of one a weight is read once for two operations: the roofline's lower branch is nearly always it.
    idle = (1 - device.load) / device.pace
    speed, layer_s = min(device.memory_bandwidth, flops * model.weight_bytes / 2), None
    row_s, together, waking_s = model.row_bytes / speed, 1.0, 0.0
    measured = device.decoding.get(model.dtype)
    if measured is not None and model.weight_bytes == model.element_bytes:
        if _decodes(measured):
            speed, layer_s = _decoding(measured, model)
            layer_s /= idle
            row_s, together = measured.row_s + model.row_bytes / measured.bandwidth, measured.together
            waking_s = measured.waking_s
        else:
            notes.append(f"{site.name}/{device.name} tells impossible times of {model.dtype} layers; they do not count")
    speed *= idle
    free = min(device.free_bytes, device.memory_bytes)
    kept = device.reserve * device.memory_bytes if reserve else 0.0
    usable = max(math.floor(free - kept), 0)
    if not usable:
        return None
    if device.pace != 1.0:
        notes.append(f"{site.name}/{device.name} takes {device.pace:.2f} times as long as it was measured to, now")
    row_s /= idle
    price = device.price_per_hour
    return Node(site.name, device.name, speed, flops * idle, usable, price, layer_s, row_s, together, waking_s)


def _decodes(measured: Decoding) -> bool:
    return (
        _within(measured.layer_s, MAX_LAYER_S, zero=True)
        and _within(measured.row_s, MAX_LAYER_S, zero=True)
        and _within(measured.bandwidth, MAX_MEMORY_BANDWIDTH)
        and _within(measured.together, MAX_TOGETHER)
        and _within(measured.waking_s, MAX_LAYER_S, zero=True)
        and measured.together >= 1.0
    )


def _decoding(measured: Decoding, model: ModelSpec) -> tuple[float, float]:
    """Bytes/s of this model's layers, and the seconds of a layer that do not shrink with a shard's share of it.

    A shard has fewer rows of q, k, v, gate and up; of o and down it has fewer columns, and all the rows.
    """
    cut_rows = (model.heads + 2 * model.kv_heads) * model.head_dim + 2 * model.intermediate
    weights = (model.layer_parameters - 2 * model.hidden) * model.weight_bytes
    speed = weights / (cut_rows * measured.row_s + weights / measured.bandwidth)
    return speed, measured.layer_s + 2 * model.hidden * measured.row_s


def _derived(device: Device, dtype: str) -> tuple[float, str]:
    """FLOP/s for a dtype that was not measured, never more than plausible, and the words that say where it comes from.

    The two dtypes of sixteen bits run alike but on CPUs, many of which have units for one of them only; a wider dtype
    than the measured one takes as much longer as it is wider; a narrower one is not assumed to be faster, for a device
    without hardware for it converts.
    """
    alike = {"float16": "bfloat16", "bfloat16": "float16"}.get(dtype, "")
    if alike in device.flops and device.kind != "cpu":
        return device.flops[alike], f"that of {alike}"
    slowest = min(device.flops, key=lambda name: (device.flops[name], name))
    factor = min(1.0, DTYPE_BYTES.get(slowest, 1) / DTYPE_BYTES[dtype])
    share = "" if factor == 1 else f"{factor:g} times "
    return device.flops[slowest] * factor, f"{share}that of {slowest}, its slowest dtype,"


def _problem(device: Device) -> str:
    """Why a device cannot be planned with, or an empty string."""
    if not _within(device.memory_bytes, MAX_MEMORY_BYTES):
        return f"memory_bytes is {device.memory_bytes}"
    if not _within(device.free_bytes, MAX_MEMORY_BYTES, zero=True):
        return f"free_bytes is {device.free_bytes}"
    if not _within(device.memory_bandwidth, MAX_MEMORY_BANDWIDTH):
        return f"memory_bandwidth is {device.memory_bandwidth}"
    if not _within(device.reserve, 1.0, zero=True):
        return f"reserve is {device.reserve}"
    if not _within(device.price_per_hour, MAX_PRICE, zero=True):
        return f"price_per_hour is {device.price_per_hour}"
    if not _within(device.load, MAX_LOAD, zero=True):
        return f"load is {device.load}"
    if not _within(device.pace, MAX_PACE):
        return f"pace is {device.pace}"
    if not device.flops:
        return "no measured flops"
    for dtype, value in sorted(device.flops.items()):
        if not _within(value, MAX_FLOPS):
            return f"flops of {dtype} is {value}"
    return ""


def _usable_link(link: Link | None) -> bool:
    return (
        link is not None
        and _within(link.rtt_s, MAX_RTT_S, zero=True)
        and _within(link.jitter_s, MAX_RTT_S, zero=True)
        and _within(link.bandwidth, MAX_LINK_BANDWIDTH)
        and _within(link.loss, 0.99, zero=True)
        and (link.age_s is None or _within(link.age_s, MAX_AGE_S, zero=True))
    )


def _paths(
    snapshot: Snapshot, names: list[str], ignore_unreachable: bool, notes: list[str]
) -> dict[tuple[str, str], Path]:
    links: dict[tuple[str, str], Link] = {}
    for link in snapshot.links:
        if (link.source, link.target) in links:
            raise TopologyError(f"the link {link.source} -> {link.target} is listed twice")
        links[link.source, link.target] = link
    if len({site.name for site in snapshot.sites}) != len(snapshot.sites):
        raise TopologyError("the snapshot lists a site twice: site names must differ")
    sound = {pair: link for pair, link in links.items() if _usable_link(link)}
    measured = [link.rtt_s for link in sound.values() if link.measured and link.reachable]
    default_s = max(measured, default=UNMEASURED_RTT_S)
    paths: dict[tuple[str, str], Path] = {}
    for site in snapshot.sites:
        if site.name in names:
            paths[site.name, site.name] = _local(site, notes)

    def direct(left: str, right: str) -> Iterator[tuple[tuple[str, str], Path]]:
        pairs = [(left, right), (right, left)]
        cut = any(pair in links and not links[pair].reachable for pair in pairs) and not ignore_unreachable
        known = [sound[pair] for pair in pairs if pair in sound and (sound[pair].reachable or ignore_unreachable)]
        for source, target in pairs:
            own = sound.get((source, target))
            said = [own] if own and own.directed else known
            bandwidth = own.bandwidth if own else min((k.bandwidth for k in known), default=UNMEASURED_BANDWIDTH)
            barred = cut if not (own and own.directed) else not own.reachable and not ignore_unreachable
            yield (source, target), _path(said, default_s, bandwidth, barred)

    for index, left in enumerate(names):
        for right in names[index + 1 :]:
            bad = [pair for pair in ((left, right), (right, left)) if pair in links and pair not in sound]
            notes.extend(f"link {a} -> {b} has impossible figures and counts as not measured" for a, b in bad)
            paths.update(direct(left, right))
    for pair in [pair for pair in paths if pair in links and links[pair].via]:
        via = links[pair].via
        first, second = dict(direct(pair[0], via))[pair[0], via], dict(direct(via, pair[1]))[via, pair[1]]
        if first.measured and second.measured and first.reachable and second.reachable:
            paths[pair] = _relayed(first, second)
    return paths


def _relayed(first: Path, second: Path) -> Path:
    """Two links and the relay between them."""
    return Path(
        first.one_way_s + second.one_way_s + RELAY_COST_S / 2,
        min(first.bandwidth, second.bandwidth),
        first.rtt_s + second.rtt_s + RELAY_COST_S,
    )


def _path(known: Iterable[Link], default_s: float, bandwidth: float, cut: bool) -> Path:
    """The path of a pair from what both ends say of it, or from the one word that counts where that is `directed`.

    A round trip is one number, however directed the reports are. The larger report is believed, so that no end can draw
    traffic to itself by claiming to be near. A measurement wins over an estimate.
    """
    known = list(known)
    best = [link for link in known if link.measured] or known
    if cut:
        return Path(math.inf, bandwidth, math.inf)
    if not best:
        return Path(default_s / 2, bandwidth, default_s, measured=False)
    rtt_s = max(link.rtt_s for link in best)
    jitter_s = max(link.jitter_s for link in best)
    loss = max(link.loss for link in best)
    # A lost single segment is found out after a tail loss probe, about two round trips (RFC 8985, section 7.2).
    repair_s = loss / (1 - loss) * 2 * rtt_s
    return Path((rtt_s + jitter_s) / 2 + repair_s, bandwidth, rtt_s, measured=any(link.measured for link in best))


def _local(site: Site, notes: list[str]) -> Path:
    rtt_s, bandwidth = site.local_rtt_s, site.local_bandwidth
    if not _within(rtt_s, MAX_RTT_S, zero=True) or not _within(bandwidth, MAX_LINK_BANDWIDTH):
        notes.append(f"site {site.name} has impossible local link figures, a slow local network is assumed")
        rtt_s, bandwidth = LOCAL_RTT_S, LOCAL_BANDWIDTH
    return Path(rtt_s / 2, bandwidth, rtt_s)
