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

import itertools
import logging
import math
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import msgpack
import trio

from mesh.errors import DeadlineExceeded, MeshError, WorkerError
from mesh.runtime.assignment import Assignment
from mesh.runtime.protocol import (
    Abort,
    AliveEvent,
    Command,
    Connect,
    Decoder,
    Epoch,
    Event,
    FailureEvent,
    Neighbour,
    Ping,
    Prepare,
    Progress,
    ProtocolError,
    Release,
    Reply,
    Request,
    Start,
    Stop,
    TokenEvent,
    encode,
)
from mesh.wire.v1 import peer_pb2

logger = logging.getLogger(__name__)

#: Loading is bound by the disk; the owner gives up earlier if it knows better.
PREPARE_S = 1800.0
#: Opening channels takes a few round trips.
CONNECT_S = 20.0
#: Commands are obeyed between two steps; the longest step is one prefill chunk.
COMMAND_S = 30.0
#: A released worker says goodbye to its neighbours and exits; then it is killed.
EXIT_S = 2.0
_STDERR_LINES = 20

OnProgress = Callable[[int, int], None]


class PoolEvent(NamedTuple):
    """What a worker of `job` reported: a token, a failure or that it lives."""

    job: str
    message: peer_pb2.WorkerEvent


class _Call:
    """A command that waits for its reply."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.on_progress = on_progress
        self.done = trio.Event()
        self.reply: Reply | None = None
        self.error: MeshError | None = None


class _Worker:
    """One process and what is known about it."""

    def __init__(self, job: str, device: str, process: trio.Process) -> None:
        self.job = job
        self.device = device
        self.process = process
        self.epoch: Epoch = (0, "")
        self.releasing = False
        self.gone = trio.Event()
        self.calls: dict[int, _Call] = {}
        self.stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self.outbox, self.to_write = trio.open_memory_channel[bytes](math.inf)


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
        self._workers: dict[tuple[str, str], _Worker] = {}
        self._all: set[_Worker] = set()
        self._ids = itertools.count(1)
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
        worker.epoch = assignment.epoch
        prepare = Prepare(
            next(self._ids), assignment.epoch, assignment.to_dict(), backends=self._backends, host=self._host
        )
        try:
            body = await self._call(worker, prepare, PREPARE_S, on_progress)
        except MeshError:
            if worker.epoch == assignment.epoch:
                await self._end(worker)
            raise
        return {str(backend): bytes(address) for backend, address in body["addresses"].items()}

    async def connect(
        self, job: str, epoch: Epoch, device: str, neighbours: Iterable[Any], *, timeout_s: float = CONNECT_S
    ) -> None:
        """Open the worker's channels; returns when all are open.

        `neighbours` are `protocol.Neighbour` or `peer_pb2.Neighbour`, whose fields are the same.
        """
        values = tuple(_neighbour(neighbour) for neighbour in neighbours)
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
        worker = self._workers.get((job, device))
        if worker is not None:
            await self._end(worker)

    def pid(self, job: str, device: str) -> int | None:
        """The process id of a worker, or None where there is none."""
        worker = self._workers.get((job, device))
        return None if worker is None else worker.process.pid

    async def _command_to(
        self, job: str, device: str, make: Callable[[int], Command], deadline_s: float = COMMAND_S
    ) -> dict[str, Any]:
        worker = self._workers.get((job, device))
        if worker is None:
            raise WorkerError(f"{device}: no worker runs for job {job}; prepare it first")
        command = make(next(self._ids))
        if not isinstance(command, Ping):
            worker.epoch = max(worker.epoch, command.epoch)
        return await self._call(worker, command, deadline_s)

    async def _call(
        self, worker: _Worker, command: Command, deadline_s: float, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        call = worker.calls[command.id] = _Call(on_progress)
        try:
            worker.outbox.send_nowait(encode(command))
            with trio.move_on_after(deadline_s) as scope:
                await call.done.wait()
            if scope.cancelled_caught:
                raise DeadlineExceeded(f"{worker.device}: no answer to {command.name} within {deadline_s:g} s")
        except trio.BrokenResourceError:
            raise WorkerError(f"{worker.device}: the worker is gone") from None
        finally:
            worker.calls.pop(command.id, None)
        if call.error is not None:
            raise call.error
        assert call.reply is not None
        try:
            return call.reply.check()
        except MeshError as error:
            raise type(error)(f"{worker.device}: {error}") from None

    # -- processes

    async def _worker_for(self, job: str, device: str) -> _Worker:
        key = (job, device)
        async with self._starting.setdefault(key, trio.Lock()):
            worker = self._workers.get(key)
            if worker is None:
                worker = self._workers[key] = await self._spawn(job, device)
        self._starting.pop(key, None)
        return worker

    async def _spawn(self, job: str, device: str) -> _Worker:
        # The job and the device are for people who look at a list of processes.
        try:
            process: trio.Process = await trio.lowlevel.open_process(
                [*self._command, job, device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise WorkerError(f"{device}: no worker could be started ({error})") from error
        worker = _Worker(job, device, process)
        self._all.add(worker)
        self._nursery.start_soon(self._mind, worker)
        return worker

    async def _mind(self, worker: _Worker) -> None:
        """Everything about one process, from its first byte to its last."""
        reason = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, worker)
                nursery.start_soon(self._read_stderr, worker)
                try:
                    await self._read_events(worker)
                except ProtocolError as error:
                    reason = str(error)
                    worker.process.kill()
                with trio.move_on_after(EXIT_S):
                    await worker.process.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                worker.process.kill()
                await worker.process.wait()
                await self._read_rest(worker)
                self._forget(worker, reason)
                for stream in (worker.process.stdin, worker.process.stdout, worker.process.stderr):
                    if stream is not None:
                        await stream.aclose()

    async def _write(self, worker: _Worker) -> None:
        stdin = worker.process.stdin
        assert stdin is not None
        try:
            async for data in worker.to_write:
                await stdin.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it is gone: the end of its stdout says so too

    async def _read_events(self, worker: _Worker) -> None:
        stdout = worker.process.stdout
        assert stdout is not None
        decoder = Decoder.events()
        while data := await stdout.receive_some(1 << 16):
            for event in decoder.feed(data):
                self._take(worker, event)

    async def _read_stderr(self, worker: _Worker) -> None:
        stderr = worker.process.stderr
        assert stderr is not None
        rest = ""
        while data := await stderr.receive_some(1 << 14):
            *lines, rest = (rest + data.decode(errors="replace")).split("\n")
            for line in lines:
                self._say(worker, line)
            rest = rest[-4096:]
        self._say(worker, rest)

    async def _read_rest(self, worker: _Worker) -> None:
        # The reason for a crash may still lie in the pipe. Something else may hold its other end: do not wait for that.
        with trio.move_on_after(0.2):
            await self._read_stderr(worker)

    def _say(self, worker: _Worker, line: str) -> None:
        line = line.rstrip()
        if line:
            worker.stderr.append(line)
            logger.debug("worker %s/%s: %s", worker.job, worker.device, line)

    def _take(self, worker: _Worker, event: Event) -> None:
        if isinstance(event, Reply):
            call = worker.calls.get(event.id)
            if call is not None:
                call.reply = event
                call.done.set()
        elif isinstance(event, Progress):
            call = worker.calls.get(event.id)
            if call is not None and call.on_progress is not None:
                call.on_progress(event.loaded_bytes, event.total_bytes)
        else:
            self._report(worker, event)

    def _report(self, worker: _Worker, event: TokenEvent | FailureEvent | AliveEvent) -> None:
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
        try:
            self._events.send_nowait(PoolEvent(worker.job, message))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # nobody listens to this pool any more

    def _forget(self, worker: _Worker, reason: str) -> None:
        """The process is gone: everybody who waits for it hears why."""
        key = (worker.job, worker.device)
        if self._workers.get(key) is worker:
            del self._workers[key]
        self._all.discard(worker)
        worker.gone.set()
        worker.to_write.close()
        why = reason or _post_mortem(worker)
        for call in worker.calls.values():
            call.error = WorkerError(f"{worker.device}: {why}")
            call.done.set()
        if not worker.releasing:
            logger.warning("worker %s/%s: %s", worker.job, worker.device, why)
            self._report(worker, FailureEvent(worker.epoch, "", why, fatal=True))

    async def _end(self, worker: _Worker) -> None:
        """Let it say goodbye, then see that it is gone."""
        worker.releasing = True
        key = (worker.job, worker.device)
        if self._workers.get(key) is worker:
            del self._workers[key]
        try:
            worker.outbox.send_nowait(encode(Release(next(self._ids), worker.epoch)))
            with trio.move_on_after(EXIT_S):
                await worker.gone.wait()
                return
        except trio.BrokenResourceError:
            pass
        finally:
            worker.process.kill()
        with trio.CancelScope(shield=True):
            await worker.gone.wait()

    async def _close(self) -> None:
        async with trio.open_nursery() as nursery:
            for worker in tuple(self._all):
                nursery.start_soon(partial(self._end, worker))
        self._events.close()


def _post_mortem(worker: _Worker) -> str:
    code = worker.process.returncode
    last = f": {worker.stderr[-1]}" if worker.stderr else ""
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        # What it said before has seldom to do with the signal: SIGKILL, for one, mostly means that memory ran out.
        return f"the worker was killed by {name}" + (last if name != "SIGKILL" else "")
    return f"the worker exited with code {code}{last}"


def _over(old: Epoch, new: Epoch) -> str:
    return f"epoch {old[0]} of {old[1]} is over: this worker obeys epoch {new[0]} of {new[1]}"


def _neighbour(value: Any) -> Neighbour:
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
    )
