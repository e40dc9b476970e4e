"""The daemon's side of models and their weights: where a model lies here, who has it elsewhere, and fetching it.

The bytes are `mesh.weights.store`'s, a process that is started when it is first needed. The daemon asks other peers for
tickets, tells the store where to connect, and tells the mesh what is here (gossip's entry "held").
"""

from __future__ import annotations

import fnmatch
import logging
import math
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgpack
import trio

from mesh.errors import MeshError, ModelError, ModelMissing, NotAllowed, PeerUnreachable, RequestError, WorkerError
from mesh.jobs.model import Inspector, ModelInfo
from mesh.jobs.peers import Progress
from mesh.peer.holdings import MAX_HELD, ROOT_BYTES, described, models_below, of_folder, of_store, read_held, size_of
from mesh.peer.store_process import StoreProcess
from mesh.runtime.assignment import Assignment
from mesh.weights.locate import locate, there
from mesh.weights.near import MAX_SOURCES, nearest
from mesh.wire.v1 import peer_pb2
from topology.snapshot import Snapshot

logger = logging.getLogger(__name__)

#: A ticket is answered from memory, but for the start of the store.
TICKET_S = 20.0
#: A source that could not be used is tried again after so long, then twice that, and so on.
RETRY_S, MAX_RETRY_S = 1.0, 15.0
#: The shards of one deployment are offered the same.
OFFER_S = 30.0
#: How often the store hears whether tokens travel.
TOKENS_S = 1.0
#: An emulated delay that a relay tells of.
MAX_DELAY_S = 10.0
#: What the store answers at once.
STORE_S = 30.0
#: Reading a whole model to hash it: 2 TB at 100 MB/s take 20,000 s.
SCAN_S = 6 * 3600.0


class Remote(Protocol):
    """What is needed of `mesh.peer.calls.RemotePeer`."""

    async def weights(self, request: peer_pb2.WeightsRequest, timeout_s: float) -> peer_pb2.WeightsTicket: ...
    async def relay(self, request: peer_pb2.RelayRequest) -> peer_pb2.RelayReply: ...


class View(Protocol):
    """What is needed of `mesh.peer.view.MeshView`."""

    def snapshot(self) -> Snapshot: ...
    def alive(self, site: str) -> bool: ...
    def via(self, one: str, other: str) -> str: ...
    def reaches(self, one: str, other: str) -> bool: ...


class Placed(NamedTuple):
    """What a worker opens, and whether it is the cache's."""

    path: str
    cached: bool


class Weights:
    """What this site has of models, and how it comes by the rest. Made by `open_weights`."""

    def __init__(
        self,
        site: str,
        store: StoreProcess,
        inspector: Inspector,
        *,
        models: Path | None,
        withhold: Sequence[str],
        delay_s: Callable[[str], float],
        publish: Callable[[dict[str, Any]], None],
        held: Callable[[], Mapping[str, Any]],
    ) -> None:
        """`models` as in `locate`, `withhold` are patterns of models that are not given away, `publish` tells the
        mesh what is here, `held` is what the mesh told: gossip's entries by site.
        """
        self.site = site
        self._view: View | None = None
        self._peer: Callable[[str], Remote] | None = None
        self._cut: Callable[[str], bool] = lambda site: False
        self._stepping: Callable[[], bool] = lambda: False
        self._store = store
        self._inspector = inspector
        self._models = models
        self._withhold = tuple(withhold)
        self._delay_s = delay_s
        self._publish = publish
        self._held = held
        self._rows: list[dict[str, Any]] = []
        self._cache: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._opened: dict[str, str] = {}
        self._nursery: trio.Nursery | None = None
        self._hashing: dict[str, trio.Event] = {}
        self._offering = trio.Lock()
        self._offers: dict[str, tuple[float, bytes]] = {}

    def attach(
        self,
        view: View,
        peer: Callable[[str], Remote],
        *,
        stepping: Callable[[], bool] = lambda: False,
        cut: Callable[[str], bool] = lambda site: False,
    ) -> None:
        """The picture of the mesh and the way to its peers, which are made after this.

        `stepping` says whether workers of this site take steps now, so that their tokens go before weights; `cut` which
        sites it does not reach, in a drill.
        """
        self._view, self._peer, self._stepping, self._cut = view, peer, stepping, cut

    def begin(self, nursery: trio.Nursery) -> None:
        """Tell of the models that lie in the site's folder. Hashing, where it is wanted, runs in `nursery`."""
        self._nursery = nursery
        nursery.start_soon(self._tell_of_tokens)
        if self._models is not None:
            for path in models_below(self._models)[:MAX_HELD]:
                self._opened[str(path)] = path.name
            if self._opened:
                self._tell()

    async def _tell_of_tokens(self) -> None:
        told = False
        while True:
            await trio.sleep(TOKENS_S)
            told = told and self._store.runs  # a store that was started again knows nothing
            if self._store.runs and self._stepping() != told:
                try:
                    await self._store.call("tokens", STORE_S, travel=not told)
                    told = not told
                except MeshError as error:
                    logger.warning("%s", error)

    # -- what is here

    def describe(self) -> list[dict[str, Any]]:
        """The rows of `models` in `mesh status --json`: what the store holds, and the folders that jobs here opened."""
        told = [{**row, "root": row["root"].hex()} for row in self._rows]
        known = {row["path"] for row in told}
        for path, name in self._opened.items():
            if path not in known:
                told.append({"root": "", "name": name, "path": path, "cached": False})
        return told

    def store_changed(self, rows: list[dict[str, Any]], cache: dict[str, int]) -> None:
        """The store says what it holds, and how full its cache is."""
        self._rows, self._cache = rows, cache
        self._tell()

    def holdings(self) -> list[dict[str, Any]]:
        """What `mesh models` shows: this site first, then the others that tell of theirs."""
        others = [
            described(site, entry)
            for site, entry in sorted(self._held().items())
            if site != self.site and self._view is not None and self._view.alive(site)
        ]
        return [described(self.site, self._told_of()), *others]

    def _tell(self) -> None:
        self._publish(self._told_of())

    def _told_of(self) -> dict[str, Any]:
        rows = [row for row in self._rows if not self._withheld(row["name"], row["path"])]
        told = [of_store(row) for row in rows[:MAX_HELD]]
        known = {row["path"] for row in self._rows}
        for path, name in list(self._opened.items())[: MAX_HELD - len(told)]:
            if path not in known and not self._withheld(name, path):
                told.append(of_folder(name, self._sizes.setdefault(path, size_of(path))))
        return {"models": told, "cache": self._cache}

    def _opened_here(self, path: str, name: str) -> None:
        if path not in self._opened and len(self._opened) < MAX_HELD:
            self._opened[path] = name
            self._tell()

    def _withheld(self, name: str, path: str) -> bool:
        return any(fnmatch.fnmatch(each, pattern) for pattern in self._withhold for each in (name, path))

    # -- the owner's side

    async def inspect(self, model: str) -> ModelInfo:
        """What a model is, from this site's files or else from what other sites have. Raises ModelError."""
        try:
            path = locate(model, self._models)
        except ModelMissing as missing:
            root = self._root_named(model)
            if root is None:
                raise ModelError(str(missing)) from None
            async with self._fetched(root, Path(model).name, None, (), lambda done, total: None) as found:
                return await self._inspector(found)
        info = await self._inspector(path)
        self._opened_here(info.path, info.spec.name)
        return info

    async def offer(self, model: str) -> bytes:
        """What a site that lacks `model` has to know to fetch it: its root, its name, who has it."""
        async with self._offering:
            ends_at, packed = self._offers.get(model, (0.0, b""))
            if trio.current_time() > ends_at:
                packed = await self._make_offer(model)
                self._offers = {model: (trio.current_time() + OFFER_S, packed)}
            return packed

    async def _make_offer(self, model: str) -> bytes:
        info = await self.inspect(model)
        answer = await self._store.call("scan", SCAN_S, path=info.path, name=info.spec.name)
        root = bytes(answer["root"])
        name = info.spec.name
        if self._withheld(name, info.path):
            raise ModelError(f"{self.site} withholds the weights of {name}: a site that lacks them cannot serve it")
        sources = self._holders(root, name, [self.site])[:MAX_HELD]
        packed: bytes = msgpack.packb({"root": root, "name": name, "sources": sources})
        return packed

    def _root_named(self, model: str) -> bytes | None:
        """The root of a model that other sites tell of under this name. Without doubt only: one root."""
        names = (model, Path(model).name)
        roots = {
            bytes(row["root"]) for site, rows in self._told() for row in rows if row["name"] in names and row["root"]
        }
        return roots.pop() if len(roots) == 1 else None

    def _told(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """What other sites tell of what they hold, as far as it is well formed."""
        found = []
        for site, entry in self._held().items():
            if site != self.site and self._view is not None and self._view.alive(site):
                good = read_held(entry)
                if good:
                    found.append((site, good))
        return found

    def _holders(self, root: bytes, name: str, first: Iterable[str]) -> list[str]:
        """Sites that have something of a model: `first`, then those that tell so, or of one of that name."""

        def may(row: dict[str, Any]) -> bool:
            return bool(row["root"] == root[:ROOT_BYTES] if row["root"] else row["name"] == name)

        told = [site for site, rows in self._told() if any(may(row) for row in rows)]
        return list(dict.fromkeys([*first, *sorted(told)]))

    # -- a shard's side

    @asynccontextmanager
    async def place(
        self, a: Assignment, offer: bytes, progress: Progress, *, cut: bool = True
    ) -> AsyncIterator[Placed]:
        """What a worker opens for this assignment, which is kept from eviction for the length of the block.

        The model's own files where this site has them, else the cache's, filled as far as needed from the sites that
        `offer` names. Raises ModelMissing without an offer, ModelError where nobody gives the blocks.
        """
        path = None
        try:
            path = locate(a.model, self._models)
        except ModelMissing:
            if not offer:
                raise
        if path is not None and (not offer or there(path)):
            name = path.rpartition("/")[2] if there(path) else path
            if path.endswith(".gguf"):
                info = await self._inspector(path)
                path, name = info.path, info.spec.name
            yield Placed(path, cached=False)
            self._opened_here(path, name)
            return
        root, name, sources = _read_offer(offer)
        async with self._fetched(root, name, a, sources, progress, cut=cut) as found:
            yield Placed(found, cached=True)

    @asynccontextmanager
    async def _fetched(
        self,
        root: bytes,
        name: str,
        a: Assignment | None,
        offered: Sequence[str],
        progress: Progress,
        *,
        cut: bool = True,
    ) -> AsyncIterator[str]:
        """Have the store fetch; the folder to open, kept from eviction while the block lasts. Raises ModelError."""
        ready = trio.Event()
        live: set[str] = set()
        retry_at: dict[str, float] = {}
        waits: dict[str, float] = {}
        number = 0
        changed = trio.Event()

        def give_up(site: str, *, lied: bool = False) -> None:
            live.discard(site)
            waits[site] = min(MAX_RETRY_S, waits.get(site, RETRY_S / 2) * 2)
            retry_at[site] = math.inf if lied else trio.current_time() + waits[site]
            changed.set()

        def on_event(event: dict[str, Any]) -> None:
            nonlocal number
            if "total" in event:
                progress(int(event["done"]), int(event["total"]))
            elif "lost" in event:
                lied = bool(event.get("lied"))
                level = logging.WARNING if lied else logging.INFO
                logger.log(level, "weights: %s is given up as a source: %s", event["lost"], event["why"])
                give_up(str(event["lost"]), lied=lied)
            elif "ready" in event:
                number = int(event["id"])
                ready.set()

        async def feed() -> None:
            nonlocal changed
            await ready.wait()
            while True:
                changed = trio.Event()
                now = trio.current_time()
                links = () if self._view is None else self._view.snapshot().links
                for site in nearest(self.site, self._holders(root, name, offered), links):
                    if len(live) >= MAX_SOURCES:
                        break
                    if site not in live and retry_at.get(site, -math.inf) <= now:
                        live.add(site)
                        nursery.start_soon(ask, site)
                with trio.move_on_after(RETRY_S / 2):
                    await changed.wait()

        async def ask(site: str) -> None:
            try:
                ticket = await self._ticket_of(site, root, name)
                await self._store.call("source", STORE_S, fetch=number, site=site, **ticket)
            except MeshError as error:
                logger.info("weights: %s gives no ticket: %s", site, error)
                give_up(site)

        failure: MeshError | None = None
        found: dict[str, Any] = {}
        document = None if a is None else a.to_dict()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(feed)
                try:
                    found = await self._store.call(
                        "fetch", SCAN_S, on_event, root=root, name=name, assignment=document, cut=cut
                    )
                except MeshError as error:
                    failure = error
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
            yield str(found["path"])
        finally:
            if found:
                await self._release(int(found["call"]))

    async def _release(self, fetch: int) -> None:
        with trio.move_on_after(STORE_S, shield=True):
            try:
                await self._store.call("release", STORE_S, fetch=fetch)
            except MeshError as error:
                logger.warning("%s", error)

    async def _ticket_of(self, site: str, root: bytes, name: str) -> dict[str, Any]:
        if self._peer is None or self._view is None:
            raise WorkerError("this peer is starting")
        request = peer_pb2.WeightsRequest(root=root, site=self.site, name=name)
        ticket = await self._peer(site).weights(request, TICKET_S)
        address, delay_s = await self._way_to(site, ticket.address)
        return {"address": address, "key": ticket.key, "hello": ticket.hello, "delay_s": delay_s}

    async def _way_to(self, site: str, address: bytes) -> tuple[bytes, float]:
        """Where to connect for a store's `address`, and the emulated delay: directly, or through a third site.

        A relay hands on what the two stores have sealed. Raises MeshError where there is no way.
        """
        assert self._view is not None and self._peer is not None
        via = self._view.via(self.site, site)
        if via:
            try:
                reply = await self._peer(via).relay(peer_pb2.RelayRequest(site=site, other=self.site, address=address))
                if not 0 <= reply.delay_s <= MAX_DELAY_S:
                    raise RequestError(f"a delay of {reply.delay_s} s towards {site} cannot be")
            except MeshError as error:
                if not self._view.reaches(self.site, site):
                    raise
                logger.info("weights: %s does not relay to %s: %s", via, site, error)
            else:
                logger.info("weights: %s is reached through %s", site, via)
                return reply.address, reply.delay_s
        if self._cut(site):
            raise PeerUnreachable(f"{self.site} does not reach {site} (a drill)")
        return address, self._delay_s(site)

    # -- a source's side

    async def _hash_if_named(self, request: peer_pb2.WeightsRequest) -> None:
        """Where files lie here under the name of a model that is asked for, find out whether they are that model.

        Waits for as long as the caller does; the hashing goes on, so that the next who asks finds it done.
        """
        if any(row["root"] == request.root for row in self._rows) or self._nursery is None:
            return
        hashed = {row["path"] for row in self._rows}
        paths = [path for path, name in self._opened.items() if name == request.name and path not in hashed]
        for path in paths:
            if path not in self._hashing:
                self._hashing[path] = trio.Event()
                self._nursery.start_soon(self._hash, path, request.name)
        with trio.move_on_after(TICKET_S / 2):
            for path in paths:
                if path in self._hashing:
                    await self._hashing[path].wait()

    async def _hash(self, path: str, name: str) -> None:
        try:
            await self._store.call("scan", SCAN_S, path=path, name=name)
        except MeshError as error:
            logger.warning("%s is not given to others: %s", path, error)
        finally:
            self._hashing.pop(path).set()

    async def ticket(self, request: peer_pb2.WeightsRequest) -> peer_pb2.WeightsTicket:
        """Where and with which key a site may read a model's blocks here. Raises NotAllowed, ModelMissing."""
        if len(request.root) != 32:
            raise RequestError("a root has 32 bytes")
        await self._hash_if_named(request)
        key, hello = secrets.token_bytes(32), b"weights/" + secrets.token_hex(8).encode()
        answer = await self._store.call(
            "admit",
            STORE_S,
            root=request.root,
            key=key,
            hello=hello,
            site=request.site,
            delay_s=self._delay_s(request.site),
        )
        # The store tells what it holds before it answers anything, so a model it admits to is among the rows.
        row = next((row for row in self._rows if row["root"] == request.root), None)
        if row is None or self._withheld(row["name"], row["path"]):
            raise NotAllowed(f"{self.site} does not give this model away")
        return peer_pb2.WeightsTicket(address=answer["address"], key=key, hello=hello)


def _read_offer(offer: bytes) -> tuple[bytes, str, list[str]]:
    try:
        document = msgpack.unpackb(offer)
        root, name = bytes(document["root"]), str(document["name"])
        sources = [str(site) for site in document["sources"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"the offer of weights is not one: {error}") from None
    if len(root) != 32 or len(sources) > MAX_HELD:
        raise RequestError("the offer of weights is out of bounds")
    return root, name, sources


@asynccontextmanager
async def open_weights(
    site: str,
    folder: Path,
    inspector: Inspector,
    *,
    host: str,
    limit_bytes: int,
    rate_bytes_per_s: int,
    models: Path | None,
    withhold: Sequence[str],
    delay_s: Callable[[str], float],
    publish: Callable[[dict[str, Any]], None],
    held: Callable[[], Mapping[str, Any]],
    sent: Callable[[str, int, float], None],
) -> AsyncIterator[Weights]:
    """A site's weights for the length of the block. The store starts at once only where an earlier run left models.

    `sent(site, bytes, seconds)` is told how fast weights went to a site.
    """
    options = {"--host": host, "--limit-bytes": limit_bytes, "--rate": rate_bytes_per_s}
    command = [sys.executable, "-m", "mesh.weights.store", str(folder)]
    command += [str(word) for option in options.items() for word in option]
    folder_there = there(str(folder))
    weights: Weights

    def changed(rows: list[dict[str, Any]], cache: dict[str, int]) -> None:
        weights.store_changed(rows, cache)

    store = StoreProcess(command, changed, sent)
    weights = Weights(
        site,
        store,
        inspector,
        models=models,
        withhold=withhold,
        delay_s=delay_s,
        publish=publish,
        held=held,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        if folder_there:
            await store.start()
        weights.begin(nursery)
        try:
            yield weights
        finally:
            nursery.cancel_scope.cancel()
