"""UCX as Python reaches it: a loop of UCXX's binding and nothing else, between two processes.

    python -m benchmarks.transport.bare

is the far end. It prints its worker's address, reads the other's, and then a task a line: "echo SIZE COUNT" or
"stream SIZE COUNT".
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.transport.ranks import WARM_UP
from benchmarks.transport.rows import LeftOut

_TASK_S = 60.0
_NEAR_TAG, _FAR_TAG = 1, 2
#: Sends of a stream that may be under way: as many as ucx_perftest has.
_AHEAD = 32


class Bare:
    """One worker, one endpoint. Everything is polled."""

    def __init__(self) -> None:
        from transport.ucx_binding import CONFIG, Array, network_devices, ucx

        self._ucx, self._array = ucx, Array
        context = ucx.UCXContext({**CONFIG, **network_devices("127.0.0.1")}, (ucx.Feature.TAG, ucx.Feature.WAKEUP))
        self._worker = ucx.UCXWorker(context)
        self.address: bytes = self._worker.address.tobytes()
        self._endpoint: Any = None

    def meet(self, other: bytes) -> None:
        """Make the endpoint to the process with that address."""
        address = self._ucx.UCXAddress.create_from_buffer(other)
        self._endpoint = self._ucx.UCXEndpoint.create_from_worker_address(self._worker, address, True)

    def run(self, what: str, size: int, count: int, *, near: bool) -> float:
        """Seconds of one way of an echo, or of a message of a stream from the near end to the far one."""
        tags = self._ucx.UCXXTag(_NEAR_TAG), self._ucx.UCXXTag(_FAR_TAG)
        data, buffer = self._array(bytearray(size)), self._array(bytearray(size))
        self._deadline = time.monotonic() + _TASK_S
        task = self._echo if what == "echo" else self._stream
        task(data, buffer, tags if near else tags[::-1], WARM_UP, near)
        return task(data, buffer, tags if near else tags[::-1], count, near)

    def _echo(self, data: Any, buffer: Any, tags: tuple[Any, Any], count: int, near: bool) -> float:
        ours, theirs = tags
        send, receive = self._endpoint.tag_send, self._endpoint.tag_recv
        began = time.perf_counter()
        for _ in range(count):
            request = receive(buffer, theirs)
            if near:
                sent = send(data, ours)
            self._until(request)
            if not near:
                sent = send(data, ours)
            self._until(sent)
        return (time.perf_counter() - began) / count / 2

    def _stream(self, data: Any, buffer: Any, tags: tuple[Any, Any], count: int, near: bool) -> float:
        ours, theirs = tags
        began = time.perf_counter()
        if near:
            under_way: deque[Any] = deque()
            for _ in range(count):
                under_way.append(self._endpoint.tag_send(data, ours))
                if len(under_way) > _AHEAD:
                    self._until(under_way.popleft())
            for request in under_way:
                self._until(request)
            self._until(self._endpoint.tag_recv(buffer, theirs))
        else:
            for _ in range(count):
                self._until(self._endpoint.tag_recv(buffer, theirs))
            self._until(self._endpoint.tag_send(data, ours))
        return (time.perf_counter() - began) / count

    def _until(self, request: Any) -> None:
        once = self._worker.progress_once
        while not request.completed:
            if not once() and time.monotonic() > self._deadline:
                raise LeftOut(f"the bare loop over UCXX took more than {_TASK_S:g} s")

    def close(self) -> None:
        """End the endpoint."""
        if self._endpoint is not None:
            self._endpoint.close_blocking()
            self._endpoint = None


class BarePair:
    """The near end, and a process with the far one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._near = Bare()
        self._near.meet(bytes.fromhex(self._exchange(self._near.address.hex())))

    def run(self, what: str, size: int, count: int) -> float:
        """As `Bare.run`, at both ends."""
        self._tell(f"{what} {size} {count}")
        return self._near.run(what, size, count, near=True)

    def close(self) -> None:
        """End both ends."""
        self._near.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _exchange(self, line: str) -> str:
        self._tell(line)
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise LeftOut("the far end of the bare loop over UCXX has ended")
        return answer


@contextmanager
def open_bare() -> Iterator[BarePair]:
    """A pair for the length of the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transport.bare"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    ) as process:
        pair = None
        try:
            pair = BarePair(process)
            yield pair
        finally:
            process.kill()
            if pair is not None:
                pair.close()


def main() -> int:
    """The far end."""
    far = Bare()
    other = sys.stdin.readline().strip()
    far.meet(bytes.fromhex(other))
    print(far.address.hex(), flush=True)
    for line in sys.stdin:
        what, size, count = line.split()
        far.run(what, int(size), int(count), near=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
