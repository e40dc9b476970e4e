"""Memory of a device is sent and received where it lies, or through the host where it has to be.

No test has a device: a fake shows memory of the host through `__cuda_array_interface__`, and UCX is told that it lies
on the host, which is all that differs.
"""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
from transport_harness import UCX, connect_pair, until

from transport import DeadlineExceeded, FrameError, TransportError, open_fabric
from transport.device_buffers import CudaStaging, DeviceBuffer, device_buffer


class FakeDevice:
    """An array whose bytes only the interface shows."""

    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        return {**self.array.__array_interface__, "version": 3, "stream": 7}


class FakeStaging:
    def __init__(self):
        self.copies, self.settled, self.lent = [], [], []

    def _view(self, device):
        return memoryview(device.owner.array).cast("B")

    def settle(self, device):
        self.settled.append(device.stream)

    def to_host(self, device):
        self.copies.append("to host")
        return memoryview(bytearray(self._view(device)))

    def lend(self, ticket):
        self.lent.append(ticket)

    def to_device(self, data, device):
        self.copies.append("to device")
        self._view(device)[:] = data


def fake(size, seed=1):
    return FakeDevice(np.frombuffer(bytearray(random.Random(seed).randbytes(size)), np.uint8))


@pytest.fixture
def joined(request):
    """Two channels with fake staging; `param`: the backend, whether sealed, whether UCX may take the memory."""
    backend, sealed, direct = request.param
    near, far = open_fabric(backend), open_fabric(backend)
    for fabric in (near, far):
        if backend == "ucx":
            from transport.ucx_direct import HOST

            fabric.listen()  # makes the UCX context, which may have CUDA though there is no device
            fabric.device_memory = HOST if direct else None
    channels = connect_pair(near, far, key=bytes(32) if sealed else None)
    for channel in channels:
        channel.staging = FakeStaging()
    alone = far.progress
    far.progress = lambda: near.progress() or alone()  # a long message needs both ends
    yield channels
    near.close()
    far.close()


DIRECT = [pytest.param(("ucx", False, True), marks=UCX.marks, id="ucx")]
STAGED = [
    pytest.param(("ucx", True, True), marks=UCX.marks, id="ucx sealed"),
    pytest.param(("ucx", False, False), marks=UCX.marks, id="ucx without CUDA"),
    pytest.param(("tcp", False, False), id="tcp"),
    pytest.param(("memory", True, False), id="memory sealed"),
]
SIZES = (1, 1000, 20_000, 300_000, 3_000_000)


@pytest.mark.parametrize("joined", DIRECT, indirect=True)
@pytest.mark.parametrize("size", SIZES)
def test_ucx_takes_and_gives_device_memory_without_the_host(joined, size):
    near, far = joined
    sent, landed = fake(size), FakeDevice(np.zeros(size, np.uint8))
    assert near.takes_device
    ticket = near.send(b"about", sent)
    assert far.receive_into(landed, 10) == b"about"
    assert (landed.array == sent.array).all()
    until(lambda: ticket.done, near.fabric, far.fabric)
    assert near.staging.settled == [7]
    assert near.staging.copies == []
    assert far.staging.copies == []


@pytest.mark.parametrize("joined", [*STAGED, *DIRECT], indirect=True)
@pytest.mark.parametrize("size", SIZES)
def test_a_device_and_the_host_understand_each_other(joined, size):
    near, far = joined
    sent = fake(size)
    near.send(b"1", sent)
    near.send(b"2", sent.array.tobytes())
    near.send(b"3", sent, bulk=True)
    first, landed = far.receive(10), FakeDevice(np.zeros(size, np.uint8))
    assert bytes(first.payload) == sent.array.tobytes()
    assert far.receive_into(landed, 10) in {b"2", b"3"}
    assert (landed.array == sent.array).all()
    assert bytes(far.receive(10).payload) == sent.array.tobytes()
    until(lambda: all(ticket.done for ticket in near.staging.lent), near.fabric, far.fabric)


@pytest.mark.parametrize("joined", DIRECT, indirect=True)
def test_messages_of_another_size_or_lane_do_not_stay_in_the_memory_that_waits(joined):
    near, far = joined
    wanted, other = fake(50_000, 1), fake(50_000, 2)
    near.send(b"lane", other, kind=130)
    near.send(b"wanted", wanted)
    landed = FakeDevice(np.zeros(50_000, np.uint8))
    assert far.receive_into(landed, 10) == b"wanted"
    assert (landed.array == wanted.array).all()
    assert bytes(far.receive(10, 130).payload) == other.array.tobytes()
    near.send(b"longer", fake(60_000))
    with pytest.raises(FrameError):
        far.receive_into(landed, 10)


@pytest.mark.parametrize("joined", DIRECT, indirect=True)
def test_a_wait_that_ends_early_leaves_the_memory_alone(joined):
    near, far = joined
    landed = FakeDevice(np.zeros(50_000, np.uint8))
    with pytest.raises(DeadlineExceeded):
        far.receive_into(landed, 0.01)
    sent = fake(50_000)
    near.send(b"late", sent)
    assert bytes(far.receive(10).payload) == sent.array.tobytes()
    assert not landed.array.any()


@pytest.mark.parametrize("joined", [DIRECT[0], ("memory", False, False)], indirect=True)
def test_what_is_neither_bytes_nor_a_device_is_refused(joined):
    with pytest.raises(TypeError):
        joined[0].send(b"", [1, 2, 3])
    with pytest.raises(TypeError):
        joined[0].receive_into(3, 1)


def test_only_contiguous_memory_is_a_device_buffer():
    array = np.zeros((4, 6), np.float32)
    whole = device_buffer(FakeDevice(array))
    assert isinstance(whole, DeviceBuffer)
    assert (whole.nbytes, len(whole), whole.stream, whole.address) == (96, 96, 7, array.ctypes.data)
    assert device_buffer(FakeDevice(array[1:3])).nbytes == 48
    assert device_buffer(FakeDevice(array[:, :0])).nbytes == 0
    for part in (array[:, :3], array.T, array[::2]):
        with pytest.raises(ValueError, match="contiguous"):
            device_buffer(FakeDevice(part))
    assert device_buffer(array) is None


class FakeRuntime:
    """The few calls of the CUDA runtime, over memory of the host."""

    class cudaMemcpyKind:
        cudaMemcpyDeviceToHost, cudaMemcpyHostToDevice = 2, 1

    def __init__(self, code=0):
        self.code, self.called, self.held = type("Code", (int,), {"name": "cudaErrorFake"})(code), [], []

    def cudaHostAlloc(self, size, _):
        self.held.append(np.empty(size, np.uint8))
        return self.code, self.held[-1].ctypes.data

    def cudaFreeHost(self, address):
        self.held = [array for array in self.held if array.ctypes.data != address]

    def cudaMemcpy(self, target, source, size, kind):
        self.called.append(kind)
        ctypes.memmove(target, source, size)
        return (self.code,)

    def cudaStreamSynchronize(self, stream):
        self.called.append(f"stream {stream}")
        return (self.code,)

    def cudaDeviceSynchronize(self):
        self.called.append("device")
        return (self.code,)


class Ticket:
    done = False


def staging(runtime, monkeypatch):
    monkeypatch.setattr("transport.device_buffers._runtime", lambda: runtime)
    return CudaStaging()


def test_staging_waits_for_the_stream_and_uses_pinned_memory_again(monkeypatch):
    runtime = FakeRuntime()
    stage, device = staging(runtime, monkeypatch), device_buffer(fake(5000))
    view, ticket = stage.to_host(device), Ticket()
    assert bytes(view) == device.owner.array.tobytes()
    assert runtime.called == ["stream 7", 2]
    stage.lend(ticket)
    stage.to_host(device)
    assert len(runtime.held) == 2  # the first is lent
    ticket.done = True
    stage.to_host(device)
    assert len(runtime.held) <= 2
    target = FakeDevice(np.zeros(5000, np.uint8))
    stage.to_device(memoryview(device.owner.array.tobytes()), device_buffer(target))
    assert (target.array == device.owner.array).all()
    stage.settle(DeviceBuffer(0, 0, None))
    assert runtime.called[-1] == "device"


def test_a_failing_device_is_an_error_of_ours(monkeypatch):
    with pytest.raises(TransportError, match="cudaErrorFake"):
        staging(FakeRuntime(1), monkeypatch).settle(device_buffer(fake(10)))
