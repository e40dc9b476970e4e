"""What every backend promises of a pipe."""

from __future__ import annotations

import gc
import random
import threading
import time
from pathlib import Path

import pytest
from transport_harness import until

from transport import AddressError, ChannelBroken, ChannelClosed, open_fabric
from transport.base import FIRST_MESSAGE_BYTES

SIZES = (0, 1, 7, 2304, 4096, 32 * 1024 - 17, 32 * 1024 - 16, 32 * 1024, 65536, 65537, 262144, 1 << 20, (8 << 20) + 3)


def take(pipe, *fabrics):
    found = []
    until(lambda: (message := pipe.take()) is not None and (found.append(message) or True), *fabrics)
    return found[0]


def ended(pipe, *fabrics, timeout_s=10.0):
    """The error that ends the pipe; messages before it are dropped."""

    def look():
        try:
            pipe.take()
        except (ChannelClosed, ChannelBroken, AddressError) as error:
            return error
        return None

    return until(look, *fabrics, timeout_s=timeout_s)


@pytest.mark.parametrize("size", SIZES)
def test_a_message_of_any_size_arrives_whole_in_both_directions(pipes, fabrics, size):
    data = random.Random(size).randbytes(size)
    for sender, receiver in (pipes, pipes[::-1]):
        ticket = sender.send((data,))
        assert bytes(take(receiver, *fabrics)) == data
        until(lambda ticket=ticket: ticket.done, *fabrics)
        until(lambda sender=sender: sender.pending_bytes == 0, *fabrics)


def test_a_message_of_many_parts_is_one_message(pipes, fabrics):
    parts = [random.Random(n).randbytes(n) for n in (0, 1, 5000, 100_000, 0, 3, 40_000, 9000)]
    pipes[0].send(parts)
    pipes[0].send([bytes([n]) * 2000 for n in range(100)])
    assert bytes(take(pipes[1], *fabrics)) == b"".join(parts)
    assert take(pipes[1], *fabrics).nbytes == 200_000


def test_order_and_boundaries_hold_over_many_messages_of_mixed_sizes(pipes, fabrics):
    rng = random.Random(5)
    sizes = [rng.choice((0, 1, 40, 3000, 31_000, 33_000, 70_000, 300_000)) for _ in range(400)]
    for sender, receiver in (pipes, pipes[::-1]):
        tickets, arrived = [], []
        for index, size in enumerate(sizes):
            tickets.append(sender.send((index.to_bytes(4, "big"), bytes([index & 255]) * size)))
            while (message := receiver.take()) is not None:
                arrived.append(message)
            for fabric in fabrics:
                fabric.progress()
        while len(arrived) < len(sizes):
            arrived.append(take(receiver, *fabrics))
        for index, (size, message) in enumerate(zip(sizes, arrived, strict=True)):
            assert message.nbytes == size + 4
            assert int.from_bytes(message[:4], "big") == index
            assert bytes(message[4:]) == bytes([index & 255]) * size
        until(lambda tickets=tickets: all(ticket.done for ticket in tickets), *fabrics)


def test_two_ends_that_both_send_long_messages_do_not_deadlock(pipes, fabrics):
    data = bytes(8 << 20)
    tickets = [pipe.send((data,)) for pipe in pipes for _ in range(3)]
    for pipe in pipes:
        for _ in range(3):
            assert take(pipe, *fabrics).nbytes == len(data)
    until(lambda: all(ticket.done for ticket in tickets), *fabrics)


def test_the_senders_buffer_is_free_when_the_ticket_is_done(pipes, fabrics):
    buffer = bytearray(b"a" * 500_000)
    ticket = pipes[0].send((memoryview(buffer),))
    until(lambda: ticket.done, *fabrics)
    buffer[:] = b"b" * len(buffer)
    assert bytes(take(pipes[1], *fabrics)) == b"a" * len(buffer)


def test_a_closed_pipe_delivers_what_was_sent_before_and_then_says_closed(pipes, fabrics):
    near, far = pipes
    for size in (10, 100_000, 20):
        near.send((b"x" * size,))
    near.close()
    near.close()
    assert [take(far, *fabrics).nbytes for _ in range(3)] == [10, 100_000, 20]
    assert isinstance(ended(far, *fabrics), ChannelClosed)
    for pipe in pipes:
        with pytest.raises(ChannelClosed):
            pipe.send((b"late",))
        with pytest.raises(ChannelClosed):
            pipe.take()


def test_both_ends_may_close_at_the_same_time(pipes, fabrics):
    for pipe in pipes:
        pipe.send((b"last",))
    for pipe in pipes:
        pipe.close()
    for pipe in pipes:
        assert isinstance(ended(pipe, *fabrics), ChannelClosed)


def test_an_aborted_pipe_is_broken_at_the_other_end(pipes, fabrics):
    near, far = pipes
    near.abort()
    near.abort()
    assert isinstance(ended(far, *fabrics), ChannelBroken)
    with pytest.raises(ChannelBroken):
        near.send((b"late",))


def test_an_abort_in_the_middle_of_long_messages_breaks_the_other_end(pipes, fabrics):
    near, far = pipes
    tickets = [near.send((bytes(8 << 20),)) for _ in range(4)]
    near.abort()
    assert isinstance(ended(far, *fabrics), ChannelBroken)
    del tickets


def test_a_fabric_that_closes_breaks_its_pipes(pipes, fabrics):
    fabrics[0].close()
    assert isinstance(ended(pipes[1], fabrics[1]), ChannelBroken)


def test_a_goodbye_survives_the_fabric_closing_right_behind_it(fabrics, pipes):
    near, far = pipes
    near.send((b"x" * 50_000,))
    near.close()
    closing = threading.Thread(target=fabrics[0].close)
    closing.start()
    assert take(far, fabrics[1]).nbytes == 50_000
    assert isinstance(ended(far, fabrics[1]), ChannelClosed)
    closing.join(5)
    assert not closing.is_alive()


def test_back_pressure_shows_as_pending_bytes_and_goes_when_the_other_end_takes(pipes, fabrics):
    near, far = pipes
    chunk = bytes(1 << 20)
    sent = 0
    while near.pending_bytes < 16 << 20:
        near.send((chunk,))
        sent += 1
        for fabric in fabrics:
            fabric.progress()
        assert sent < 400, "the sender never learned that nobody reads"
    for _ in range(sent):
        assert take(far, *fabrics).nbytes == len(chunk)
    until(lambda: near.pending_bytes == 0, *fabrics)


def test_a_stranger_gets_no_further_than_one_short_message(fabrics):
    near, far = fabrics
    listener = far.listen()
    pipe = near.connect(listener.address)
    pipe.send((b"hello",))
    pipe.send((b"more",))
    accepted = until(listener.accept, near, far)
    assert bytes(take(accepted, near, far)) == b"hello"
    for _ in range(50):
        for fabric in fabrics:
            fabric.progress()
        assert accepted.take() is None
    accepted.trust()
    assert bytes(take(accepted, near, far)) == b"more"
    for size in (FIRST_MESSAGE_BYTES + 1, 1 << 20):
        pipe = near.connect(listener.address)
        pipe.send((bytes(size),))
        accepted = until(listener.accept, near, far)
        assert isinstance(ended(accepted, near, far), ChannelBroken)


def test_a_malformed_address_is_refused_at_once(fabrics):
    good = fabrics[0].listen().address
    for address in (b"", b"nonsense", b"tcp1", b"ucx1" + bytes(100), good[:-1] + b"\xff", good[:5]):
        with pytest.raises(AddressError):
            fabrics[1].connect(address)


def test_a_closed_listener_leaves_its_pipes_alive(fabrics):
    near, far = fabrics
    listener = far.listen()
    pipe = near.connect(listener.address)
    pipe.send((b"first",))
    accepted = until(listener.accept, near, far)
    listener.close()
    listener.close()
    assert bytes(take(accepted, near, far)) == b"first"
    accepted.trust()
    accepted.send((b"back",))
    assert bytes(take(pipe, near, far)) == b"back"


def test_wait_returns_when_something_arrives(pipes, fabrics):
    near, far = fabrics
    while near.progress() or far.progress():
        pass
    far.wait(0.05)
    timer = threading.Timer(0.05, lambda: (pipes[0].send((b"x",)), near.progress()))
    timer.start()
    start = time.monotonic()
    while pipes[1].take() is None:
        far.wait(5)
    assert 0.02 < time.monotonic() - start < 2
    timer.join()


def test_wake_from_another_thread_interrupts_a_wait(fabrics):
    fabric = fabrics[0]
    fabric.listen()
    fabric.wait(0)
    timer = threading.Timer(0.05, fabric.wake)
    timer.start()
    start = time.monotonic()
    while not fabric.take_wake() and time.monotonic() - start < 5:
        fabric.wait(5)
        if time.monotonic() - start > 0.04:
            break
    assert time.monotonic() - start < 1
    timer.join()


def test_a_wake_before_the_wait_is_not_lost(fabrics):
    fabric = fabrics[0]
    fabric.listen()
    fabric.wait(0.01)
    fabric.wake()
    start = time.monotonic()
    fabric.wait(5)
    assert time.monotonic() - start < 0.2


def test_an_idle_wait_takes_its_time_and_no_longer(fabrics):
    fabric = fabrics[0]
    fabric.listen()
    fabric.wait(0.01)
    start = time.monotonic()
    while (left := start + 0.05 - time.monotonic()) > 0:
        fabric.wait(left)
    assert 0.05 <= time.monotonic() - start < 0.5


def descriptors():
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_open_after_close(backend):
    def once():
        near, far = open_fabric(backend), open_fabric(backend)
        near.linger_s = far.linger_s = 0.05  # the other end is not driven while one closes
        listener = far.listen()
        kept = []
        for end in ("close", "abort", "forget", "close"):
            pipe = near.connect(listener.address)
            pipe.send((b"first",))
            accepted = until(listener.accept, near, far)
            take(accepted, near, far)
            accepted.trust()
            pipe.send((bytes(3 << 20),))
            accepted.send((bytes(100),))
            for _ in range(5):
                near.progress(), far.progress()
            if end != "forget":
                getattr(pipe, end)()
            kept.append((pipe, accepted))
        near.close()
        far.close()
        near.close()
        return kept

    kept = once()
    before = descriptors()
    for _ in range(3):
        kept = once()
    assert descriptors() <= before
    del kept
