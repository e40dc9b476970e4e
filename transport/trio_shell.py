"""Channels under trio: one task drives a fabric, and any number of tasks wait for their channels.

The driver progresses the fabric, wakes whoever waits, arms the fabric and sleeps on its descriptor. A waiting task
looks for itself, so a cancelled one has taken nothing and leaves nothing behind.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from transport.accept import Acceptor
from transport.base import Buffer, DeadlineExceeded, Fabric
from transport.channel import Channel, Message
from transport.waiting import FALLBACK_S

#: How much of a turn of trio's loop the fabric may take before other tasks run.
_BUDGET_S = 2e-3
#: A channel with more than this on its way is full: `send` waits.
PENDING_BYTES = 8 << 20


class Driver:
    """Made by `open_driver`. One fabric, one trio thread."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        #: How long to let bytes gather before they are moved again, while nothing is in a hurry: packets of a link that
        #: are read one by one cost a turn each.
        self.rest_s = 0.0
        self._moved = trio.Event()

    async def receive(
        self, channel: Channel, timeout_s: float | None = None, kind: int | None = None, *, size_bytes: int = 0
    ) -> Message:
        """The next message of `channel`. timeout_s: None for what `size_bytes` may take on its link.

        Raises DeadlineExceeded after `timeout_s`, ChannelClosed, ChannelBroken.
        """
        await trio.lowlevel.checkpoint()
        if timeout_s is None:
            timeout_s = channel.allowance_s(size_bytes)
        with trio.move_on_after(timeout_s):
            while True:
                message = channel.poll(kind)
                if message is not None:
                    return message
                await self._turn(channel.due_s)
        raise DeadlineExceeded(f"{channel.name}: nothing arrived within {timeout_s:g} s; it is overloaded or gone")

    async def send(
        self,
        channel: Channel,
        meta: bytes,
        payload: Buffer,
        timeout_s: float | None = None,
        *,
        kind: int = 0,
        bulk: bool = False,
    ) -> None:
        """Send one message; returns when it has left and no more than `PENDING_BYTES` are pending.

        timeout_s: None for what the message and those before it may take on this link. bulk: as `Channel.send`.

        The payload is copied unless it is `bytes`, so that a cancelled caller may reuse its buffer at once. A message
        whose wait was cancelled or timed out is still sent. Raises DeadlineExceeded, ChannelClosed, ChannelBroken.
        """
        await trio.lowlevel.checkpoint()
        ticket = channel.send(meta, payload if isinstance(payload, bytes) else bytes(payload), kind=kind, bulk=bulk)
        if timeout_s is None:
            timeout_s = channel.allowance_s(0)  # what was sent pends by now
        self.fabric.wake()
        with trio.move_on_after(timeout_s):
            while not ticket.done or channel.pending_bytes > PENDING_BYTES:
                channel.check()
                await self._turn(None)
            return
        raise DeadlineExceeded(f"{channel.name}: still sending after {timeout_s:g} s; the link or the neighbour stalls")

    async def accept(self, acceptor: Acceptor, timeout_s: float) -> list[tuple[bytes, Channel]]:
        """The next established channels with their hellos, at least one. Raises DeadlineExceeded after `timeout_s`."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(timeout_s):
            while True:
                made = acceptor.poll()
                if made:
                    return made
                await self._turn(FALLBACK_S)
        raise DeadlineExceeded(f"no expected neighbour connected within {timeout_s:g} s")

    async def room(self, channel: Channel, most_bytes: int, timeout_s: float) -> None:
        """Wait until no more than `most_bytes` of what `channel` sent as bulk have yet to leave.

        Raises DeadlineExceeded, ChannelClosed, ChannelBroken.
        """
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(timeout_s):
            while True:
                channel.check()
                if channel.bulk_pending_bytes <= most_bytes:
                    return
                await self._turn(None)
        raise DeadlineExceeded(f"{channel.name}: bulk still waits after {timeout_s:g} s; the link stalls")

    async def _turn(self, due_s: float | None) -> None:
        """Wait until the fabric moved, or something of the caller's own is due."""
        moved = self._moved
        with trio.move_on_after(math.inf if due_s is None else due_s):
            await moved.wait()

    async def _run(self) -> None:
        fabric = self.fabric
        while True:
            budget = trio.current_time() + _BUDGET_S
            moved = False
            while fabric.progress():
                moved = True
                if trio.current_time() >= budget:
                    break
            woken = fabric.take_wake()
            # Waiters look after every turn, also an idle one: a fabric may have moved something inside of `poll`.
            self._moved.set()
            self._moved = trio.Event()
            if moved and self.rest_s:
                await trio.sleep(self.rest_s)
            elif moved or woken or not fabric.arm():
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_after(FALLBACK_S):
                await trio.lowlevel.wait_readable(fabric.fileno())


@asynccontextmanager
async def open_driver(fabric: Fabric) -> AsyncIterator[Driver]:
    """Drive `fabric` in a background task for the length of the block. The fabric stays the caller's to close."""
    driver = Driver(fabric)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver._run)
        try:
            yield driver
        finally:
            nursery.cancel_scope.cancel()
