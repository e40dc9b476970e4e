"""A short measurement of what a device does, in its worker's number of threads.

Two figures bound inference (the roofline of Williams, Waterman and Patterson, 2009): prefill is matrix products, so
FLOP/s by dtype is measured with square ones; decode multiplies one row with every weight, so memory bandwidth is
measured with just that (`linear` of one row), over more weights than any cache holds. How far a real layer stays behind
that is measured with real layers (`mesh.devices.layers`), and what an exchange between two workers of the machine takes
with two processes (`mesh.devices.exchange`).
Of the repeats the lower quartile counts: what else runs on the machine only ever makes a run longer, by a factor of ten
where threads wait for one that lost its core. One device takes about three seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mesh.errors import WorkerError
from topology.snapshot import Decoding

_BUDGET_S = 0.2
#: For each of three rounds over three stacks of layers of each dtype.
_LAYERS_BUDGET_S = 0.04
_LEAST_REPEATS, _MOST_REPEATS = 5, 200
#: A product long enough that call overhead does not count, short enough for five repeats in the budget.
_PRODUCT_S = 0.02
#: Short runs are repeated inside one timing until it takes this long, so that a GPU's launch and wait do not count.
_TIMING_S = 0.004
_SMALLEST, _LARGEST = 256, 8192
#: Median over minimum of the repeats: 1.02 to 1.08 on a quiet machine, 2 and more beside a busy neighbour.
_STEADY_SPREAD = 1.3
#: Weights are read in blocks of this many columns, the hidden size of a model of about a billion parameters. Measured
#: on one core of an AMD EPYC (Zen 4), float32: 11 GB/s at 576 columns, 18 at 2048, 22 at 4096.
_COLUMNS = 2048
_CPU_STREAM_BYTES, _GPU_STREAM_BYTES = 2**28, 2**30
#: A dtype slower than this share of float32 is emulated: of no use, so it is left out. (float16 products on a CPU
#: without float16 arithmetic: 22 against 100 GFLOP/s on the machine above.)
_USEFUL_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured speed: `flops` is matrix-product FLOP/s by dtype name, `memory_bandwidth` bytes/s of one-row products.

    `steady` is False where repeats differed so much that something else was using the device: good enough to plan with,
    not to keep. `decoding` is what layers cost by dtype name; `exchange_s` an all-reduce of a short vector between two
    processes of the machine, None where it was not measured.
    """

    flops: dict[str, float]
    memory_bandwidth: float
    steady: bool = True
    decoding: dict[str, Decoding] = field(default_factory=dict)
    exchange_s: float | None = None


class Busy(Exception):
    """Others use the machine so much that measuring would take long and tell nothing."""


class Layers(Protocol):
    """`mesh.devices.layers.decoding`."""

    def __call__(
        self,
        torch: Any,
        torch_device: str,
        dtype: str,
        free_bytes: int,
        typical_s: Callable[[Callable[[], object]], float],
    ) -> Decoding | None: ...


def calibrate(
    torch: Any,
    torch_device: str,
    *,
    threads: int,
    dtypes: Sequence[str],
    free_bytes: int,
    clock: Callable[[], float],
    layers: Layers | None = None,
) -> Speed:
    """Measure a device. `free_bytes` bounds what is allocated (a quarter of it at most); `clock` gives seconds.

    `layers` measures real layers, where the figures of plain products are not to be all.

    Raises WorkerError where not even float32 products work.
    """
    torch.set_num_threads(threads)
    timer = _Timer(clock, _synchronizer(torch, torch_device))
    flops: dict[str, float] = {}
    with torch.inference_mode():
        for dtype in ("float32", *(name for name in dtypes if name != "float32")):
            try:
                speed = _products(torch, torch_device, dtype, timer)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                if dtype == "float32":
                    reason = str(error).partition("\n")[0]
                    raise WorkerError(f"device {torch_device} cannot multiply matrices: {reason}") from None
                continue
            if speed >= _USEFUL_SHARE * flops.get("float32", 0.0):
                flops[dtype] = speed
        bandwidth = _stream(torch, torch_device, timer, free_bytes)
        decoding: dict[str, Decoding] = {}
        typical_s = functools.partial(timer.typical_s, budget_s=_LAYERS_BUDGET_S)
        try:
            if layers is not None:
                for dtype in flops:
                    found = layers(torch, torch_device, dtype, free_bytes, typical_s)
                    if found is not None:
                        decoding[dtype] = found
        except Busy:
            timer.steady = False
    return Speed(flops, bandwidth, timer.steady, decoding)


def _products(torch: Any, torch_device: str, dtype: str, timer: _Timer) -> float:
    """FLOP/s of square products in one dtype, of a size that suits the device."""

    def product(size: int) -> Callable[[], object]:
        left, right = (
            torch.randn(size, size, device=torch_device).to(getattr(torch, dtype)).contiguous() for _ in range(2)
        )
        return lambda: torch.mm(left, right.t())

    size = 2 * _SMALLEST
    first_s = timer.typical_s(product(size), budget_s=0.0)
    wanted = size * (_PRODUCT_S / max(first_s, 1e-9)) ** (1 / 3)
    size = int(min(_LARGEST, max(_SMALLEST, wanted // 64 * 64)))
    return float(2 * size**3 / timer.typical_s(product(size)))


def _stream(torch: Any, torch_device: str, timer: _Timer, free_bytes: int) -> float:
    """Bytes/s of float32 weights multiplied with one row."""
    wanted = _CPU_STREAM_BYTES if torch_device == "cpu" else _GPU_STREAM_BYTES
    rows = max(64, min(wanted, free_bytes // 4) // (4 * 4 * _COLUMNS))
    weights = [torch.ones(rows, _COLUMNS, device=torch_device) for _ in range(4)]
    row = torch.ones(1, _COLUMNS, device=torch_device)
    linear = torch.nn.functional.linear

    def run() -> None:
        for weight in weights:
            linear(row, weight)

    return float(4 * 4 * rows * _COLUMNS / timer.typical_s(run))


class _Timer:
    """Repeats runs. `steady` turns False when a run's repeats differ beyond what a quiet machine shows."""

    def __init__(self, clock: Callable[[], float], synchronize: Callable[[], object]) -> None:
        self.steady = True
        self._clock = clock
        self._synchronize = synchronize

    def typical_s(self, run: Callable[[], object], *, budget_s: float = _BUDGET_S) -> float:
        """Seconds of one run. The first is not counted: it loads kernels and touches pages."""
        self._once(run, 1)
        inner = max(1, math.ceil(_TIMING_S / max(self._once(run, 1), 1e-9)))
        inner = min(inner, 10_000)
        end = self._clock() + budget_s
        times: list[float] = []
        while len(times) < _LEAST_REPEATS or (len(times) < _MOST_REPEATS and self._clock() < end):
            times.append(self._once(run, inner) / inner)
        times.sort()
        if times[len(times) // 2] > _STEADY_SPREAD * times[0]:
            self.steady = False
        return max(times[len(times) // 4], 1e-12)

    def _once(self, run: Callable[[], object], inner: int) -> float:
        self._synchronize()
        start = self._clock()
        for _ in range(inner):
            run()
        self._synchronize()
        return self._clock() - start


def _synchronizer(torch: Any, torch_device: str) -> Callable[[], object]:
    """What waits until the device has done all it was given. A CPU is never behind."""
    kind = torch_device.partition(":")[0]
    if kind == "cuda":
        return lambda: torch.cuda.synchronize(torch_device)
    if kind == "xpu":
        return lambda: torch.xpu.synchronize(torch_device)
    if kind == "mps":
        synchronize: Callable[[], object] = torch.mps.synchronize
        return synchronize
    return lambda: None
