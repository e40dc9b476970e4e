"""What a channel promises over every backend, sealed and not."""

from __future__ import annotations

import gc
import os
import random
import time
import weakref

import pytest
from transport_harness import connect_pair, until

from transport import (
    Acceptor,
    ChannelBroken,
    ChannelClosed,
    DeadlineExceeded,
    FrameError,
    TransportError,
    connect_channel,
    open_fabric,
    wait_any,
)

KEY = bytes(range(32))


def poll(channel, other, kind=None):
    found = []
    until(lambda: (m := channel.poll(kind)) is not None and (found.append(m) or True), other.fabric)
    return found[0]


def raises_soon(error, channel, other, match=None):
    with pytest.raises(error, match=match):
        until(lambda: channel.poll() is channel, other.fabric)


def test_messages_keep_kind_metadata_payload_and_order_both_ways(channels):
    for sender, receiver in (channels, channels[::-1]):
        for index, size in enumerate((0, 10, 2304, 40_000, 2 << 20)):
            sender.send(b"meta %d" % index, bytes([index]) * size, kind=index)
        for index, size in enumerate((0, 10, 2304, 40_000, 2 << 20)):
            message = poll(receiver, sender)
            assert (message.kind, message.meta) == (index, b"meta %d" % index)
            assert message.payload == bytes([index]) * size


def test_long_messages_come_whole_and_in_order_among_short_ones_and_on_lanes(channels):
    near, far = channels
    sizes = (5, (1 << 20) + 1, 10, (3 << 20) + 7, 3 << 20, 2304)
    data = [random.Random(size).randbytes(size) for size in sizes]
    tickets = [near.send(b"%d" % n, data[n], kind=130 * (n == 3)) for n in range(len(sizes))]
    for n in (0, 1, 2, 4, 5):
        message = poll(far, near)
        assert (message.kind, message.meta) == (0, b"%d" % n)
        assert message.payload == data[n]
    lane = poll(far, near, 130)
    assert (lane.kind, lane.meta) == (130, b"3")
    assert lane.payload == data[3]
    until(lambda: all(ticket.done for ticket in tickets), near.fabric, far.fabric)


def test_a_long_message_that_is_held_keeps_its_bytes_while_others_arrive(channels):
    near, far = channels
    held = []
    for turn in range(6):
        near.send(b"", bytes([turn]) * (2 << 20))
        held.append(poll(far, near).payload)
    for turn, payload in enumerate(held):
        assert payload == bytes([turn]) * (2 << 20)


def test_receive_raises_deadline_exceeded_and_the_channel_lives_on(channels):
    near, far = channels
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="connector"):
        far.receive(0.03)
    assert 0.03 <= time.monotonic() - start < 0.5
    near.send(b"late")
    assert poll(far, near).meta == b"late"


def test_receive_into_fills_the_buffer_and_refuses_another_size(channels):
    near, far = channels
    near.send(b"one", b"abcd")
    near.send(b"two", b"too long")
    buffer = bytearray(4)
    near.fabric.progress()
    assert far.receive_into(memoryview(buffer), 5) == b"one"
    assert buffer == b"abcd"
    near.fabric.progress()
    with pytest.raises(FrameError, match="8 bytes where 4"):
        far.receive_into(memoryview(buffer), 5)
    raises_soon(ChannelBroken, near, far)


def test_a_lane_and_ordinary_messages_do_not_steal_from_each_other(channels):
    near, far = channels
    for kind, meta in ((130, b"a"), (0, b"b"), (131, b"c"), (130, b"d"), (5, b"e")):
        near.send(meta, kind=kind)
    assert poll(far, near).meta == b"b"
    assert poll(far, near, 131).meta == b"c"
    assert poll(far, near).meta == b"e"
    assert [poll(far, near, 130).meta for _ in range(2)] == [b"a", b"d"]
    assert far.poll() is None


def test_kinds_of_the_channel_itself_cannot_be_sent(channels):
    with pytest.raises(ValueError, match="200"):
        channels[0].send(b"", kind=200)


def test_close_gives_closed_at_both_ends_after_what_was_sent(channels):
    near, far = channels
    near.send(b"last", bytes(100_000))
    near.close()
    near.close()
    assert poll(far, near).meta == b"last"
    raises_soon(ChannelClosed, far, near, match="connector")
    for channel in channels:
        with pytest.raises(ChannelClosed):
            channel.send(b"late")
        with pytest.raises(ChannelClosed):
            channel.poll()


def test_abort_gives_broken_at_both_ends(channels):
    near, far = channels
    far.abort()
    far.abort()
    raises_soon(ChannelBroken, near, far, match="acceptor")
    with pytest.raises(ChannelBroken):
        far.send(b"late")


def test_a_fabric_that_ends_breaks_the_channel(channels):
    near, far = channels
    near.fabric.close()
    raises_soon(ChannelBroken, far, far)


def test_a_goodbye_that_is_not_sealed_is_not_believed(fabrics):
    near, far = connect_pair(*fabrics, key=KEY)
    near._pipe.close()  # what somebody on the way could forge
    raises_soon(ChannelBroken, far, near, match="without a sealed goodbye")


@pytest.mark.parametrize("size", [10, 2 << 20])
def test_a_tampered_frame_breaks_the_channel_and_delivers_nothing(fabrics, size):
    near, far = connect_pair(*fabrics, key=KEY)
    genuine = near._pipe.send

    def tamper(parts):
        message = bytearray(b"".join(parts))
        message[-1] ^= 1
        return genuine((bytes(message),))

    near._pipe.send = tamper
    near.send(b"secret", bytes(size))
    raises_soon(ChannelBroken, far, near, match="seal of frame 0")
    near._pipe.send = genuine
    raises_soon(ChannelBroken, near, far)


def test_sealed_bytes_on_the_pipe_do_not_show_the_message(fabrics):
    near, _ = connect_pair(*fabrics, key=KEY)
    seen = []
    genuine = near._pipe.send
    near._pipe.send = lambda parts: seen.append(b"".join(parts)) or genuine(parts)
    near.send(b"metadata!", b"payload!" * 8)
    assert b"metadata!" not in seen[0]
    assert b"payload!" not in seen[0]


def test_an_emulated_delay_holds_messages_for_the_one_way_time(fabrics):
    near, far = connect_pair(*fabrics, delay_s=0.05)
    start = time.monotonic()
    for index in range(5):
        near.send(b"%d" % index, bytes(1000))
    near.fabric.progress()
    near.fabric.wait(0.001)
    arrived = [far.receive(2).meta for _ in range(5)]
    elapsed = time.monotonic() - start
    assert arrived == [b"%d" % index for index in range(5)]
    assert 0.05 <= elapsed < 0.2
    near.send(b"last")
    near.close()
    assert far.poll() is None
    assert poll(far, near).meta == b"last"
    raises_soon(ChannelClosed, far, near)


def test_pending_bytes_show_that_the_neighbour_does_not_take(channels):
    near, far = channels
    sent = 0
    while near.pending_bytes < 16 << 20:
        near.send(b"", bytes(1 << 20))
        sent += 1
        near.fabric.progress()
        far.fabric.progress()
        assert sent < 400
    for _ in range(sent):
        poll(far, near)
    until(lambda: near.pending_bytes == 0, near.fabric, far.fabric)


def test_silence_longer_than_allowed_breaks_and_heartbeats_prevent_it(fabrics):
    near, far = connect_pair(*fabrics, silence_s=0.12)
    end = time.monotonic() + 0.4
    while time.monotonic() < end:
        assert near.poll() is None
        assert far.poll() is None
        time.sleep(0.005)
    start = time.monotonic()
    with pytest.raises(ChannelBroken, match=r"silent for more than 0\.12 s"):
        while time.monotonic() < start + 5:  # only this end is driven
            far.poll()
            time.sleep(0.005)
    assert time.monotonic() - start < 1


def test_being_busy_oneself_is_not_the_neighbours_silence(fabrics):
    near, far = connect_pair(*fabrics, silence_s=0.1)
    near.poll(), far.poll()
    time.sleep(0.25)
    assert far.poll() is None
    assert near.poll() is None


def test_a_hello_that_is_not_expected_yet_waits_and_one_that_never_is_gets_dropped(fabrics):
    near, far = fabrics
    acceptor = Acceptor(far, far.listen(), patience_s=0.2)
    early = connect_channel(near, acceptor.address, name="early", key=KEY, hello=b"early")
    never = connect_channel(near, acceptor.address, name="never", key=KEY, hello=b"never")
    early.send(b"right behind the hello", bytes(100_000))
    for _ in range(20):
        near.progress()
        assert acceptor.poll() == []
    acceptor.expect(b"early", name="near", key=KEY)
    ((_, accepted),) = until(acceptor.poll, near)
    until(lambda: early.poll() or early.established, near, far)
    assert poll(accepted, early).meta == b"right behind the hello"
    with pytest.raises(ChannelBroken, match="never answered the hello"):
        until(lambda: acceptor.poll() or never.poll(), near, far)
    acceptor.close()


def test_what_is_sent_before_the_neighbour_answers_leaves_when_it_has(fabrics):
    near, far = fabrics
    acceptor = Acceptor(far, far.listen())
    early = connect_channel(near, acceptor.address, name="early", key=KEY, hello=b"early")
    tickets = [early.send(b"%d" % size, bytes(size)) for size in (10, 100_000)]
    assert early.pending_bytes >= 100_010
    assert not any(ticket.done for ticket in tickets)
    with pytest.raises(ValueError, match="too long"):
        early.send(bytes(2 << 20))
    acceptor.expect(b"early", name="near", key=KEY)
    ((_, accepted),) = until(acceptor.poll, near)
    until(lambda: early.poll() or early.established, near, far)
    for size in (10, 100_000):
        message = poll(accepted, early)
        assert (message.meta, message.payload.nbytes) == (b"%d" % size, size)
    until(lambda: all(ticket.done for ticket in tickets), near, far)
    until(lambda: early.pending_bytes == 0, near, far)
    acceptor.close()


def test_a_channel_closed_before_the_neighbour_answers_forgets_what_it_held(fabrics):
    near, far = fabrics
    acceptor = Acceptor(far, far.listen())
    early = connect_channel(near, acceptor.address, name="early", key=KEY, hello=b"early")
    early.send(b"never", bytes(1000))
    early.close()
    assert early._held_bytes == 0
    with pytest.raises(ChannelClosed):
        early.poll()
    acceptor.close()


@pytest.mark.parametrize("key", [bytes(32), None])
def test_a_hello_with_another_key_is_dropped_and_the_expectation_stays(fabrics, key):
    near, far = fabrics
    acceptor = Acceptor(far, far.listen())
    acceptor.expect(b"hello", name="near", key=KEY)
    impostor = connect_channel(near, acceptor.address, name="far", key=key, hello=b"hello")
    with pytest.raises(ChannelBroken, match="never answered"):
        until(lambda: acceptor.poll() or impostor.poll(), near, far)
    genuine = connect_channel(near, acceptor.address, name="far", key=KEY, hello=b"hello")
    ((_, accepted),) = until(acceptor.poll, near)
    genuine.send(b"hi")
    until(lambda: genuine.poll() or genuine.established, near, far)
    assert poll(accepted, genuine).meta == b"hi"
    acceptor.close()


def test_random_first_messages_never_become_a_channel(fabrics):
    near, far = fabrics
    acceptor = Acceptor(far, far.listen())
    acceptor.expect(b"hello", name="near", key=None)
    for size in (0, 1, 50, 300, 4000, 20_000):
        near.connect(acceptor.address).send((os.urandom(size),))
    for _ in range(50):
        near.progress()
        assert acceptor.poll() == []
    acceptor.close()


def test_a_channel_and_its_buffers_are_forgotten_after_close(channels):
    import numpy as np

    near, far = channels
    payload = np.ones(1 << 20, np.uint8)
    alive = weakref.ref(payload)
    tickets = [near.send(b"", payload.data)]
    poll(far, near)
    until(lambda: tickets[0].done, near.fabric, far.fabric)
    near.close()
    raises_soon(ChannelClosed, far, near)
    until(lambda: not getattr(near.fabric, "_pipes", None), near.fabric, far.fabric)
    del payload
    gc.collect()
    assert alive() is None


def test_one_wait_covers_fabrics_of_different_backends():
    fabrics = [open_fabric("memory"), open_fabric("tcp")]
    pairs = [connect_pair(fabric, fabric) for fabric in fabrics]
    for near, far in pairs:
        near.send(b"x")
        deadline = time.monotonic() + 5
        while far.poll() is None:
            assert time.monotonic() < deadline
            wait_any(fabrics, 1.0)
    start = time.monotonic()
    while time.monotonic() - start < 0.03:
        wait_any(fabrics, 0.03 - (time.monotonic() - start))
    for fabric in fabrics:
        fabric.close()


def test_an_unknown_transport_names_the_known_ones():
    with pytest.raises(TransportError, match="tcp, ucx, memory"):
        open_fabric("carrier pigeon")
