"""A running peer as HTTP, gRPC and `mesh up` see it: what they ask of it, what it tells the mesh, and how it leaves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgpack
import trio

from mesh.devices.local import LocalDevice
from mesh.gossip import Gossip
from mesh.gossip.sealing import REFUSALS
from mesh.jobs.ledger import Ledger
from mesh.peer.cluster import Cluster
from mesh.peer.config import PeerConfig
from mesh.peer.guard import Guard
from mesh.peer.metrics import DeviceMemory
from mesh.peer.service import PeerService
from mesh.peer.view import MeshView
from mesh.peer.weights import Weights

logger = logging.getLogger(__name__)

#: A leaving peer lets its own requests finish, and the owners of its workers move away, for up to this long each.
GRACE_S = 10.0
#: Announcing the leave: a few datagrams to a few peers.
LEAVE_S = 1.0
#: What the mesh is told of jobs must fit into one entry of gossip (32 KiB): the newest ones, their models' names cut.
JOBS_TOLD_BYTES, MODEL_CHARACTERS_TOLD = 30_000, 64


class Peer:
    """A running peer: the parts, and the questions that HTTP and gRPC ask of them."""

    def __init__(
        self,
        *,
        config: PeerConfig,
        gossip: Gossip,
        ledger: Ledger,
        view: MeshView,
        service: PeerService,
        devices: list[LocalDevice],
        cluster: Cluster | None = None,
        guard: Guard | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._weights = weights
        self._cluster = cluster
        self._guard = guard
        self._config = config
        self._gossip = gossip
        self._ledger = ledger
        self._view = view
        self._service = service
        self._devices = devices
        self._state = "serving"

    @property
    def site(self) -> str:
        """The site's name."""
        return self._config.site

    @property
    def address(self) -> str:
        """`HOST:PORT` of gossip and control."""
        return str(self._gossip.address)

    async def leave(self) -> None:
        """Announce the leave, finish what runs, and let the owners of this site's workers move their jobs away."""
        self._state = "leaving"
        logger.info("leaving")
        await self._ledger.close(GRACE_S)
        await self._gossip.leave(LEAVE_S)
        with trio.move_on_after(GRACE_S):
            await self._service.drain()

    def publish_load(self) -> None:
        """Tell the mesh how much memory is left, and which devices are slower or faster than they were calibrated."""
        self._gossip.publish("load", {"free": self._service.free_bytes(), "pace": self._service.paces()})

    def publish_jobs(self) -> None:
        """Tell the mesh which jobs this peer owns."""
        told: dict[str, dict[str, Any]] = {}
        room = JOBS_TOLD_BYTES
        for job in reversed([coordinator.job for coordinator in self._ledger if not coordinator.job.ended]):
            entry = {
                "model": _shortened(job.model),
                "state": job.state,
                "epoch": job.counter,
                "priority": job.priority,
                "held": job.held_bytes,
            }
            room -= len(msgpack.packb({job.id: entry}))
            if room < 0:
                break
            told[job.id] = entry
        self._gossip.publish("jobs", told)

    def elsewhere(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Jobs that other peers own: owner and what it says of the job, by job id."""
        return {
            str(job): (site, entry)
            for site, jobs in self._gossip.entries("jobs").items()
            if site != self.site and self._view.alive(site) and isinstance(jobs, Mapping)
            for job, entry in jobs.items()
            if isinstance(entry, Mapping)
        }

    def status(self) -> dict[str, Any]:
        """The document of `mesh status`."""
        rtts = self.rtts_s()
        regions = {site.name: site.region for site in self._view.snapshot().sites}
        free, paces = self._service.free_bytes(), self._service.paces()
        return {
            **({} if self._cluster is None else {"identity": self._cluster.describe()}),
            "site": self.site,
            "address": self.address,
            "region": self._config.region,
            "state": self._state,
            "members": [
                {
                    "site": member.site,
                    "address": member.address,
                    "region": regions.get(member.site),
                    "state": str(member.state),
                    "incarnation": member.incarnation,
                    "rtt_ms": rtts[member.site] * 1e3 if member.site in rtts else None,
                    **({} if self._cluster is None else self._cluster.describe_member(member.site)),
                }
                for member in self._gossip.members()
            ],
            "devices": [
                {
                    **asdict(local.device),
                    "free_bytes": free[local.device.name],
                    "pace": paces.get(local.device.name, 1.0),
                }
                for local in self._devices
            ],
            "models": [] if self._weights is None else self._weights.describe(),
            "holdings": [] if self._weights is None else self._weights.holdings(),
            "jobs": [
                {
                    "job": c.job.id,
                    "model": c.job.model,
                    "state": c.job.state,
                    "owner": self.site,
                    "epoch": c.job.counter,
                    **({"code_rms": c.code_rms} if c.code_rms else {}),
                }
                for c in self._ledger
            ],
        }

    def state(self) -> str:
        """`serving` or `leaving`."""
        return self._state

    def members(self) -> Mapping[str, str]:
        """State by site."""
        return {member.site: str(member.state) for member in self._gossip.members()}

    def jobs(self) -> Mapping[str, str]:
        """State by job, of the jobs this site owns."""
        return {coordinator.job.id: coordinator.job.state for coordinator in self._ledger}

    def code_errors(self) -> Mapping[str, float]:
        """The error of lossy codes by job owned here, of jobs that use one."""
        return {coordinator.job.id: coordinator.code_rms for coordinator in self._ledger if coordinator.code_rms}

    def rtts_s(self) -> Mapping[str, float]:
        """Least measured round trip by site."""
        return {site: rtt.min_s for site, rtt in self._gossip.rtts().items()}

    def devices(self) -> Mapping[str, DeviceMemory]:
        """Memory by device."""
        free = self._service.free_bytes()
        return {
            local.device.name: DeviceMemory(local.device.memory_bytes, free[local.device.name])
            for local in self._devices
        }

    def tokens_total(self) -> int:
        """Tokens of all jobs owned here."""
        return self._ledger.tokens_total

    def recoveries_total(self) -> int:
        """Recoveries of all jobs owned here."""
        return self._ledger.recoveries_total

    def gossip_refused_total(self) -> Mapping[str, int]:
        """What gossip refused, by kind."""
        counters = self._gossip.counters()
        return {kind: counters[kind] for kind in REFUSALS}

    def calls_refused_total(self) -> Mapping[str, int]:
        """Calls refused, by the code of the error."""
        return {} if self._guard is None else dict(self._guard.refused)


def _shortened(model: str) -> str:
    """The end of a long name: of a path it says the most."""
    return model if len(model) <= MODEL_CHARACTERS_TOLD else "..." + model[3 - MODEL_CHARACTERS_TOLD :]
