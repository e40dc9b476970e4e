"""Giving weights away: one channel, one model, whatever blocks of it the other end asks for, in order."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import trio

from mesh.errors import MeshError, ModelError, RequestError
from mesh.weights.frames import BLOCK, CANCEL, CHUNK_BYTES, GONE, HAVE, MANIFEST, WANT, numbers, read_numbers
from mesh.weights.have import BlockMap
from mesh.weights.manifest import Manifest
from transport import Channel, TransportError
from transport.trio_shell import Driver

#: A fetcher that asks for nothing for so long is gone or has all it needs.
IDLE_S = 120.0
#: 1 MiB at 35 kB/s.
SEND_S = 30.0
#: Requests that may wait: more than any window.
MAX_WAITING = 256


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

    def read(self, block: int) -> bytes | None:
        """A block's bytes, or None where the file is not what it was."""
        file, offset, length = self.manifest.place(block)
        try:
            descriptor = os.open(self.folder / self.manifest.files[file].name, os.O_RDONLY | os.O_CLOEXEC)
            try:
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


async def serve(driver: Driver, channel: Channel, held: Holding, bucket: Bucket | None = None) -> int:
    """Serve until the other end goes away or falls silent; the bytes sent. Raises nothing: the channel is closed."""
    waiting: OrderedDict[int, None] = OrderedDict()
    asked = trio.Event()
    sent = 0

    async def send(kind: int, meta: bytes, payload: bytes = b"") -> None:
        await driver.send(channel, meta, payload, SEND_S, kind=kind)

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
            else:
                raise RequestError(f"kind {message.kind} about block {first} is nothing to ask for")

    async def answer() -> None:
        nonlocal asked, sent
        while True:
            while not waiting:
                asked = trio.Event()
                await asked.wait()
            block, _ = waiting.popitem(last=False)
            data = await trio.to_thread.run_sync(held.read, block)
            if data is None:
                await send(GONE, numbers(block))
                continue
            if bucket is not None:
                await trio.sleep(bucket.take(len(data), trio.current_time()))
            await send(BLOCK, numbers(block), data)
            sent += len(data)

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
    except TransportError:
        pass
    finally:
        channel.close()
    return sent


async def _send_manifest(manifest: Manifest, chunk: int, send: object) -> None:
    encoded = manifest.encoded
    chunks = -(-len(encoded) // CHUNK_BYTES)
    if chunk >= chunks:
        raise ModelError(f"the manifest has {chunks} pieces, not {chunk}")
    part = encoded[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
    await send(MANIFEST, numbers(chunk, chunks), part)  # type: ignore[operator]
