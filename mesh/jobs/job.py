"""A job as its owner sees it: its state, and everybody who waits for that state to change."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import trio

from mesh.errors import JobCancelled, JobFailed, MeshError
from mesh.wire.v1 import mesh_pb2, peer_pb2
from topology.plan import Plan

#: planning -> loading -> ready <-> recovering; and from any of them to failed or cancelled, where a job ends.
STATES = ("planning", "loading", "ready", "recovering", "failed", "cancelled")
ENDED = frozenset({"failed", "cancelled"})


@dataclass
class Job:
    """One submitted job. Only its coordinator changes it, through `update`."""

    id: str
    model: str
    strategy: str
    constraints: dict[str, object]
    owner: str
    state: str = "planning"
    counter: int = 0
    plan: Plan | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    error: MeshError | None = None
    recoveries: int = 0
    _changed: trio.Event = field(default_factory=trio.Event, repr=False)

    @property
    def epoch(self) -> tuple[int, str]:
        """The totally ordered (counter, owner) pair that fences the job's work."""
        return (self.counter, self.owner)

    @property
    def priority(self) -> int:
        """What its constraints say."""
        wanted = self.constraints.get("priority", 0)
        return wanted if isinstance(wanted, int) else 0

    @property
    def held_bytes(self) -> dict[str, int]:
        """Bytes by `site/device` that its plan holds, standbys and replicas included."""
        return {} if self.plan is None or self.ended else self.plan.memory_bytes

    @property
    def ended(self) -> bool:
        """Whether the job will never serve again."""
        return self.state in ENDED

    def update(self, **changes: object) -> None:
        """Set fields and wake everybody who watches."""
        for key, value in changes.items():
            setattr(self, key, value)
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        """Wait for the next `update`. The caller bounds the wait."""
        await self._changed.wait()

    async def ready(self) -> None:
        """Wait until requests can start. Raises the job's error once it has ended. The caller bounds the wait."""
        while self.state != "ready":
            self.raise_if_ended()
            await self.changed()

    def raise_if_ended(self) -> None:
        """Raise what ended the job, as a new exception of the same class, if it has ended."""
        if self.state == "cancelled":
            raise JobCancelled(f"job {self.id} was cancelled")
        if self.state == "failed":
            error = self.error or JobFailed(f"job {self.id} failed")
            raise type(error)(str(error))

    async def watch(self) -> AsyncGenerator[mesh_pb2.JobStatus, None]:
        """The present status, then every new one; ends when the job has ended."""
        last = None
        while True:
            status = self.status()
            if status != last:
                last = status
                yield status
            if self.ended:
                return
            changed = self._changed
            if self.status() == last:
                await changed.wait()

    def status(self) -> mesh_pb2.JobStatus:
        """The job as clients see it."""
        return mesh_pb2.JobStatus(
            job=self.id,
            model=self.model,
            state=self.state,
            owner=self.owner,
            epoch=self.counter,
            plan_json=json.dumps(self.plan.to_dict()) if self.plan else "",
            loaded_bytes=self.loaded_bytes,
            total_bytes=self.total_bytes,
            error=str(self.error or ""),
            error_code=self.error.code if self.error else "",
        )


def wire_epoch(epoch: tuple[int, str]) -> peer_pb2.Epoch:
    """The epoch as it travels."""
    return peer_pb2.Epoch(counter=epoch[0], owner=epoch[1])
