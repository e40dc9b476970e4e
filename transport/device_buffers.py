"""Memory of a CUDA device, sent and received without a copy on the host where the backend can, staged where it cannot.

Whatever has `__cuda_array_interface__` (torch, CuPy, Numba, RMM) says where its memory lies. UCX takes that as it is;
sealing, codes, TCP and a UCX without CUDA need the bytes on the host: there they pass through pinned memory, which is
used again.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any, NamedTuple, Protocol

from transport.base import Ticket, TransportError
from transport.buffers import Buffers
from transport.tickets import flat


class DeviceBuffer:
    """Contiguous bytes of a device. `owner` keeps them; `stream` is that of the interface, None where it has none."""

    __slots__ = ("address", "nbytes", "owner", "stream")

    def __init__(self, address: int, nbytes: int, owner: object, stream: int | None = None) -> None:
        self.address = address
        self.nbytes = nbytes
        self.owner = owner
        self.stream = stream

    def __len__(self) -> int:
        return self.nbytes


class OnDevice(Protocol):
    """Whatever shows memory of a CUDA device."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class Landed(NamedTuple):
    """A message whose payload was received into a device; `head` is what came before it."""

    head: memoryview
    payload: DeviceBuffer

    @property
    def nbytes(self) -> int:
        """Of the whole message."""
        return self.head.nbytes + self.payload.nbytes


def device_buffer(thing: Any) -> DeviceBuffer | None:
    """What a thing with `__cuda_array_interface__` shows (Numba's documentation, version 2 or 3), None for any other.

    Raises ValueError where its memory is not contiguous, or behind a mask.
    """
    if isinstance(thing, DeviceBuffer):
        return thing
    interface = getattr(thing, "__cuda_array_interface__", None)
    if interface is None:
        return None
    shape, item = tuple(interface["shape"]), int(interface["typestr"][2:])
    strides = interface.get("strides")
    if interface.get("mask") is not None:
        raise ValueError("a masked device array cannot be sent; fill it first")
    if strides is not None and math.prod(shape):
        due = item
        for length, stride in zip(reversed(shape), reversed(tuple(strides)), strict=True):
            if length > 1 and stride != due:
                raise ValueError("a device array that is not contiguous cannot be sent; make it contiguous first")
            due *= length
    return DeviceBuffer(int(interface["data"][0]), math.prod(shape) * item, thing, interface.get("stream"))


class Staging(Protocol):
    """Between a device and the host."""

    def settle(self, device: DeviceBuffer) -> None:
        """Wait for what computes the memory: UCX is not ordered with CUDA's streams."""
        ...

    def to_host(self, device: DeviceBuffer) -> memoryview:
        """Its bytes on the host, in memory that `lend` lends."""
        ...

    def lend(self, ticket: Ticket) -> None:
        """What `to_host` gave last is free when the ticket is done."""
        ...

    def to_device(self, data: memoryview, device: DeviceBuffer) -> None:
        """Copy bytes of the host, as many as the device has room for."""
        ...


class CudaStaging:
    """Through pinned memory, by the CUDA runtime of `cuda.bindings`, which comes with UCXX."""

    def __init__(self) -> None:
        """Raises TransportError where there is no CUDA runtime."""
        self._cuda = _runtime()
        self._pinned = Buffers(self._allocate)

    def settle(self, device: DeviceBuffer) -> None:
        """Wait for the stream that the interface names, or, where it names none, for the whole device."""
        if device.stream is None:
            self._check(self._cuda.cudaDeviceSynchronize())
        else:
            self._check(self._cuda.cudaStreamSynchronize(device.stream))

    def to_host(self, device: DeviceBuffer) -> memoryview:
        """As in `Staging`."""
        self.settle(device)
        view = self._pinned.take(max(1, device.nbytes))[: device.nbytes]
        if device.nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._check(self._cuda.cudaMemcpy(_address(view), device.address, device.nbytes, kind))
        return view

    def lend(self, ticket: Ticket) -> None:
        """As in `Staging`."""
        self._pinned.lend(ticket)

    def to_device(self, data: memoryview, device: DeviceBuffer) -> None:
        """As in `Staging`."""
        if device.nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            writable = data if not data.readonly else memoryview(bytearray(data))
            self._check(self._cuda.cudaMemcpy(device.address, _address(writable), device.nbytes, kind))

    def _allocate(self, size: int) -> memoryview:
        (address,) = self._check(self._cuda.cudaHostAlloc(size, 0))
        memory = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(memory, self._cuda.cudaFreeHost, address)
        return memoryview(memory).cast("B")

    def _check(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        if int(result[0]):
            raise TransportError(f"CUDA: {result[0].name}; the device or its driver has failed")
        return result[1:]


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise TransportError(f"device memory needs cuda.bindings ({error}); install the extra `ucx`") from None
    return runtime


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(flat(view)))
