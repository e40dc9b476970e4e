"""Pipes over UCX: RDMA, GPU paths or TCP, whichever UCX finds best between two processes.

Endpoints have error handling on, or a dead neighbour would look alive. Shared memory takes part in that only when told
to (`ucx_binding.CONFIG`), and then does not tell when a neighbour dies: `ucx_life` does.

Contexts, workers and endpoints are UCXX's (`ucxx._lib.libucxx`, UCXX 0.52, UCX 1.21), driven by polling, without its
asyncio layer and without a progress thread (deadlocks: ucxx#123, #687); messages go past it (`ucx_direct`).

**Set-up.** A listener's address is the UCX worker's address and a random tag. A connector makes an endpoint from it,
draws two random tags for the pipe, one a direction, and sends them with its own worker address as a hello to the
listener's tag. The listener makes its endpoint from that. The connector need not wait: what it sends to the new tag
before the listener knows of it waits in UCX. Worker addresses are parsed by UCX without much care, so both carry a
checksum; the listener's travels over the authenticated control plane anyway.

**Messages.** Each direction has several tags. On the first travel control messages of at most `SLOT_BYTES`: a small
message whole, or the layout of a long one, whose long parts follow on another tag without a copy into receives posted
to size. UCX matches messages of one tag in order, and so are messages given. To another machine long messages take
turns on several endpoints, each with a tag of its own: see `ucx_send`.

**Back-pressure.** UCX buffers what nobody receives without a bound, so the pipe has a window: the receiver reports
what was taken, the sender holds back what exceeds the window.

**The end.** Closing an endpoint is abrupt, and with a long send in flight the other end was not told at all. So a pipe
ends with FIN and its answer, or with RST; a killed process is noticed by UCX (measured: 1 to 7 ms) and reported by the
endpoint's close callback.
Two habits shape `UcxPipe._release`: `UCXEndpoint.close()` on an endpoint that failed crashes the process (so only
`close_blocking()`, 60 us, which also ends what is being sent); and a receive belongs to the worker, not to the
endpoint, so it stays posted until it is cancelled, and one that has begun to arrive goes on. Every request is kept
with its buffer until it has completed.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from transport.base import AddressError
from transport.buffers import Landings
from transport.ucx_binding import CONFIG, OPERATORS, network_devices, ucx
from transport.ucx_direct import CUDA, Transfer, UcxFailure, drain
from transport.ucx_life import WORD_BYTES, word
from transport.ucx_pipe import UcxPipe
from transport.ucx_receive import Slot
from transport.waiting import SPIN_S, Gate, wait_any

_PREFIX = b"ucx4"
_VERSION = struct.Struct("<3B")
_TAG = struct.Struct("<Q")
_CHECK_BYTES = 8
_HELLO = struct.Struct(f"<8sQQQ{WORD_BYTES}s")
_HELLO_MAGIC = b"ISTHUCX4"
_HELLO_LIMIT = 4096

_UNACCEPTED = 64
_LINGER_S = 1.0
#: Calls of UCX's progress between two looks at what came of them.
_STEPS = (1, 2, 4, 8)
#: What has arrived and nobody asked for may take so long to be whole when the worker ends.
_DRAIN_S = 0.1
#: After how many waits that UCX refused, and in which nothing moved (50 us each), the next ones are slept, and for how
#: long: a neighbour that computes, or is stopped, must not cost a core here. It took 85 % of one, and takes 11 %.
_VAIN_ARMS, _REST_S = 20, 0.5e-3
#: Over TCP an endpoint is a connection (ucx#4221), and one connection fills no wide link.
_STREAMS = 4


class UcxListener:
    """A tag on the fabric's worker that hellos are sent to."""

    def __init__(self, fabric: UcxFabric) -> None:
        self._fabric = fabric
        tag = _random_tag()
        self._waiting: deque[UcxPipe] = deque()
        self._slot = Slot(fabric._worker.handle, tag, _HELLO_LIMIT)
        body = _PREFIX + _VERSION.pack(*ucx.get_ucx_version()) + _TAG.pack(tag) + word() + fabric._address
        self.address = body + _checksum(body)
        fabric._listeners[self] = None
        fabric._dirty = True

    def accept(self) -> UcxPipe | None:
        """The next pipe, or None."""
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Stop accepting; pipes nobody accepted break."""
        if self._fabric._listeners.pop(self, self) is None:
            self._fabric._graveyard.extend(self._slot.release())
        while self._waiting:
            self._waiting.popleft().abort()

    def _advance(self) -> bool:
        moved = False
        while True:
            try:
                if not self._slot.arrived():
                    return moved
                moved = True
                self._welcome(self._slot.view)
            except (UcxFailure, ucx.UCXError, ValueError, struct.error):
                pass  # not a hello, or from somebody who cannot be reached: nothing to answer

    def _welcome(self, view: memoryview) -> None:
        magic, length, here, there, life = _HELLO.unpack_from(view)
        if magic != _HELLO_MAGIC or not _HELLO.size + _CHECK_BYTES < length <= view.nbytes:
            return
        hello = bytes(view[:length])
        if not _intact(hello) or (here | there) & 0xFF or here in self._fabric._tags:
            return
        if len(self._waiting) >= _UNACCEPTED:
            self._waiting.popleft().abort()
        address = hello[_HELLO.size : -_CHECK_BYTES]
        pipe = UcxPipe(self._fabric, address, life, send_tag=there, receive_tag=here, connecting=False)
        pipe.answer()
        self._waiting.append(pipe)


class UcxFabric:
    """The UCX backend of one thread: one context and one worker, made at the first `listen` or `connect`.

    config: UCX settings beside `CONFIG`, without the UCX_ prefix. linger_s: how long a goodbye may take. streams:
    endpoints that long messages to a process on another machine go over in turn, at most `LANES`.
    """

    name = "ucx"

    def __init__(
        self,
        *,
        spin_s: float = SPIN_S,
        linger_s: float = _LINGER_S,
        streams: int = _STREAMS,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self.spin_s = spin_s
        self.linger_s = linger_s
        self.streams = streams
        self._config = dict(config or {})
        self._gate = Gate()
        self._context: Any = None
        self._worker: Any = None
        self._once: Callable[[], bool] | None = None
        #: Where UCX is told that memory of a device lies; None where this UCX has no CUDA.
        self.device_memory: int | None = None
        self._address = b""
        self._pipes: dict[UcxPipe, None] = {}
        self._bulky: dict[UcxPipe, None] = {}
        self._listeners: dict[UcxListener, None] = {}
        self._tags: set[int] = set()
        self._again: dict[UcxPipe, None] = {}
        self._landings = Landings()
        self._graveyard: list[Transfer] = []
        self._dirty = False
        self._vain = 0
        self._expiry = 0.0

    def listen(self, host: str = "127.0.0.1") -> UcxListener:
        """Accept pipes. The first call fixes the network device: the one that has `host`; see `network_devices`."""
        self._start(host)
        return UcxListener(self)

    def connect(self, address: bytes) -> UcxPipe:
        """Begin a pipe. Raises AddressError for an address that is not a listener's or not of a fitting UCX."""
        body = address[:-_CHECK_BYTES]
        life = len(_PREFIX) + _VERSION.size + _TAG.size
        start = life + WORD_BYTES
        if not address.startswith(_PREFIX) or len(body) <= start or not _intact(address):
            raise AddressError(f"not a ucx address: {address[:16]!r}; give one from UcxFabric.listen")
        theirs, ours = _VERSION.unpack_from(address, len(_PREFIX)), ucx.get_ucx_version()
        if theirs[:2] != ours[:2]:
            raise AddressError(
                f"the neighbour runs UCX {'.'.join(map(str, theirs))}, this end {'.'.join(map(str, ours))}; "
                "worker addresses differ between releases (ucx#10376): install the same, or use tcp"
            )
        self._start(None)
        (listener,) = _TAG.unpack_from(address, len(_PREFIX) + _VERSION.size)
        there, here = _random_tag(), _random_tag()
        try:
            pipe = UcxPipe(self, body[start:], body[life:start], send_tag=there, receive_tag=here, connecting=True)
        except ucx.UCXError as error:
            raise AddressError(f"ucx cannot reach that address: {error}; use tcp") from None
        length = _HELLO.size + len(self._address) + _CHECK_BYTES
        hello = _HELLO.pack(_HELLO_MAGIC, length, there, here, word()) + self._address
        pipe._out.post(hello + _checksum(hello), listener)
        self._dirty = True
        return pipe

    def progress(self) -> bool:
        """Let UCX work, then look at what completed."""
        once = self._once
        if once is None:
            return False
        if self._bulky:
            for pipe in tuple(self._bulky):
                pipe.pump()
        moved = False
        if self._dirty:
            self._dirty = False
            moved = once()
            return self._look() or moved
        # The first thing that arrives is looked at straight away. Where that was a part of a long message, most of what
        # follows is too, and looking costs more than a part: so from then on not after every one.
        for steps in _STEPS:
            left = steps
            while left and once():
                left -= 1
            if left == steps:
                break
            moved = True
            self._vain = 0
            if self._look():
                return True
            if left:
                break
        if moved:
            return True  # a part of something: who waits does well to look again before it sleeps
        if self._again:
            return self._look()
        now = time.monotonic()
        if now >= self._expiry:
            self._expiry = now + 0.02
            self._expire(now)
        return False

    def _look(self) -> bool:
        moved = False
        self._again.clear()
        for pipe in tuple(self._pipes):
            if pipe._advance():
                moved = True
        if not moved and self._listeners:
            for listener in tuple(self._listeners):
                if listener._advance():
                    moved = True
        if self._graveyard:
            self._graveyard = [transfer for transfer in self._graveyard if not transfer.completed]
        return moved

    def _expire(self, now: float) -> None:
        for pipe in tuple(self._pipes):
            pipe._expire(now)
        for key, _ in self._gate.selector.select(0):
            if isinstance(key.data, UcxPipe):  # its process has ended: nothing more arrives than what is here
                key.data._failed = self._dirty = True

    def wait(self, timeout_s: float) -> None:
        """Spin, then sleep until UCX has an event."""
        wait_any((self,), timeout_s, spin_s=self.spin_s)

    def wake(self) -> None:
        """Interrupt a wait."""
        self._gate.wake()

    def take_wake(self) -> bool:
        """Consume a wake-up."""
        return self._gate.take_wake()

    def fileno(self) -> int:
        """Readable when UCX has an event or `wake` was called. Arm before waiting, every time."""
        return self._gate.fileno()

    def arm(self) -> bool:
        """False when UCX has work already."""
        if self._worker is None:
            return not self._gate.ready()
        if self._dirty or self._again:
            return False
        if not self._worker.arm():
            # What waits for room in a neighbour's queue in shared memory cannot be waited for: UCX calls it work.
            self._vain += 1
            if self._vain > _VAIN_ARMS:
                time.sleep(_REST_S)
            return False
        self._vain = 0
        return not self._gate.ready()

    def close(self) -> None:
        """Let goodbyes finish (at most `linger_s`), abort the rest, then destroy the worker and the context."""
        if self._worker is not None:
            for listener in tuple(self._listeners):
                listener.close()
            for pipe in tuple(self._pipes):
                if pipe._release_by is None:
                    pipe.abort()
            deadline = time.monotonic() + self.linger_s
            while self._pipes and time.monotonic() < deadline:
                self.wait(0.01)
                now = time.monotonic()
                for pipe in tuple(self._pipes):
                    pipe._expire(now)
            for pipe in tuple(self._pipes):
                pipe._release()
            self._graveyard += drain(self._worker.handle, self._worker.progress_once, _DRAIN_S)
            self._gate.selector.unregister(self._worker.epoll_file_descriptor)
            buffers = [transfer.kept for transfer in self._graveyard]
            for transfer in self._graveyard:
                transfer.abandon()
            self._graveyard.clear()
            self._worker = self._context = self._once = None
            del buffers  # UCX may have written into them up to here
        self._gate.close()

    def _start(self, host: str | None) -> None:
        if self._worker is not None:
            return
        config = {**CONFIG, **network_devices(host), **self._config}
        config = {name: value for name, value in config.items() if f"UCX_{name}" not in OPERATORS}
        self._context = ucx.UCXContext(config, (ucx.Feature.TAG, ucx.Feature.WAKEUP))
        self._worker = ucx.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self._once = self._worker.progress_once
        if self._context.cuda_support:
            self.device_memory = CUDA
        self._address = self._worker.address.tobytes()
        self._gate.selector.register(self._worker.epoll_file_descriptor, selectors.EVENT_READ, self)


def _random_tag() -> int:
    """A tag nobody else draws: the low byte is the lane."""
    return int.from_bytes(os.urandom(7), "little") << 8


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2s(body, digest_size=_CHECK_BYTES).digest()


def _intact(message: bytes) -> bool:
    return _checksum(message[:-_CHECK_BYTES]) == message[-_CHECK_BYTES:]
