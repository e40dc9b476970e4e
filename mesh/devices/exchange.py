"""What two workers of a machine cost each other: two processes that decode together, as two shards of a stage do.

Both compute the same layers of made-up weights (`mesh.devices.layers`). Side by side they share what memory bandwidth
and caches the machine has: a step takes longer than alone (`Decoding.together`). With an all-reduce after each half of
a layer it takes longer still, and that is what an exchange costs, met as in a step: with cold caches, and with a
neighbour that is not ready at the same instant.

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
from dataclasses import dataclass
from typing import Any

from mesh.devices.layers import Sample, stack
from topology.picture import MAX_TOGETHER
from transport import Acceptor, Channel, TransportError, connect_channel, open_fabric
from transport.collectives import Group

#: Half a shard of a narrow model: what two workers of one machine compute is small, or one of them would do.
_SAMPLE = Sample(512, 4, 1536, 2)
#: Together 100 MB and more in a dtype of four bytes: beyond the caches.
LAYERS = 24
#: Steps of each kind in a row, how many turns of those at most, and for how long more turns are begun.
STEPS, TURNS, PATIENCE_S = 8, 6, 1.0
#: The other process loads torch, from a cold disk perhaps.
_START_S = 30.0
#: One all-reduce. Also how long the other process computes by itself before it looks for a word.
_ROUND_S = 5.0
#: Beyond these bounds lies a mistake, and not a loopback.
_BOUNDS_S = (1e-6, 1e-3)
_BESIDE, _REDUCE, _REST = b"beside", b"reduce", b"rest"


@dataclass(frozen=True, slots=True)
class Company:
    """What a neighbour costs. `together`: a step beside it over one alone, 1 or more. `exchange_s`: one all-reduce.

    None where it could not be measured, or only a busy machine.
    """

    together: float | None = None
    exchange_s: float | None = None


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
        self._group: Group | None = None

    def __enter__(self) -> Partner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            self._group.close()
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

    def company(self, torch: Any, dtype: str, clock: Callable[[], float] = time.monotonic) -> Company:
        """Measure in one dtype, on one thread of the CPU. About as long as `PATIENCE_S`."""
        if not self.ready():
            return Company()
        assert self._channel is not None
        channel = self._channel
        self._group = group = self._group or Group(0, 2, {1: channel}, beside=True)  # it counts what both have done
        torch.set_num_threads(1)
        alone: list[float] = []
        beside: list[float] = []
        reduced: list[float] = []

        def tell(order: bytes) -> None:
            channel.send(order, dtype.encode())
            channel.receive(_START_S)  # it is done with what was before, and begins

        try:
            with torch.inference_mode():
                layers = _Layers(torch, dtype, group)
                tell(_REST)
                end = clock() + PATIENCE_S
                while not alone or (len(alone) < STEPS * TURNS and clock() < end):
                    alone += layers.steps()
                    tell(_BESIDE)
                    beside += layers.steps()
                    tell(_REDUCE)
                    reduced += layers.steps(reducing=True)
        except TransportError:
            return Company()
        return judged(alone, beside, reduced)


def judged(alone: list[float], beside: list[float], reduced: list[float]) -> Company:
    """What steps of `LAYERS` layers say: seconds alone, beside a neighbour, and beside it with all-reduces.

    Medians, not the lower quartile: that one shard is late now and then is what an all-reduce costs.
    """
    by_itself, in_company, together = map(statistics.median, (alone, beside, reduced))
    slower = max(in_company / by_itself, 1.0)
    exchange_s = (together - in_company) / (2 * LAYERS)
    return Company(
        slower if slower <= MAX_TOGETHER else None,
        exchange_s if _BOUNDS_S[0] <= exchange_s <= _BOUNDS_S[1] else None,
    )


class _Layers:
    """Layers to step through, with all-reduces while `reducing`."""

    def __init__(self, torch: Any, dtype: str, group: Group) -> None:
        self.reducing = False
        self._group = group
        self.step = stack(torch, "cpu", dtype, _SAMPLE, LAYERS, self._reduce)
        self.step()  # touches pages

    def _reduce(self, tensor: Any) -> None:
        if self.reducing:
            self._group.all_reduce_(tensor, _ROUND_S)

    def steps(self, *, reducing: bool = False) -> list[float]:
        """Seconds of each of `STEPS` steps, behind one that fetches what others have pushed out of the caches."""
        self.reducing = reducing
        self.step()
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - began)
        self.reducing = False
        return times


def main() -> int:
    """The other process."""
    import torch

    torch.set_num_threads(1)
    address, key = sys.stdin.readline().split()
    # The parent may be killed, and then nobody answers.
    threading.Thread(target=_end_with_input, daemon=True).start()
    fabric = open_fabric("tcp")
    channel = connect_channel(
        fabric, bytes.fromhex(address), name="the calibration", key=bytes.fromhex(key), hello=b"exchange"
    )
    group = Group(1, 2, {0: channel}, beside=True)
    kept: dict[str, _Layers] = {}
    try:
        with torch.inference_mode():
            order = channel.receive(_START_S)
            while True:
                dtype = bytes(order.payload).decode()
                if dtype not in kept:
                    kept = {dtype: _Layers(torch, dtype, group)}
                channel.send(b"")
                if order.meta == _REDUCE:
                    kept[dtype].steps(reducing=True)
                elif order.meta == _BESIDE:
                    while (next_order := channel.poll()) is None:
                        kept[dtype].step()
                    order = next_order
                    continue
                order = channel.receive(_START_S)
    except TransportError:
        return 0
    finally:
        fabric.close()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
