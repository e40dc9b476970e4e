"""Channels under trio: deadlines, cancellation that leaves nothing behind, fairness."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from transport_harness import connect_pair

from transport import Acceptor, ChannelBroken, ChannelClosed, DeadlineExceeded, connect_channel
from transport.trio_shell import open_driver

KEY = bytes(range(32))


@pytest.fixture
def pair(fabrics):
    return connect_pair(*fabrics, key=KEY)


async def test_messages_go_both_ways_between_two_driven_fabrics(pair):
    near, far = pair
    async with open_driver(near.fabric) as here, open_driver(far.fabric) as there:
        for size in (0, 2304, 3 << 20):
            await here.send(near, b"ping", bytes(size), 5)
            assert (await there.receive(far, 5)).payload.nbytes == size
            await there.send(far, b"pong", bytearray(size), 5)
            assert (await here.receive(near, 5)).meta == b"pong"


async def test_a_channel_is_accepted_under_trio(fabrics):
    near, far = fabrics
    acceptor = Acceptor(far, far.listen())
    acceptor.expect(b"hello", name="near", key=KEY)
    async with open_driver(near) as here, open_driver(far) as there:
        channel = connect_channel(near, acceptor.address, name="far", key=KEY, hello=b"hello")
        ((hello, accepted),) = await there.accept(acceptor, 5)
        assert hello == b"hello"
        await there.send(accepted, b"hi", b"", 5)
        assert (await here.receive(channel, 5)).meta == b"hi"
        with pytest.raises(DeadlineExceeded, match="no expected neighbour"):
            await there.accept(acceptor, 0.02)
    acceptor.close()


async def test_a_deadline_ends_a_receive_and_the_channel_lives_on(pair):
    near, far = pair
    async with open_driver(near.fabric) as here, open_driver(far.fabric) as there:
        with trio.fail_after(2), pytest.raises(DeadlineExceeded, match="connector"):
            await there.receive(far, 0.05)
        await here.send(near, b"x", b"", 5)
        assert (await there.receive(far, 5)).meta == b"x"


async def test_a_cancelled_receive_takes_no_message_with_it(pair):
    near, far = pair
    async with open_driver(near.fabric) as here, open_driver(far.fabric) as there:
        for index in range(30):
            with trio.move_on_after(0.001 * (index % 3)):
                while True:
                    await there.receive(far, 5)
            await here.send(near, b"%d" % index, b"", 5)
            assert (await there.receive(far, 5)).meta == b"%d" % index


async def test_a_cancelled_send_leaves_a_whole_message_or_none(pair):
    near, far = pair
    async with open_driver(near.fabric) as here, open_driver(far.fabric) as there:
        payload = bytearray(b"a" * (4 << 20))
        with trio.move_on_after(0) as scope:
            await here.send(near, b"cut", payload, 5)
        assert scope.cancelled_caught
        with trio.move_on_after(0.0001):
            await here.send(near, b"maybe", payload, 5)
        payload[:] = b"b" * len(payload)
        await here.send(near, b"end", b"", 5)
        while (message := await there.receive(far, 5)).meta != b"end":
            assert message.meta == b"maybe"
            assert message.payload == b"a" * len(payload)


async def test_the_end_of_a_channel_reaches_a_waiting_receive(fabrics):
    for end, error in (("close", ChannelClosed), ("abort", ChannelBroken)):
        near, far = connect_pair(*fabrics, key=KEY)
        async with open_driver(near.fabric), open_driver(far.fabric) as there:
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def wait(far=far, error=error, there=there):
                        with pytest.raises(error):
                            await there.receive(far, 5)

                    await trio.testing.wait_all_tasks_blocked(0.02)
                    getattr(near, end)()
                    near.fabric.wake()


async def test_a_send_to_a_neighbour_that_does_not_take_waits_and_gives_up(pair):
    near, far = pair
    async with open_driver(near.fabric) as here:
        with trio.fail_after(20), pytest.raises(DeadlineExceeded, match="still sending"):
            for _ in range(200):
                await here.send(near, b"", bytes(4 << 20), 0.1)
    far.abort()


async def test_an_emulated_delay_is_kept_under_trio(fabrics):
    near, far = connect_pair(*fabrics, delay_s=0.05)
    async with open_driver(near.fabric) as here, open_driver(far.fabric) as there:
        start = trio.current_time()
        await here.send(near, b"x", b"", 5)
        await there.receive(far, 5)
        assert 0.045 <= trio.current_time() - start < 0.25


async def test_other_tasks_run_while_the_fabric_is_busy(pair):
    near, far = pair
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await trio.sleep(0.001)
            ticks += 1

    async with open_driver(near.fabric) as here, open_driver(far.fabric) as there, trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        for _ in range(20):
            await here.send(near, b"", bytes(1 << 20), 5)
            await there.receive(far, 5)
        nursery.cancel_scope.cancel()
    assert ticks > 2
