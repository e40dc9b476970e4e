"""The channels of one worker: listening, opening them to the neighbours, polling, waiting, and getting out of a wait.

Listeners live as long as the worker; channels as long as an epoch. Everything here belongs to the step thread, except
`wake`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from mesh.errors import WorkerError
from mesh.runtime.inbox import Interrupted
from mesh.runtime.protocol import Neighbour
from transport import (
    Acceptor,
    AddressError,
    Channel,
    Fabric,
    Listener,
    Pipe,
    TransportError,
    available,
    connect_channel,
    open_fabric,
    wait_any,
)

#: How long goodbyes may take to leave when the worker ends.
_FLUSH_S = 0.2


class GuardedFabric:
    """A fabric that gets its caller out of a wait: every turn of it raises Interrupted once `interrupted` says so.

    Collectives wait inside `transport`, deep in a model's forward pass. They cannot know of epochs; but they all turn
    their fabric while they wait, and so this is the one place where a newer epoch can reach them.
    """

    def __init__(self, inner: Fabric, interrupted: Callable[[], bool]) -> None:
        self.inner = inner
        self.name = inner.name
        self._interrupted = interrupted
        self.take_wake = inner.take_wake
        self.fileno = inner.fileno
        self.arm = inner.arm
        self.wake = inner.wake
        self.close = inner.close

    def listen(self, host: str = "127.0.0.1") -> Listener:
        """As the inner fabric."""
        return self.inner.listen(host)

    def connect(self, address: bytes) -> Pipe:
        """As the inner fabric."""
        return self.inner.connect(address)

    def progress(self) -> bool:
        """As the inner fabric. Raises Interrupted."""
        if self._interrupted():
            raise Interrupted
        return self.inner.progress()

    def wait(self, timeout_s: float) -> None:
        """As the inner fabric. Raises Interrupted."""
        if self._interrupted():
            raise Interrupted
        self.inner.wait(timeout_s)


class Links:
    """A worker's channels by role: `next` and `previous` in the ring, `shards` by rank within the stage.

    `interrupted` is asked whenever a channel waits while `guarded` is set (the step thread sets it around a step).
    """

    def __init__(
        self,
        interrupted: Callable[[], bool] = lambda: False,
        *,
        fabrics: Callable[[str], Fabric] = open_fabric,
        usable: Callable[[], Iterable[str]] = available,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.next: Channel | None = None
        self.previous: Channel | None = None
        self.shards: dict[int, Channel] = {}
        #: Whether all shards of the stage are workers of this host.
        self.beside = False
        self.guarded = False
        self._interrupted = interrupted
        self._open_fabric = fabrics
        self._usable = usable
        self._clock = clock
        self._fabrics: dict[str, GuardedFabric] = {}
        self._fabric_list: tuple[GuardedFabric, ...] = ()
        self._acceptors: dict[str, Acceptor] = {}
        self._opening: dict[bytes, Neighbour] = {}
        self._connecting: list[tuple[Neighbour, Channel]] = []
        self._idle = threading.Event()

    # -- listening

    def listen(self, backends: Iterable[str], host: str) -> dict[str, bytes]:
        """Listen on `host` over each backend that works on this machine; the addresses. Repeating it changes nothing.

        Raises WorkerError where none of them works.
        """
        usable = set(self._usable())
        reasons = []
        for backend in backends:
            if backend in self._acceptors:
                continue
            if backend not in usable:
                reasons.append(f"{backend} is not installed")
                continue
            try:
                fabric = GuardedFabric(self._open_fabric(backend), lambda: self.guarded and self._interrupted())
                self._acceptors[backend] = Acceptor(fabric, fabric.listen(host))
            except (TransportError, OSError) as error:
                reasons.append(f"{backend}: {error}")
                continue
            self._fabrics[backend] = fabric
            self._fabric_list = tuple(self._fabrics.values())
        if not self._acceptors:
            raise WorkerError(f"no transport works here ({'; '.join(reasons) or 'none was asked for'})")
        return {backend: acceptor.address for backend, acceptor in self._acceptors.items() if backend in set(backends)}

    # -- opening

    def open(self, neighbours: Iterable[Neighbour]) -> None:
        """Begin to open channels; `opened` says when they are. Raises WorkerError where one cannot be met."""
        neighbours = tuple(neighbours)
        self.beside = all(neighbour.beside for neighbour in neighbours if neighbour.role == "shard")
        for neighbour in neighbours:
            acceptor = self._acceptors.get(neighbour.backend)
            if acceptor is None:
                raise WorkerError(f"{neighbour.name} is to be met over {neighbour.backend}, which is not open here")
            if not neighbour.address:
                acceptor.expect(
                    neighbour.hello,
                    name=neighbour.name,
                    key=neighbour.key,
                    seal=neighbour.seal,
                    delay_s=neighbour.delay_s,
                )
                self._opening[neighbour.hello] = neighbour
                continue
            try:
                channel = connect_channel(
                    acceptor.fabric,
                    neighbour.address,
                    name=neighbour.name,
                    key=neighbour.key,
                    seal=neighbour.seal,
                    hello=neighbour.hello,
                    delay_s=neighbour.delay_s,
                )
            except (AddressError, TransportError) as error:
                raise WorkerError(str(error)) from error
            self._connecting.append((neighbour, channel))
            self._place(neighbour, channel)

    def opened(self) -> bool:
        """Whether every channel is open by now. Raises TransportError where one broke meanwhile."""
        if self._opening:
            for acceptor in self._acceptors.values():
                for hello, channel in acceptor.poll():
                    self._place(self._opening.pop(hello), channel)
        for neighbour, channel in tuple(self._connecting):
            if not channel.established:
                channel.poll()
            if channel.established:
                self._connecting.remove((neighbour, channel))
        return not self._opening and not self._connecting

    @property
    def missing(self) -> list[str]:
        """The names of the neighbours that have not answered yet."""
        waiting = [*self._opening.values(), *(neighbour for neighbour, _ in self._connecting)]
        return sorted({neighbour.name for neighbour in waiting})

    def _place(self, neighbour: Neighbour, channel: Channel) -> None:
        if neighbour.role == "next":
            self.next = channel
        elif neighbour.role == "previous":
            self.previous = channel
        else:
            self.shards[neighbour.rank] = channel

    # -- using

    @property
    def channels(self) -> list[Channel]:
        """Every channel that is there."""
        ring = [channel for channel in (self.previous, self.next) if channel is not None]
        return [*ring, *self.shards.values()]

    def wait(self, timeout_s: float) -> None:
        """Until something may have arrived, `wake` was called, or the time is over."""
        if not self._fabric_list:
            self._idle.wait(timeout_s)
            self._idle.clear()
            return
        for channel in self.channels:
            due_s = channel.due_s
            if due_s is not None and due_s < timeout_s:
                timeout_s = due_s
        if len(self._fabric_list) == 1:
            self._fabric_list[0].inner.wait(timeout_s)
        else:
            wait_any(self._fabric_list, timeout_s)

    def wake(self) -> None:
        """Get the step thread out of `wait`. Any thread may call it."""
        self._idle.set()
        for fabric in self._fabric_list:
            fabric.wake()

    def accused(self, error: Exception) -> str:
        """The neighbour that `error` is about: whose channel has ended, else whom its words name; empty for nobody."""
        for channel in self.channels:
            try:
                channel.check()
            except TransportError:
                return channel.name
        named = [channel.name for channel in self.channels if channel.name and channel.name in str(error)]
        return max(named, key=len, default="")

    # -- ending

    def drop(self) -> None:
        """Say goodbye on every channel and expect none of those that were being opened. Listeners stay."""
        for hello, neighbour in self._opening.items():
            self._acceptors[neighbour.backend].forget(hello)
        channels = self.channels
        self.next = self.previous = None
        self.shards = {}
        self._opening = {}
        self._connecting = []
        for channel in channels:
            channel.close()
        for fabric in self._fabric_list:
            fabric.inner.progress()

    def close(self) -> None:
        """End everything; goodbyes get a moment to leave."""
        channels = self.channels
        self.drop()
        deadline = self._clock() + _FLUSH_S
        while any(channel.pending_bytes for channel in channels) and self._clock() < deadline:
            for fabric in self._fabric_list:
                fabric.inner.progress()
        for acceptor in self._acceptors.values():
            acceptor.close()
        for fabric in self._fabric_list:
            fabric.close()
        self._acceptors = {}
        self._fabrics = {}
        self._fabric_list = ()
