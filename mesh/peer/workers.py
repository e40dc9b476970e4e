"""The worker processes of this peer: started, spoken to, listened to and ended. Restarts nothing by itself.

    async with WorkerPool.open(host="127.0.0.1", backends=("tcp",)) as pool:
        addresses = await pool.prepare(assignment, on_progress, name="cpu:0")
        await pool.connect(job, epoch, "cpu:0", neighbours)
        await pool.start(start_request)
        async for event in pool.events: ...

A worker is one process for a job and a device, a fresh interpreter, in the process group of this one: what kills the
group kills the workers, and a worker whose daemon is gone ends by itself (`mesh.runtime.worker`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgpack
import trio

from mesh.errors import MeshError, WorkerError
from mesh.peer.worker_process import OnProgress, WorkerProcess
from mesh.runtime.assignment import Assignment
from mesh.runtime.protocol import (
    Abort,
    AliveEvent,
    Command,
    Connect,
    Epoch,
    FailureEvent,
    Neighbour,
    Ping,
    Prepare,
    Request,
    Start,
    Stop,
    TokenEvent,
)
from mesh.runtime.work import Decoded
from mesh.wire.v1 import peer_pb2

#: Loading is bound by the disk; the owner gives up earlier if it knows better.
PREPARE_S = 1800.0
#: Opening channels takes a few round trips.
CONNECT_S = 20.0
#: Commands are obeyed between two steps; the longest step is one prefill chunk.
COMMAND_S = 30.0


class PoolEvent(NamedTuple):
    """What a worker of `job` reported: a token, a failure or that it lives, and then what it has decoded so far."""

    job: str
    message: peer_pb2.WorkerEvent
    decoded: Decoded | None = None


class WorkerPool:
    """Made by `WorkerPool.open`. Devices are named as in plans; every command names the worker by job and device.

    Methods raise WorkerError where there is no such worker, it refuses or it dies; DeadlineExceeded where it does not
    answer; or the error of `mesh.errors` that it met (ModelError, RequestError).
    """

    def __init__(self, nursery: trio.Nursery, host: str, backends: Sequence[str], command: Sequence[str]) -> None:
        self._nursery = nursery
        self._host = host
        self._backends = tuple(backends)
        self._command = tuple(command)
        self._workers: dict[tuple[str, str], WorkerProcess] = {}
        self._all: set[WorkerProcess] = set()
        self._starting: dict[tuple[str, str], trio.Lock] = {}
        self._events, self.events = trio.open_memory_channel[PoolEvent](math.inf)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        *,
        host: str,
        backends: Sequence[str],
        command: Sequence[str] = (sys.executable, "-m", "mesh.runtime.worker"),
    ) -> AsyncIterator[WorkerPool]:
        """A pool for the length of the block; at its end no worker is left.

        `host` is where workers listen for their neighbours, `backends` over which transports, best first.
        """
        async with trio.open_nursery() as nursery:
            pool = cls(nursery, host, backends, command)
            try:
                yield pool
            finally:
                with trio.CancelScope(shield=True):
                    await pool._close()
                nursery.cancel_scope.cancel()

    # -- commands

    async def prepare(
        self, assignment: Assignment, on_progress: OnProgress | None = None, *, name: str | None = None
    ) -> dict[str, bytes]:
        """Load a shard, in the worker that is there (slices that overlap are kept) or in a new one.

        Gives the worker's addresses by transport. `name` is the device's name in plans (default: torch's name for it).
        A worker that fails to load is ended: it holds nothing of use.
        """
        device = assignment.device if name is None else name
        worker = await self._worker_for(assignment.job, device)
        if assignment.epoch < worker.epoch:
            raise WorkerError(_over(assignment.epoch, worker.epoch))

        def command(id: int) -> Prepare:
            return Prepare(id, assignment.epoch, assignment.to_dict(), backends=self._backends, host=self._host)

        try:
            body = await worker.call(command, PREPARE_S, on_progress)
        except MeshError:
            if worker.epoch == assignment.epoch:
                await worker.end()
            raise
        return {str(backend): bytes(address) for backend, address in body["addresses"].items()}

    async def connect(
        self,
        job: str,
        epoch: Epoch,
        device: str,
        neighbours: Iterable[Any],
        *,
        site: str | None = None,
        timeout_s: float = CONNECT_S,
    ) -> None:
        """Open the worker's channels; returns when all are open.

        `neighbours` are `protocol.Neighbour` or `peer_pb2.Neighbour`, whose fields are the same. `site` is this peer's:
        neighbours of its name are workers of this pool.
        """
        values = tuple(_neighbour(neighbour, site) for neighbour in neighbours)
        await self._command_to(
            job, device, lambda id: Connect(id, epoch, values, timeout_s), deadline_s=timeout_s + COMMAND_S
        )

    async def start(self, request: peer_pb2.StartRequest) -> None:
        """Begin or resume a request, at the lead of the first stage."""
        value = Request(
            request=request.request,
            tokens=tuple(request.tokens),
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            stop_tokens=tuple(request.stop_tokens),
        )
        epoch = (request.epoch.counter, request.epoch.owner)
        await self._command_to(request.job, request.device, lambda id: Start(id, epoch, value))

    async def stop(self, job: str, epoch: Epoch, device: str, request: str) -> None:
        """End a request early, at the lead of the first stage. No error where it is over already."""
        await self._command_to(job, device, lambda id: Stop(id, epoch, request))

    async def abort(self, job: str, epoch: Epoch, device: str) -> None:
        """Drop the requests and channels of `epoch` and older ones; the weights stay."""
        await self._command_to(job, device, lambda id: Abort(id, epoch))

    async def ping(self, job: str, device: str) -> dict[str, Any]:
        """{"steps", "epoch", "pid"}, answered even while a step is under way."""
        return await self._command_to(job, device, Ping)

    async def release(self, job: str, device: str) -> None:
        """End a worker and wait until it is gone. No error where there is none."""
        worker = self._find(job, device)
        if worker is not None:
            await worker.end()

    def pid(self, job: str, device: str) -> int | None:
        """The process id of a worker, or None where there is none."""
        worker = self._find(job, device)
        return None if worker is None else worker.pid

    async def _command_to(
        self, job: str, device: str, make: Callable[[int], Command], deadline_s: float = COMMAND_S
    ) -> dict[str, Any]:
        worker = self._find(job, device)
        if worker is None:
            raise WorkerError(f"{device}: no worker runs for job {job}; prepare it first")
        return await worker.call(make, deadline_s)

    # -- processes

    def _find(self, job: str, device: str) -> WorkerProcess | None:
        worker = self._workers.get((job, device))
        return None if worker is None or worker.releasing or worker.gone.is_set() else worker

    async def _worker_for(self, job: str, device: str) -> WorkerProcess:
        key = (job, device)
        async with self._starting.setdefault(key, trio.Lock()):
            worker = self._find(job, device)
            if worker is None:
                worker = await WorkerProcess.spawn(self._command, job, device, self._report)
                self._workers[key] = worker
                self._all.add(worker)
                self._nursery.start_soon(self._mind, worker)
        self._starting.pop(key, None)
        return worker

    async def _mind(self, worker: WorkerProcess) -> None:
        try:
            await worker.run()
        finally:
            self._all.discard(worker)
            if self._workers.get((worker.job, worker.device)) is worker:
                del self._workers[worker.job, worker.device]

    def _report(self, worker: WorkerProcess, event: TokenEvent | FailureEvent | AliveEvent) -> None:
        decoded = None
        epoch = peer_pb2.Epoch(counter=event.epoch[0], owner=event.epoch[1])
        message = peer_pb2.WorkerEvent(device=worker.device, epoch=epoch)
        match event:
            case TokenEvent():
                message.token.CopyFrom(
                    peer_pb2.TokenEvent(
                        request=event.request,
                        index=event.index,
                        token=event.token,
                        finish_reason=event.finish_reason,
                        timings=msgpack.packb(event.timings),
                    )
                )
            case FailureEvent():
                message.failure.CopyFrom(
                    peer_pb2.FailureEvent(neighbour=event.neighbour, reason=event.reason, fatal=event.fatal)
                )
            case AliveEvent():
                message.alive.CopyFrom(peer_pb2.AliveEvent(steps=event.steps))
                decoded = event.decoded
        try:
            self._events.send_nowait(PoolEvent(worker.job, message, decoded))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # nobody listens to this pool any more

    async def _close(self) -> None:
        async with trio.open_nursery() as nursery:
            for worker in tuple(self._all):
                nursery.start_soon(worker.end)
        self._events.close()


def _over(old: Epoch, new: Epoch) -> str:
    return f"epoch {old[0]} of {old[1]} is over: this worker obeys epoch {new[0]} of {new[1]}"


def _neighbour(value: Any, site: str | None) -> Neighbour:
    if isinstance(value, Neighbour):
        return value
    return Neighbour(
        role=value.role,
        rank=value.rank,
        name=value.name,
        backend=value.backend,
        address=value.address,
        key=value.key,
        hello=value.hello,
        seal=value.seal,
        delay_s=value.delay_s,
        beside=value.name.split("/")[0] == site and not value.delay_s,
    )
