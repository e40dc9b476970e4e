"""Fetching the blocks of one model from several sources at once, each checked, each kept as it comes.

Blocks are hashed and written by threads while others arrive; so many at once and no more, or a slow disk would fill the
memory.
The decisions are `mesh.weights.pull`'s; here are the channels. A source that breaks, stalls or sends what is not the
block is given up and reported; whoever started the fetch may bring it back, or another. The fetch ends when every
block is there, or when for `PATIENCE_S` no source gave any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from mesh.errors import MeshError, ModelError
from mesh.weights.cache import CachedModel, disk_full
from mesh.weights.frames import BLOCK, CANCEL, GONE, HAVE, MANIFEST, WANT, numbers, read_numbers
from mesh.weights.have import BlockMap
from mesh.weights.manifest import MAX_MANIFEST_BYTES, Manifest
from mesh.weights.pull import MAX_STALL_S, Puller
from mesh.weights.serving import hush
from transport import Channel, DeadlineExceeded, TransportError, connect_channel
from transport.trio_shell import Driver

#: How long a source may take to say what it has.
HELLO_S = 15.0
#: A fetch that gets nothing from anybody for so long has failed. The sources are tried again meanwhile.
PATIENCE_S = 30.0
#: Blocks that are being hashed and written. While so many are, nothing more is taken in and the sources wait.
WRITES = 8
#: How often a source that waits looks for blocks that others gave back.
TURN_S = 0.25


@dataclass(frozen=True, slots=True)
class Source:
    """Where and how to reach a site that has the model: what its peer's ticket says."""

    site: str
    address: bytes
    key: bytes
    hello: bytes
    delay_s: float = 0.0


class Fetch:
    """One model's fetch. `lost(site, reason)` is told of each source that is given up. `liars` are those of them that
    sent what is not of the model: they are not taken on again.

    `progress(done, total)` counts bytes of the blocks that were wanted and not there. `busy` says whether tokens travel
    at this site, so that they are let pass.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        lost: Callable[[str, str], None],
        progress: Callable[[int, int], None] = lambda done, total: None,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._driver = driver
        self._busy = busy
        self._lost = lost
        self._progress = progress
        self._connections: dict[str, _Connection] = {}
        self._changed = trio.Event()
        self._moved_at = trio.current_time()
        self._why = "no site that has them answers"
        self._nursery: trio.Nursery | None = None
        self._model: CachedModel | None = None
        self._puller: Puller | None = None
        self._failure: MeshError | None = None
        self._done_bytes = self._total_bytes = 0
        self._writing = 0
        self._room = trio.Semaphore(WRITES)
        self.fetched: dict[str, int] = {}
        self.liars: set[str] = set()

    def add(self, source: Source) -> None:
        """Take on a source. One that is there already is left alone. Only inside `run`."""
        if self._nursery is not None and source.site not in self._connections and source.site not in self.liars:
            connection = self._connections[source.site] = _Connection(source)
            self._nursery.start_soon(self._serve, connection)

    async def manifest(self, root: bytes, name: str) -> Manifest:
        """The manifest of the model, which is to be called `name`, from the first source that gives it.

        Only inside `run`. Raises ModelError.
        """
        while True:
            for connection in list(self._connections.values()):
                if connection.ready:
                    try:
                        encoded = await self._manifest_of(connection)
                    except (TransportError, MeshError) as error:
                        self._give_up(connection, str(error))
                        continue
                    try:
                        return Manifest.decode(encoded, root, name)
                    except ModelError as error:
                        self.liars.add(connection.source.site)
                        self._give_up(connection, str(error))
            await self._wait("manifest")

    async def blocks(self, model: CachedModel, wanted: list[int]) -> None:
        """Bring in the blocks of `wanted` that are not there. Raises ModelError, also for a full disk."""
        missing = [block for block in wanted if block not in model.have]
        puller = Puller(missing, model.manifest.size_of)
        self._model, self._puller = model, puller
        self._total_bytes = sum(model.manifest.size_of(block) for block in missing)
        self._done_bytes = 0
        self._progress(0, self._total_bytes)
        self._moved_at = trio.current_time()
        for connection in self._connections.values():
            self._enlist(connection)
        try:
            while not puller.done or self._writing:
                if self._failure is not None:
                    raise self._failure
                now = trio.current_time()
                if not self._room.value:
                    puller.excuse(now)
                for site in puller.stalled(now):
                    self._give_up(self._connections[site], f"it sent nothing for {MAX_STALL_S:.0f} s or more")
                await self._wait(f"{self._total_bytes - self._done_bytes} bytes")
        finally:
            for site in puller.sources:
                puller.remove(site)
            self._model = self._puller = None

    async def run(self, body: Callable[[Fetch], object]) -> None:
        """Run `body` with the channels open, and close them. Raises what `body` raises."""
        failure: BaseException | None = None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await body(self)  # type: ignore[misc]
            except (MeshError, OSError) as error:
                failure = error  # an error that crossed the nursery would come out in a group
            nursery.cancel_scope.cancel()
        self._nursery = None
        if isinstance(failure, OSError):
            raise ModelError(f"the cache of weights cannot be written: {failure.strerror}") from failure
        if failure is not None:
            raise failure

    async def _wait(self, what: str) -> None:
        if trio.current_time() - self._moved_at > PATIENCE_S:
            raise ModelError(f"nothing came of {what} of weights for {PATIENCE_S:.0f} s: {self._why}")
        with trio.move_on_after(TURN_S):
            await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _give_up(self, connection: _Connection, reason: str) -> None:
        if self._connections.get(connection.source.site) is not connection:
            return
        del self._connections[connection.source.site]
        if self._puller is not None:
            self._puller.remove(connection.source.site)
        self._why = f"{connection.source.site}: {reason}"
        connection.scope.cancel()
        self._lost(connection.source.site, reason)
        self._change()

    def _enlist(self, connection: _Connection) -> None:
        if self._puller is None or self._model is None or not connection.ready:
            return
        if connection.bits:
            have = BlockMap(self._model.manifest.blocks, connection.bits)
            self._puller.add(connection.source.site, have.__contains__, trio.current_time())
        else:
            self._puller.add(connection.source.site, lambda block: True, trio.current_time())

    # -- one source

    async def _serve(self, connection: _Connection) -> None:
        source = connection.source
        channel: Channel | None = None
        try:
            with connection.scope:
                channel = connection.channel = connect_channel(
                    self._driver.fabric,
                    source.address,
                    name=source.site,
                    key=source.key,
                    hello=source.hello,
                    delay_s=source.delay_s,
                )
                first = await self._driver.receive(channel, HELLO_S)
                if first.kind != HAVE:
                    raise ModelError(f"it began with a message of kind {first.kind}")
                connection.bits = bytes(first.payload)
                connection.ready = True
                self._enlist(connection)
                self._change()
                if self._nursery is not None:
                    self._nursery.start_soon(self._hush, connection, channel)
                await self._pull(connection, channel)
        except (TransportError, MeshError) as error:
            self._give_up(connection, str(error))
        finally:
            connection.hushing.cancel()
            if channel is not None:
                channel.close()

    async def _hush(self, connection: _Connection, channel: Channel) -> None:
        with connection.hushing:
            try:
                await hush(self._driver, channel, self._busy)
            except TransportError:
                pass  # whoever receives finds out

    async def _pull(self, connection: _Connection, channel: Channel) -> None:
        site = connection.source.site
        while True:
            puller = self._puller
            if puller is not None:
                self._ask(puller, site, channel)
            try:
                message = await self._driver.receive(channel, TURN_S)
            except DeadlineExceeded:
                continue
            first, second = read_numbers(message.meta)
            if message.kind == MANIFEST:
                connection.chunks[first] = bytes(message.payload)
                connection.total_chunks = second
                self._moved_at = trio.current_time()
                self._change()
            elif message.kind == GONE and puller is not None:
                puller.refuse(site, first)
            elif message.kind == BLOCK and self._puller is not None and self._model is not None:
                await self._take(self._model, self._puller, connection, first, message.payload)

    def _ask(self, puller: Puller, site: str, channel: Channel) -> None:
        now = trio.current_time()
        while (block := puller.next(site, now)) is not None:
            channel.send(numbers(block), kind=WANT, bulk=True)
        self._driver.fabric.wake()

    async def _take(
        self, model: CachedModel, puller: Puller, connection: _Connection, block: int, data: memoryview
    ) -> None:
        site = connection.source.site
        self.fetched[site] = self.fetched.get(site, 0) + len(data)
        await self._room.acquire()
        useful, others = puller.arrived(site, block, trio.current_time())
        for other in others:
            taken = self._connections.get(other)
            if taken is not None and taken.channel is not None:
                try:
                    taken.channel.send(numbers(block), kind=CANCEL, bulk=True)
                except TransportError:
                    pass  # its own task finds out
        if useful and self._nursery is not None:
            self._writing += 1
            self._nursery.start_soon(self._keep, model, puller, connection, block, data)
        else:
            self._room.release()

    async def _keep(
        self, model: CachedModel, puller: Puller, connection: _Connection, block: int, data: memoryview
    ) -> None:
        """Check and write one block in a thread; it counts when that is done."""
        try:
            if await trio.to_thread.run_sync(model.put, block, data):
                model.mark(block)
                self._moved_at = trio.current_time()
                self._done_bytes += len(data)
                self._progress(self._done_bytes, self._total_bytes)
            else:
                puller.spoilt(block)
                self.liars.add(connection.source.site)
                self._give_up(connection, f"it sent a block {block} that is not of the model")
        except OSError as error:
            text = "the disk is full" if disk_full(error) else str(error.strerror)
            self._failure = ModelError(f"the cache of weights cannot be written: {text}")
        finally:
            self._writing -= 1
            self._room.release()
            if self._failure is not None or (puller.done and not self._writing):
                self._change()

    async def _manifest_of(self, connection: _Connection) -> bytes:
        channel = connection.channel
        assert channel is not None
        chunk, total = 0, 1
        while chunk < total:
            channel.send(numbers(chunk), kind=MANIFEST, bulk=True)
            self._driver.fabric.wake()
            with trio.move_on_after(HELLO_S) as late:
                while chunk not in connection.chunks:
                    if self._connections.get(connection.source.site) is not connection:
                        raise ModelError("it went away")
                    await self._changed.wait()
            if late.cancelled_caught:
                raise ModelError(f"its manifest did not come within {HELLO_S:.0f} s")
            total = connection.total_chunks
            chunk += 1
            if sum(map(len, connection.chunks.values())) > MAX_MANIFEST_BYTES:
                raise ModelError("its manifest is too long")
        return b"".join(connection.chunks.pop(number) for number in range(total))


class _Connection:
    """One source and what it said."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.scope = trio.CancelScope()
        self.hushing = trio.CancelScope()
        self.channel: Channel | None = None
        self.ready = False
        self.bits = b""
        self.chunks: dict[int, bytes] = {}
        self.total_chunks = 1
