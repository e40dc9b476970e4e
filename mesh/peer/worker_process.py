"""One worker process as the daemon sees it: the commands that wait for a reply, and what it reports."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import trio

from mesh.errors import DeadlineExceeded, MeshError, WorkerError
from mesh.peer.child import EXIT_S, Child
from mesh.runtime.protocol import (
    AliveEvent,
    Command,
    Decoder,
    Epoch,
    Event,
    FailureEvent,
    Ping,
    Progress,
    Release,
    Reply,
    TokenEvent,
    encode,
)

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
Report = Callable[["WorkerProcess", TokenEvent | FailureEvent | AliveEvent], None]


class _Call:
    """A command that waits for its reply."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.on_progress = on_progress
        self.done = trio.Event()
        self.reply: Reply | None = None
        self.error: MeshError | None = None


class WorkerProcess:
    """A worker from its first byte to its last. Made by `spawn`; `run` belongs in a nursery at once.

    `report` is called for each event, and with a fatal failure where it ends unasked. `gone` is set at its end.
    """

    def __init__(self, job: str, device: str, report: Report) -> None:
        self.job = job
        self.device = device
        self.epoch: Epoch = (0, "")
        self.releasing = False
        self.calls: dict[int, _Call] = {}
        self._report = report
        self._ids = itertools.count(1)
        self._decoder = Decoder.events()
        self._child: Child

    @classmethod
    async def spawn(cls, command: Sequence[str], job: str, device: str, report: Report) -> WorkerProcess:
        """Start a fresh interpreter. Raises WorkerError where the system refuses."""
        worker = cls(job, device, report)

        def log(line: str) -> None:
            logger.debug("worker %s/%s: %s", job, device, line)

        try:
            # The job and the device are for people who look at a list of processes.
            worker._child = await Child.spawn([*command, job, device], worker._hear, "the worker", on_line=log)
        except WorkerError as error:
            raise WorkerError(f"{device}: {error}") from error
        return worker

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._child.process.pid

    @property
    def gone(self) -> trio.Event:
        """Set when it has ended."""
        return self._child.gone

    async def call(
        self, make: Callable[[int], Command], deadline_s: float, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Send the command that `make` makes of an id; the reply's body. Raises what the worker met, or WorkerError."""
        command = make(next(self._ids))
        if not isinstance(command, Ping):
            self.epoch = max(self.epoch, command.epoch)
        call = self.calls[command.id] = _Call(on_progress)
        try:
            self._child.send(encode(command))
            with trio.move_on_after(deadline_s) as scope:
                await call.done.wait()
            if scope.cancelled_caught:
                raise DeadlineExceeded(f"{self.device}: no answer to {command.name} within {deadline_s:g} s")
        except trio.BrokenResourceError:
            raise WorkerError(f"{self.device}: the worker is gone") from None
        finally:
            self.calls.pop(command.id, None)
        if call.error is not None:
            raise call.error
        assert call.reply is not None
        try:
            return call.reply.check()
        except MeshError as error:
            raise type(error)(f"{self.device}: {error}") from None

    async def end(self) -> None:
        """Let it say goodbye, then see that it is gone."""
        self.releasing = True
        try:
            self._child.send(encode(Release(next(self._ids), self.epoch)))
            with trio.move_on_after(EXIT_S):
                await self.gone.wait()
                return
        except trio.BrokenResourceError:
            pass
        finally:
            self._child.kill()
        with trio.CancelScope(shield=True):
            await self.gone.wait()

    async def run(self) -> None:
        """Everything that goes through its pipes, until it ends or this is cancelled; then it is gone."""
        try:
            await self._child.run()
        finally:
            self._forget(self._child.why)

    def _hear(self, data: bytes | bytearray) -> None:
        for event in self._decoder.feed(data):
            self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, Reply):
            call = self.calls.get(event.id)
            if call is not None:
                call.reply = event
                call.done.set()
        elif isinstance(event, Progress):
            call = self.calls.get(event.id)
            if call is not None and call.on_progress is not None:
                call.on_progress(event.loaded_bytes, event.total_bytes)
        else:
            self._report(self, event)

    def _forget(self, why: str) -> None:
        """The process is gone: everybody who waits for it hears why."""
        for call in self.calls.values():
            call.error = WorkerError(f"{self.device}: {why}")
            call.done.set()
        if not self.releasing:
            logger.warning("worker %s/%s: %s", self.job, self.device, why)
            self._report(self, FailureEvent(self.epoch, "", why, fatal=True))
