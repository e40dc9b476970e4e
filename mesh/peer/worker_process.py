"""One worker process as the daemon sees it: its pipes, the commands that wait for a reply, and how it ended."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import trio

from mesh.errors import DeadlineExceeded, MeshError, WorkerError
from mesh.runtime.protocol import (
    AliveEvent,
    Command,
    Decoder,
    Epoch,
    Event,
    FailureEvent,
    Ping,
    Progress,
    ProtocolError,
    Release,
    Reply,
    TokenEvent,
    encode,
)

logger = logging.getLogger(__name__)

#: A released worker says goodbye to its neighbours and exits; then it is killed.
EXIT_S = 2.0
_STDERR_LINES = 20

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
    """A worker from its first byte to its last. `run` belongs in a nursery as soon as the process exists.

    `report` is called for each event, and with a fatal failure where it ends unasked. `gone` is set at its end.
    """

    def __init__(self, job: str, device: str, process: trio.Process, report: Report) -> None:
        self.job = job
        self.device = device
        self.process = process
        self.epoch: Epoch = (0, "")
        self.releasing = False
        self.gone = trio.Event()
        self.calls: dict[int, _Call] = {}
        self._report = report
        self._ids = itertools.count(1)
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._outbox, self._to_write = trio.open_memory_channel[bytes](math.inf)

    @classmethod
    async def spawn(cls, command: Sequence[str], job: str, device: str, report: Report) -> WorkerProcess:
        """Start a fresh interpreter. Raises WorkerError where the system refuses."""
        # The job and the device are for people who look at a list of processes.
        try:
            process: trio.Process = await trio.lowlevel.open_process(
                [*command, job, device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise WorkerError(f"{device}: no worker could be started ({error})") from error
        return cls(job, device, process, report)

    async def call(
        self, make: Callable[[int], Command], deadline_s: float, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Send the command that `make` makes of an id; the reply's body. Raises what the worker met, or WorkerError."""
        command = make(next(self._ids))
        if not isinstance(command, Ping):
            self.epoch = max(self.epoch, command.epoch)
        call = self.calls[command.id] = _Call(on_progress)
        try:
            self._outbox.send_nowait(encode(command))
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
            self._outbox.send_nowait(encode(Release(next(self._ids), self.epoch)))
            with trio.move_on_after(EXIT_S):
                await self.gone.wait()
                return
        except trio.BrokenResourceError:
            pass
        finally:
            self.process.kill()
        with trio.CancelScope(shield=True):
            await self.gone.wait()

    async def run(self) -> None:
        """Everything that goes through its pipes, until it ends or this is cancelled; then it is gone."""
        reason = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._read_stderr)
                try:
                    await self._read_events()
                except ProtocolError as error:
                    reason = str(error)
                    self.process.kill()
                with trio.move_on_after(EXIT_S):
                    await self.process.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                self.process.kill()
                await self.process.wait()
                await self._read_rest()
                self._forget(reason)
                for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                    if stream is not None:
                        await stream.aclose()

    async def _write(self) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        try:
            async for data in self._to_write:
                await stdin.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it is gone: the end of its stdout says so too

    async def _read_events(self) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        decoder = Decoder.events()
        while data := await stdout.receive_some(1 << 16):
            for event in decoder.feed(data):
                self._take(event)

    async def _read_stderr(self) -> None:
        stderr = self.process.stderr
        assert stderr is not None
        rest = ""
        while data := await stderr.receive_some(1 << 14):
            *lines, rest = (rest + data.decode(errors="replace")).split("\n")
            for line in lines:
                self._say(line)
            rest = rest[-4096:]
        self._say(rest)

    async def _read_rest(self) -> None:
        # The reason for a crash may still lie in the pipe. Something else may hold its other end: do not wait for that.
        with trio.move_on_after(0.2):
            await self._read_stderr()

    def _say(self, line: str) -> None:
        line = line.rstrip()
        if line:
            self._stderr.append(line)
            logger.debug("worker %s/%s: %s", self.job, self.device, line)

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

    def _forget(self, reason: str) -> None:
        """The process is gone: everybody who waits for it hears why."""
        self.gone.set()
        self._to_write.close()
        why = reason or self._post_mortem()
        for call in self.calls.values():
            call.error = WorkerError(f"{self.device}: {why}")
            call.done.set()
        if not self.releasing:
            logger.warning("worker %s/%s: %s", self.job, self.device, why)
            self._report(self, FailureEvent(self.epoch, "", why, fatal=True))

    def _post_mortem(self) -> str:
        code = self.process.returncode
        last = f": {self._stderr[-1]}" if self._stderr else ""
        if code is not None and code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            # What it said before has seldom to do with the signal: SIGKILL, for one, mostly means that memory ran out.
            return f"the worker was killed by {name}" + (last if name != "SIGKILL" else "")
        return f"the worker exited with code {code}{last}"
