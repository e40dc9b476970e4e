"""A job of higher priority takes the place of lower ones, and only of those."""

import pytest
import trio
from job_fakes import World, write_tokenizer

from mesh.errors import JobFailed, RequestError
from mesh.jobs.coordinator import Coordinator
from mesh.jobs.job import Job
from mesh.jobs.ledger import Ledger
from mesh.wire.v1 import peer_pb2
from topology.displace import RunningJob

MEMORY = 12_000_000


def holding(priority):
    return {"old": ("b", RunningJob("old", priority, {f"{site}/cpu0": MEMORY for site in "abc"}))}


async def outcome(tmp_path, world_held, constraints):
    """The state of a submitted job after 5 s, its error, and whom it displaced."""
    async with trio.open_nursery() as nursery:
        world = World(("a", "b", "c"), nursery, write_tokenizer(tmp_path), MEMORY)
        world.held = world_held
        job = Job("new", "toy", "auto", constraints, owner="a")
        world.coordinator = Coordinator(job, world, world.inspector, lambda: None, spawn=nursery.start_soon)
        nursery.start_soon(world.coordinator.run)
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
        return job.state, str(job.error or ""), world.peers["b"].displaced


async def test_a_lower_job_is_displaced_by_its_owner_before_the_shards_load(tmp_path, autojump_clock):
    state, _, displaced = await outcome(tmp_path, holding(0), {"priority": 5})
    assert state == "ready"
    assert displaced == [("old", "new", 5)]


@pytest.mark.parametrize("priority", [5, 6])
async def test_a_job_of_the_same_or_a_higher_priority_stays(tmp_path, autojump_clock, priority):
    state, error, displaced = await outcome(tmp_path, holding(priority), {"priority": 5})
    assert state == "failed"
    assert "memory" in error
    assert displaced == []


async def test_the_owner_ends_a_lower_job_in_words_and_refuses_for_others(tmp_path, autojump_clock):
    async with trio.open_nursery() as nursery:
        world = World(("a", "b", "c"), nursery, write_tokenizer(tmp_path), MEMORY)
        ledger = Ledger("a", world, world.inspector, nursery, lambda: None)
        job = ledger.submit("toy", "auto", {"priority": 3})
        world.coordinator = ledger.get(job.id)
        await job.ready()
        with pytest.raises(RequestError, match="has priority 3"):
            await ledger.displace(peer_pb2.DisplaceRequest(job=job.id, by="x", priority=3))
        assert job.state == "ready"
        with trio.fail_after(5):
            await ledger.displace(peer_pb2.DisplaceRequest(job=job.id, by="x", priority=4))
        with pytest.raises(JobFailed, match="displaced by job x of priority 4"):
            job.raise_if_ended()
        assert any(peer.released for peer in world.peers.values())
        nursery.cancel_scope.cancel()
