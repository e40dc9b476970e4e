"""Turn a plan into running workers: events first, then weights, then channels.

The order matters. The owner listens to a peer's events before that peer loads anything, because an attached owner is
the lease on which a peer keeps a job's workers. Channels are opened when every shard has its weights, all at once,
because each end waits for the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import trio

from mesh.errors import DeadlineExceeded, MeshError
from mesh.jobs.job import wire_epoch
from mesh.jobs.peers import Progress, View, load_shard
from mesh.jobs.routes import Routes, bytes_per_s
from mesh.runtime.assignment import Assignment, assignments
from mesh.wire.v1 import peer_pb2
from topology.plan import Plan, Shard
from topology.snapshot import Snapshot

#: Loading is bound by the disk, or by the link where weights have to travel first: 70 GB at 5 MB/s take 4 hours. A peer
#: that dies meanwhile is noticed long before, and a fetch that gets nothing ends by itself.
PREPARE_DEADLINE_S = 6 * 3600.0
#: Opening channels takes a few round trips.
CONNECT_DEADLINE_S = 30.0
#: Comparing the transports of a link: two processes start, and measure for a fraction of a second.
MEASURE_DEADLINE_S = 25.0
#: A relay starts a process for its first channel.
RELAY_DEADLINE_S = 20.0
#: A job that gives way ends its workers first.
DISPLACE_DEADLINE_S = 15.0


class ShardFailed(MeshError):
    """One shard could not be brought up; `site` says where, `__cause__` why."""

    def __init__(self, site: str, error: MeshError) -> None:
        super().__init__(str(error))
        self.site = site
        self.error = error


@dataclass(frozen=True, slots=True)
class Wire:
    """One channel between two shards: `connector` opens it, `acceptor` listens; roles as each end sees the other."""

    connector: Shard
    acceptor: Shard
    connector_role: str
    acceptor_role: str
    connector_rank: int = 0
    acceptor_rank: int = 0


def wires(plan: Plan) -> tuple[Wire, ...]:
    """Every channel of a plan: the ring of the leads, and all pairs of shards within each stage."""
    found = []
    stages = plan.stages
    if len(stages) > 1:
        for stage, following in zip(stages, (*stages[1:], stages[0]), strict=True):
            found.append(Wire(stage.lead, following.lead, "next", "previous"))
    for stage in stages:
        for i, lower in enumerate(stage.shards):
            for j, higher in enumerate(stage.shards[i + 1 :], start=i + 1):
                found.append(Wire(lower, higher, "shard", "shard", connector_rank=j, acceptor_rank=i))
    return tuple(found)


async def deploy(
    view: View,
    plan: Plan,
    *,
    job: str,
    epoch: tuple[int, str],
    model: str,
    progress: Progress,
    routes: Routes,
    connect_s: float = CONNECT_DEADLINE_S,
) -> None:
    """Bring up every shard of `plan` under `epoch`, its channels over `routes`, each within `connect_s`.

    Raises ShardFailed for the first shard that cannot be brought up.
    """
    parts = assignments(plan, job=job, epoch=epoch, model=model)
    for key, rate in _onward(plan, view.snapshot()).items():
        parts[key] = replace(parts[key], onward_bytes_per_s=rate)
    shards = {shard.key: shard for stage in plan.stages for shard in stage.shards}
    addresses: dict[str, dict[str, bytes]] = {}
    loaded = dict.fromkeys(shards, (0, 0))

    def report(key: str, done: int, total: int) -> None:
        loaded[key] = (done, total)
        progress(sum(done for done, _ in loaded.values()), sum(total for _, total in loaded.values()))

    async def prepare(key: str) -> None:
        request = peer_pb2.PrepareRequest(
            job=job, epoch=wire_epoch(epoch), device=shards[key].device, assignment=pack(parts[key])
        )
        site = shards[key].site
        addresses[key] = await load_shard(view, site, request, model, lambda done, total: report(key, done, total))

    async def connect(key: str) -> None:
        request = peer_pb2.ConnectRequest(
            job=job, epoch=wire_epoch(epoch), device=shards[key].device, neighbours=neighbours[key]
        )
        await view.peer(shards[key].site).connect(request)

    await _all(shards, prepare, PREPARE_DEADLINE_S, "loading its weights")
    neighbours = await _neighbours(plan, job, epoch, addresses, routes)
    await _all(shards, connect, connect_s, "connecting to its neighbours")


def _onward(plan: Plan, snapshot: Snapshot) -> dict[str, float]:
    """What the link from each lead to the next one carries; not of the last, which sends tokens alone."""
    pairs = zip(plan.stages, plan.stages[1:], strict=False)
    return {stage.lead.key: bytes_per_s(snapshot, stage.lead.site, onward.lead.site) for stage, onward in pairs}


async def release(
    view: View, former: Plan, following: Plan | None, *, job: str, epoch: tuple[int, str], lost: Collection[str]
) -> None:
    """End the workers of `former` that `following` does not use, but at `lost` sites.

    Best effort: a lease ends them anyway.
    """
    kept: list[tuple[str, str]] = []
    if following is not None:
        kept = [(s.site, s.device) for s in following.shards] + [(s.site, s.device) for s in following.standbys]

    async def one(site: str) -> None:
        keep = [device for at, device in kept if at == site]
        try:
            await view.peer(site).release(peer_pb2.ReleaseRequest(job=job, epoch=wire_epoch(epoch), keep=keep))
        except MeshError:
            pass  # gone, or going: its workers end when their lease does

    async with trio.open_nursery() as nursery:
        standing_by = {standby.site for standby in former.standbys}
        for site in {*former.sites, *standing_by} - set(lost):
            nursery.start_soon(one, site)


async def _all(shards: Mapping[str, Shard], step: Callable[[str], object], deadline_s: float, doing: str) -> None:
    """Run `step` for every shard at once; the first failure cancels the rest and is raised as ShardFailed."""
    failures: list[ShardFailed] = []

    async def one(key: str, scope: trio.CancelScope) -> None:
        try:
            with trio.move_on_after(deadline_s) as deadline:
                await step(key)  # type: ignore[misc]
            if deadline.cancelled_caught:
                raise DeadlineExceeded(f"{key} spent more than {deadline_s:.0f} s {doing}")
        except MeshError as error:
            failures.append(ShardFailed(shards[key].site, error))
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for key in shards:
            nursery.start_soon(one, key, nursery.cancel_scope)
    if failures:
        raise failures[0]


async def _neighbours(
    plan: Plan, job: str, epoch: tuple[int, str], addresses: Mapping[str, Mapping[str, bytes]], routes: Routes
) -> dict[str, list[peer_pb2.Neighbour]]:
    """Both ends of every wire, by shard. Keys are fresh for each epoch, so a frame of an older one cannot be opened."""
    ends: dict[str, list[peer_pb2.Neighbour]] = {key: [] for key in addresses}
    for index, wire in enumerate(wires(plan)):
        try:
            route = await routes.find(
                wire.connector.site, wire.acceptor.site, addresses[wire.connector.key], addresses[wire.acceptor.key]
            )
        except MeshError as error:
            raise ShardFailed(wire.acceptor.site, error) from error
        common: dict[str, Any] = {
            "backend": route.backend,
            "key": secrets.token_bytes(32),
            "hello": f"{job}/{epoch[0]}/{index}".encode(),
            "seal": True,
            "via": route.via,
            "delay_s": route.delay_s,
        }
        ends[wire.connector.key].append(
            peer_pb2.Neighbour(
                role=wire.connector_role,
                rank=wire.connector_rank,
                name=wire.acceptor.key,
                address=route.address,
                **common,
            )
        )
        ends[wire.acceptor.key].append(
            peer_pb2.Neighbour(role=wire.acceptor_role, rank=wire.acceptor_rank, name=wire.connector.key, **common)
        )
    return ends


def pack(assignment: Assignment) -> bytes:
    """An assignment as it travels."""
    packed: bytes = msgpack.packb(assignment.to_dict())
    return packed
