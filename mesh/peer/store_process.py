"""The process that holds and moves a site's weights (`mesh.weights.store`) as the daemon sees it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import trio

from mesh.errors import ModelError, ModelMissing, WorkerError
from mesh.peer.child import Child

logger = logging.getLogger(__name__)

#: The longest message from the store: what it holds.
MAX_MESSAGE_BYTES = 64 << 20


class _Call:
    """A request to the store."""

    def __init__(self, number: int, on_event: Callable[[dict[str, Any]], None]) -> None:
        self.number = number
        self.on_event = on_event
        self.done = trio.Event()
        self.answer: dict[str, Any] = {}


class StoreProcess:
    """The store. Started by the first call; started again by the next one after it died.

    `on_held` is told what it holds and how full the cache is, `on_sent(site, bytes, seconds)` how fast a
    site is given blocks, and `on_gave(site, bytes)` how much it was given when it is gone.
    """

    def __init__(
        self,
        command: Sequence[str],
        on_held: Callable[[list[dict[str, Any]], dict[str, int]], None] = lambda rows, cache: None,
        on_sent: Callable[[str, int, float], None] = lambda site, count, seconds: None,
        on_gave: Callable[[str, int], None] = lambda site, count: None,
    ) -> None:
        self._command = tuple(command)
        self._on_held = on_held
        self._on_sent = on_sent
        self._on_gave = on_gave
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self._child: Child | None = None
        self._starting = trio.Lock()
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the process for the length of this task."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def start(self) -> Child:
        """See that it runs. Raises WorkerError."""
        async with self._starting:
            if self._child is None or self._child.gone.is_set():
                if self._nursery is None:
                    raise WorkerError("this peer is stopping")
                unpacker = msgpack.Unpacker(max_buffer_size=MAX_MESSAGE_BYTES)

                def hear(data: bytes | bytearray) -> None:
                    unpacker.feed(data)
                    for message in unpacker:
                        self._take(message)

                self._child = await Child.spawn(self._command, hear, "the store of weights")
                self._nursery.start_soon(self._mind, self._child)
            return self._child

    @property
    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and not self._child.gone.is_set()

    def kill(self) -> trio.Event:
        """End the process as a crash would; the event is set when it is gone."""
        if self._child is None:
            gone = trio.Event()
            gone.set()
            return gone
        self._child.kill()
        return self._child.gone

    async def call(
        self,
        operation: str,
        deadline_s: float,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        **body: Any,
    ) -> dict[str, Any]:
        """Ask, and wait for the answer, which has the call's number as "call". A cancelled call is cancelled there too,
        and a fetch that is done there already is given back. Raises the error it met.
        """
        child = await self.start()
        call = _Call(next(self._numbers), on_event)
        self._calls[call.number] = call
        taken = False
        try:
            child.send(_packed({"id": call.number, "op": operation, **body}))
            with trio.move_on_after(deadline_s) as scope:
                await call.done.wait()
                taken = True
            if scope.cancelled_caught:
                raise WorkerError(f"the store of weights did not answer {operation!r} within {deadline_s:.0f} s")
        except trio.BrokenResourceError:
            raise WorkerError("the store of weights is gone") from None
        finally:
            del self._calls[call.number]
            if not taken:
                try:
                    child.send(_packed({"id": next(self._numbers), "op": "cancel", "other": call.number}))
                except trio.BrokenResourceError:
                    pass  # nothing is left to cancel
        if "error" in call.answer:
            kind = ModelMissing if call.answer.get("missing") else ModelError
            raise kind(str(call.answer["error"]))
        return {**call.answer.get("ok", {}), "call": call.number}

    async def _mind(self, child: Child) -> None:
        """Keep it until it ends; then whoever waits for it hears so."""
        try:
            await child.run()
            logger.warning("%s", child.why)
        finally:
            if self._child is child:
                self._child = None
            for call in self._calls.values():
                call.answer = {"error": child.why}
                call.done.set()

    def _take(self, message: dict[str, Any]) -> None:
        if "held" in message:
            self._on_held(message["held"], message["cache"])
        elif "sent" in message:
            self._on_sent(message["sent"], message["bytes"], message["seconds"])
        elif "gave" in message:
            self._on_gave(message["gave"], message["bytes"])
        elif (call := self._calls.get(message.get("id", 0))) is None:
            return
        elif "ok" in message or "error" in message:
            call.answer = message
            call.done.set()
        else:
            call.on_event(message)


def _packed(message: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(message)
    return packed
