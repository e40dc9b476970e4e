"""Noise, mutated and spliced datagrams and streams: refused in one way, no crash, no hang, memory bounded.

A few thousand by default; `ISTHMUS_FUZZ=1000000 python -m pytest tests/gossip/test_gossip_fuzz.py` does a million.
"""

from __future__ import annotations

import os
import random
import tracemalloc

import msgpack
import pytest

from mesh.gossip import config
from mesh.gossip.codec import Codec, pack_message, pack_sender
from mesh.gossip.config import GossipConfig
from mesh.gossip.core import GossipCore
from mesh.gossip.members import Claim
from mesh.gossip.messages import Message, Sender
from mesh.gossip.post import MAX_PLACES, MAX_STREAMS
from mesh.gossip.sealing import REFUSALS, Malformed
from mesh.gossip.spread import MAX_HOT
from mesh.gossip.state import MAX_ASSEMBLIES, MAX_STATE_BYTES
from simulations.network import VirtualNetwork

ROUNDS = int(os.environ.get("ISTHMUS_FUZZ", "4000"))
#: What a core may hold after any amount of noise. A mesh of the 4 sites that the corpus tells of takes about 200 KB.
MEMORY_BYTES = 64 * 1024 * 1024
CODEC = Codec("isthmus")


class Recorder(GossipCore):
    """A core that keeps what it was sent."""

    seen: list[bytes] = []  # noqa: RUF012 (shared on purpose)

    def receive(self, data: bytes, source: str, now: float) -> None:
        self.seen.append(data)
        super().receive(data, source, now)


@pytest.fixture(scope="module")
def corpus() -> list[bytes]:
    """One of every size and kind of datagram that four real peers send each other within some seconds."""
    import simulations.network as network

    kept, network.GossipCore = network.GossipCore, Recorder  # type: ignore[misc]
    try:
        net = VirtualNetwork(seed=1, latency=0.05, jitter=0.5, loss=0.1)
        for site in "abcd":
            net.spawn(site, seeds=["a"])
            net.publish(site, "capabilities", {"devices": [{"note": "x" * 600}] * 4})
        net.run_for(3.0)
        net.crash("d")
        net.run_for(6.0)
    finally:
        network.GossipCore = kept  # type: ignore[misc]
    return list({len(data): data for data in Recorder.seen}.values())


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """One of the ways in which bytes go wrong, by accident or not."""
    way, spoilt = chance.randrange(9), bytearray(data)
    if way == 0:
        return chance.randbytes(chance.randrange(1500))
    if way == 1:
        return data[:13] + chance.randbytes(chance.randrange(200))
    if way == 2:
        return data[: chance.randrange(len(data))]
    if way == 3:
        return data + chance.randbytes(chance.randrange(1, 300))
    if way == 4:  # bits
        for _ in range(chance.randrange(1, 4)):
            spoilt[chance.randrange(13, len(spoilt))] ^= 1 << chance.randrange(8)
        return bytes(spoilt)
    if way == 5:  # a length or a type in front of something
        spoilt[chance.randrange(13, len(spoilt))] = chance.choice(
            b"\x80\x8f\x90\x9f\xc4\xc5\xc6\xdc\xdd\xde\xdf\xcf\xd3\xcb"
        )
        return bytes(spoilt)
    if way == 6:  # spliced
        return data[: chance.randrange(13, len(data))] + other[chance.randrange(13, len(other)) :]
    if way == 7:  # repeated
        start = chance.randrange(13, len(data))
        return data[:start] + data[start : start + 40] * chance.randrange(2, 20)
    return numbers(data, chance)


def numbers(data: bytes, chance: random.Random) -> bytes:
    """Well formed, with other numbers and names in it."""
    objects = msgpack.unpackb(data[13:])
    odd = [0, -1, 1, 2**31, 2**62, 2**63, 2**64 - 1, "", "@cluster", "a", b"", b"\0" * 72, None, True, 1e300, [], {}]
    place = chance.choice([item for item in objects if item])
    place[chance.randrange(len(place))] = chance.choice(odd)
    body: bytes = msgpack.packb(objects[:1]) if len(objects) < 2 else msgpack.packb(objects)
    return data[:13] + (b"\xdc" + len(objects).to_bytes(2) + body[1:] if body[0] & 0xF0 == 0x90 else body)


def bounded(core: GossipCore) -> None:
    """No map of a core exceeds its bound, whatever came."""
    assert len(core.members()) <= config.MAX_MEMBERS + 1
    assert len(core._post._places) <= MAX_PLACES
    assert len(core._post._asked) <= MAX_STREAMS
    assert len(core._entries.spread._hot) <= MAX_HOT
    assert len(core._state._assemblies) <= MAX_ASSEMBLIES
    assert core._state.size_bytes <= MAX_STATE_BYTES
    assert core._state.size_bytes == sum(len(e.data) for o in core._state._owners.values() for e in o.entries.values())


def test_whatever_arrives_is_heard_or_refused(corpus):
    chance = random.Random(7)
    core = GossipCore(GossipConfig("b", "b:7700", rng=random.Random(1)), streaming=True)
    now = 0.0
    core.start(now)
    refused = 0
    tracemalloc.start()
    try:
        for number in range(ROUNDS):
            data = mutated(chance.choice(corpus), chance.choice(corpus), chance)
            now += 0.002
            try:
                CODEC.decode(data)
            except Malformed:
                refused += 1
            core.receive(data, f"{chance.choice('acdx')}:7700", now)
            if number % 3 == 0:
                core.handle_timer(now)
            assert all(len(sent) <= config.MAX_DATAGRAM_BYTES for _, sent in core.datagrams(now))
            for request in core.streams():
                assert len(request.data) <= config.MAX_STREAM_BYTES
                core.stream_answered(request.token, data if chance.random() < 0.5 else None, now)
            core.events()
            if number % 1000 == 0:
                bounded(core)
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    bounded(core)
    assert held_bytes < MEMORY_BYTES
    assert refused > ROUNDS / 3
    assert sum(core.counters[kind] for kind in REFUSALS) >= refused
    core.receive(corpus[0], "a:7700", now)  # it still listens
    assert core.members()


def test_whatever_is_asked_over_a_stream_is_answered_or_refused(corpus):
    chance = random.Random(8)
    core = GossipCore(GossipConfig("b", "b:7700", rng=random.Random(1)), streaming=True)
    core.start(0.0)
    now, served = 0.0, 0
    for _ in range(ROUNDS // 4):
        now += 0.01
        data = mutated(chance.choice(corpus), chance.choice(corpus), chance)
        try:
            answer = core.serve_stream(data, "x:1", now)
        except Malformed:
            pass
        else:
            served += 1
            assert len(answer) <= config.MAX_STREAM_BYTES
            CODEC.decode_stream(answer)
        core.handle_timer(now)
        core.datagrams(now), core.streams(), core.events()
    bounded(core)
    assert 0 < served < ROUNDS / 4


def test_a_stream_of_the_largest_size_is_no_bomb():
    core = GossipCore(GossipConfig("b", "b:7700", rng=random.Random(1)))
    core.start(0.0)
    sender = pack_sender(Sender("a", "a:1", 1, False, bytes(8)))
    for body in (b"\x90" * 260_000, b"\x91" * 260_000, b"\xdd\xff\xff\xff\xff" * 1000, b"\xc0" * 8191):
        with pytest.raises(Malformed):
            core.serve_stream(CODEC.join_stream(sender, [body]), "a:1", 1.0)


def flood(core: GossipCore, messages: list[Message]) -> None:
    sender = pack_sender(Sender("a", "a:1", 1, False, bytes(8)))
    core.receive(CODEC.join(sender, [pack_message(message) for message in messages]), "a:1", 1.0)


def test_more_members_than_there_may_be_are_not_kept():
    from mesh.gossip.messages import Rumour

    core = GossipCore(GossipConfig("b", "b:7700", rng=random.Random(1)))
    core.start(0.0)
    for number in range(0, config.MAX_MEMBERS + 300, 10):
        flood(core, [Rumour(Claim(f"s{n}", f"s{n}:1", "alive", 1)) for n in range(number, number + 10)])
        core.datagrams(1.0), core.events()
    bounded(core)
