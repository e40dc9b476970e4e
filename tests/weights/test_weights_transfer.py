"""Blocks over real channels: from several sources at once, past dead, silent and lying ones, and no byte twice."""

import math
from contextlib import asynccontextmanager

import pytest
import trio
from weight_models import write_folder

from mesh.errors import ModelError
from mesh.weights import fetching
from mesh.weights.cache import Cache
from mesh.weights.fetching import Fetch, Source
from mesh.weights.frames import BLOCK, HAVE, MANIFEST, WANT, numbers, read_numbers
from mesh.weights.manifest import BLOCK_BYTES
from mesh.weights.scan import scan
from mesh.weights.serving import LEAST_BYTES, MOST_BYTES, Bucket, LocalModel, Stretch, serve
from transport import Acceptor, TransportError, open_fabric
from transport.trio_shell import open_driver

KEY = bytes(32)


class World:
    """One process with both ends: `source(site, how)` starts a source, `how(driver, channel)` is what it does."""

    def __init__(self, driver, acceptor, nursery, folder, tmp_path):
        self.driver, self.acceptor, self.nursery = driver, acceptor, nursery
        self.manifest = scan(folder, "m")
        self.local = LocalModel(folder, self.manifest)
        self.cache = Cache(tmp_path / "cache", lambda used: 1 << 40)
        self.sent, self.lost, self.hows = {}, [], {}

    async def accept(self):
        while True:
            for hello, channel in await self.driver.accept(self.acceptor, 3600.0):
                self.nursery.start_soon(self._one, hello.decode(), channel)

    async def _one(self, site, channel):
        self.sent[site] = await self.hows[site](self.driver, channel)

    def source(self, site, how=None):
        async def honest(driver, channel):
            return await serve(driver, channel, self.local)

        self.hows[site] = how or honest
        self.acceptor.expect(site.encode(), name=site, key=KEY)
        return Source(site, self.acceptor.address, KEY, site.encode())

    async def fetch(self, *sources, wanted=None, again=()):
        """Fetch everything (or `wanted`) from the sources; the Fetch."""
        fetch = Fetch(self.driver, lost=lambda site, why: self.lost.append((site, why)))

        async def body(fetch):
            for source in sources:
                fetch.add(source)
            made = await fetch.manifest(self.manifest.root, "m")
            assert made == self.manifest
            blocks = list(range(made.blocks)) if wanted is None else wanted
            await fetch.blocks(self.cache.open(made), blocks)

        await fetch.run(body)
        return fetch

    def whole(self):
        cached = self.cache.models[self.manifest.root]
        return all(cached.read(block) == self.local.read(block) for block in range(self.manifest.blocks))


@asynccontextmanager
async def world(tmp_path, **folder):
    path = write_folder(tmp_path / "model", **folder)
    fabric = open_fabric("tcp")
    acceptor = Acceptor(fabric, fabric.listen())
    async with open_driver(fabric) as driver, trio.open_nursery() as nursery:
        made = World(driver, acceptor, nursery, path, tmp_path)
        nursery.start_soon(made.accept)
        with trio.fail_after(30):
            yield made
        nursery.cancel_scope.cancel()
    acceptor.close()
    fabric.close()


def failing_after(w, blocks):
    """A source that serves so many blocks, then breaks off."""

    async def how(driver, channel):
        await driver.send(channel, numbers(0), b"", 5.0, kind=HAVE)
        left = blocks
        while left:
            message = await driver.receive(channel, 30.0)
            if message.kind == MANIFEST:
                await driver.send(channel, numbers(0, 1), w.manifest.encoded, 5.0, kind=MANIFEST)
            if message.kind == WANT:
                block, _ = read_numbers(message.meta)
                await driver.send(channel, numbers(block), w.local.read(block), 5.0, kind=BLOCK)
                left -= 1
        channel.abort()

    return how


async def test_two_sources_share_the_blocks_and_hardly_any_comes_twice(tmp_path):
    async with world(tmp_path) as w:
        fetch = await w.fetch(w.source("a"), w.source("b"))
        assert w.whole()
        # On a busy machine one may seem dead for a moment, and its last block be asked of the other.
        assert sum(fetch.fetched.values()) <= w.manifest.total_bytes + BLOCK_BYTES
        assert w.lost == []


async def test_a_fetch_that_is_over_lets_go_of_its_sources(tmp_path):
    async with world(tmp_path) as w:
        await w.fetch(w.source("a"), w.source("b"))
        while set(w.sent) != {"a", "b"}:
            await trio.sleep(0.01)


async def test_what_is_there_is_not_fetched_again(tmp_path):
    async with world(tmp_path) as w:
        first = await w.fetch(w.source("a"), wanted=[0, 1, 2])
        assert sum(first.fetched.values()) == sum(w.manifest.size_of(block) for block in range(3))
        second = await w.fetch(w.source("b"))
        assert sum(second.fetched.values()) == w.manifest.total_bytes - sum(first.fetched.values())
        assert w.whole()


async def test_a_source_that_breaks_off_loses_its_blocks_to_the_other(tmp_path):
    async with world(tmp_path) as w:
        slow = Bucket(4e6)

        async def paced(driver, channel):
            return await serve(driver, channel, w.local, slow)

        await w.fetch(w.source("a", failing_after(w, 2)), w.source("b", paced))
        assert w.whole()
        assert [site for site, _ in w.lost] == ["a"]


async def test_a_source_that_lies_is_given_up_and_its_lie_is_not_kept(tmp_path):
    async def lie(driver, channel):
        await driver.send(channel, numbers(0), b"", 5.0, kind=HAVE)
        try:
            while True:
                message = await driver.receive(channel, 30.0)
                if message.kind == MANIFEST:
                    await driver.send(channel, numbers(0, 1), w.manifest.encoded, 5.0, kind=MANIFEST)
                if message.kind == WANT:
                    block, _ = read_numbers(message.meta)
                    await driver.send(channel, numbers(block), bytes(w.manifest.size_of(block)), 5.0, kind=BLOCK)
        except TransportError:
            return 0

    async with world(tmp_path) as w:
        slow = Bucket(4e6)

        async def paced(driver, channel):
            return await serve(driver, channel, w.local, slow)

        fetch = await w.fetch(w.source("honest", paced), w.source("liar", lie))
        assert w.whole()
        assert [site for site, _ in w.lost] == ["liar"]
        assert "not of the model" in w.lost[0][1]
        assert fetch.liars == {"liar"}


async def test_a_source_that_has_a_part_gives_that_part(tmp_path):
    async with world(tmp_path) as w:

        class Part:
            manifest = w.manifest

            def __init__(self):
                from mesh.weights.have import BlockMap

                self.have = BlockMap(w.manifest.blocks)
                self.have.add(2)

            def read(self, block):
                assert block == 2
                return w.local.read(block)

        async def part(driver, channel):
            return await serve(driver, channel, Part())

        await w.fetch(w.source("part", part), w.source("whole"))
        assert w.whole()


async def test_nobody_that_gives_anything_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.5)
    async with world(tmp_path) as w:
        with pytest.raises(ModelError, match=r"nothing came of .* no site that has them answers"):
            await w.fetch()

        async def silent(driver, channel):
            await driver.send(channel, numbers(0), b"", 5.0, kind=HAVE)
            await trio.sleep(3600)

        with pytest.raises(ModelError) as caught:
            await w.fetch(w.source("silent", silent))
        assert "\n" not in str(caught.value)


async def test_a_full_disk_ends_the_fetch_in_words(tmp_path, monkeypatch):
    import errno

    async with world(tmp_path) as w:

        def full(self, block, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("mesh.weights.cache.CachedModel.put", full)
        with pytest.raises(ModelError, match="the disk is full"):
            await w.fetch(w.source("a"))


async def test_a_fetch_that_is_cancelled_leaves_no_task_and_keeps_what_came(tmp_path):
    async with world(tmp_path) as w:
        slow = Bucket(2e6)

        async def paced(driver, channel):
            return await serve(driver, channel, w.local, slow)

        with trio.move_on_after(1.5):
            await w.fetch(w.source("a", paced))
        kept = len(w.cache.models[w.manifest.root].have)
        assert 0 < kept < w.manifest.blocks
        fetch = await w.fetch(w.source("b"))
        assert w.whole()
        assert sum(fetch.fetched.values()) <= w.manifest.total_bytes - (kept - 1) * (1 << 20) + 1000


@pytest.mark.parametrize("message", [(WANT, 10**6), (77, 0), (WANT, None)])
async def test_a_fetcher_that_talks_nonsense_gets_nothing_more(tmp_path, message):
    from transport import connect_channel

    async with world(tmp_path) as w:
        source = w.source("a")
        channel = connect_channel(w.driver.fabric, source.address, name="a", key=KEY, hello=source.hello)
        assert (await w.driver.receive(channel, 5.0)).kind == HAVE
        kind, block = message
        channel.send(b"short" if block is None else numbers(block), kind=kind)
        w.driver.fabric.wake()
        with pytest.raises(TransportError):
            await w.driver.receive(channel, 5.0)
        channel.close()


def test_a_bucket_lets_through_its_rate_after_its_burst():
    bucket = Bucket(100.0, burst=50)
    waited = [bucket.take(50, 10.0) for _ in range(3)]
    assert waited == [0.0, 0.5, 1.0]
    assert math.isclose(bucket.take(50, 1000.0), 0.0)


def test_blocks_that_leave_in_a_row_tell_what_the_link_carries():
    stretch = Stretch()
    stretch.began(10.0)
    assert stretch.sent(LEAST_BYTES - 1, 11.0, more=True) is None
    assert stretch.sent(1, 12.0, more=False) == (LEAST_BYTES, 2.0)
    stretch.began(60.0)  # what passes while nobody asks does not count
    assert stretch.sent(MOST_BYTES, 64.0, more=True) == (MOST_BYTES, 4.0)
    assert stretch.sent(LEAST_BYTES, 65.0, more=False) == (LEAST_BYTES, 1.0)
    stretch.began(80.0)
    assert stretch.sent(LEAST_BYTES - 1, 90.0, more=False) is None, "a few blocks fit into buffers"


async def test_a_source_whose_files_have_changed_gives_nothing_and_is_no_liar(tmp_path):
    async with world(tmp_path) as w:
        path = tmp_path / "model" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert w.local.read(0) is None
        other = LocalModel(write_folder(tmp_path / "other"), w.manifest)

        async def good(driver, channel):
            return await serve(driver, channel, other)

        fetch = await w.fetch(w.source("changed"), w.source("good", good))
        assert not fetch.liars and w.lost == []
        small = w.manifest.files[-1].size  # config.json, which has not changed
        assert fetch.fetched["good"] >= w.manifest.total_bytes - small
