"""Real worker processes: the same tokens from every plan, and a good end in every case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import trio
from worker_models import HALVES, LAYERS, VOCAB, WHOLE, Crew, write_model

from mesh.errors import WorkerError
from mesh.peer.workers import WorkerPool
from mesh.runtime.protocol import Decoder, Ping, Reply, encode

PROMPT = [7, 30, 11, 52, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def crew(model):
    with trio.fail_after(60):
        async with WorkerPool.open(host="127.0.0.1", backends=("tcp",)) as pool:
            yield Crew(pool, model)


async def test_every_plan_gives_the_same_tokens_and_workers_change_plan_without_a_restart(crew):
    found = []
    names = ["a", "b", "c"]
    pids = set()
    for cuts, shards in (
        ([0, LAYERS], None),
        ([0, 1, LAYERS], None),
        ([0, 1, 3, LAYERS], None),
        ([0, LAYERS], [HALVES]),
        ([0, 2, LAYERS], [HALVES, WHOLE]),
        ([0, 2, LAYERS], [WHOLE, HALVES]),
    ):
        await crew.deploy(cuts, shards, names=names)
        pids.add(crew.pool.pid("job", "a"))
        await crew.start(PROMPT, 24, temperature=0.8, seed=5)
        found.append(await crew.tokens())
    assert len(pids) == 1
    assert len(found[0]) == 24 and len(set(found[0])) > 4
    assert found == [found[0]] * len(found)


async def test_a_killed_stage_is_accused_and_the_stream_goes_on_under_the_next_epoch(crew):
    await crew.deploy([0, 2, LAYERS], names=["a", "b"])
    await crew.start(PROMPT, 40)
    whole = await crew.tokens()
    await crew.start(PROMPT, 400, request="again", seed=1)
    so_far = await crew.tokens(limit=10)
    os.kill(crew.pool.pid("job", "b"), signal.SIGKILL)
    began = time.monotonic()
    reports = [await crew.failure(), await crew.failure()]
    failures = {(report.device, report.failure.neighbour, report.failure.fatal) for report in reports}
    assert time.monotonic() - began < 2
    assert failures == {("a", "s/b", False), ("b", "", True)}
    await crew.deploy([0, LAYERS], names=["a"])
    await crew.start(PROMPT, 40, done=so_far)
    assert so_far + await crew.tokens() == whole


async def test_a_stopped_neighbour_does_not_hold_a_worker_beyond_the_next_epoch(crew):
    await crew.deploy([0, LAYERS], [HALVES], names=["a", "b"])
    other = crew.pool.pid("job", "b")
    os.kill(other, signal.SIGSTOP)
    try:
        await crew.start(PROMPT, 5)
        await trio.sleep(0.3)
        began = time.monotonic()
        await crew.deploy([0, LAYERS], names=["a"])
        await crew.start(PROMPT, 5)
        assert len(await crew.tokens()) == 5
        assert time.monotonic() - began < 2
    finally:
        os.kill(other, signal.SIGKILL)


async def test_an_emulated_distance_is_waited_for_once_a_hop(crew):
    await crew.deploy([0, 2, LAYERS], names=["a", "b"], delay_s=0.02)
    await crew.start(PROMPT, 12)
    await crew.tokens(limit=1)
    began = time.monotonic()
    assert len(await crew.tokens()) == 11
    a_token_s = (time.monotonic() - began) / 11
    assert 0.040 <= a_token_s < 0.080


async def test_a_shard_that_would_not_fit_is_refused_before_it_is_loaded(crew):
    await crew.deploy([0, LAYERS], names=["a"])
    tight = replace(crew.plan["a"], memory_bytes=50_000, epoch=(9, "owner"))
    with pytest.raises(WorkerError, match=r"a: layers 0 to 4 on cpu: it needs .* MB of weights and .* MB of KV caches"):
        await crew.pool.prepare(tight, name="a")


async def test_token_ids_beyond_the_vocabulary_break_nothing_but_their_ring(crew):
    await crew.deploy([0, LAYERS], names=["a"])
    await crew.start([VOCAB + 5], 5)
    failure = (await crew.failure()).failure
    assert not failure.fatal and "token ids" in failure.reason
    await crew.pool.ping("job", "a")


BUSY = """
import mesh.runtime.engine as engine, torch
def run(self):
    print("chatter on stdout")
    a = torch.ones(1500, 1500)
    while True:
        torch.mm(a, a)
engine.Engine.run = run
from mesh.runtime.worker import main
main()
"""


def spawn(code: str = "from mesh.runtime.worker import main; main()", **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def ping(worker: subprocess.Popen) -> Reply:
    worker.stdin.write(encode(Ping(1)))
    worker.stdin.flush()
    decoder = Decoder.events()
    while True:
        data = os.read(worker.stdout.fileno(), 65536)
        assert data, "it ended"
        for event in decoder.feed(data):
            if isinstance(event, Reply):
                return event


def finish(worker: subprocess.Popen, within_s: float) -> None:
    try:
        worker.wait(within_s)
    finally:
        worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout, worker.stderr):
            stream.close()


def test_a_worker_whose_daemon_is_gone_ends_even_in_the_middle_of_a_step():
    worker = spawn(BUSY)
    assert ping(worker).body["pid"] == worker.pid
    assert worker.stderr.readline() == b"chatter on stdout\n"
    worker.stdin.close()
    finish(worker, 2.0)


def test_a_worker_outlives_the_thread_that_spawned_it():
    made = []
    thread = threading.Thread(target=lambda: made.append(spawn()))
    thread.start()
    thread.join()
    (worker,) = made
    ping(worker)
    time.sleep(0.2)
    assert worker.poll() is None
    assert ping(worker).body["pid"] == worker.pid
    worker.stdin.close()
    finish(worker, 2.0)


PARENT = """
import subprocess, sys, os
worker = subprocess.Popen([sys.executable, "-m", "mesh.runtime.worker"], stdin=0, stdout=subprocess.PIPE)
os.read(worker.stdout.fileno(), 100)
print(worker.pid, flush=True)
worker.wait()
"""


def test_a_killed_daemon_takes_its_worker_along_even_where_the_pipe_stays_open():
    # This process holds the other end of the worker's stdin, so that only the parent's death can tell.
    parent = spawn(PARENT)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 2.0
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    finish(parent, 1.0)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - a file that vanishes while it is read
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
