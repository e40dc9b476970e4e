"""What a channel promises across processes: messages, death noticed at both ends, nothing left."""

from __future__ import annotations

import signal
import time

import pytest
from transport_harness import PROCESSES, Neighbour

from transport import ChannelBroken, ChannelClosed

KEY = bytes(range(32))


@pytest.fixture(params=PROCESSES)
def process_backend(request):
    return request.param


@pytest.mark.parametrize("key", [None, KEY], ids=["unsealed", "sealed"])
def test_messages_of_any_size_come_back_from_another_process(process_backend, key):
    with Neighbour(process_backend, "echo", key) as neighbour:
        channel = neighbour.channel
        for size in (0, 1, 2304, 40_000, 1 << 20, 8 << 20):
            data = bytes([size & 255]) * size
            channel.send(b"meta", data, kind=7)
            message = channel.receive(30)
            assert (message.kind, message.meta, bytes(message.payload)) == (7, b"meta", data)
        neighbour.channel.close()
        neighbour.fabric.close()
        assert neighbour.process.wait(10) == 0
        assert neighbour.process.stdout.read().strip() == "ChannelClosed"


def test_a_killed_neighbour_is_noticed_within_a_second(process_backend):
    with Neighbour(process_backend, "idle") as neighbour:
        channel = neighbour.channel
        assert channel.receive(30).meta == b"ready"
        neighbour.process.send_signal(signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(ChannelBroken, match="child"):
            channel.receive(10)
        assert time.monotonic() - start < 1
        with pytest.raises(ChannelBroken, match="child"):
            channel.send(b"late")


def test_a_neighbour_killed_in_the_middle_of_long_messages_is_noticed(process_backend):
    with Neighbour(process_backend, "echo") as neighbour:
        channel = neighbour.channel
        tickets = [channel.send(b"", bytes(8 << 20)) for _ in range(6)]
        channel.receive(30)
        neighbour.process.send_signal(signal.SIGKILL)
        with pytest.raises(ChannelBroken, match="child"):
            for _ in range(6):
                channel.receive(10)
        del tickets


def test_a_neighbour_that_leaves_in_good_order_is_closed_not_broken(process_backend):
    with Neighbour(process_backend, "leave", KEY) as neighbour:
        assert neighbour.channel.receive(30).meta == b"ready"
        with pytest.raises(ChannelClosed, match="child"):
            neighbour.channel.receive(10)
        assert neighbour.process.wait(10) == 0


def test_an_abort_is_noticed_by_the_neighbour(process_backend):
    with Neighbour(process_backend, "echo") as neighbour:
        neighbour.channel.send(b"x")
        neighbour.channel.receive(30)
        neighbour.channel.abort()
        neighbour.fabric.close()
        assert neighbour.process.wait(10) == 0
        assert neighbour.process.stdout.read().strip() == "ChannelBroken"
