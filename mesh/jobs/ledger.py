"""The jobs this peer owns: made, found, listed and cancelled here."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import trio

from mesh.errors import JobNotFound, PeerUnreachable, PlanError, RequestError
from mesh.jobs.coordinator import Coordinator
from mesh.jobs.job import Job
from mesh.jobs.model import Inspector
from mesh.jobs.peers import View
from mesh.wire.v1 import peer_pb2
from topology import ConstraintError, Constraints, Plan, TopologyError

STRATEGIES = ("auto", "tensor_parallelism", "pipeline")
#: Longest name of a model: a path may have 4096 bytes on Linux, but nobody types such a one.
MAX_MODEL_CHARACTERS = 1024
#: Ended jobs that are kept for `mesh jobs` to show why they ended.
KEPT_ENDED = 64


class Ledger:
    """Coordinators by job id. `nursery` is the daemon's; a job lives in it until it ends."""

    def __init__(
        self, site: str, view: View, inspector: Inspector, nursery: trio.Nursery, on_change: Callable[[], None]
    ) -> None:
        self._site = site
        self._view = view
        self._inspector = inspector
        self._nursery = nursery
        self._on_change = on_change
        self._coordinators: dict[str, Coordinator] = {}
        self._closing = False
        self._old_tokens = 0
        self._old_recoveries = 0

    def __iter__(self) -> Iterator[Coordinator]:
        return iter(list(self._coordinators.values()))

    @property
    def tokens_total(self) -> int:
        """Tokens that all jobs owned here ever gave."""
        return self._old_tokens + sum(coordinator.tokens_total for coordinator in self)

    @property
    def recoveries_total(self) -> int:
        """Recoveries of all jobs owned here, ever."""
        return self._old_recoveries + sum(coordinator.job.recoveries for coordinator in self)

    def submit(self, model: str, strategy: str, constraints: dict[str, Any]) -> Job:
        """Begin a job. Raises RequestError for a strategy or a constraint that does not exist.

        Raises PeerUnreachable once `close` was called.
        """
        if self._closing:
            raise PeerUnreachable(f"{self._site} is leaving the mesh: submit to another peer")
        coordinator = self._coordinator(model, strategy, constraints)
        self._coordinators[coordinator.job.id] = coordinator
        self._forget_old()
        self._nursery.start_soon(coordinator.run)
        self._on_change()
        return coordinator.job

    async def plan(self, model: str, strategy: str, constraints: dict[str, Any]) -> Plan:
        """Where such a job would run now, without running it. Raises PlanError where it could not."""
        coordinator = self._coordinator(model, strategy, constraints)
        info = await self._inspector(model)
        try:
            return coordinator.plan(info)
        except TopologyError as error:
            raise PlanError(str(error)) from None

    def get(self, job: str) -> Coordinator:
        """The coordinator of a job owned here. Raises JobNotFound."""
        try:
            return self._coordinators[job]
        except KeyError:
            raise JobNotFound(f"no job {job!r} is known here: `mesh jobs` lists those there are") from None

    def __contains__(self, job: str) -> bool:
        return job in self._coordinators

    async def displace(self, request: peer_pb2.DisplaceRequest) -> None:
        """End a job for one of higher priority, and wait until its workers are gone. An ended one has given way.

        Raises JobNotFound, and RequestError where its priority is not lower than the other's.
        """
        coordinator = self.get(request.job)
        if coordinator.job.priority >= request.priority:
            raise RequestError(
                f"job {request.job} has priority {coordinator.job.priority}: "
                f"job {request.by} of priority {request.priority} cannot displace it"
            )
        await coordinator.give_way(f"displaced by job {request.by} of priority {request.priority}")

    async def close(self, grace_s: float) -> None:
        """Let live requests finish for up to `grace_s` seconds, then end every job. Nothing new is taken on."""
        self._closing = True
        for coordinator in self:
            coordinator.close()
        with trio.move_on_after(grace_s):
            for coordinator in self:
                await coordinator.idle()
        for coordinator in self:
            coordinator.cancel()
        with trio.move_on_after(grace_s):
            for coordinator in self:
                while not coordinator.job.ended:
                    await coordinator.job.changed()

    def _coordinator(self, model: str, strategy: str, constraints: dict[str, Any]) -> Coordinator:
        if strategy not in STRATEGIES:
            raise RequestError(f"strategy {strategy!r} is unknown: it is one of {', '.join(STRATEGIES)}")
        if not model or len(model) > MAX_MODEL_CHARACTERS or not model.isprintable():
            raise RequestError(f"the name of a model has 1 to {MAX_MODEL_CHARACTERS} printable characters")
        try:
            Constraints.parse(constraints)
        except ConstraintError as error:
            raise RequestError(str(error)) from None
        job = Job(secrets.token_hex(4), model, strategy, constraints, self._site)
        return Coordinator(job, self._view, self._inspector, self._on_change, spawn=self._nursery.start_soon)

    def _forget_old(self) -> None:
        ended = [name for name, coordinator in self._coordinators.items() if coordinator.job.ended]
        for name in ended[:-KEPT_ENDED]:
            old = self._coordinators.pop(name)
            self._old_tokens += old.tokens_total
            self._old_recoveries += old.job.recoveries
