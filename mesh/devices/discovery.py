"""From hardware and specs to the devices a site offers: which, how much memory each, how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from mesh.devices import cuda, mps, rocm, xpu
from mesh.devices.calibration import Speed
from mesh.devices.found import Found
from mesh.devices.spec import DeviceSpec, named
from mesh.devices.units import format_bytes
from mesh.errors import ConfigError
from topology.snapshot import Device, device_from

_ACCELERATORS = (cuda.find, rocm.find, mps.find, xpu.find)


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """A device of this site: what the planner sees of it, and what its worker needs (torch's name for it, threads).

    `local_rtt_s` is the round trip to another worker of this machine, None where nobody measured it.
    """

    device: Device
    torch_device: str
    threads: int
    local_rtt_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON document, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> LocalDevice:
        """Rebuild a device. Raises KeyError or TypeError where the document is not one."""
        device = device_from(document["device"])
        rtt_s = document.get("local_rtt_s")
        place = str(document["torch_device"]), int(document["threads"])
        return cls(device, *place, None if rtt_s is None else float(rtt_s))


class Measure(Protocol):
    """Gives the speed of a device in a number of threads, from a cache or by measuring."""

    def __call__(self, found: Found, threads: int) -> Speed: ...


def accelerators(torch: Any) -> list[Found]:
    """Everything but CPUs that torch can use on this machine."""
    return [found for find in _ACCELERATORS for found in find(torch)]


def discover(
    specs: Sequence[DeviceSpec],
    *,
    cpu: Found,
    load_torch: Callable[[], Any],
    measure: Measure,
    reserve: float,
) -> list[LocalDevice]:
    """The devices of a site: those of `specs`, or everything found where there is none.

    torch is loaded only where a spec, or their absence, asks for accelerators. A CPU's threads and the memory of any
    device are shared out evenly among specs that leave them open. Raises ConfigError where a spec names a device that
    is not there, or more memory than there is.
    """
    hardware = [cpu]
    if not specs or any(spec.kind != "cpu" for spec in specs):
        hardware = [*accelerators(load_torch()), cpu]
    if not specs:
        specs = [DeviceSpec(found.kind, found.index) for found in hardware]
    specs = named(specs)
    chosen = [(spec, _matching(spec, hardware)) for spec in specs]
    sharers = Counter(found.label for _, found in chosen)
    memory = {found.label: _share_memory(found, [s for s, f in chosen if f is found]) for found in hardware}
    devices = []
    for spec, found in chosen:
        threads = spec.threads or max(1, found.threads // sharers[found.label])
        speed = _speed(spec, found, threads, measure)
        memory_bytes, free_bytes = memory[found.label][str(spec.name)]
        devices.append(
            LocalDevice(
                Device(
                    name=str(spec.name),
                    kind=found.kind,
                    vendor=found.vendor,
                    memory_bytes=memory_bytes,
                    free_bytes=free_bytes,
                    flops=speed.flops,
                    memory_bandwidth=speed.memory_bandwidth,
                    reserve=reserve,
                    decoding=speed.decoding,
                ),
                found.torch_device,
                threads,
                None if speed.exchange_s is None else 2 * speed.exchange_s,
            )
        )
    return devices


def _matching(spec: DeviceSpec, hardware: Sequence[Found]) -> Found:
    for found in hardware:
        if (found.kind, found.index) == (spec.kind, spec.index):
            return found
    there = ", ".join(found.label for found in hardware)
    raise ConfigError(f"device {str(spec)!r}: not on this machine; there are: {there}")


def _share_memory(found: Found, specs: Sequence[DeviceSpec]) -> dict[str, tuple[int, int]]:
    """Memory and free memory by device name. Specs that name none share what the others leave of the usable memory."""
    stated = sum(spec.memory_bytes or 0 for spec in specs)
    if stated > found.total_bytes:
        raise ConfigError(
            f"device {found.label}: memory of {format_bytes(stated)} in all is more than the "
            f"{format_bytes(found.total_bytes)} there are; give less with memory="
        )
    silent = sum(1 for spec in specs if spec.memory_bytes is None)
    share = (found.usable_bytes - stated) // silent if silent else 0
    if silent and share <= 0:
        raise ConfigError(f"device {found.label}: other devices take all its memory; give each a memory=")
    sizes = {str(spec.name): spec.memory_bytes or share for spec in specs}
    total = sum(sizes.values())
    scale = min(1.0, found.free_bytes / total) if total else 1.0
    return {name: (size, int(size * scale)) for name, size in sizes.items()}


def _speed(spec: DeviceSpec, found: Found, threads: int, measure: Measure) -> Speed:
    """The speed a spec states, and for what it leaves open, the measured one."""
    if spec.flops is not None and spec.bandwidth is not None:
        return Speed(dict.fromkeys(found.dtypes, spec.flops), spec.bandwidth)
    measured = measure(found, threads)
    flops = measured.flops if spec.flops is None else dict.fromkeys(found.dtypes, spec.flops)
    if spec.flops is None and spec.bandwidth is None:
        return measured
    bandwidth = measured.memory_bandwidth if spec.bandwidth is None else spec.bandwidth
    return Speed(flops, bandwidth, exchange_s=measured.exchange_s)
