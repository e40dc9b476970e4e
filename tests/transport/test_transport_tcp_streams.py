"""Bulk over several connections, as on a wide link: opened, filled, put in order, and broken as one."""

from __future__ import annotations

import random
import socket
import struct
import time

import pytest
from transport_harness import connect_pair, until

from transport import Acceptor, ChannelBroken, ChannelClosed, connect_channel, open_fabric
from transport.tcp import _ADDRESS, _MAGIC, _PREFIX
from transport.tcp_adapt import FIRST_STREAMS

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def everything_is_far(monkeypatch):
    monkeypatch.setattr("transport.tcp_streams.WIDE_RTT_S", 0.0)


@pytest.fixture
def far_pair():
    """Two channels whose listener stays, so that further connections are accepted."""
    near, far = open_fabric("tcp"), open_fabric("tcp")
    near.linger_s = far.linger_s = 0.2
    acceptor = Acceptor(far, far.listen())
    acceptor.expect(b"hello", name="connector", key=KEY)
    channel = connect_channel(near, acceptor.address, name="acceptor", key=KEY, hello=b"hello")
    ((_, accepted),) = until(acceptor.poll, near, far)
    until(lambda: channel.poll() is None and channel.established, near, far)
    yield channel, accepted
    near.close()
    far.close()


def receive(channel, other):
    found = []
    until(lambda: (m := channel.poll()) is not None and (found.append(m) or True), other.fabric)
    return found[0]


def streams(channel):
    return channel._pipe._bundle.streams


@pytest.mark.parametrize("backwards", [False, True])
def test_bulk_opens_streams_and_arrives_whole_and_in_order(far_pair, backwards):
    sender, receiver = far_pair[::-1] if backwards else far_pair
    data = [random.Random(n).randbytes(3 << 20) for n in range(6)]
    tickets = [sender.send(b"%d" % n, data[n], bulk=True) for n in range(6)]
    for n in range(6):
        message = receive(receiver, sender)
        assert message.meta == b"%d" % n
        assert message.payload == data[n]
    until(lambda: all(ticket.done for ticket in tickets), sender.fabric, receiver.fabric)
    assert len(streams(sender)) >= FIRST_STREAMS
    assert len(streams(receiver)) == len(streams(sender))


def test_ordinary_messages_need_no_streams(far_pair):
    near, far = far_pair
    near.send(b"activations", bytes(4 << 20))
    assert receive(far, near).payload.nbytes == 4 << 20
    assert not streams(near)


def test_a_stream_that_breaks_in_the_middle_breaks_the_channel_at_both_ends(far_pair):
    near, far = far_pair
    near.send(b"", bytes(200 << 20), bulk=True)
    until(lambda: len(streams(near)) >= FIRST_STREAMS and near.bulk_pending_bytes < 150 << 20, near.fabric, far.fabric)
    # One in the middle of a record: a stream that ends between two has lost nothing.
    (stream, *_) = until(lambda: far.poll() or [each for each in streams(near) if each.out_bytes], near.fabric)
    victim = stream._sock
    victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    victim.shutdown(socket.SHUT_RDWR)
    for channel, other in ((near, far), (far, near)):
        with pytest.raises(ChannelBroken):
            until(lambda channel=channel: channel.poll() is channel, other.fabric)
    assert not near.fabric._bulky


def test_closing_behind_bulk_that_has_left_loses_none_of_it(far_pair):
    near, far = far_pair
    ticket = near.send(b"last", bytes(20 << 20), bulk=True)
    until(lambda: ticket.done, near.fabric, far.fabric)
    near.close()
    assert receive(far, near).payload.nbytes == 20 << 20
    with pytest.raises(ChannelClosed):
        until(lambda: far.poll() is far, near.fabric)


def test_a_listener_that_is_gone_leaves_bulk_the_first_connection(monkeypatch):
    monkeypatch.setattr("transport.tcp_streams._APART_S", 0.05)
    near, far = open_fabric("tcp"), open_fabric("tcp")
    channel, accepted = connect_pair(near, far, key=KEY)  # closes its listener
    until(lambda: channel.poll() is None and channel.established, near, far)
    channel.send(b"", bytes(5 << 20), bulk=True)
    assert receive(accepted, channel).payload.nbytes == 5 << 20
    near.close()
    far.close()


def test_a_stranger_cannot_join_a_pipe_it_has_no_name_of(far_pair):
    _, far = far_pair
    listener = next(iter(far.fabric._listeners))
    cookie, port = _ADDRESS.unpack_from(listener.address, len(_PREFIX))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(_MAGIC + cookie + bytes(16) + b"\x01")
        sock.settimeout(0.01)
        deadline = time.monotonic() + 5
        while True:
            far.fabric.progress()
            try:
                assert sock.recv(1) == b""
                break
            except TimeoutError:
                assert time.monotonic() < deadline
    assert not streams(far)


def test_a_stream_that_closed_since_the_selector_was_asked_is_passed_over(far_pair):
    near, far = far_pair
    near.send(b"", bytes(8 << 20), bulk=True)
    until(lambda: streams(near), near.fabric, far.fabric)
    closed = list(streams(near))
    near.abort()
    assert not any(stream._advance() for stream in closed)
