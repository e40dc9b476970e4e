"""A child process of the daemon that is talked to through its pipes: what it is told, what it says, how it ended."""

from __future__ import annotations

import math
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence

import trio

from mesh.errors import MeshError, WorkerError

#: A child that was told to end, or whose output ended, gets so long; then it is killed.
EXIT_S = 2.0
_STDERR_LINES = 20
_READ_BYTES = 1 << 16


class Child:
    """A child from its first byte to its last. `run` belongs in a nursery as soon as the process exists.

    `hear` is given what it writes to its standard output, as it comes; where that raises MeshError or ValueError the
    child talks nonsense and is killed. `gone` is set at its end, and `why` then says how it ended.
    """

    def __init__(self, process: trio.Process, hear: Callable[[bytes | bytearray], None], what: str) -> None:
        self.process = process
        self.gone = trio.Event()
        self.why = ""
        self._hear = hear
        self._what = what
        self._last: deque[str] = deque(maxlen=_STDERR_LINES)
        self._on_line: Callable[[str], None] = lambda line: None
        self._outbox, self._to_write = trio.open_memory_channel[bytes](math.inf)

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        hear: Callable[[bytes | bytearray], None],
        what: str,
        *,
        on_line: Callable[[str], None] | None = None,
    ) -> Child:
        """Start it. `what` is what errors call it. Raises WorkerError where the system refuses.

        on_line: takes the lines of its standard error; None leaves that where the daemon's goes.
        """
        try:
            process: trio.Process = await trio.lowlevel.open_process(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if on_line is None else subprocess.PIPE,
            )
        except OSError as error:
            raise WorkerError(f"no {what.removeprefix('the ')} could be started ({error})") from error
        child = cls(process, hear, what)
        if on_line is not None:
            child._on_line = on_line
        return child

    def send(self, data: bytes) -> None:
        """Queue what is to be written to its standard input. Raises trio.BrokenResourceError once it is gone."""
        self._outbox.send_nowait(data)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    async def run(self) -> None:
        """Everything that goes through its pipes, until it ends or this is cancelled; then it is gone."""
        reason = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._read_stderr)
                try:
                    await self._read()
                except (MeshError, ValueError) as error:
                    reason = str(error)
                    self.process.kill()
                with trio.move_on_after(EXIT_S):
                    await self.process.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                self.process.kill()
                await self.process.wait()
                # The reason for a crash may still lie in the pipe. Something else may hold its other end: no long wait.
                with trio.move_on_after(0.2):
                    await self._read_stderr()
                self.why = reason or self._post_mortem()
                self.gone.set()
                self._to_write.close()
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

    async def _read(self) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        while data := await stdout.receive_some(_READ_BYTES):
            self._hear(data)

    async def _read_stderr(self) -> None:
        stderr = self.process.stderr
        if stderr is None:
            return
        rest = ""
        while data := await stderr.receive_some(1 << 14):
            *lines, rest = (rest + data.decode(errors="replace")).split("\n")
            for line in lines:
                self._say(line)
            rest = rest[-4096:]
        self._say(rest)

    def _say(self, line: str) -> None:
        line = line.rstrip()
        if line:
            self._last.append(line)
            self._on_line(line)

    def _post_mortem(self) -> str:
        code = self.process.returncode
        last = f": {self._last[-1]}" if self._last else ""
        if code is not None and code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            # What it said before has seldom to do with the signal: SIGKILL, for one, mostly means that memory ran out.
            return f"{self._what} was killed by {name}" + (last if name != "SIGKILL" else "")
        return f"{self._what} exited with code {code}{last}"
