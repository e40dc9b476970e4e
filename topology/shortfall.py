"""What to tell a user whom no plan satisfies: each constraint that stands in the way, and by how much.

A constraint is in the way if a plan exists once it alone is lifted. Where none is by itself, memory is measured against
what the model takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from topology.candidate import Candidate
from topology.constraints import Constraints
from topology.cost import needed_bytes
from topology.errors import Shortfall
from topology.model import ModelSpec
from topology.picture import Picture, look
from topology.search import Outcome, Search
from topology.snapshot import Snapshot

#: Work of one plan that is tried to see whether a constraint is in the way.
TRY_WORK: Final = 2_000

#: Limits: the objective that comes nearest to meeting each, the unit, and the figure.
_LIMITS: Final[dict[str, tuple[str, str, Callable[[Candidate], float]]]] = {
    "max_token_latency_ms": ("latency", "ms", lambda c: c.token_s * 1e3),
    "max_first_token_ms": ("first_token", "ms", lambda c: c.first_token_s * 1e3),
    "min_tokens_per_s": ("throughput", "tokens/s", lambda c: c.rate),
    "max_price_per_hour": ("cost", "an hour", lambda c: c.price_per_hour),
}


def shortfalls(
    snapshot: Snapshot,
    model: ModelSpec,
    context: int,
    constraints: Constraints,
    *,
    strategy: str,
    outcome: Outcome | None,
    origin: str | None = None,
) -> tuple[Shortfall, ...]:
    """Per constraint, what is required, available and missing. Never empty."""

    def tried(wishes: Constraints, *, ignore_unreachable: bool = False) -> Candidate | None:
        picture = look(snapshot, model, wishes, reserve=False, ignore_unreachable=ignore_unreachable, origin=origin)
        return Search(picture, model, context, wishes, strategy, max_work=TRY_WORK).run().best

    picture = look(snapshot, model, constraints, reserve=False, origin=origin)
    asked = constraints
    constraints = replace(constraints, standbys=0, replicas=1)
    if asked != constraints and (plain := tried(constraints)) is not None:
        return _besides(asked, plain, picture) or (_memory(picture, model, context, constraints),)
    found: list[Shortfall] = []
    if outcome is not None and outcome.fastest is not None:
        missed = _limits(constraints, tried, outcome.fastest)
        if missed:
            return missed
    if not picture.sites:
        return (_nowhere(snapshot, constraints, needed_bytes(model, context, 1, constraints.requests)),)
    if constraints.forced:
        found += _shape(constraints, picture, model)
    if constraints.max_sites is not None:
        fewest = tried(replace(constraints, max_sites=None))
        if fewest is not None:
            needs = len(fewest.sites)
            found.append(Shortfall("max_sites", needs, constraints.max_sites, needs - constraints.max_sites, "sites"))
    joined = tried(constraints, ignore_unreachable=True)
    if joined is not None:
        leads = [each.nodes[0].site for each in joined.fits]
        pairs = list(zip(leads, [*leads[1:], leads[0]], strict=True))
        cut = sum(not picture.path(a, b).reachable for a, b in pairs)
        found.append(Shortfall("reachable links", len(pairs), len(pairs) - cut, max(cut, 1), "links"))
    for name, lifted in (
        ("sites", replace(constraints, sites=())),
        ("exclude_sites", replace(constraints, exclude_sites=())),
        ("regions", replace(constraints, regions=())),
        ("exclude_regions", replace(constraints, exclude_regions=())),
        ("vendors", replace(constraints, vendors=())),
        ("needs", replace(constraints, needs=())),
        ("trusted_only", replace(constraints, trusted_only=False)),
        ("private", replace(constraints, private=False)),
    ):
        if lifted != constraints:
            wider = tried(lifted)
            if wider is not None:
                here = len(picture.sites)
                extra = len(wider.sites - set(picture.sites))
                if extra:
                    found.append(Shortfall(name, here + extra, here, extra, "sites"))
                else:
                    found.append(_devices(name, wider, picture))
    if not found or (joined is None and not constraints.forced):
        found.insert(0, _memory(picture, model, context, constraints))
    return tuple(found)


def _limits(
    constraints: Constraints, tried: Callable[[Constraints], Candidate | None], fastest: Candidate
) -> tuple[Shortfall, ...]:
    """The limits that the plan which is best for each misses; all of them where only together they cannot be met."""
    asked = [(name, *how) for name, how in _LIMITS.items() if getattr(constraints, name) is not None]
    without: dict[str, Any] = dict.fromkeys((name for name, *_ in asked), None)
    free = replace(constraints, **without)
    for base in (free, constraints):
        found = []
        for name, objective, unit, figure in asked:
            changed: dict[str, Any] = {name: None, "objective": objective, "min_latency": "medium"}
            available = figure(tried(replace(base, **changed)) or fastest)
            limit = getattr(constraints, name)
            missing = limit - available if name == "min_tokens_per_s" else available - limit
            if missing > 0:
                found.append(Shortfall(name, limit, available, missing, unit))
        if found:
            return tuple(found)
    return ()


def _besides(asked: Constraints, plain: Candidate, picture: Picture) -> tuple[Shortfall, ...]:
    """One ring there is; the standbys and further rings that were asked for are what has no room."""
    used = sum(len(each.nodes) for each in plain.fits)
    free = sum(len(nodes) for nodes in picture.nodes.values()) - used
    found = []
    if asked.standbys:
        have = min(free, asked.standbys - 1)
        found.append(Shortfall("standbys", asked.standbys, have, asked.standbys - have, "devices"))
    if isinstance(asked.replicas, int) and asked.replicas > 1:
        have = min(1 + free // used, asked.replicas - 1)
        found.append(Shortfall("replicas", asked.replicas, have, asked.replicas - have, "rings"))
    return tuple(found) or _limits(replace(asked, standbys=0), lambda wishes: plain, plain)


def _devices(name: str, wider: Candidate, picture: Picture) -> Shortfall:
    """How many devices of the plan there would be are kept out by constraint `name`."""
    here = {node.key for nodes in picture.nodes.values() for node in nodes}
    used = {node.key for each in wider.fits for node in each.nodes}
    missing = max(len(used - here), 1)
    return Shortfall(name, len(used & here) + missing, len(used & here), missing, "devices")


def _memory(picture: Picture, model: ModelSpec, context: int, constraints: Constraints) -> Shortfall:
    """Bytes of the model over as many stages as could take part, against the room of the roomiest of the sites."""
    rooms = sorted((sum(n.usable_bytes for n in picture.nodes[name]) for name in picture.sites), reverse=True)
    most = min(len(rooms), constraints.max_sites or len(rooms), model.layers)
    available = sum(rooms[:most])
    need = needed_bytes(model, context, most, constraints.requests)
    if need <= available:
        # There is room in all, but whole layers do not fit into the pieces: one layer's worth is missing at least.
        piece = model.layer_bytes + model.kv_bytes_per_token(1) * context * constraints.requests
        return Shortfall("memory", available + piece, available, piece, "bytes")
    return Shortfall("memory", need, available, need - available, "bytes")


def _nowhere(snapshot: Snapshot, constraints: Constraints, need: int) -> Shortfall:
    """No site is left: by the constraints, because all memory is taken, or because no site has a usable device."""
    for name in ("regions", "exclude_regions", "exclude_sites", "sites", "trusted_only", "vendors", "needs"):
        if getattr(constraints, name) and snapshot.sites:
            return Shortfall(name, 1, 0, 1, "sites")
    devices = [device for site in snapshot.sites for device in site.devices]
    if devices and all(device.free_bytes == 0 < device.memory_bytes for device in devices):
        return Shortfall("memory", need, 0, need, "bytes")
    return Shortfall("sites", 1, 0, 1, "sites")


def _shape(constraints: Constraints, picture: Picture, model: ModelSpec) -> list[Shortfall]:
    """Devices that the overrides ask for and the mesh does not have."""
    devices = sum(len(nodes) for nodes in picture.nodes.values())
    stages = constraints.stages or 1
    if isinstance(constraints.shards, tuple):
        wanted, widest = sum(constraints.shards), max(constraints.shards)
    else:
        widest = constraints.shards or 1
        wanted = widest * stages
    found = []
    if stages > devices:
        found.append(Shortfall("stages", stages, devices, stages - devices, "devices"))
    elif wanted > devices:
        found.append(Shortfall("shards", wanted, devices, wanted - devices, "devices"))
    return found
