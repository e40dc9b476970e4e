"""A site measures seldom, one link at a time, never while it is busy, and always comes to an end."""

import sys

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import MeshError, PeerUnreachable, RequestError
from mesh.gossip.rtt import Rtt
from mesh.peer.measuring import WIDE_RTT_S, Figures, Measuring, best_of, figures

json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
entry = st.fixed_dictionaries({"rtt_s": json, "bytes": json, "seconds": json})


class FakeGossip:
    def __init__(self, due=(), rtt_s=1e-4):
        self.due = list(due)
        self.failed, self.moved, self.best = [], [], {}
        self._rtt_s = rtt_s

    def bandwidth_probe(self):
        return self.due.pop(0) if self.due else None

    def probe_failed(self, site):
        self.failed.append(site)

    def transferred(self, site, size_bytes, seconds):
        self.moved.append((site, size_bytes, seconds))

    def chose(self, site, transport):
        self.best[site] = transport

    def rtts(self):
        return {"b": Rtt(self._rtt_s, self._rtt_s, 0.0, 9)}


def measuring(gossip, answerer=None, **settings):
    async def nobody(backends, key):
        raise PeerUnreachable("nobody")

    values = {"host": "127.0.0.1", "backends": ("tcp",), "busy": lambda: False, "rng": lambda: -1.0}
    return Measuring("a", gossip, answerer or (lambda site: nobody), **{**values, **settings})


@given(st.dictionaries(st.sampled_from(["tcp", "ucx", "x"]), entry | json, max_size=3) | json)
@settings(max_examples=50)
def test_figures_of_another_process_are_held_to_bounds(document):
    for one in figures(document).values():
        assert 0 < one.rtt_s <= 60
        assert one.message_s > 0


def test_the_best_transport_is_the_one_that_takes_least_for_a_token():
    near, thick = Figures(20e-6, 1 << 20, 1e-3), Figures(100e-6, 1 << 20, 1e-4)
    assert best_of({"tcp": near, "ucx": thick}) == "tcp"
    assert best_of({"tcp": Figures(20e-6, 1 << 20, 1.0), "ucx": thick}) == "ucx"
    assert best_of({}) == ""


async def test_a_link_that_is_due_is_measured_and_told():
    gossip = FakeGossip(["b"])
    other = measuring(FakeGossip())
    own = measuring(gossip, lambda site: other.answer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.run)
        nursery.start_soon(own.run)
        with trio.fail_after(60):
            while not gossip.moved and not gossip.failed:
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    assert [site for site, _, _ in gossip.moved] == ["b"]
    assert gossip.best == {"b": None}


async def test_who_is_busy_or_unwilling_neither_measures_nor_answers(autojump_clock):
    for change in ({"busy": lambda: True}, {"enabled": False}):
        gossip = FakeGossip(["b"])
        own = measuring(gossip, **change)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(own.run)
            await trio.sleep(100)
            with pytest.raises(RequestError):
                await own.answer(["tcp"], bytes(32))
            nursery.cancel_scope.cancel()
        assert (gossip.due, gossip.moved, gossip.failed) == (["b"], [], [])


async def test_a_peer_that_does_not_answer_is_told_as_a_failure(autojump_clock):
    gossip = FakeGossip(["b"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(measuring(gossip).run)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert gossip.failed == ["b"]


@pytest.mark.parametrize("script", ["", "import time; time.sleep(60)", "print('no')", "print('[]')"])
async def test_a_process_that_says_nothing_of_use_costs_a_deadline_and_no_more(script, monkeypatch):
    monkeypatch.setattr("mesh.peer.measuring.START_S", 1.0)
    own = measuring(FakeGossip(), command=(sys.executable, "-c", script))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(own.run)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30), pytest.raises(MeshError):
            await own.answer(["tcp"], bytes(32))
        nursery.cancel_scope.cancel()


async def test_across_a_distance_there_is_nothing_to_compare():
    own = measuring(FakeGossip(rtt_s=2 * WIDE_RTT_S), backends=("ucx", "tcp"))
    assert await own.choose("b", ["ucx", "tcp"]) == "tcp"
    assert await own.choose("b", ["ucx"]) == "ucx"
    assert await own.choose("unknown", ["ucx", "tcp"]) == "tcp"
    with pytest.raises(RequestError):
        await own.choose("b", [])


async def test_where_comparing_fails_the_first_is_taken():
    own = measuring(FakeGossip(), backends=("ucx", "tcp"))
    assert await own.choose("b", ["ucx", "tcp"]) == "ucx"
