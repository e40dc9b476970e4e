"""The pool of worker processes, against a stub of a worker that is quick to start and misbehaves on demand."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import psutil
import pytest
import trio

from mesh.errors import DeadlineExceeded, ModelError, WorkerError
from mesh.peer import worker_process, workers
from mesh.peer.workers import WorkerPool, _neighbour
from mesh.runtime.assignment import Assignment
from mesh.wire.v1 import peer_pb2

STUB = (sys.executable, str(Path(__file__).with_name("worker_stub.py")))
EPOCH = (3, "owner")


def assignment(job="job", epoch=EPOCH) -> Assignment:
    return Assignment(
        job=job, epoch=epoch, model="m", dtype="float32", device="cpu", threads=1, memory_bytes=0, context=64, stage=0,
        stages=1, start=0, end=1, rank=0, size=1, kv_heads=(0, 1), columns=(0, 1), vocabulary=(0, 1),
    )  # fmt: skip


@asynccontextmanager
async def open_pool(command=STUB):
    before = set(psutil.Process().children())
    with trio.fail_after(20):
        async with WorkerPool.open(host="127.0.0.1", backends=("tcp",), command=command) as pool:
            yield pool
    assert set(psutil.Process().children()) <= before


async def test_preparing_starts_one_worker_for_a_job_and_a_device():
    progress = []
    async with open_pool() as pool:
        addresses = await pool.prepare(assignment(), lambda done, total: progress.append((done, total)), name="cpu:0")
        assert addresses == {"tcp": b"tcp at 127.0.0.1"}
        assert progress == [(5, 10)]
        first = pool.pid("job", "cpu:0")
        await pool.prepare(assignment(epoch=(4, "")), name="cpu:0")
        await pool.prepare(assignment(), name="cpu:1")
        assert pool.pid("job", "cpu:0") == first != pool.pid("job", "cpu:1")
        assert (await pool.ping("job", "cpu:0"))["pid"] == first


def test_workers_of_one_site_are_beside_each_other_unless_a_drill_sets_them_apart():
    def beside(name, delay_s, site="here"):
        return _neighbour(peer_pb2.Neighbour(role="shard", name=name, key=bytes(32), delay_s=delay_s), site).beside

    assert beside("here/cpu1", 0.0)
    assert not beside("here/cpu1", 0.001)
    assert not beside("there/cpu1", 0.0)
    assert not beside("here/cpu1", 0.0, site=None)


async def test_two_who_prepare_at_once_share_a_worker():
    async with open_pool() as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(pool.prepare, assignment())
        assert len(pool._all) == 1


async def test_events_of_a_worker_arrive_as_they_go_to_the_owner():
    async with open_pool() as pool:
        await pool.prepare(assignment(), name="cpu:0")
        neighbour = peer_pb2.Neighbour(role="next", name="b/cpu", backend="tcp", key=bytes(32), delay_s=0.5)
        await pool.connect("job", EPOCH, "cpu:0", [neighbour])
        epoch = peer_pb2.Epoch(counter=3, owner="owner")
        await pool.start(
            peer_pb2.StartRequest(
                job="job", epoch=epoch, device="cpu:0", request="r", tokens=[1, 2, 3], prompt_tokens=2, max_tokens=3
            )
        )
        failure, one, two, alive = [await pool.events.receive() for _ in range(4)]
        assert {event.job for event in (failure, one, two, alive)} == {"job"}
        assert failure.message.failure == peer_pb2.FailureEvent(neighbour="b/cpu", reason="0.5")
        assert (one.message.token.index, two.message.token.index, two.message.token.token) == (1, 2, 4)
        assert msgpack.unpackb(one.message.token.timings) == {"compute_s": 0.25}
        assert alive.message == peer_pb2.WorkerEvent(device="cpu:0", epoch=epoch, alive=peer_pb2.AliveEvent(steps=7))


async def test_an_error_of_the_worker_keeps_its_class_and_a_worker_that_cannot_load_is_ended():
    async with open_pool() as pool:
        with pytest.raises(ModelError, match=r"cpu: there is no such model"):
            await pool.prepare(assignment("bad-model"))
        assert pool.pid("bad-model", "cpu") is None


async def test_a_crash_is_told_with_the_last_thing_the_worker_said():
    async with open_pool() as pool:
        with pytest.raises(WorkerError, match="cpu: the worker exited with code 1: ValueError: cannot load this"):
            await pool.prepare(assignment("crash"))


async def test_a_worker_that_is_killed_is_reported_as_gone():
    async with open_pool() as pool:
        await pool.prepare(assignment(), name="cpu:0")
        os.kill(pool.pid("job", "cpu:0"), signal.SIGKILL)
        event = await pool.events.receive()
        failure = event.message.failure
        assert (failure.fatal, failure.neighbour, failure.reason) == (True, "", "the worker was killed by SIGKILL")
        assert (event.message.device, event.message.epoch.counter) == ("cpu:0", 3)
        with pytest.raises(WorkerError, match="no worker runs for job job"):
            await pool.ping("job", "cpu:0")
        await pool.prepare(assignment(), name="cpu:0")


async def test_a_worker_that_sends_nonsense_is_ended():
    async with open_pool() as pool:
        with pytest.raises(WorkerError, match="control message"):
            await pool.prepare(assignment("nonsense"))


async def test_no_command_waits_longer_than_its_deadline(monkeypatch):
    monkeypatch.setattr(workers, "PREPARE_S", 0.2)
    monkeypatch.setattr(worker_process, "EXIT_S", 0.2)
    async with open_pool() as pool:
        with pytest.raises(DeadlineExceeded, match=r"cpu: no answer to prepare within 0\.2 s"):
            await pool.prepare(assignment("mute"))
        assert pool.pid("mute", "cpu") is None


async def test_an_older_epoch_is_refused_without_disturbing_the_worker():
    async with open_pool() as pool:
        await pool.prepare(assignment())
        with pytest.raises(WorkerError, match="epoch 2 of owner is over"):
            await pool.prepare(assignment(epoch=(2, "owner")))
        await pool.ping("job", "cpu")


async def test_a_released_worker_is_gone_and_nobody_is_alarmed(monkeypatch):
    monkeypatch.setattr(worker_process, "EXIT_S", 0.3)
    async with open_pool() as pool:
        for job in ("job", "stubborn"):
            await pool.prepare(assignment(job))
            pid = pool.pid(job, "cpu")
            await pool.release(job, "cpu")
            assert not psutil.pid_exists(pid)
            await pool.release(job, "cpu")
        with pytest.raises(trio.WouldBlock):
            pool.events.receive_nowait()


async def test_a_cancelled_prepare_leaves_a_worker_that_still_obeys(monkeypatch):
    monkeypatch.setattr(worker_process, "EXIT_S", 0.2)
    async with open_pool() as pool:
        with trio.move_on_after(0.3):
            await pool.prepare(assignment("mute"))
        await pool.prepare(assignment())
        assert not next(iter(pool._all)).calls


async def test_a_command_that_does_not_exist_is_said_so():
    async with open_pool(("/no/such/python",)) as pool:
        with pytest.raises(WorkerError, match="no worker could be started"):
            await pool.prepare(assignment())
