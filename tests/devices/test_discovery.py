from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.devices.calibration import Speed
from mesh.devices.discovery import LocalDevice, accelerators, discover
from mesh.devices.found import Found
from mesh.devices.spec import parse_specs
from mesh.errors import ConfigError

GIB = 2**30


def cpu_found(**changes: Any) -> Found:
    """A CPU of four threads and 16 GiB, 12 usable, 10 free."""
    values: dict[str, Any] = {
        "kind": "cpu",
        "index": 0,
        "vendor": "amd",
        "model": "Test 1",
        "torch_device": "cpu",
        "total_bytes": 16 * GIB,
        "usable_bytes": 12 * GIB,
        "free_bytes": 12 * GIB,
        "threads": 4,
    }
    return Found(**{**values, **changes})


def fake_torch(*, cuda: int = 0, hip: str | None = None, mps: bool = False, xpu: int = 0, busy: int = -1) -> Any:
    """`busy` is the index of a GPU whose memory cannot be asked for."""

    def mem_get_info(index: int) -> tuple[int, int]:
        if index == busy:
            raise RuntimeError("CUDA error: all devices are busy")
        return 70 * GIB, 80 * GIB

    properties = SimpleNamespace(
        name="Card", major=9, minor=0, multi_processor_count=132, total_memory=16 * GIB, driver_version="1.2"
    )
    return SimpleNamespace(
        version=SimpleNamespace(hip=hip),
        cuda=SimpleNamespace(
            is_available=lambda: cuda > 0,
            device_count=lambda: cuda,
            get_device_properties=lambda index: properties,
            mem_get_info=mem_get_info,
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        mps=SimpleNamespace(recommended_max_memory=lambda: 20 * GIB, driver_allocated_memory=lambda: GIB),
        xpu=SimpleNamespace(
            is_available=lambda: xpu > 0, device_count=lambda: xpu, get_device_properties=lambda index: properties
        ),
    )


MEASURED = Speed({"float32": 1e11, "bfloat16": 2e11}, 2e10)


def _measure(found: Found, threads: int) -> Speed:
    return MEASURED


def _never() -> Any:
    raise AssertionError("not needed here")


def _discover(*texts: str, torch: Any = None, cpu: Found | None = None) -> list[LocalDevice]:
    return discover(
        parse_specs(texts),
        cpu=cpu or cpu_found(),
        load_torch=_never if torch is None else lambda: torch,
        measure=_measure,
        reserve=0.1,
    )


def test_without_specs_everything_found_is_offered() -> None:
    devices = _discover(torch=fake_torch(cuda=2, xpu=1, mps=True))
    assert [(d.device.name, d.torch_device, d.device.vendor) for d in devices] == [
        ("cuda0", "cuda:0", "nvidia"),
        ("cuda1", "cuda:1", "nvidia"),
        ("mps0", "mps", "apple"),
        ("xpu0", "xpu:0", "intel"),
        ("cpu0", "cpu", "amd"),
    ]
    assert all(d.device.flops == MEASURED.flops and d.device.reserve == 0.1 for d in devices)


def test_a_rocm_gpu_is_amd_and_torch_calls_it_cuda() -> None:
    (found,) = accelerators(fake_torch(cuda=1, hip="6.4"))
    assert (found.label, found.vendor, found.torch_device) == ("rocm:0", "amd", "cuda:0")


def test_a_gpu_that_another_process_holds_alone_is_left_out() -> None:
    assert [found.label for found in accelerators(fake_torch(cuda=2, busy=0))] == ["cuda:1"]


def test_specs_replace_discovery_and_cpus_need_no_torch() -> None:
    first, second = _discover("cpu,threads=1,memory=200MiB", "cpu")
    assert (first.device.memory_bytes, first.device.free_bytes, first.threads) == (200 * 2**20, 200 * 2**20, 1)
    assert (second.device.name, second.device.memory_bytes, second.threads) == ("cpu1", 12 * GIB - 200 * 2**20, 2)


def test_a_stated_speed_is_not_measured() -> None:
    def refuse(found: Found, threads: int) -> Speed:
        raise AssertionError("measured")

    specs = parse_specs(["cpu,flops=1e9,bandwidth=1GB"])
    (local,) = discover(specs, cpu=cpu_found(), load_torch=_never, measure=refuse, reserve=0.2)
    assert set(local.device.flops.values()) == {1e9}
    assert local.device.memory_bandwidth == 1e9


def test_half_a_stated_speed_leaves_the_other_half_measured() -> None:
    (local,) = _discover("cpu,bandwidth=1GB")
    assert local.device.flops == MEASURED.flops
    assert local.device.memory_bandwidth == 1e9


def test_free_memory_is_never_more_than_there_is() -> None:
    devices = _discover("cpu,memory=8GiB", "cpu,memory=8GiB", cpu=cpu_found(free_bytes=4 * GIB))
    assert sum(d.device.free_bytes for d in devices) == 4 * GIB
    assert sum(d.device.memory_bytes for d in devices) == 16 * GIB


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["cuda:7"], "not on this machine; there are: cuda:0, cpu"),
        (["cpu,memory=17GiB"], "17GiB in all is more than the 16GiB"),
        (["cpu,memory=9GiB", "cpu,memory=8GiB"], "17GiB in all"),
        (["cpu,memory=13GiB", "cpu"], "other devices take all its memory"),
    ],
)
def test_what_is_not_there_is_refused(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _discover(*texts, torch=fake_torch(cuda=1))


def test_a_device_survives_json() -> None:
    (local,) = _discover("cpu")
    assert LocalDevice.from_dict(json.loads(json.dumps(local.to_dict()))) == local
