"""The decoder takes what the encoder made and refuses everything else, whatever it is."""

from __future__ import annotations

import random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip import codec, config
from mesh.gossip.codec import Codec, pack_message, pack_sender
from mesh.gossip.config import GossipConfig
from mesh.gossip.coordinates import Coordinate
from mesh.gossip.core import GossipCore
from mesh.gossip.members import STATES, Claim
from mesh.gossip.messages import (
    Ack,
    Buckets,
    Digest,
    Nack,
    Page,
    Ping,
    PingRequest,
    Rumour,
    Sender,
    Summary,
    Taken,
    Want,
)
from mesh.gossip.sealing import REFUSALS, Foreign, Forged, Malformed, Opened

CODEC = Codec("test")
SENDER = Sender("a", "a:1", 1, False, bytes(8))
HEADER = CODEC.join(b"", [])[:-3]

names = st.text("abcdefghijklmnop-_.0123456789", min_size=1, max_size=20)
addresses = st.builds(lambda host, port: f"{host}:{port}", names, st.integers(1, 65535))
counters = st.integers(1, config.MAX_COUNTER)
sequences = st.integers(0, 2**32 - 1)
proofs = st.binary(max_size=72)
claims = st.builds(Claim, names, addresses, st.sampled_from(STATES), counters, st.one_of(st.just(""), names), proofs)
held = st.dictionaries(names, counters, max_size=4)
generations = st.integers(0, config.MAX_COUNTER)
places = st.lists(st.integers(0, 15), min_size=1, max_size=9, unique=True).map(bytes)
coordinates = st.lists(st.floats(0, 1.5, width=32), min_size=10, max_size=10)
wheres = coordinates.map(lambda values: Coordinate(tuple(values[:8]), values[8], values[9]).pack())
messages = st.one_of(
    st.builds(Ping, sequences, st.one_of(st.just(""), names), st.just(""), st.just(0)),
    st.builds(Ping, sequences, names, names, sequences),
    st.builds(Ack, sequences, st.just(b"") | wheres),
    st.builds(Nack, sequences),
    st.builds(PingRequest, sequences, names, addresses, st.integers(1, 30_000)),
    st.builds(Rumour, claims, st.booleans()),
    st.builds(Buckets, st.just(16), st.binary(min_size=48, max_size=48)),
    st.builds(
        Summary, st.just(16), places, st.integers(0, 9).flatmap(lambda n: st.binary(min_size=10 * n, max_size=10 * n))
    ),
    st.builds(Want, st.integers(1, 9).flatmap(lambda n: st.binary(min_size=6 * n, max_size=6 * n))),
    st.builds(Digest, st.one_of(names, st.just("@cluster")), counters, generations, held, st.booleans()),
    st.builds(
        Page,
        st.one_of(names, st.just("@cluster")),
        counters,
        names,
        counters,
        st.integers(0, 2),
        st.integers(3, 9),
        st.binary(min_size=1),
        proofs,
        st.integers(0, 16),
    ),
    st.builds(Taken, addresses),
)
senders = st.builds(Sender, names, addresses, counters, st.booleans(), st.binary(min_size=8, max_size=8), proofs)
junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=8),
        st.binary(max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=9), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=12,
)


def core() -> GossipCore:
    made = GossipCore(GossipConfig("me", "me:1", cluster="test", rng=random.Random(0)))
    made.start(0.0)
    return made


@settings(deadline=None)
@given(senders, st.lists(messages, max_size=8))
def test_what_is_encoded_is_decoded(sender, sent):
    data = CODEC.join(pack_sender(sender), [pack_message(message) for message in sent])
    if len(data) <= config.MAX_DATAGRAM_BYTES:
        assert CODEC.decode(data) == (sender, sent, None)


@settings(deadline=None)
@given(st.binary(max_size=1600), st.booleans())
def test_random_bytes_are_refused_in_one_way_only(data, with_header):
    with pytest.raises(Malformed):
        CODEC.decode(HEADER + data if with_header else data)


@settings(deadline=None)
@given(senders, st.lists(messages, min_size=1, max_size=4), st.data())
def test_truncated_and_extended_datagrams_are_refused(sender, sent, data):
    whole = CODEC.join(pack_sender(sender), [pack_message(message) for message in sent])
    for wrong in (whole[: data.draw(st.integers(0, len(whole) - 1))], whole + data.draw(st.binary(min_size=1))):
        with pytest.raises(Malformed):
            CODEC.decode(wrong)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(junk, st.tuples(st.integers(0, 10), junk, junk, junk).map(list)), max_size=5))
def test_a_core_survives_any_msgpack_from_a_known_sender(items):
    body = b"".join(msgpack.packb(item) for item in items)
    target = core()
    target.receive(CODEC.join(pack_sender(SENDER), [body]), "a:1", 1.0)
    target.receive(HEADER + body, "a:1", 1.0)
    target.datagrams(1.0)
    target.handle_timer(5.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(senders, st.lists(messages, max_size=5), st.floats(0, 5)), max_size=8))
def test_a_core_survives_any_well_formed_datagrams(datagrams):
    target, now = core(), 0.0
    for sender, sent, wait_s in datagrams:
        now += wait_s
        target.handle_timer(now)
        target.receive(
            CODEC.join(pack_sender(sender), [pack_message(message) for message in sent]), sender.address, now
        )
        assert all(len(data) <= config.MAX_DATAGRAM_BYTES for _, data in target.datagrams(now))
        target.members(), target.entries("load"), target.rtts(), target.events()
    for _ in range(200):
        now = max(now, target.next_timer() or now)
        target.handle_timer(now)
        target.datagrams(now)


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 4 billion elements
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xdb\xff\xff\xff\xff",  # a text of 4 GB
        b"\xc6\xff\xff\xff\xff",  # bytes of as many
        b"\x91" * 1300,  # a list in a list in a list ...
        b"\xdc\xff\xff" * 400,
        b"\x81\x01\x01",  # a key that is a number
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xc7\x04\x05abcd",  # an unknown extension
        b"\xc1",  # never used
        b"\xa2\xff\xff",  # not UTF-8
        b"",
        b"\x00" * 1300,
    ],
)
def test_bombs_are_refused(body):
    for data in (HEADER + body, CODEC.join(pack_sender(SENDER), [body or b"\xc0"])):
        with pytest.raises(Malformed):
            CODEC.decode(data)


@pytest.mark.parametrize(
    "fields",
    [
        [0, -1, ""],
        [0, 2**32, ""],
        [0, True, ""],
        [0, 1.0, ""],
        [0, 1],
        [0, 1, "", ""],
        [0, 1, "a b"],
        [0, 1, "x" * 65],
        [0, 1, "\x00"],
        [3, 1, "a", "a:1", 0],
        [3, 1, "a", "a:1", 10**9],
        [3, 1, "a", "a", 5],
        [3, 1, "a", "a:0", 5],
        [3, 1, "a", "a:65536", 5],
        [3, 1, "a", "::1:80", 5],
        [4, "a", "a:1", 4, 1, "", b"", True],
        [4, "a", "a:1", 0, 0, "", b"", True],
        [4, "a", "a:1", 0, 2**63, "", b"", True],
        [4, "", "a:1", 0, 1, "", b"", True],
        [4, "@cluster", "a:1", 0, 1, "", b"", True],
        [4, "a", "a:1", 0, 1, "", b"x" * 73, True],
        [4, "a", "a:1", 0, 1, "", "x", True],
        [4, "a", "a:1", 0, 1, "", b"", 1],
        [5, 16, b""],
        [5, 17, bytes(51)],
        [5, 512, bytes(1536)],
        [5, 16, "x" * 48],
        [6, 16, b"", b""],
        [6, 16, b"\x10", b""],
        [6, 16, b"\x01\x01", b""],
        [6, 16, b"\x01", bytes(9)],
        [7, b""],
        [7, bytes(5)],
        [7, "x" * 6],
        [8, "a", 0, 1, {}, False],
        [8, "a", 1, 1, {"k": 0}, False],
        [8, "a", 1, 1, {}, 0],
        [8, "@other", 1, 1, {}, False],
        [8, "a", 1, 1, {str(number): 1 for number in range(17)}, False],
        [9, "a", 1, "k", 1, 1, 1, b"x", b"", 0],
        [9, "a", 1, "k", 1, 0, 10**6, b"x", b"", 0],
        [9, "a", 1, "k", 1, 0, 1, b"", b"", 0],
        [9, "a", 1, "k", 1, 0, 1, "x", b"", 0],
        [9, "a", 1, "k", 1, 0, 1, b"x", b"x" * 73, 0],
        [9, "a", 1, "k", 1, 0, 1, b"x", b"", 17],
        [9, "a", 1, "k", 1, 0, 1, b"x" * 751, b"", 0],
        [11],
        [-1],
        ["0"],
        [],
        {},
        None,
    ],
)
def test_fields_out_of_bounds_are_refused(fields):
    with pytest.raises(Malformed):
        CODEC.decode(CODEC.join(pack_sender(SENDER), [msgpack.packb(fields)]))


def test_too_many_messages_are_refused():
    with pytest.raises(Malformed):
        CODEC.decode(CODEC.join(pack_sender(SENDER), [pack_message(Ack(1))] * (codec.MAX_MESSAGES + 1)))


def test_another_cluster_is_foreign_and_is_not_answered():
    target = core()
    target.receive(Codec("other").join(pack_sender(SENDER), [pack_message(Ping(1, ""))]), "a:1", 1.0)
    assert target.counters["foreign"] == 1
    assert target.datagrams(1.0) == []
    assert len(target.members()) == 1
    with pytest.raises(Foreign):
        CODEC.decode(Codec("other").join(pack_sender(SENDER), []))


def test_refused_datagrams_are_counted():
    target = core()
    target.receive(HEADER + b"\xc1", "a:1", 1.0)
    target.receive(b"hello", "a:1", 1.0)
    assert (target.counters["malformed"], target.counters["foreign"], target.counters["received"]) == (1, 1, 2)


def test_the_largest_messages_fit_into_a_datagram_with_the_largest_sender():
    name, key = "n" * config.MAX_NAME_BYTES, "k" * (config.MAX_KEY_BYTES - 2)
    address = "h" * (config.MAX_ADDRESS_BYTES - 6) + ":65535"
    sender = pack_sender(Sender(name, address, config.MAX_COUNTER, True, bytes(8), bytes(72)))
    versions = {f"{key}{number:02}": config.MAX_COUNTER for number in range(config.MAX_KEYS_PER_SITE)}
    claim = Claim(name, address, "suspect", config.MAX_COUNTER, name, bytes(72))
    top = config.MAX_COUNTER
    for message in (
        Page(name, top, key, top, 0, config.MAX_PAGES, bytes(config.PAGE_BYTES), bytes(72), 16),
        Digest(name, top, top, versions, True),
        Buckets(256, bytes(256 * 3)),
        Summary(256, bytes(range(75)), bytes(75 * 10)),
        Want(bytes(750)),
        Rumour(claim),
    ):
        data = CODEC.join(sender, [pack_message(message)])
        assert len(data) <= config.MAX_DATAGRAM_BYTES - 120  # room for a seal
        assert CODEC.decode(data).messages == [message]


class Xor:
    """A sealer that everybody can break, and that says who sealed."""

    overhead_bytes = 2

    def seal(self, body: bytes, *, address: str, site: str, now: float) -> bytes:
        return b"a" + (b"?" if not site else b"!") + bytes(byte ^ 0x55 for byte in body)

    def open(self, data: bytes, *, source: str, now: float) -> Opened:
        if data[1:2] == b"?":
            return Opened(b"", None, b"hello")
        if data[1:2] != b"!":
            raise Forged("bad seal")
        return Opened(bytes(byte ^ 0x55 for byte in data[2:]), data[:1].decode())


def test_a_sealer_hides_the_body_and_says_who_sent_it():
    sealed = Codec("test", Xor())
    data = sealed.join(pack_sender(SENDER), [pack_message(Ack(7))], site="b")
    assert sealed.decode(data).messages == [Ack(7)]
    assert sealed.room_bytes(b"") == CODEC.room_bytes(b"") - 2
    with pytest.raises(Forged, match="a speaks as z"):
        sealed.decode(sealed.join(pack_sender(SENDER._replace(site="z")), [], site="b"))
    with pytest.raises(Malformed):
        sealed.decode(CODEC.join(pack_sender(SENDER), []))


def test_what_sealers_say_to_each_other_goes_back_to_where_it_came_from():
    target = GossipCore(GossipConfig("me", "me:1", cluster="test", rng=random.Random(0)), sealer=Xor())
    target.start(0.0)
    target.receive(Codec("test", Xor()).join(pack_sender(SENDER), []), "a:1", 1.0)
    assert target.datagrams(1.0) == [("a:1", HEADER + b"hello")]
    assert len(target.members()) == 1


class Sealed(Xor):
    """Refuses everything in one way."""

    def __init__(self, refusal: type[Malformed]) -> None:
        self.refusal = refusal

    def open(self, data: bytes, *, source: str, now: float) -> Opened:
        raise self.refusal("so")


@pytest.mark.parametrize("refusal", [Malformed, *Malformed.__subclasses__()])
def test_every_kind_of_refusal_is_counted_under_its_name(refusal):
    target = GossipCore(GossipConfig("me", "me:1", cluster="test", rng=random.Random(0)), sealer=Sealed(refusal))
    target.receive(HEADER + b"x", "a:1", 1.0)
    assert target.counters[refusal.__name__.lower()] == 1
    assert refusal.__name__.lower() in REFUSALS
