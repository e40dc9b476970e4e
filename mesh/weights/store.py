"""The process that holds and moves weights: `python -m mesh.weights.store DIR`, started by a peer's daemon.

It hashes folders of models, serves their blocks to other sites and fetches blocks into the cache below DIR, so that no
byte of weights goes through the daemon. It never imports torch. Its stdin and stdout belong to the daemon: msgpack maps
one after the other. A request {"id", "op", ...} gets one {"id", "ok": {...}} or {"id", "error": line}, for a fetch with
{"id", "done", "total"} and {"id", "lost": site, "why": line, "lied"} before it. Unasked come {"held": [...], "cache"},
what is here, whenever that changes, {"sent": site, "bytes", "seconds"}, how fast a site is given blocks, and {"gave":
site, "bytes"}, how much it was given when it is gone. The end of stdin ends the process.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import trio

from mesh.errors import MeshError, ModelError, ModelMissing, RequestError
from mesh.runtime.assignment import Assignment
from mesh.weights.cache import Cache, CachedModel
from mesh.weights.fetching import Fetch, Source
from mesh.weights.manifest import Manifest
from mesh.weights.ranges import layers_present, wanted
from mesh.weights.scan import folders, remember, remembered, scan
from mesh.weights.serving import Bucket, Holding, LocalModel, serve
from transport import Acceptor, Channel, TransportError, open_fabric
from transport.trio_shell import Driver, open_driver

logger = logging.getLogger("mesh.weights")

#: How often what a fetch has brought is told.
PROGRESS_S = 0.2
#: The longest message from the daemon: an assignment and a ticket are some hundred bytes.
MAX_MESSAGE_BYTES = 1 << 20
#: A ticket that nobody came with for so long is void.
TICKET_S = 60.0
#: One wait for channels; the next follows.
ACCEPT_S = 3600.0
#: Packets that gather before they are read together: at 1 Gbit/s a quarter of a megabyte. Not while tokens travel: what
#: is acknowledged late looks like a queue to the sender, which then slows down.
REST_S = 2e-3
_READ_BYTES = 1 << 16


class Store:
    """The state behind the requests. `tell` sends a message to the daemon."""

    def __init__(
        self,
        path: Path,
        driver: Driver,
        acceptor: Acceptor,
        nursery: trio.Nursery,
        tell: Callable[[dict[str, Any]], None],
        *,
        limit_bytes: int = 0,
        bucket: Bucket | None = None,
    ) -> None:
        """`limit_bytes`: of the cache; 0 for half of what the disk has room for."""
        self._path = path
        self._limit_bytes = limit_bytes
        self._driver = driver
        self._acceptor = acceptor
        self._nursery = nursery
        self._tell = tell
        self._bucket = bucket
        self._cache = Cache(path / "models", self._limit)
        self._local: dict[bytes, LocalModel] = {}
        self._expected: dict[bytes, tuple[bytes, str, float]] = {}
        self._fetches: dict[int, Fetch] = {}
        self._pinned: dict[int, bytes] = {}
        self._locks: dict[bytes, trio.Lock] = {}
        self._serving_jobs = False

    def _limit(self, used: int) -> int:
        if self._limit_bytes:
            return self._limit_bytes
        folder = self._path if self._path.exists() else self._path.parent
        disk = os.statvfs(folder)
        return (used + disk.f_bavail * disk.f_frsize) // 2

    # -- what is here

    async def begin(self) -> None:
        """Look at what earlier runs left."""

        def look() -> list[tuple[Path, Manifest]]:
            for model in self._cache.models.values():
                lost = model.check()
                if lost:
                    logger.warning("%s: %d blocks were lost with the machine's power", model.folder, lost)
            kept = self._path / "scanned"
            found = [(folder, remembered(kept, folder)) for folder in folders(kept)]
            return [(folder, manifest) for folder, manifest in found if manifest is not None]

        for folder, manifest in await trio.to_thread.run_sync(look):
            self._local.setdefault(manifest.root, LocalModel(folder, manifest))
        self.publish()

    def publish(self) -> None:
        """Tell the daemon what is here."""
        told = [self._row(root, local.manifest, None) for root, local in self._local.items()]
        told += [
            self._row(root, model.manifest, model)
            for root, model in self._cache.models.items()
            if root not in self._local
        ]
        used = sum(occupant.bytes for occupant in self._cache.used())
        self._tell({"held": told, "cache": {"used": used, "limit": self._limit(used)}})

    def _row(self, root: bytes, manifest: Manifest, cached: CachedModel | None) -> dict[str, Any]:
        folder = self._local[root].folder if cached is None else cached.folder
        layers = layers_present(manifest, lambda block: cached is None or block in cached.have)
        return {
            "root": root,
            "name": manifest.name,
            "path": str(folder),
            "cached": cached is not None,
            "bytes": manifest.total_bytes if cached is None else cached.bytes,
            "total_bytes": manifest.total_bytes,
            "layers": [list(run) for run in layers],
            "in_use": cached is not None and self._cache.in_use(root),
        }

    def _holding(self, root: bytes) -> Holding:
        found: Holding | None = self._local.get(root) or self._cache.models.get(root)
        if found is None:
            raise ModelMissing(f"nothing of the model {root.hex()[:12]} is here")
        return found

    # -- requests

    async def scan(self, path: str, name: str) -> dict[str, Any]:
        """The root of the model in a folder."""
        folder = Path(path)
        home = folder.parent
        if home.parent == self._cache.path:
            return {"root": bytes.fromhex(home.name)}
        async with self._locks.setdefault(path.encode(), trio.Lock()):
            kept = self._path / "scanned"

            def make() -> Manifest:
                found = remembered(kept, folder)
                if found is None:
                    found = scan(folder, name)
                    remember(kept, folder, found)
                return found

            try:
                manifest = await trio.to_thread.run_sync(make)
            except OSError as error:
                raise ModelError(f"{folder} cannot be read: {error.strerror}") from error
        for root in [root for root, local in self._local.items() if local.folder == folder]:
            del self._local[root]  # what was in this folder before
        self._local[manifest.root] = LocalModel(folder, manifest)
        self.publish()
        return {"root": manifest.root}

    def admit(self, root: bytes, key: bytes, hello: bytes, site: str, delay_s: float) -> dict[str, Any]:
        """Expect a site's channel; where it may connect."""
        self._holding(root)
        now = trio.current_time()
        for old, (_, _, ends_at) in list(self._expected.items()):
            if ends_at < now:
                del self._expected[old]
                self._acceptor.forget(old)
        self._expected[hello] = (root, site, now + TICKET_S)
        self._acceptor.expect(hello, name=site, key=key, delay_s=delay_s)
        return {"address": self._acceptor.address}

    async def fetch(
        self, number: int, root: bytes, name: str, assignment: dict[str, Any] | None, cut: bool
    ) -> dict[str, Any]:
        """Bring in what `assignment` needs of a model; the folder to open. It stays pinned until `release(number)`."""
        part = None if assignment is None else Assignment.from_dict(assignment)
        self._cache.pins[root] = self._cache.pins.get(root, 0) + 1
        done = False
        told_at = 0.0
        try:
            async with self._locks.setdefault(root, trio.Lock()):
                cached = self._cache.models.get(root)
                if cached is not None:
                    needed = wanted(cached.manifest, part, cut=cut)
                    if all(block in cached.have for block in needed):
                        cached.touch()
                        done = True
                        self._pinned[number] = root
                        return {"path": str(cached.folder), "fetched": {}}

                def progress(have: int, total: int) -> None:
                    nonlocal told_at
                    now = trio.current_time()
                    if have >= total or now - told_at > PROGRESS_S:
                        told_at = now
                        self._tell({"id": number, "done": have, "total": total})

                def lost(site: str, why: str) -> None:
                    self._tell({"id": number, "lost": site, "why": why, "lied": site in fetch.liars})

                fetch = Fetch(self._driver, lost=lost, progress=progress, busy=self.busy)
                found: CachedModel | None = cached

                async def body(fetch: Fetch) -> None:
                    nonlocal found
                    self._tell({"id": number, "ready": True})
                    manifest = found.manifest if found is not None else await fetch.manifest(root, name)
                    needed = wanted(manifest, part, cut=cut)
                    for gone in self._cache.reserve(manifest, needed):
                        self._locks.pop(gone, None)
                    found = self._cache.open(manifest)
                    await fetch.blocks(found, needed)

                self._fetches[number] = fetch
                self._rest()
                try:
                    await fetch.run(body)
                finally:
                    self._fetches.pop(number, None)
                    self._cache.settle(root)
                    self._rest()
                    self.publish()
                assert found is not None
                found.touch()
                done = True
                self._pinned[number] = root
                return {"path": str(found.folder), "fetched": fetch.fetched}
        finally:
            if not done:
                self._unpin(root)

    def source(self, fetch: int, **ticket: Any) -> dict[str, Any]:
        """Another source for a fetch under way. Nothing happens where it is over."""
        if fetch in self._fetches:
            self._fetches[fetch].add(Source(**ticket))
        return {}

    def busy(self) -> bool:
        """Whether tokens travel at this site, as far as the daemon said."""
        return self._serving_jobs

    def tokens(self, travel: bool) -> dict[str, Any]:
        """The daemon says whether tokens travel at this site: weights then let them pass."""
        self._serving_jobs = travel
        self._rest()
        return {}

    def _rest(self) -> None:
        self._driver.rest_s = REST_S if self._fetches and not self._serving_jobs else 0.0

    def release(self, fetch: int) -> dict[str, Any]:
        """What a fetch brought need not be kept any more; it is, until its room is wanted."""
        root = self._pinned.pop(fetch, None)
        if root is not None:
            self._unpin(root)
        return {}

    def _unpin(self, root: bytes) -> None:
        left = self._cache.pins.get(root, 0) - 1
        if left > 0:
            self._cache.pins[root] = left
        else:
            self._cache.pins.pop(root, None)

    # -- serving

    async def accept(self) -> None:
        """Serve every site that comes with a ticket. Runs until cancelled."""
        while True:
            try:
                made = await self._driver.accept(self._acceptor, ACCEPT_S)
            except TransportError:
                continue
            for hello, channel in made:
                root, site, _ = self._expected.pop(hello, (b"", "", 0.0))
                try:
                    held = self._holding(root)
                except MeshError:
                    channel.close()
                    continue

                self._nursery.start_soon(self._give, channel, held, site)

    async def _give(self, channel: Channel, held: Holding, site: str) -> None:
        def report(count: int, seconds: float) -> None:
            self._tell({"sent": site, "bytes": count, "seconds": seconds})

        gave = await serve(self._driver, channel, held, self._bucket, report=report, busy=self.busy)
        self._tell({"gave": site, "bytes": gave})

    def close(self) -> None:
        """Close the files."""
        self._cache.close()


class Desk:
    """Requests in, replies out."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._scopes: dict[int, trio.CancelScope] = {}

    async def take(self, store: Store, request: dict[str, Any]) -> None:
        """Answer one request."""
        number = int(request["id"])
        scope = self._scopes[number] = trio.CancelScope()
        try:
            with scope:
                self._tell({"id": number, "ok": await self._do(store, number, request)})
        except MeshError as error:
            self._tell({"id": number, "error": str(error), "missing": isinstance(error, ModelMissing)})
        except Exception as error:
            logger.exception("a request failed")
            self._tell({"id": number, "error": f"{type(error).__name__}: {error}", "missing": False})
        finally:
            del self._scopes[number]

    async def _do(self, store: Store, number: int, request: dict[str, Any]) -> dict[str, Any]:
        body = {key: value for key, value in request.items() if key not in ("id", "op")}
        steps: dict[str, Callable[..., dict[str, Any]]] = {
            "admit": store.admit,
            "release": store.release,
            "source": store.source,
            "tokens": store.tokens,
            "cancel": lambda other: self._cancel(store, other),
        }
        waits: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "scan": store.scan,
            "fetch": lambda **options: store.fetch(number, **options),
        }
        operation = request["op"]
        if operation in steps:
            return steps[operation](**body)
        if operation in waits:
            return await waits[operation](**body)
        raise RequestError(f"no operation {operation!r}")

    def _cancel(self, store: Store, other: int) -> dict[str, Any]:
        """End a request that nobody waits for. Where its answer is on its way already, nobody will read it."""
        scope = self._scopes.get(other)
        if scope is not None:
            scope.cancel()
        return store.release(other)


def main() -> None:
    """Run until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m mesh.weights.store", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="where other sites reach this one")
    parser.add_argument("--limit-bytes", type=int, default=0, help="of the cache; 0: half of the disk's free space")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second to send at most; 0: no limit")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    commands, events = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    trio.run(_run, options, commands, events)
    os._exit(0)  # threads that still hash have nothing left to tell


async def _run(options: argparse.Namespace, commands: int, events: int) -> None:
    send, outbox = trio.open_memory_channel[dict[str, Any]](10_000)

    def tell(message: dict[str, Any]) -> None:
        try:
            send.send_nowait(message)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # a daemon that reads nothing is going, or gone

    fabric = open_fabric("tcp")
    acceptor = Acceptor(fabric, fabric.listen(options.host))
    bucket = Bucket(options.rate) if options.rate else None
    async with open_driver(fabric) as driver, trio.open_nursery() as nursery:
        store = Store(
            options.directory, driver, acceptor, nursery, tell, limit_bytes=options.limit_bytes, bucket=bucket
        )
        nursery.start_soon(_write, trio.lowlevel.FdStream(events), outbox)
        await store.begin()
        nursery.start_soon(store.accept)
        desk = Desk(tell)
        unpacker = msgpack.Unpacker(max_buffer_size=MAX_MESSAGE_BYTES)
        stream = trio.lowlevel.FdStream(commands)
        while data := await stream.receive_some(_READ_BYTES):
            unpacker.feed(data)
            for request in unpacker:
                nursery.start_soon(desk.take, store, request)
        nursery.cancel_scope.cancel()
    store.close()
    acceptor.close()
    fabric.close()


async def _write(stream: trio.lowlevel.FdStream, outbox: trio.MemoryReceiveChannel[dict[str, Any]]) -> None:
    async for message in outbox:
        try:
            await stream.send_all(msgpack.packb(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


if __name__ == "__main__":
    main()
