"""Giving weights away: one channel, one model, whatever blocks of it the other end asks for, in order.

Blocks travel as bulk: on a wide link over streams of their own, as fast as it goes. While either site serves a job both
ends say so, and the transport holds the blocks at what the link delivers and keeps the router's queue short
(`transport.pace`): then the tokens of other channels between the two find it empty.
"""

from __future__ import annotations

import functools
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import trio

from mesh.errors import MeshError, ModelError, RequestError
from mesh.weights.frames import (
    BLOCK,
    CANCEL,
    CHUNK_BYTES,
    GONE,
    HAVE,
    HUSH,
    HUSH_S,
    MANIFEST,
    WANT,
    numbers,
    read_numbers,
)
from mesh.weights.have import BlockMap
from mesh.weights.manifest import Manifest
from mesh.weights.scan import stats
from transport import Channel, TransportError
from transport.trio_shell import Driver

#: A fetcher that asks for nothing for so long is gone or has all it needs.
IDLE_S = 120.0
#: 1 MiB at 35 kB/s.
SEND_S = 30.0
#: Blocks that wait in the channel. A link of 1 Gbit/s has a tenth of a second's worth in pieces on 32 streams.
AHEAD_BYTES = 16 << 20
#: How often to look what has left while nothing else happens.
LOOK_S = 0.02
#: Requests that may wait: more than any window.
MAX_WAITING = 256
#: Blocks that leave in a row tell of the link from so many bytes on, more than buffers hold; so many are told at once.
LEAST_BYTES, MOST_BYTES = 16 << 20, 128 << 20


class Holding(Protocol):
    """A model that this site has, whole or in part: `mesh.weights.cache.CachedModel` and `LocalModel`."""

    manifest: Manifest

    @property
    def have(self) -> BlockMap | None: ...
    def read(self, block: int) -> bytes | None: ...


class LocalModel:
    """A folder of the user's own, with every block."""

    have = None

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._stats = stats(folder)

    def read(self, block: int) -> bytes | None:
        """A block's bytes, or None where the file is not what it was."""
        file, offset, length = self.manifest.place(block)
        try:
            descriptor = os.open(self.folder / self.manifest.files[file].name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.fstat(descriptor)
                name = self.manifest.files[file].name
                if (name, found.st_mtime_ns, found.st_size) not in self._stats:
                    return None  # no longer the file that was hashed: nobody is to be taken for a liar
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError:
            return None
        return data if len(data) == length else None


class Bucket:
    """A token bucket: how long to wait before the next bytes may leave. Pure."""

    def __init__(self, bytes_per_s: float, burst: int = 1 << 20) -> None:
        self._rate = bytes_per_s
        self._burst_s = burst / bytes_per_s
        self._free_at = 0.0

    def take(self, count: int, now: float) -> float:
        """Seconds to wait from `now` until `count` bytes may leave."""
        self._free_at = max(self._free_at, now - self._burst_s) + count / self._rate
        return max(0.0, self._free_at - now)


class Stretch:
    """How fast bytes leave while somebody waits for more of them: what a link carries. Pure.

    What the kernel's buffers swallow counts as sent, so short stretches say nothing. Before `began` nothing counts.
    """

    def __init__(self) -> None:
        self._began_s: float | None = None
        self._bytes = 0

    def began(self, now: float) -> None:
        """The first of several blocks is about to leave; of no effect in the middle of a stretch."""
        if self._began_s is None:
            self._began_s, self._bytes = now, 0

    def sent(self, count: int, now: float, *, more: bool) -> tuple[int, float] | None:
        """So many bytes have left, and `more` wait. A stretch that is over and long enough: its bytes and seconds."""
        if self._began_s is None:
            return None
        self._bytes += count
        seconds = now - self._began_s
        if not more or self._bytes >= MOST_BYTES:
            self._began_s = now if more else None
            found, self._bytes = self._bytes, 0
            if found >= LEAST_BYTES and seconds > 0:
                return found, seconds
        return None


async def serve(
    driver: Driver,
    channel: Channel,
    held: Holding,
    bucket: Bucket | None = None,
    *,
    report: Callable[[int, float], None] = lambda count, seconds: None,
    busy: Callable[[], bool] = lambda: False,
) -> int:
    """Serve until the other end goes away or falls silent; the bytes of blocks that have left.

    Raises nothing: the channel is closed.

    `report` is told how many bytes left in how many seconds, where no bucket held them back. `busy` says whether tokens
    travel at this site.
    """
    stretch = Stretch()
    waiting: OrderedDict[int, None] = OrderedDict()
    asked = trio.Event()
    queued = left = 0

    def account() -> None:
        nonlocal left
        before, left = left, queued - channel.bulk_pending_bytes
        seen = stretch.sent(left - before, trio.current_time(), more=bool(waiting) or left < queued)
        if seen is not None and bucket is None:
            report(*seen)

    async def send(kind: int, meta: bytes, payload: bytes = b"") -> None:
        channel.send(meta, payload, kind=kind, bulk=True)
        driver.fabric.wake()
        await driver.room(channel, AHEAD_BYTES, SEND_S)

    async def listen() -> None:
        while True:
            message = await driver.receive(channel, IDLE_S)
            first, _ = read_numbers(message.meta)
            if message.kind == MANIFEST:
                await _send_manifest(held.manifest, first, send)
            elif message.kind == CANCEL:
                waiting.pop(first, None)
            elif message.kind == WANT and first < held.manifest.blocks and len(waiting) < MAX_WAITING:
                waiting[first] = None
                asked.set()
            elif message.kind != HUSH:
                raise RequestError(f"kind {message.kind} about block {first} is nothing to ask for")

    async def answer() -> None:
        nonlocal asked, queued
        while True:
            while not waiting:
                asked = trio.Event()
                with trio.move_on_after(LOOK_S if left < queued else math.inf):
                    await asked.wait()
                account()
            block, _ = waiting.popitem(last=False)
            data = await trio.to_thread.run_sync(held.read, block)
            if data is None:
                await send(GONE, numbers(block))
                continue
            if bucket is not None:
                await trio.sleep(bucket.take(len(data), trio.current_time()))
            stretch.began(trio.current_time())
            queued += len(data)
            await send(BLOCK, numbers(block), data)
            account()

    async def until_over(step: object, scope: trio.CancelScope) -> None:
        try:
            await step()  # type: ignore[operator]
        except (TransportError, MeshError):
            pass  # gone, silent or talking nonsense: either way it gets nothing more
        scope.cancel()

    try:
        await send(HAVE, numbers(0), b"" if held.have is None else held.have.bits)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_over, listen, nursery.cancel_scope)
            nursery.start_soon(until_over, answer, nursery.cancel_scope)
            nursery.start_soon(until_over, functools.partial(hush, driver, channel, busy), nursery.cancel_scope)
    except TransportError:
        pass
    finally:
        channel.close()
    return left


async def hush(driver: Driver, channel: Channel, busy: Callable[[], bool]) -> None:
    """Have the transport hold bulk back as long as `busy`, at both ends. Raises TransportError at the channel's end."""
    while True:
        if busy():
            channel.send(numbers(0), kind=HUSH)
            driver.fabric.wake()
        await trio.sleep(HUSH_S)


async def _send_manifest(manifest: Manifest, chunk: int, send: object) -> None:
    encoded = manifest.encoded
    chunks = -(-len(encoded) // CHUNK_BYTES)
    if chunk >= chunks:
        raise ModelError(f"the manifest has {chunks} pieces, not {chunk}")
    part = encoded[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
    await send(MANIFEST, numbers(chunk, chunks), part)  # type: ignore[operator]
