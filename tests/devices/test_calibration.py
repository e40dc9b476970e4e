from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.devices.calibration import Busy, calibrate
from mesh.errors import WorkerError
from topology.snapshot import Decoding

FLOPS = {"float32": 1e11, "bfloat16": 2e11, "float16": 2e10}
BANDWIDTH = 2e10


class Machine:
    """A device whose clock moves by what its speed says; every `every`-th run takes `slow` times as long."""

    def __init__(self, *, every: int = 0, slow: float = 1.0, broken: tuple[str, ...] = ()) -> None:
        self.now = 0.0
        self.runs = 0
        self.every = every
        self.slow = slow
        self.broken = broken
        self.allocated = 0

    def clock(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.runs += 1
        self.now += seconds * (self.slow if self.every and self.runs % self.every == 0 else 1.0)

    def torch(self) -> Any:
        def tensor(rows: int, columns: int, dtype: str = "float32") -> Any:
            made = SimpleNamespace(rows=rows, columns=columns, dtype=dtype)

            def to(name: str) -> Any:
                if name in self.broken:
                    raise TypeError(f"no {name} on this device\nand a second line")
                return tensor(rows, columns, name)

            made.to, made.contiguous, made.t = to, lambda: made, lambda: made
            return made

        def ones(rows: int, columns: int, device: str) -> Any:
            self.allocated += 4 * rows * columns
            return tensor(rows, columns)

        def mm(left: Any, right: Any) -> None:
            self.take(2 * left.rows**3 / FLOPS[left.dtype])

        def linear(row: Any, weight: Any) -> None:
            self.take(4 * weight.rows * weight.columns / BANDWIDTH)

        return SimpleNamespace(
            float32="float32",
            bfloat16="bfloat16",
            float16="float16",
            set_num_threads=lambda threads: None,
            inference_mode=nullcontext,
            randn=lambda rows, columns, device: tensor(rows, columns),
            ones=ones,
            mm=mm,
            nn=SimpleNamespace(functional=SimpleNamespace(linear=linear)),
        )


def _calibrate(machine: Machine, free_bytes: int = 2**34, layers: Any = None) -> Any:
    options = {"threads": 1, "dtypes": tuple(FLOPS), "free_bytes": free_bytes, "clock": machine.clock}
    return calibrate(machine.torch(), "cpu", layers=layers, **options)


def test_speeds_come_out_as_they_are_and_emulated_dtypes_are_left_out() -> None:
    speed = _calibrate(Machine())
    assert speed.flops == pytest.approx({"float32": 1e11, "bfloat16": 2e11})
    assert speed.memory_bandwidth == pytest.approx(2e10)
    assert speed.steady


def test_it_is_short() -> None:
    machine = Machine()
    _calibrate(machine)
    assert machine.now < 3.0


def test_some_disturbed_repeats_do_not_count() -> None:
    speed = _calibrate(Machine(every=7, slow=20.0))
    assert speed.flops["float32"] == pytest.approx(1e11)
    assert speed.memory_bandwidth == pytest.approx(2e10, rel=0.01) or not speed.steady


def test_a_busy_machine_is_noticed() -> None:
    assert not _calibrate(Machine(every=2, slow=10.0)).steady


def test_layers_are_measured_in_every_dtype_that_is_of_use() -> None:
    machine, asked = Machine(), []

    def layers(torch: Any, torch_device: str, dtype: str, free_bytes: int, typical_s: Any) -> Decoding:
        asked.append(dtype)
        return Decoding(typical_s(lambda: machine.take(1e-3)), 0.0, 1e10)

    speed = _calibrate(machine, layers=layers)
    assert asked == ["float32", "bfloat16"]
    assert speed.decoding["bfloat16"].layer_s == pytest.approx(1e-3)
    assert speed.steady


def test_layers_that_a_busy_machine_kept_from_being_measured_are_measured_again() -> None:
    def layers(*arguments: object) -> Decoding:
        raise Busy

    speed = _calibrate(Machine(), layers=layers)
    assert not speed.decoding
    assert not speed.steady


def test_a_dtype_the_device_lacks_is_left_out() -> None:
    assert set(_calibrate(Machine(broken=("bfloat16",))).flops) == {"float32"}


def test_a_device_that_cannot_multiply_is_one_line() -> None:
    with pytest.raises(WorkerError, match=r"^device cpu cannot multiply matrices: no float32 on this device$"):
        _calibrate(Machine(broken=("float32",)))


def test_it_takes_a_quarter_of_the_free_memory_at_most() -> None:
    machine = Machine()
    _calibrate(machine, free_bytes=64 * 2**20)
    assert machine.allocated <= 16 * 2**20 + 2**13  # the weights and the one row


@pytest.fixture
def threads_restored() -> Iterator[Callable[[], int]]:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    yield torch.get_num_threads
    torch.set_num_threads(before)


def test_the_real_cpu_gives_plausible_figures(threads_restored: Callable[[], int]) -> None:
    import torch

    speed = calibrate(torch, "cpu", threads=1, dtypes=("float32",), free_bytes=2**28, clock=time.perf_counter)
    assert threads_restored() == 1
    assert 1e8 < speed.flops["float32"] < 1e13
    assert 1e8 < speed.memory_bandwidth < 1e12
