"""Bulk over every backend: whole, in order, overtaken by what is urgent, held back by who does not take."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_harness import connect_pair, until

from transport import ChannelBroken, ChannelClosed, FrameError
from transport.bulk import PIECE_BYTES
from transport.fragments import Incoming, Outgoing
from transport.frames import BULK_LANE, CHUNK_BYTES, FRAGMENT, PART, FrameReader, FrameWriter

KEY = bytes(range(32))


def poll(channel, other, kind=None):
    found = []
    until(lambda: (m := channel.poll(kind)) is not None and (found.append(m) or True), other.fabric)
    return found[0]


def test_bulk_of_any_size_arrives_whole_and_in_order_both_ways(channels):
    sizes = (0, 1, 5000, PIECE_BYTES, PIECE_BYTES + 1, (3 << 20) + 7)
    for sender, receiver in (channels, channels[::-1]):
        data = [random.Random(size).randbytes(size) for size in sizes]
        tickets = [sender.send(b"%d" % n, data[n], kind=n, bulk=True) for n in range(len(sizes))]
        for n in range(len(sizes)):
            message = poll(receiver, sender)
            assert (message.kind, message.meta) == (n, b"%d" % n)
            assert message.payload == data[n]
        until(lambda tickets=tickets: all(ticket.done for ticket in tickets), sender.fabric, receiver.fabric)
        assert sender.bulk_pending_bytes == 0


def test_a_small_message_sent_behind_bulk_arrives_before_it(channels):
    near, far = channels
    near.send(b"weights", bytes(24 << 20), kind=1, bulk=True)
    near.send(b"token", kind=2)
    assert poll(far, near).meta == b"token"
    assert poll(far, near).meta == b"weights"


def test_bulk_that_nobody_takes_stays_at_the_sender(channels):
    near, far = channels
    ticket = near.send(b"", bytes(256 << 20), bulk=True)
    for _ in range(200):
        near.fabric.progress()
        far.fabric.progress()
    assert near.bulk_pending_bytes > 128 << 20
    assert not ticket.done
    assert poll(far, near).payload.nbytes == 256 << 20


def test_the_end_of_a_channel_lets_go_of_bulk_and_breaks_the_other_end(channels):
    near, far = channels
    ticket = near.send(b"", bytes(256 << 20), bulk=True)
    near.abort()
    assert ticket.done
    with pytest.raises((ChannelBroken, ChannelClosed)):
        until(lambda: far.poll() is not None, near.fabric)
    with pytest.raises(ChannelBroken):
        near.send(b"", b"late", bulk=True)


def test_an_emulated_delay_holds_bulk_too(fabrics):
    near, far = connect_pair(*fabrics, delay_s=0.05)
    near.send(b"far", bytes(3 << 20), bulk=True)
    for _ in range(20):
        near.fabric.progress()
        assert far.poll() is None
    assert poll(far, near).meta == b"far"


@settings(max_examples=30)
@given(st.sampled_from([None, KEY]), st.lists(st.binary(max_size=3000), max_size=5), st.integers(1, 700))
def test_pieces_of_any_length_make_the_same_messages(key, payloads, most_bytes):
    writer, reader, incoming = FrameWriter(key, BULK_LANE), FrameReader(key, BULK_LANE), Incoming()
    arrived = []
    for payload in payloads:
        source = Outgoing(writer, 7, b"meta", payload, lambda: 5)
        while (parts := source.pull(most_bytes)) is not None:
            frame = reader.read(memoryview(b"".join(parts)))
            assert frame.kind == FRAGMENT
            whole = incoming.add(frame)
            if whole is not None:
                arrived.append((whole.kind, whole.meta, bytes(whole.payload), whole.stamp_ns))
        assert source.done
    assert arrived == [(7, b"meta", payload, 5) for payload in payloads]
    assert incoming.waiting_bytes == 0


@pytest.mark.parametrize("key", [None, KEY], ids=["unsealed", "sealed"])
@pytest.mark.parametrize("size", [0, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_parts_are_opened_in_the_message_that_they_are_of(key, size):
    writer, reader = FrameWriter(key), FrameReader(key)
    memory = memoryview(bytearray(size))
    incoming = Incoming(lambda size: memory[:size])
    payload = random.Random(size).randbytes(size)
    source = Outgoing(writer, 7, b"meta", payload, lambda: 5)
    whole = None
    while (parts := source.pull_part()) is not None:
        assert whole is None
        frame = reader.read(memoryview(b"".join(parts)), place=incoming.place)
        assert frame.kind == PART
        whole = incoming.add(frame)
    assert (whole.kind, whole.meta, whole.stamp_ns) == (7, b"meta", 5)
    assert memory == payload
    assert whole.payload == memory


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2**40), st.integers(0, 2**62), st.binary(max_size=50))))
def test_pieces_that_no_honest_sender_sends_are_a_frame_error(pieces):
    incoming = Incoming()
    filled = size = 0
    for kind, offset, claimed, payload in pieces:
        frame = FrameReader(None).read(
            memoryview(b"".join(FrameWriter(None).write(FRAGMENT, _meta(kind, offset, claimed), payload, 0)))
        )
        try:
            incoming.add(frame)
        except FrameError:
            continue
        assert offset == filled % max(size, 1) or offset == 0
        filled, size = offset + len(payload), claimed


def _meta(kind, offset, size):
    return kind.to_bytes(1, "little") + offset.to_bytes(8, "little") + size.to_bytes(8, "little")


def test_the_two_lanes_never_share_a_nonce():
    ordinary, bulk = FrameWriter(KEY), FrameWriter(KEY, BULK_LANE)
    assert ordinary.write(1, b"", b"x" * 64, 0)[1][:64] != bulk.write(1, b"", b"x" * 64, 0)[1][:64]
    with pytest.raises(FrameError):
        FrameReader(KEY).read(memoryview(b"".join(FrameWriter(KEY, BULK_LANE).write(1, b"", b"x", 0))))
