"""What an all-reduce between two workers of this machine takes: two processes over TCP, as two shards of a stage are.

Between two all-reduces each computes about as long as half a layer, so that the exchange is met as in a step: with
cold caches, and with a neighbour that is not ready at the same instant. What a round takes beyond the computing counts.

    python -m mesh.devices.exchange

is the other process. It reads the address of a channel from its standard input, and ends when the channel or the input
does.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transport import Acceptor, Channel, TransportError, connect_channel, open_fabric

#: Rounds in a row, how many of those at most, and for how long more are begun.
ROUNDS, TURNS, PATIENCE_S = 50, 4, 0.6
#: A hidden state of a narrow model in float32: what latency is all of.
_ELEMENTS = 576
#: Rows and columns of the product between two rounds: 8 MB, about half a millisecond and beyond the inner caches.
_ROWS, _COLUMNS = 2048, 1024
#: The other process loads torch, from a cold disk perhaps.
_START_S = 30.0
_ROUND_S = 5.0
#: Beyond these bounds lies a mistake, and not a loopback.
_BOUNDS_S = (1e-6, 1e-3)


class Partner:
    """The other process. Start it early: it loads torch meanwhile. A context manager, which ends it."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "mesh.devices.exchange")) -> None:
        self._key = os.urandom(32)
        self._fabric = open_fabric("tcp")
        self._acceptor = Acceptor(self._fabric, self._fabric.listen())
        self._acceptor.expect(b"exchange", name="the other process", key=self._key)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        with contextlib.suppress(BrokenPipeError):  # ended already: `ready` says so
            self._tell(f"{self._acceptor.address.hex()} {self._key.hex()}\n")
        self._channel: Channel | None = None

    def __enter__(self) -> Partner:
        return self

    def __exit__(self, *_: object) -> None:
        self._acceptor.close()
        self._fabric.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def ready(self, timeout_s: float = _START_S) -> bool:
        """Wait until it has loaded what it needs. False where it has not in time, or has ended."""
        deadline = time.monotonic() + timeout_s
        while self._channel is None and time.monotonic() < deadline and self._process.poll() is None:
            for _, channel in self._acceptor.poll():
                self._channel = channel
            self._fabric.wait(0.02)
        return self._channel is not None

    def exchange_s(self, torch: Any, clock: Callable[[], float] = time.monotonic) -> float | None:
        """Seconds of one all-reduce of a short vector; None where it could not be measured, or only a busy machine."""
        if not self.ready():
            return None
        assert self._channel is not None
        from transport.collectives import Group

        group = Group(0, 2, {1: self._channel})
        alone: list[float] = []
        together: list[float] = []
        end = clock() + PATIENCE_S
        try:
            while not alone or (len(alone) < ROUNDS * TURNS and clock() < end):
                self._channel.send(b"again")
                _rounds(torch, group, alone, together)
        except TransportError:
            return None
        return typical_s(alone, together)


def typical_s(alone: list[float], together: list[float]) -> float | None:
    """The median of rounds of computing and reducing, less that of computing alone; None out of bounds.

    Not the lower quartile: that one shard is late now and then is what an all-reduce costs, and no disturbance of it.
    """
    found = statistics.median(together) - statistics.median(alone)
    return found if _BOUNDS_S[0] <= found <= _BOUNDS_S[1] else None


def _rounds(torch: Any, group: Any, alone: list[float], together: list[float]) -> None:
    """`ROUNDS` times of computing alone, and of computing and reducing."""
    torch.set_num_threads(1)
    weight, row = torch.ones(_ROWS, _COLUMNS), torch.ones(1, _COLUMNS)
    vector = torch.zeros(1, _ELEMENTS)
    with torch.inference_mode():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            torch.nn.functional.linear(row, weight)
            computed = time.perf_counter()
            group.all_reduce_(vector, _ROUND_S)
            alone.append(computed - began)
            together.append(time.perf_counter() - began)


def main() -> int:
    """The other process."""
    import torch

    from transport.collectives import Group

    address, key = sys.stdin.readline().split()
    # The parent may be killed, and then nobody answers.
    threading.Thread(target=_end_with_input, daemon=True).start()
    fabric = open_fabric("tcp")
    channel = connect_channel(
        fabric, bytes.fromhex(address), name="the calibration", key=bytes.fromhex(key), hello=b"exchange"
    )
    group = Group(1, 2, {0: channel})
    try:
        while True:
            channel.receive(_START_S)
            _rounds(torch, group, [], [])
    except TransportError:
        return 0
    finally:
        fabric.close()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
