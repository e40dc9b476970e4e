"""Ranks of a group in processes of their own, all connected, that do what they are told: for collectives and pairs.

    python -m benchmarks.transport.ranks BACKEND SEAL RANK SIZE

is one rank. It prints its address, reads everybody's from its standard input, and then a task a line, to which it
answers with the seconds that it took, "error" and a line, or nothing more when its input ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.transport.rows import LeftOut

#: Seconds that one task may take. A rank that takes longer is stuck, and the measurement is given up.
TASK_S = 60.0
#: Messages before those that are timed: as many as ucx_perftest is told to send.
WARM_UP = 5


class Ranks:
    """`size` processes, each with a channel to each other one. Made by `open_ranks`."""

    def __init__(self, backend: str, size: int, *, seal: bool) -> None:
        self._size = size
        command = [sys.executable, "-m", "benchmarks.transport.ranks", backend, "sealed" if seal else "open"]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                text=True,
            )
            for rank in range(size)
        ]
        addresses = [self._answer(rank) for rank in range(size)]
        key = os.urandom(32).hex()
        self._tell(" ".join([key, *addresses]))

    def run(self, task: str) -> float:
        """Let every rank do `task`; the seconds that the slowest took. Raises LeftOut where one could not."""
        self._tell(task)
        answers = [self._answer(rank) for rank in range(self._size)]
        try:
            return max(float(answer) for answer in answers)
        except ValueError:
            failed = next(answer for answer in answers if answer.startswith("error"))
            raise LeftOut(f"{task}: {failed.removeprefix('error ')}") from None

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def _tell(self, line: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _answer(self, rank: int) -> str:
        stream = self._processes[rank].stdout
        assert stream is not None
        line = stream.readline().strip()
        if not line:
            raise LeftOut(f"rank {rank} of {self._size} has ended")
        return line


@contextlib.contextmanager
def open_ranks(backend: str, size: int, *, seal: bool) -> Iterator[Ranks]:
    """Ranks for the length of the block."""
    ranks = None
    try:
        ranks = Ranks(backend, size, seal=seal)
        yield ranks
    finally:
        if ranks is not None:
            ranks.close()


# -- one rank


def main(arguments: list[str]) -> int:
    """One rank."""
    from transport import Acceptor, TransportError, connect_channel, open_fabric

    backend, seal, rank, size = arguments[0], arguments[1] == "sealed", int(arguments[2]), int(arguments[3])
    fabric = open_fabric(backend)
    acceptor = Acceptor(fabric, fabric.listen())
    print(acceptor.address.hex(), flush=True)
    key_hex, *addresses = sys.stdin.readline().split()
    key = bytes.fromhex(key_hex)
    channels: dict[int, Any] = {}
    for other in range(rank + 1, size):
        acceptor.expect(f"{rank}-{other}".encode(), name=f"rank {other}", key=key, seal=seal)
    for other in range(rank):
        channels[other] = connect_channel(
            fabric,
            bytes.fromhex(addresses[other]),
            name=f"rank {other}",
            key=key,
            hello=f"{other}-{rank}".encode(),
            seal=seal,
        )
    deadline = time.monotonic() + TASK_S
    while len(channels) < size - 1 or not all(channel.established for channel in channels.values()):
        for hello, channel in acceptor.poll():
            channels[int(hello.split(b"-")[1])] = channel
        for channel in channels.values():
            channel.check()
        if time.monotonic() > deadline:
            return 1
    tasks = _Tasks(rank, size, channels)
    for line in sys.stdin:
        what, *numbers = line.split()
        try:
            print(tasks.run(what, *map(int, numbers)), flush=True)
        except (TransportError, RuntimeError, ImportError) as error:
            print(f"error {str(error).splitlines()[0]}", flush=True)
    return 0


class _Tasks:
    def __init__(self, rank: int, size: int, channels: dict[int, Any]) -> None:
        self._rank = rank
        self._size = size
        self._channels = channels
        self._groups: dict[int, Any] = {}
        self._gloo: Any = None

    def run(self, what: str, nbytes: int, count: int, extra: int = 0) -> float:
        """Seconds of one turn of a task."""
        task: Callable[[int, int, int], float] = {
            "reduce": self._reduce,
            "gloo": self._gloo_reduce,
            "echo": self._echo,
            "stream": self._stream,
        }[what]
        return task(nbytes, count, extra)

    def _reduce(self, nbytes: int, count: int, beside: int) -> float:
        """beside: 1 lets the ranks share memory, 0 has them send messages."""
        import torch

        from transport.collectives import Group

        torch.set_num_threads(1)
        group = self._groups.get(beside)
        if group is None:
            group = self._groups[beside] = Group(self._rank, self._size, self._channels, beside=bool(beside))
        tensor = torch.zeros(nbytes // 4)
        with torch.inference_mode():
            for _ in range(2):
                group.all_reduce_(tensor, TASK_S)
            began = time.perf_counter()
            for _ in range(count):
                group.all_reduce_(tensor, TASK_S)
            return (time.perf_counter() - began) / count

    def _gloo_reduce(self, nbytes: int, count: int, port: int) -> float:
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        if self._gloo is None:
            distributed.init_process_group(
                "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=self._rank, world_size=self._size
            )
            self._gloo = distributed
        tensor = torch.zeros(nbytes // 4)
        for _ in range(2):
            distributed.all_reduce(tensor)
        began = time.perf_counter()
        for _ in range(count):
            distributed.all_reduce(tensor)
        return (time.perf_counter() - began) / count

    def _echo(self, nbytes: int, count: int, _: int) -> float:
        """There and back `count` times; the seconds of one way."""
        return self._timed(self._turns, nbytes, count) / 2

    def _stream(self, nbytes: int, count: int, _: int) -> float:
        """`count` messages one way, and a word back; the seconds of one."""
        return self._timed(self._flow, nbytes, count)

    def _timed(self, work: Callable[[Any, bytearray, int], None], nbytes: int, count: int) -> float:
        channel, payload = self._channels[1 - self._rank], bytearray(nbytes)
        work(channel, payload, WARM_UP)
        began = time.perf_counter()
        work(channel, payload, count)
        return (time.perf_counter() - began) / count

    def _turns(self, channel: Any, payload: bytearray, count: int) -> None:
        for _ in range(count):
            if self._rank == 0:
                channel.send(b"", payload)
                channel.receive(TASK_S)
            else:
                ticket = channel.send(b"", channel.receive(TASK_S).payload)
        while self._rank == 1 and not ticket.done:  # a long message needs its sender's help to the end
            channel.check()
            channel.fabric.progress()

    def _flow(self, channel: Any, payload: bytearray, count: int) -> None:
        if self._rank == 1:
            for _ in range(count):
                channel.receive(TASK_S)
            channel.send(b"done")
            return
        most = max(4 << 20, 2 * len(payload))
        for _ in range(count):
            channel.send(b"", payload)
            while channel.pending_bytes > most:
                channel.fabric.wait(TASK_S)
                channel.check()
        channel.receive(TASK_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
