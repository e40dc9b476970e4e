"""A job goes on when what it runs on does not, and says so when it cannot."""

from contextlib import asynccontextmanager

import pytest
import trio
from job_fakes import World, token_at, write_tokenizer

from mesh.errors import JobCancelled, JobFailed, ModelError, PlanError, RequestError, WorkerError
from mesh.jobs.coordinator import STALL_S, Coordinator
from mesh.jobs.job import Job
from mesh.wire.v1 import mesh_pb2, peer_pb2

#: Three sites hold the toy model with its caches, two hold it with the reserve, one does not.
MEMORY = 2_250_000


@asynccontextmanager
async def running(tmp_path, names=("a", "b", "c"), memory_bytes=MEMORY, constraints=None):
    async with trio.open_nursery() as nursery:
        world = World(names, nursery, write_tokenizer(tmp_path), memory_bytes)
        job = Job("j", "toy", "auto", constraints or {}, owner="a")
        world.coordinator = Coordinator(job, world, world.inspector, lambda: None, spawn=nursery.start_soon)
        nursery.start_soon(world.coordinator.run)
        yield world
        nursery.cancel_scope.cancel()


def request(max_tokens=20, text="w1 w2 w3", **options):
    return mesh_pb2.GenerateRequest(job="j", text=text, max_tokens=max_tokens, top_p=1.0, **options)


async def tokens_of(world, message, on_token=lambda count: None):
    tokens, text, last = [], "", None
    async for event in world.coordinator.serving.generate(message):
        tokens += event.token_ids
        text += event.text
        last = event
        if event.token_ids:
            on_token(len(tokens))
    return tokens, text, last


def expected(count, prompt=3):
    return [token_at(prompt + i) for i in range(count)]


async def test_a_request_streams_every_token_once_and_ends_with_its_timings(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        tokens, text, last = await tokens_of(world, request(20))
    assert tokens == expected(20)
    assert text.split() == [f"w{t}" for t in tokens]
    assert last.finish_reason == "length"
    assert "decode_tokens_per_s" in last.timings_json


@pytest.mark.parametrize("loss", ["killed", "silent", "left"])
async def test_a_lost_site_costs_no_token_and_repeats_none(tmp_path, autojump_clock, loss):
    async with running(tmp_path) as world:
        with trio.fail_after(10):
            await world.coordinator.job.ready()
        first_plan = world.coordinator.job.plan
        assert len(first_plan.sites) == 3
        victim = first_plan.stages[1].lead.site

        def lose(count):
            if count == 7:
                if loss == "killed":
                    world.peers[victim].kill()
                elif loss == "silent":
                    world.peers[victim].silent = True
                else:
                    world.coordinator.site_left(victim)

        with trio.fail_after(60):
            tokens, _, _ = await tokens_of(world, request(20), lose)
        assert tokens == expected(20)
        job = world.coordinator.job
        assert job.counter == 2
        assert victim not in job.plan.sites
        assert any("reserve" in reason for reason in job.plan.why)


async def test_a_worker_that_dies_on_a_living_site_is_started_again_there(tmp_path, autojump_clock):
    async with running(tmp_path) as world:

        def crash(count):
            if count == 5:
                failure = peer_pb2.FailureEvent(reason="the worker ended with signal 9", fatal=True)
                epoch = peer_pb2.Epoch(counter=1, owner="a")
                world.peers["b"].report(peer_pb2.WorkerEvent(device="cpu0", epoch=epoch, failure=failure))

        tokens, _, _ = await tokens_of(world, request(12), crash)
        assert tokens == expected(12)
        assert world.peers["b"].prepared == [1, 2]


async def test_a_ring_that_gives_no_token_is_set_up_anew(tmp_path, autojump_clock):
    async with running(tmp_path) as world:

        def stall(count):
            if count == 4 and world.coordinator.job.counter == 1:
                world.stalled = True
                world.nursery.start_soon(heal)

        async def heal():
            while world.coordinator.job.counter == 1:
                await trio.sleep(0.1)
            world.stalled = False

        with trio.fail_after(200):
            tokens, _, _ = await tokens_of(world, request(10), stall)
        assert tokens == expected(10)


async def test_a_long_prefill_that_takes_steps_is_left_in_peace(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        world.first_token_s = 4 * STALL_S
        world.stepping = True
        with trio.fail_after(1000):
            tokens, _, _ = await tokens_of(world, request(5))
        assert tokens == expected(5)
        assert world.coordinator.job.counter == 1


async def test_reports_of_an_older_epoch_are_not_taken(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        await world.coordinator.job.ready()
        stale = peer_pb2.FailureEvent(reason="from the past", fatal=False)
        epoch = peer_pb2.Epoch(counter=0, owner="a")
        world.peers["b"].report(peer_pb2.WorkerEvent(device="cpu0", epoch=epoch, failure=stale))
        await trio.sleep(5)
        assert world.coordinator.job.counter == 1


async def test_without_room_for_a_plan_the_job_fails_and_says_how_much_is_missing(tmp_path, autojump_clock):
    async with running(tmp_path, names=("a",), memory_bytes=MEMORY // 4) as world:
        with pytest.raises(PlanError, match="memory"):
            await world.coordinator.job.ready()


async def test_a_site_lost_beyond_repair_fails_the_job_and_its_requests(tmp_path, autojump_clock):
    async with running(tmp_path) as world:

        def lose_two(count):
            if count == 3:
                world.peers["b"].kill()
                world.peers["c"].kill()

        with pytest.raises(JobFailed, match=r"no plan is left after a loss.*memory"):
            await tokens_of(world, request(20), lose_two)


async def test_a_model_that_cannot_be_read_fails_the_job_with_the_models_error(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        world.inspector_error = ModelError("no such folder")
        with pytest.raises(ModelError, match="no such folder"):
            await world.coordinator.job.ready()


async def test_a_shard_that_never_loads_fails_the_job_after_bounded_attempts(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        world.peers["c"].prepare_error = WorkerError("the device is gone")
        with pytest.raises(WorkerError, match="the device is gone"):
            with trio.fail_after(100):
                await world.coordinator.job.ready()


async def test_cancelling_ends_requests_and_releases_every_worker(tmp_path, autojump_clock):
    async with running(tmp_path) as world:

        def cancel(count):
            if count == 3:
                world.coordinator.cancel()

        with pytest.raises(JobCancelled):
            await tokens_of(world, request(20), cancel)
        await trio.sleep(1)
        assert all(peer.released for peer in world.peers.values())
        assert world.coordinator.job.state == "cancelled"


async def test_closing_the_stream_stops_the_request_at_the_workers(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        stream = world.coordinator.serving.generate(request(100))
        async for event in stream:
            if event.token_ids:
                break
        await stream.aclose()
        assert not world.coordinator.serving.live
        lead = world.coordinator.job.plan.stages[0].lead.site
        assert world.peers[lead].stopped == ["j.1"]


async def test_a_stop_string_ends_the_text_before_it(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        word = f"w{token_at(6)}"
        _, text, last = await tokens_of(world, request(20, stop=[word]))
    assert last.finish_reason == "stop"
    assert word not in text.split()
    assert text.split() == [f"w{token_at(i)}" for i in range(3, 6)]


async def test_requests_wait_until_the_caches_have_room(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        done = []

        async def one(count):
            tokens, _, _ = await tokens_of(world, request(count))
            assert tokens == expected(count)
            done.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one, 100)
        assert done[2] - done[0] > 4  # two of three fit into a context of 256 at once


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"text": ""}, "empty"),
        ({"text": " ".join(["w1"] * 300)}, "300 tokens"),
        ({"stop": [""]}, "stop"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_in_words(tmp_path, autojump_clock, change, words):
    async with running(tmp_path) as world:
        with pytest.raises(RequestError, match=words):
            await tokens_of(world, request(**change))
        assert not world.coordinator.serving.live


async def test_all_who_wait_for_room_hear_of_it_at_once(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        done = []

        async def one(count):
            await tokens_of(world, request(count))
            done.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 200)
            await trio.sleep(1)
            for _ in range(3):
                nursery.start_soon(one, 60)
            with trio.fail_after(30):
                await world.coordinator.serving.idle()
        assert done[3] - done[1] < 1.0  # all three began when the first ended, none at its next heartbeat


async def test_a_request_that_the_workers_refuse_fails_alone(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        await world.coordinator.job.ready()
        lead = world.peers[world.coordinator.job.plan.stages[0].lead.site]
        start = lead.start

        async def refuse(message):
            raise RequestError("not with these tokens")

        def lose(count):
            if count == 3:
                last = world.peers[world.coordinator.job.plan.stages[-1].lead.site]
                lead.start = refuse
                last.report(peer_pb2.WorkerEvent(failure=peer_pb2.FailureEvent(reason="died", fatal=True)))

        with pytest.raises(RequestError, match="not with these tokens"):
            await tokens_of(world, request(20), lose)
        lead.start = start
        assert (await tokens_of(world, request(20)))[0] == expected(20)


async def test_a_fault_of_ours_ends_the_job_in_words_and_nothing_else(tmp_path, autojump_clock):
    async with running(tmp_path) as world:
        await world.coordinator.job.ready()

        def lose(count):
            if count == 3:
                world.snapshot = lambda: 1 / 0
                world.peers["b"].kill()

        with pytest.raises(JobFailed, match="a fault in its owner: ZeroDivisionError"):
            await tokens_of(world, request(20), lose)
        assert world.coordinator.job.state == "failed"
