"""Standbys of a plan: workers that hold the weights of a shard somebody else serves, so that its loss costs no loading.

A standby is prepared like a shard and never connected. The next plan may put the shard on it: then its worker keeps the
slices it has. Nothing waits for a standby, and losing one is no loss to the job; it is tried again later.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import trio

from mesh.errors import MeshError
from mesh.jobs.deploy import PREPARE_DEADLINE_S, pack
from mesh.jobs.job import Job, wire_epoch
from mesh.jobs.peers import View, load_shard
from mesh.runtime.assignment import assignments
from mesh.wire.v1 import peer_pb2
from topology.plan import Plan, Standby

logger = logging.getLogger(__name__)

#: A standby that could not be kept is tried again after so long.
RETRY_S = 10.0


async def keep_standbys(view: View, plan: Plan, job: Job) -> None:
    """Hold every standby of `plan` under the job's present epoch. Runs until cancelled."""
    async with trio.open_nursery() as nursery:
        for standby in plan.standbys:
            nursery.start_soon(_keep, view, plan, job, standby)


async def _keep(view: View, plan: Plan, job: Job, standby: Standby) -> None:
    while True:
        try:
            await _hold(view, plan, job, standby)
        except (MeshError, trio.TooSlowError) as error:
            logger.warning("job %s: no standby on %s for now: %s", job.id, standby.key, error)
        await trio.sleep(RETRY_S)


async def _hold(view: View, plan: Plan, job: Job, standby: Standby) -> None:
    """Load the weights and keep the lease on them. Returns when the worker or its peer is gone. Raises MeshError."""
    peer, epoch = view.peer(standby.site), wire_epoch(job.epoch)
    shard = plan.stages[standby.stage].shards[standby.rank]
    part = assignments(plan, job=job.id, epoch=job.epoch, model=job.model)[shard.key]
    part = replace(part, device=standby.device, memory_bytes=standby.memory_bytes)
    async with peer.events(peer_pb2.EventsRequest(job=job.id, epoch=epoch)) as events:
        request = peer_pb2.PrepareRequest(job=job.id, epoch=epoch, device=standby.device, assignment=pack(part))
        with trio.fail_after(PREPARE_DEADLINE_S):
            await load_shard(view, standby.site, request, job.model, lambda done, total: None)
        async for event in events:
            if event.device == standby.device and event.HasField("failure") and event.failure.fatal:
                return
