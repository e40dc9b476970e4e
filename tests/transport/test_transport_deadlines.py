"""Nothing waits for ever: what an operation may take follows from its size and the link, over every backend."""

from __future__ import annotations

import functools
import random
import socket
import time

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_harness import connect_pair, until

from transport import ChannelBroken, DeadlineExceeded, TransportError, connect_channel
from transport.deadlines import Watch, Way, allowance_s
from transport.tcp import TcpFabric
from transport.trio_shell import open_driver

KEY = bytes(range(32))
PATIENCE_S = 0.2


@pytest.fixture
def pair(fabrics):
    return connect_pair(*fabrics, key=KEY, patience_s=PATIENCE_S)


def broken(channel, *fabrics):
    """Poll until the channel breaks; the reason."""
    with pytest.raises(ChannelBroken) as caught:
        until(lambda: channel.poll() is channel, *fabrics)
    return str(caught.value)


@pytest.mark.parametrize("bulk", [False, True], ids=["ordinary", "bulk"])
def test_a_neighbour_that_takes_nothing_is_an_exception_at_both_ends(pair, backend, bulk):
    near, far = pair
    tickets = [near.send(b"", bytes(70_000), bulk=bulk) for _ in range(2000)]
    why = broken(near)  # the far end is not driven
    assert "acceptor" in why
    assert "none moved" in why
    near.abort()
    if backend != "ucx":  # what UCX was given it may keep until the fabric ends
        until(lambda: all(ticket.done for ticket in tickets), near.fabric)
    with pytest.raises(ChannelBroken):
        until(lambda: far.poll() is far, near.fabric)


def test_a_message_of_which_the_rest_never_comes_is_an_exception_at_both_ends(pair, backend):
    near, far = pair
    size = 300_000 if backend == "ucx" else 64 << 20  # UCX shows no progress within a message, so the size counts
    near.send(b"", bytes(size), bulk=backend == "memory")  # in memory, ordinary messages come whole
    why = broken(far)  # the near end is not driven any more
    assert "connector" in why
    with pytest.raises(ChannelBroken):
        until(lambda: near.poll() is near, far.fabric)


def test_a_receive_without_a_timeout_ends_after_what_its_size_may_take(pair):
    near, far = pair
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="acceptor"):
        near.receive()
    with pytest.raises(DeadlineExceeded, match="acceptor"):
        near.receive(size_bytes=10_000)
    assert time.monotonic() - began >= 2 * PATIENCE_S
    far.send(b"still there")
    assert until(near.poll, far.fabric).meta == b"still there"


async def test_under_trio_sends_receives_and_bulk_have_deadlines_of_their_own(pair):
    near, far = pair
    async with open_driver(near.fabric) as here:
        with pytest.raises(DeadlineExceeded):
            await here.receive(near)
        with pytest.raises(TransportError):
            for _ in range(8):
                await here.send(near, b"", bytes(16 << 20), bulk=True)
    far.abort()


async def test_bulk_goes_through_under_trio(pair):
    near, far = pair
    data = random.Random(1).randbytes(3 << 20)
    async with open_driver(near.fabric) as here, open_driver(far.fabric) as there, trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(here.send, near, b"weights", data, bulk=True))
        message = await there.receive(far, size_bytes=len(data))
    assert message.meta == b"weights"
    assert message.payload == data


def test_a_hello_that_nobody_answers_breaks_the_channel(fabrics):
    near, far = fabrics
    listener = far.listen()
    channel = connect_channel(near, listener.address, name="nobody", key=KEY, hello=b"hello", patience_s=PATIENCE_S)
    channel.send(b"", b"held until there is an answer")
    assert "nobody" in broken(channel, far)


def test_a_collective_of_which_a_rank_stops_ends_at_its_deadline(pair):
    torch = pytest.importorskip("torch")
    from transport.collectives import Group

    near, _ = pair
    group = Group(0, 2, {1: near})
    began = time.monotonic()
    with pytest.raises((DeadlineExceeded, ChannelBroken), match="acceptor"):
        group.all_reduce_(torch.ones(1000))
    assert time.monotonic() - began >= PATIENCE_S


def test_a_machine_that_says_nothing_breaks_an_idle_connection():
    """A path that swallows everything: here, a neighbour whose kernel is not asked."""
    near, far = TcpFabric(), TcpFabric()
    try:
        channel, _ = connect_pair(near, far, key=KEY)
        near.link_s = 0.05
        why = broken(channel)
        assert "said nothing" in why
    finally:
        near.close()
        far.close()


def test_idle_connections_are_asked_whether_they_live():
    near, far = TcpFabric(), TcpFabric()
    try:
        channel, _ = connect_pair(near, far)
        sock = channel._pipe._sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= near.link_s / 2
    finally:
        near.close()
        far.close()


def test_allowances_follow_size_round_trip_and_rate():
    assert allowance_s(0) < allowance_s(1 << 20) < allowance_s(1 << 30)
    assert allowance_s(1 << 30, 0.2, 1e9) < allowance_s(1 << 30, 0.2) < allowance_s(1 << 30, 0.4)


@settings(max_examples=50)
@given(st.integers(1, 1 << 30), st.floats(200_000, 1e9), st.floats(0.01, 0.25))
def test_what_moves_at_an_honest_rate_is_never_late(size, bytes_per_s, every_s):
    watch, now, moved = Watch(5.0), 0.0, 0
    steps = 0
    while moved < size and steps < 2000:
        assert watch.late(now, Way(size - moved, moved), 0.05, None) is None
        now, moved, steps = now + every_s, min(size, moved + int(bytes_per_s * every_s)), steps + 1


@settings(max_examples=50)
@given(st.integers(1, 1 << 26), st.integers(0, 1 << 26), st.floats(0.01, 0.25))
def test_what_stops_is_late_within_the_patience_and_what_trickles_within_its_allowance(size, moved, every_s):
    moved = min(moved, size - 1)
    stopped, trickling = Watch(2.0), Watch(2.0)
    now, found, trickled = 0.0, None, None
    while found is None:
        found = stopped.late(now, Way(size - moved, moved), 0.0, None)
        now += every_s
        assert now <= 2.0 + 3 * every_s
    now, done = 0.0, 0
    size += 1 << 20
    while trickled is None:
        trickled = trickling.late(now, Way(size - done, done), 0.0, None)
        now, done = now + 1.5, done + 1  # a byte in time, every time
        assert now <= 2 * allowance_s(size, patience_s=2.0) + 3


def test_an_end_that_was_busy_itself_accuses_nobody(fabrics):
    patience_s = 1.0  # as long as this process may be held up without having slept
    near, far = connect_pair(*fabrics, patience_s=patience_s)
    near.send(b"", bytes(64 << 20), bulk=True)
    near.poll()
    time.sleep(2.2 * patience_s)
    near.poll()  # nothing moved meanwhile, for nobody looked
    assert until(far.poll, near.fabric).payload.nbytes == 64 << 20
