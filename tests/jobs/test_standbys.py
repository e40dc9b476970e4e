"""A standby loads what a shard holds, is nobody's loss, and serves at once when the shard's site is gone."""

import trio
from job_fakes import World, write_tokenizer

from mesh.jobs.coordinator import Coordinator
from mesh.jobs.deploy import PREPARE_DEADLINE_S
from mesh.jobs.job import Job

MEMORY = 2_250_000


async def run(tmp_path, during):
    async with trio.open_nursery() as nursery:
        world = World(("a", "b", "c", "d", "e", "f"), nursery, write_tokenizer(tmp_path), MEMORY)
        job = Job("j", "toy", "auto", {"standbys": 1}, owner="a")
        world.coordinator = Coordinator(job, world, world.inspector, lambda: None, spawn=nursery.start_soon)
        nursery.start_soon(world.coordinator.run)
        with trio.fail_after(30):
            await job.ready()
            await trio.sleep(2)
            result = await during(world, job)
        nursery.cancel_scope.cancel()
        return result


async def test_a_standby_holds_the_layers_of_a_shard_and_is_not_connected(tmp_path, autojump_clock):
    async def during(world, job):
        (standby,) = job.plan.standbys
        stage = job.plan.stages[standby.stage]
        assert world.peers[standby.site].assigned == [(standby.device, stage.start, stage.end)]
        assert standby.site not in job.plan.sites

    await run(tmp_path, during)


async def test_losing_a_standby_is_no_loss_to_the_job(tmp_path, autojump_clock):
    async def during(world, job):
        epoch = job.epoch
        world.peers[job.plan.standbys[0].site].kill()
        await trio.sleep(20)
        assert (job.state, job.epoch) == ("ready", epoch)

    await run(tmp_path, during)


async def test_the_standby_takes_the_place_of_a_lost_site(tmp_path, autojump_clock):
    async def during(world, job):
        standby = job.plan.standbys[0]
        lost = job.plan.stages[standby.stage].lead.site
        world.peers[lost].kill()
        await trio.sleep(3)
        await job.ready()
        assert standby.site in job.plan.sites
        assert lost not in job.plan.sites

    await run(tmp_path, during)


async def test_a_standby_that_never_finishes_loading_is_no_loss_to_the_job(tmp_path, autojump_clock):
    async with trio.open_nursery() as nursery:
        world = World(("a", "b", "c", "d", "e", "f"), nursery, write_tokenizer(tmp_path), MEMORY)
        job = Job("j", "toy", "auto", {"standbys": 1}, owner="a")
        for peer in world.peers.values():
            prepare = peer.prepare

            async def stuck_once_ready(request, progress, prepare=prepare):
                if job.state == "ready":
                    await trio.sleep_forever()
                return await prepare(request, progress)

            peer.prepare = stuck_once_ready
        world.coordinator = Coordinator(job, world, world.inspector, lambda: None, spawn=nursery.start_soon)
        nursery.start_soon(world.coordinator.run)
        await job.ready()
        await trio.sleep(PREPARE_DEADLINE_S + 60)
        assert job.state == "ready", job.error
        nursery.cancel_scope.cancel()
