"""Room in the cache is kept from the beginning of a fetch to its end, so that several at once stay within the limit."""

from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights_cache import model
from weight_models import assignment, write_folder

from mesh.errors import ModelError
from mesh.peer.store_process import StoreProcess
from mesh.weights.cache import Cache
from mesh.weights.manifest import BLOCK_BYTES
from mesh.weights.presence import Presence
from mesh.weights.store import Desk, Store
from transport import Acceptor, open_fabric
from transport.trio_shell import open_driver

KEY = bytes(32)


def cache_of(path, blocks):
    return Cache(path, lambda used: blocks * BLOCK_BYTES)


def fill(cache, manifest, blocks, numbers):
    cached = cache.open(manifest)
    for number in numbers:
        assert cached.write(number, blocks[number])
    return cached


def test_a_second_fetch_counts_what_the_first_will_bring(tmp_path):
    cache = cache_of(tmp_path, 10)
    one, _ = model("one", 7)
    two, _ = model("two", 5)
    assert cache.reserve(one, range(7)) == []
    with pytest.raises(ModelError) as refused:
        cache.reserve(two, range(5))
    assert str(refused.value).startswith(
        "the weights of two need 4 MB more and the cache has room for 4 MB of its 10 MB, "
        "one, which is being fetched, holds 6 MB: raise weights_cache"
    )
    assert "\n" not in str(refused.value)
    cache.settle(one.root)
    assert cache.reserve(two, range(5)) == []


def test_what_has_come_of_a_fetch_is_not_counted_twice(tmp_path):
    cache = cache_of(tmp_path, 10)
    one, blocks = model("one", 6)
    two, _ = model("two", 4)
    cache.reserve(one, range(6))
    fill(cache, one, blocks, range(4))
    assert cache.reserve(two, range(4)) == []


def test_a_model_that_is_being_fetched_is_not_evicted_however_old_it_is(tmp_path):
    cache = cache_of(tmp_path, 10)
    half, blocks = model("half", 6)
    idle, others = model("idle", 3)
    cache.reserve(half, range(6))
    kept = fill(cache, half, blocks, range(2))
    fill(cache, idle, others, range(3))
    new, _ = model("new", 4)
    assert cache.reserve(new, range(4)) == [idle.root]
    assert kept.read(1) == blocks[1]


def test_after_a_kill_the_room_is_free_and_what_had_come_is_not_needed_again(tmp_path):
    one, blocks = model("one", 8)
    first = cache_of(tmp_path, 10)
    first.reserve(one, range(8))
    fill(first, one, blocks, range(5))
    # No settle, no close: what a killed process leaves.
    again = cache_of(tmp_path, 10)
    two, _ = model("two", 5)
    assert again.reserve(two, range(5)) == []
    again.settle(two.root)
    assert again.reserve(one, range(8)) == []
    assert sorted(again.models[one.root].have) == [0, 1, 2, 3, 4]
    with pytest.raises(ModelError, match=r"two need 4 MB more .* room for 3 MB .* one, .* fetched, holds 7 MB"):
        again.reserve(two, range(5))


def test_who_is_refused_hears_what_is_needed_what_is_free_and_who_holds_the_rest(tmp_path):
    cache = cache_of(tmp_path, 7)
    one, blocks = model("one", 8)
    used, others = model("used", 3)
    fill(cache, one, blocks, range(3))
    reader = Presence.of(fill(cache, used, others, range(2)).folder)
    with pytest.raises(ModelError) as refused:
        cache.reserve(one, range(8))
    assert str(refused.value).startswith(
        "the weights of one need 4 MB more and the cache has room for 2 MB of its 7 MB, "
        "3 MB are there of it, used, in use, holds 2 MB: raise weights_cache, free disk space in"
    )
    reader.close()
    assert cache.reserve(one, range(7)) == [used.root]


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["begin", "block", "block", "block", "end"]), st.integers(0, 3))),
    limit=st.integers(4, 12),
)
def test_however_fetches_begin_and_end_the_cache_stays_within_its_limit(tmp_path_factory, steps, limit):
    cache = cache_of(tmp_path_factory.mktemp("cache"), limit)
    models = [model(name, size) for name, size in (("a", 2), ("b", 4), ("c", 5), ("d", 7))]
    under_way = set()
    for step, number in steps:
        manifest, blocks = models[number]
        if step == "begin" and number not in under_way:
            try:
                gone = cache.reserve(manifest, range(manifest.blocks))
            except ModelError:
                continue
            assert not {models[other][0].root for other in under_way} & set(gone)
            cache.open(manifest)
            under_way.add(number)
        elif step == "block" and number in under_way:
            cached = cache.models[manifest.root]
            missing = [block for block in range(manifest.blocks) if block not in cached.have]
            if missing:
                assert cached.write(missing[0], blocks[missing[0]])
        elif step == "end" and number in under_way:
            cache.settle(manifest.root)
            under_way.remove(number)
        assert sum(each.bytes for each in cache.used()) <= limit * BLOCK_BYTES
    for number in under_way:  # all that was begun may be brought to its end
        manifest, blocks = models[number]
        fill(cache, manifest, blocks, range(manifest.blocks))
    assert sum(each.bytes for each in cache.used()) <= limit * BLOCK_BYTES
    cache.close()


# ------------------------------------------------------------------------------------------------ the store


class Shop:
    """A store that fetches, and one that has the models, in one process."""

    def __init__(self, here, there, nursery, said):
        self.here, self.there, self.nursery = here, there, nursery
        self.said = said
        self.desk = Desk(said.append)
        self.roots = {}
        self.number = 0

    async def has(self, folder, name):
        self.roots[name] = (await self.there.scan(str(folder), name))["root"]

    def begin(self, name):
        """Ask for a whole model; the request's number."""
        self.number += 1
        order = {"root": self.roots[name], "name": name, "assignment": assignment(0, 4), "cut": False}
        request = {"id": self.number, "op": "fetch", **order}
        self.nursery.start_soon(self.desk.take, self.here, request)
        return self.number

    async def sourced(self, number, name):
        """Once the fetch is ready for it, the other store is its source."""
        await self.until(lambda: {"id": number, "ready": True} in self.said)
        hello = f"{name}-{number}".encode()
        ticket = self.there.admit(self.roots[name], KEY, hello, "here", 0.0)
        self.here.source(number, site="there", address=ticket["address"], key=KEY, hello=hello)

    async def answer(self, number):
        def found():
            return [each for each in self.said if each.get("id") == number and ("ok" in each or "error" in each)]

        await self.until(found)
        return found()[0]

    async def until(self, true):
        while not true():
            await trio.sleep(0.005)

    async def tell(self, operation, **body):
        self.number += 1
        await self.desk.take(self.here, {"id": self.number, "op": operation, **body})


@asynccontextmanager
async def shop(tmp_path, limit_bytes):
    fabric = open_fabric("tcp")
    acceptor = Acceptor(fabric, fabric.listen())
    said = []
    async with open_driver(fabric) as driver, trio.open_nursery() as nursery:
        here = Store(tmp_path / "here", driver, acceptor, nursery, said.append, limit_bytes=limit_bytes)
        there = Store(tmp_path / "there", driver, acceptor, nursery, lambda message: None)
        nursery.start_soon(there.accept)
        made = Shop(here, there, nursery, said)
        for seed, name in enumerate(("one", "two")):
            await made.has(write_folder(tmp_path / name, seed=seed), name)  # 8 MiB of weights each
        with trio.fail_after(30):
            yield made
        nursery.cancel_scope.cancel()
        here.close()
    acceptor.close()
    fabric.close()


async def test_of_two_fetches_at_once_the_one_that_does_not_fit_says_so_and_the_other_comes(tmp_path):
    async with shop(tmp_path, 12 << 20) as s:
        first = s.begin("one")
        await s.sourced(first, "one")
        await s.until(lambda: any(each.get("id") == first and each.get("total") for each in s.said))
        second = s.begin("two")
        await s.sourced(second, "two")
        refused = await s.answer(second)
        assert "two need 8 MB more" in refused["error"] and "one, " in refused["error"]
        assert "ok" in await s.answer(first)
        # It is done and pinned: still no room for the other, until it is given back.
        third = s.begin("two")
        await s.sourced(third, "two")
        assert "one, in use, holds 8 MB" in (await s.answer(third))["error"]
        await s.tell("release", fetch=first)
        fourth = s.begin("two")
        await s.sourced(fourth, "two")
        assert "ok" in await s.answer(fourth)


async def test_a_fetch_that_is_cancelled_gives_its_room_back(tmp_path):
    async with shop(tmp_path, 12 << 20) as s:
        first = s.begin("one")  # and nobody gives it anything, but for the manifest
        await s.sourced(first, "one")
        await s.until(lambda: any(each.get("id") == first and each.get("total") for each in s.said))
        await s.tell("cancel", other=first)
        second = s.begin("two")
        await s.sourced(second, "two")
        assert "ok" in await s.answer(second)


async def test_an_answer_that_nobody_waits_for_any_more_keeps_nothing(tmp_path):
    async with shop(tmp_path, 12 << 20) as s:
        first = s.begin("one")
        await s.sourced(first, "one")
        assert "ok" in await s.answer(first)
        await s.tell("cancel", other=first)  # it was on its way
        second = s.begin("two")
        await s.sourced(second, "two")
        assert "ok" in await s.answer(second)


async def test_whoever_is_cancelled_as_the_answer_comes_says_so():
    sent = []

    class FakeChild:
        def send(self, data):
            sent.append(data)

    process = StoreProcess(("store",))

    async def start():
        return FakeChild()

    process.start = start
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.call, "fetch", 60.0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        process._take({"id": 1, "ok": {"path": "/there"}})
    assert [b"fetch" in sent[0], b"cancel" in sent[1]] == [True, True]
