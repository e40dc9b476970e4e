"""What a peer does for the owners of jobs: admission by epoch and memory, and the lease."""

import math
from contextlib import asynccontextmanager
from types import SimpleNamespace

import msgpack
import pytest
import trio
import trio.lowlevel

from mesh.devices.local import LocalDevice
from mesh.errors import ModelError, RequestError, WorkerError
from mesh.peer.service import LEASE_S, PeerService
from mesh.peer.workers import PoolEvent
from mesh.runtime.assignment import Assignment
from mesh.runtime.work import Decoded
from mesh.wire.v1 import peer_pb2
from topology.snapshot import Decoding, Device

MEMORY = 1000
#: A step of one layer and nothing else takes ten milliseconds.
DECODING = Decoding(0.01, 0.0, 1e9)


class FakePool:
    def __init__(self):
        self.prepared, self.released, self.connected = [], [], []
        self.error = None
        self.send, self.events = trio.open_memory_channel(math.inf)

    async def prepare(self, assignment, progress, *, name):
        await trio.lowlevel.checkpoint()
        if self.error:
            raise self.error
        self.prepared.append((name, assignment))
        return {"tcp": b"address"}

    async def connect(self, job, epoch, device, neighbours, *, site):
        self.connected = list(neighbours)

    async def release(self, job, device):
        self.released.append((job, device))


@asynccontextmanager
async def serving(**options):
    devices = [
        LocalDevice(
            Device(name, "cpu", "test", MEMORY, MEMORY, {"float32": 1.0}, 1.0, decoding={"float32": DECODING}), "cpu", 3
        )
        for name in ("cpu0", "cpu1")
    ]
    pool = FakePool()

    async def inspect(model):
        return SimpleNamespace(path=f"prepared/{model}")

    loads = []

    async def displace(request):
        raise RequestError("no such job")

    service = PeerService(
        "here",
        pool,
        devices,
        delay_s=lambda site: 0.04,
        on_load=lambda: loads.append(1),
        measure=None,
        relay=None,
        inspector=inspect,
        displace=displace,
        **options,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        yield service, pool
        nursery.cancel_scope.cancel()


def epoch(counter):
    return peer_pb2.Epoch(counter=counter, owner="owner")


def prepare(job="j", counter=1, device="cpu0", memory=600, model="m"):
    assignment = Assignment(
        job=job, epoch=(counter, "owner"), model=model, dtype="float32", device=device, threads=0, memory_bytes=memory,
        context=8, stage=0, stages=1, start=0, end=1, rank=0, size=1, kv_heads=(0, 1), columns=(0, 8),
        vocabulary=(0, 8),
    )  # fmt: skip
    return peer_pb2.PrepareRequest(
        job=job, epoch=epoch(counter), device=device, assignment=msgpack.packb(assignment.to_dict())
    )


def nothing(done, total):
    pass


async def test_a_shard_gets_the_devices_own_name_and_threads_and_its_memory_is_counted(autojump_clock):
    async with serving() as (service, pool):
        assert await service.prepare(prepare(), nothing) == {"tcp": b"address"}
        name, assignment = pool.prepared[0]
        assert (name, assignment.device, assignment.threads) == ("cpu0", "cpu", 3)
        assert service.free_bytes() == {"cpu0": 400, "cpu1": 1000}


async def test_a_gguf_file_is_opened_as_what_this_site_prepared_of_it(autojump_clock):
    async with serving() as (service, pool):
        await service.prepare(prepare(model="m.gguf"), nothing)
        await service.prepare(prepare(job="k", device="cpu1", model="folder"), nothing)
        assert [assignment.model for _, assignment in pool.prepared] == ["prepared/m.gguf", "folder"]


async def test_memory_that_another_job_holds_is_refused_and_ones_own_is_not(autojump_clock):
    async with serving() as (service, _):
        await service.prepare(prepare("first"), nothing)
        with pytest.raises(WorkerError, match="here/cpu0 has"):
            await service.prepare(prepare("second"), nothing)
        await service.prepare(prepare("first", counter=2, memory=900), nothing)
        assert service.free_bytes()["cpu0"] == 100


async def test_a_shard_that_fails_to_load_gives_its_memory_back(autojump_clock):
    async with serving() as (service, pool):
        pool.error = ModelError("damaged")
        with pytest.raises(ModelError):
            await service.prepare(prepare(), nothing)
        assert service.free_bytes()["cpu0"] == MEMORY


async def test_an_older_epoch_is_refused_everywhere(autojump_clock):
    async with serving() as (service, pool):
        await service.prepare(prepare(counter=3), nothing)
        stale = epoch(2)
        with pytest.raises(RequestError, match="epoch 2"):
            await service.prepare(prepare(counter=2), nothing)
        with pytest.raises(RequestError):
            await service.connect(peer_pb2.ConnectRequest(job="j", epoch=stale, device="cpu0"))
        with pytest.raises(RequestError):
            await service.start(peer_pb2.StartRequest(job="j", epoch=stale, device="cpu0"))
        with pytest.raises(RequestError):
            await service.stop(peer_pb2.StopRequest(job="j", epoch=stale, device="cpu0"))
        with pytest.raises(RequestError):
            await service.release(peer_pb2.ReleaseRequest(job="j", epoch=stale))
        assert not pool.released


async def test_an_unknown_device_and_a_damaged_assignment_are_refused_in_words(autojump_clock):
    async with serving() as (service, _):
        with pytest.raises(RequestError, match="cpu0, cpu1"):
            await service.prepare(prepare(device="gpu9"), nothing)
        with pytest.raises(RequestError, match="assignment"):
            await service.prepare(
                peer_pb2.PrepareRequest(job="j", epoch=epoch(1), device="cpu0", assignment=b"\xc1"), nothing
            )


async def test_each_neighbour_gets_the_delay_that_this_site_emulates(autojump_clock):
    async with serving() as (service, pool):
        await service.connect(connect("far/cpu0", seal=True))
        assert pool.connected[0].delay_s == pytest.approx(0.04)


def connect(name, *, seal):
    neighbour = peer_pb2.Neighbour(name=name, delay_s=9.0, seal=seal)
    return peer_pb2.ConnectRequest(job="j", epoch=epoch(1), device="cpu0", neighbours=[neighbour])


@pytest.mark.parametrize(("inside", "name", "sealed"), [(True, "here/cpu1", True), (False, "here/cpu1", False)])
async def test_a_site_says_itself_whether_its_own_shards_seal(autojump_clock, inside, name, sealed):
    async with serving(seal_inside=inside) as (service, pool):
        await service.connect(connect(name, seal=True))
        assert pool.connected[0].seal is sealed


@pytest.mark.parametrize(("inside", "name"), [(True, "here/cpu1"), (True, "far/cpu0"), (False, "far/cpu0")])
async def test_nobody_gets_frames_unsealed_that_this_site_seals(autojump_clock, inside, name):
    async with serving(seal_inside=inside) as (service, _):
        with pytest.raises(WorkerError, match="here seals what goes to") as refusal:
            await service.connect(connect(name, seal=False))
        assert "\n" not in str(refusal.value)


async def test_between_sites_frames_are_sealed_also_where_a_site_seals_nothing_inside(autojump_clock):
    async with serving(seal_inside=False) as (service, pool):
        await service.connect(connect("far/cpu0", seal=True))
        assert pool.connected[0].seal


async def test_workers_end_when_nobody_listens_for_the_length_of_the_lease(autojump_clock):
    async with serving() as (service, pool):
        async with service.events(peer_pb2.EventsRequest(job="j", epoch=epoch(1))):
            await service.prepare(prepare(), nothing)
            await trio.sleep(10 * LEASE_S)
            assert not pool.released
        await trio.sleep(LEASE_S / 2)
        assert not pool.released
        await trio.sleep(LEASE_S * 2)
        assert pool.released == [("j", "cpu0")]
        assert service.free_bytes()["cpu0"] == MEMORY


async def test_a_listener_that_returns_within_the_lease_keeps_the_workers(autojump_clock):
    async with serving() as (service, pool):
        async with service.events(peer_pb2.EventsRequest(job="j", epoch=epoch(1))):
            await service.prepare(prepare(), nothing)
        await trio.sleep(LEASE_S / 2)
        async with service.events(peer_pb2.EventsRequest(job="j", epoch=epoch(2))):
            await trio.sleep(10 * LEASE_S)
            assert not pool.released


async def test_release_keeps_the_devices_that_the_next_plan_uses(autojump_clock):
    async with serving() as (service, pool):
        await service.prepare(prepare(device="cpu0"), nothing)
        await service.prepare(prepare(device="cpu1"), nothing)
        await service.release(peer_pb2.ReleaseRequest(job="j", epoch=epoch(2), keep=["cpu1"]))
        assert pool.released == [("j", "cpu0")]
        assert service.free_bytes() == {"cpu0": 1000, "cpu1": 400}


async def test_reports_go_to_the_listeners_of_their_job_alone(autojump_clock):
    async with (
        serving() as (service, pool),
        service.events(peer_pb2.EventsRequest(job="one", epoch=epoch(1))) as ours,
        service.events(peer_pb2.EventsRequest(job="two", epoch=epoch(1))) as others,
    ):
        token = peer_pb2.WorkerEvent(device="cpu0", token=peer_pb2.TokenEvent(request="r", token=7))
        pool.send.send_nowait(PoolEvent("one", token))
        with trio.fail_after(1):
            assert (await anext(ours)).token.token == 7
        with trio.move_on_after(3):
            async for event in others:
                assert event.HasField("alive")


async def test_a_worker_that_is_gone_gives_its_memory_back(autojump_clock):
    async with serving() as (service, pool):
        await service.prepare(prepare(), nothing)
        failure = peer_pb2.FailureEvent(reason="killed", fatal=True)
        pool.send.send_nowait(PoolEvent("j", peer_pb2.WorkerEvent(device="cpu0", failure=failure)))
        with trio.fail_after(1):
            await service.idle()
        assert service.free_bytes()["cpu0"] == MEMORY


async def test_two_shards_of_one_job_share_a_device_under_two_names(autojump_clock):
    async with serving() as (service, _pool):
        await service.prepare(prepare(device="cpu0", memory=400), lambda done, total: None)
        await service.prepare(prepare(device="cpu0#1", memory=400), lambda done, total: None)
        assert service.free_bytes()["cpu0"] == MEMORY - 800
        with pytest.raises(WorkerError, match="left"):
            await service.prepare(prepare(device="cpu0#2", memory=400), lambda done, total: None)


async def test_a_device_whose_steps_take_longer_than_calibrated_is_told_as_slower_until_it_is_not(autojump_clock):
    async with serving() as (service, pool):
        await service.prepare(prepare(), nothing)
        alive = peer_pb2.WorkerEvent(device="cpu0", alive=peer_pb2.AliveEvent(steps=1))
        pool.send.send_nowait(PoolEvent("j", alive, Decoded(400, 4.0, 400)))
        await trio.sleep(2)
        assert service.paces() == {}
        pool.send.send_nowait(PoolEvent("j", alive, Decoded(800, 4.0 + 100.0, 800)))
        await trio.sleep(2)
        assert service.paces() == {"cpu0": 20.0}
        await trio.sleep(700)
        assert service.paces() == {}
