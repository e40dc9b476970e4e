"""The trio client: the same promises, and cancellation that reaches the peer."""

import socket

import pytest
import trio
from fake_peer import PLAN, SNAPSHOT

import mesh
from mesh.client import aio


async def dropped(peer) -> bool:
    return await trio.to_thread.run_sync(peer.cancelled.wait, 5)


async def test_submit_wait_generate(peer):
    async with await aio.connect(peer.address) as client:
        job = await client.submit(model="org/model")
        assert job.status == "planning" and job.plan is None
        assert await job.wait() is job
        assert job.status == "ready" and job.plan == PLAN
        generation = await job.generate("The", max_tokens=4)
        assert generation.text == "The sea is wide" and generation.finish_reason == "length"
        await job.cancel()
        assert (await job.refresh()).state == "cancelled"


async def test_documents_and_jobs(peer):
    async with await aio.connect(peer.address) as client:
        assert (await client.status())["site"] == "berlin"
        assert await client.topology() == SNAPSHOT
        assert await client.plan("org/model") == PLAN
        job = await client.submit("a/b")
        assert [job.id for job in await client.jobs()] == ["job-1"]
        assert [status.state async for status in job.watch()] == ["planning", "loading", "ready"]
        assert (await client.job("job-1")).status == "ready"
        with pytest.raises(mesh.JobNotFound):
            await client.job("job-9")


async def test_module_level_submit(peer):
    job = await aio.submit(model="a/b", peer=peer.address)
    assert (await job.generate("x", max_tokens=2)).text == "The sea"


async def test_a_stream_yields_chunks_and_then_the_whole(peer):
    job = await aio.submit("a/b", peer=peer.address)
    async with job.stream("x") as stream:
        assert [chunk.text async for chunk in stream][:2] == ["The", " sea"]
        assert stream.generation.text == "The sea is wide and old."


async def test_leaving_the_block_cancels_the_request(peer):
    job = await aio.submit("mute/after3", peer=peer.address)
    async with job.stream("x") as stream:
        await anext(stream)
    assert await dropped(peer)


async def test_cancelling_the_reader_cancels_the_request(peer):
    job = await aio.submit("mute/after3", peer=peer.address)
    stream = job.stream("x")
    with trio.move_on_after(0.3) as scope:
        async for _ in stream:
            pass
    assert scope.cancelled_caught and await dropped(peer)


async def test_a_forgotten_stream_cancels_the_request(peer):
    job = await aio.submit("mute/after3", peer=peer.address)
    stream = job.stream("x")
    await anext(stream)
    del stream
    assert await dropped(peer)


async def test_cancelling_a_wait_reaches_the_peer(peer):
    job = await aio.submit("slow/load", peer=peer.address)
    with trio.move_on_after(0.2):
        await job.wait()
    assert await dropped(peer)


async def test_deadlines(peer):
    job = await aio.submit("slow/load", peer=peer.address)
    with pytest.raises(mesh.DeadlineExceeded, match=r"was still loading after 0.3 s"):
        await job.wait(timeout_s=0.3)
    mute = await aio.submit("mute/after3", peer=peer.address)
    with pytest.raises(mesh.DeadlineExceeded, match=r"within 0.2 s"):
        await mute.generate("x", idle_timeout_s=0.2)


async def test_failures_keep_their_class(peer):
    async with await aio.connect(peer.address) as client:
        with pytest.raises(mesh.WorkerError, match="out of memory"):
            await (await client.submit("bad/worker")).wait()
        with pytest.raises(mesh.ModelError):
            await client.submit("no/model")
        with pytest.raises(mesh.JobFailed, match="after 3 tokens"):
            await (await client.submit("cut/after3")).generate("x")
        with pytest.raises(mesh.RequestError):
            (await client.submit("a/b")).stream("x", temprature=1)


async def wait_for_the_end(job: aio.Job) -> None:
    with pytest.raises(mesh.MeshError, match="is closed"):
        await job.wait()


async def test_closing_the_client_ends_its_calls(peer):
    client = await aio.connect(peer.address)
    job = await client.submit("slow/load")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_the_end, job)
        await trio.sleep(0.1)
        client.close()
    with pytest.raises(mesh.MeshError, match="is closed"):
        await client.status()


async def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(mesh.PeerUnreachable, match="mesh up"):
            await aio.connect(f"127.0.0.1:{taken.getsockname()[1]}")


async def test_many_streams_at_once_do_not_block_each_other(peer):
    job = await aio.submit("a/b", peer=peer.address)
    texts = []

    async def one() -> None:
        texts.append((await job.generate("x")).text)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
    assert texts == ["The sea is wide and old."] * 20
