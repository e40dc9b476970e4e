"""One site that lacks a model's files and two that have them, each behind an emulated link, and nothing else.

Each site is the process that a peer runs for its weights (`mesh.weights.store`), asked as its daemon asks it. Links are
network namespaces (`simulations.wide_area`); without the right to make those, the sources pace themselves to the
link's rate and messages are held back for its delay, and `emulated` is False.
"""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from benchmarks.weights.tokens import Tokens
from mesh.errors import MeshError
from mesh.peer.store_process import StoreProcess
from simulations.wide_area import NEAR_HOST, Line, WideArea, WideAreaUnavailable, far_host

#: Of a packet of 1500 bytes, what TCP with time stamps leaves for data.
DATA_SHARE = 1448 / 1500
_CALL_S = 600.0
_SETTLE_S = 60.0


class World:
    """Made by `open_world`. `fetch` brings the slices in; `served` counts the bytes of blocks that left each source."""

    def __init__(self, lines: Sequence[Line], folder: Path, area: WideArea | None, reason: str) -> None:
        self.lines = tuple(lines)
        self.folder = folder
        self.area = area
        self.reason = reason
        self.served = [0] * len(lines)
        self._giving = 0
        self._changed = trio.Event()
        self.root = b""
        self._sources: list[StoreProcess] = []
        self.here = self._store("here", NEAR_HOST, None if area is None else area.near, lambda count: None, 0.0)
        for number, line in enumerate(lines):
            space = None if area is None else area.fars[number]
            self._sources.append(
                self._store(f"source{number}", far_host(number), space, self._counting(number), line.rate)
            )

    @property
    def emulated(self) -> bool:
        """Whether the links are links, with packets."""
        return self.area is not None

    @property
    def bytes_per_s(self) -> float:
        """What the links carry together."""
        share = DATA_SHARE if self.emulated else 1.0
        return sum(line.rate / 8 * share * (1 - line.loss) for line in self.lines)

    @property
    def words(self) -> str:
        """The links, for a row."""
        return " + ".join(map(str, self.lines)) + ("" if self.emulated else ", paced")

    async def forget(self) -> None:
        """Take away what was fetched."""
        await self.here.kill().wait()
        await trio.to_thread.run_sync(lambda: shutil.rmtree(self.folder / "here", ignore_errors=True))

    def _counting(self, number: int) -> Callable[[int], None]:
        def count(sent: int) -> None:
            self.served[number] += sent
            self._giving -= 1
            self._changed.set()

        return count

    def _store(self, name: str, host: str, space: str | None, gave: Callable[[int], None], rate: float) -> StoreProcess:
        """A site's process. rate: of its link, bits a second; 0 for a site that gives nothing."""
        module = ["mesh.weights.store", str(self.folder / name)]
        if space is None:
            command = [sys.executable, "-m", *module, "--host", "127.0.0.1"]
            command += ["--rate", str(rate / 8)] if rate else []
        else:
            command = [sys.executable, "-m", "benchmarks.weights.inside", space, *module, "--host", host]
        limit = ["--limit-bytes", str(1 << 44)]
        return StoreProcess([*command, *limit], on_gave=lambda site, count: gave(count))

    async def begin(self, nursery: trio.Nursery, model: Path) -> None:
        """Start the processes and have the sources hash the model."""
        for store in (self.here, *self._sources):
            await nursery.start(store.run)
        await self.polite(False)  # the process is there before anything is timed
        for store in self._sources:
            answer = await store.call("scan", _CALL_S, path=str(model), name="weights")
            self.root = bytes(answer["root"])

    async def polite(self, tokens: bool) -> None:
        """Say, or not any more, that tokens travel at the site that fetches."""
        await self.here.call("tokens", _CALL_S, travel=tokens)

    async def fetch(self, assignment: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, int]:
        """Fetch what is missing of the slices; bytes that came, by source. Raises ModelError where the fetcher dies."""
        answer: dict[str, Any] = {}
        failure: MeshError | None = None
        async with trio.open_nursery() as nursery:

            def on_event(event: dict[str, Any]) -> None:
                if "ready" in event:
                    nursery.start_soon(self._introduce, int(event["id"]))
                elif "total" in event:
                    progress(int(event["done"]), int(event["total"]))

            try:
                answer = await self.here.call(
                    "fetch", _CALL_S, on_event, root=self.root, name="weights", assignment=assignment, cut=True
                )
            except MeshError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        await self.here.call("release", _CALL_S, fetch=answer["call"])
        found: dict[str, int] = answer["fetched"]
        return found

    async def _introduce(self, fetch: int) -> None:
        for number, store in enumerate(self._sources):
            key, hello = secrets.token_bytes(32), secrets.token_bytes(16)
            delay_s = 0.0 if self.emulated else self.lines[number].rtt_s / 2
            admitted = await store.call(
                "admit", _CALL_S, root=self.root, key=key, hello=hello, site="here", delay_s=delay_s
            )
            self._giving += 1
            ticket = {"address": admitted["address"], "key": key, "hello": hello, "delay_s": delay_s}
            await self.here.call("source", _CALL_S, fetch=fetch, site=f"source{number}", **ticket)

    async def settled(self) -> int:
        """Wait until the sources have noticed that nobody takes any more; the bytes that left them so far."""
        with trio.fail_after(_SETTLE_S):
            while self._giving:
                self._changed = trio.Event()
                await self._changed.wait()
        return sum(self.served)

    def tokens(self) -> Tokens:
        """Small messages over the first link."""
        if self.area is None:
            return Tokens(None, None, "127.0.0.1")
        return Tokens(self.area.near, self.area.far, far_host(0))


@asynccontextmanager
async def open_world(lines: Sequence[Line], folder: Path, model: Path) -> AsyncIterator[World]:
    """The sites, for the length of the block."""
    with ExitStack() as stack:
        try:
            area, reason = stack.enter_context(WideArea(*lines)), ""
        except WideAreaUnavailable as error:
            area, reason = None, str(error)
        world = World(lines, folder, area, reason)
        async with trio.open_nursery() as nursery:
            await world.begin(nursery, model)
            try:
                yield world
            finally:
                nursery.cancel_scope.cancel()
