"""The pipe of the UCX backend: endpoints, and two tags or more a direction. See `transport.ucx` for how it all fits.

What a message costs here is Python (UCX itself takes 0.1 us over shared memory): so nothing is called twice, and what
can wait until nothing arrives does.
"""

from __future__ import annotations

import os
import selectors
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transport.base import (
    FIRST_MESSAGE_BYTES,
    MAX_MESSAGE_BYTES,
    Buffer,
    ChannelBroken,
    ChannelClosed,
    Source,
    Ticket,
    TransportError,
)
from transport.bulk import BulkQueue
from transport.device_buffers import DeviceBuffer, Landed
from transport.tickets import again, size_bytes
from transport.ucx_binding import ucx
from transport.ucx_life import is_near, watch
from transport.ucx_receive import Arrivals, Slot
from transport.ucx_send import WINDOW_BYTES, Lane, Outbox
from transport.ucx_wire import CONTROL, CREDIT, DATA, FIN, FIN_ACK, LANES, LONG, RST, SMALL_BYTES

if TYPE_CHECKING:
    from transport.ucx import UcxFabric

#: How long a connector waits for the listener's answer, and the end that answered a FIN keeps the endpoint for it.
CONNECT_S = 10.0
ANSWER_S = 0.2
#: What is received at once from a process of this machine: two messages of 1 MiB, so that the next is announced while
#: one arrives, but not so many that what is copied leaves the processor's cache (1 MiB: 10 GB/s so, 8 with four).
AHEAD_BYTES = 2 << 20

_unpack_control = CONTROL.unpack_from
_CONTROL_BYTES = CONTROL.size


class UcxPipe:
    """Messages to and from one neighbour. Control messages are read ahead by one; messages are given in order."""

    def __init__(
        self, fabric: UcxFabric, address: bytes, life: bytes, *, send_tag: int, receive_tag: int, connecting: bool
    ) -> None:
        self._fabric = fabric
        self._name = f"ucx pipe {receive_tag >> 8:014x}"
        self._address = address
        self._failed = False
        self._endpoints: list[Any] = []
        self._streams = min(1 if is_near(life) else fabric.streams, LANES)
        self._tag = receive_tag
        self._life: int | None = None
        self._answered_by = time.monotonic() + CONNECT_S if connecting else None
        self._trusted = connecting
        self._given = 0
        self._taken_bytes = self._reported_bytes = 0
        self._inbox: deque[memoryview | Landed] = deque()
        self._bulk = BulkQueue()
        self._fin_arrived = self._fin_answered = False
        self._ended: TransportError | None = None
        self._release_by: float | None = None
        self._released = False
        worker = fabric._worker.handle
        self._out = Outbox(self._endpoint(), send_tag, self._lanes)
        self._slot = Slot(worker, receive_tag)
        ahead = AHEAD_BYTES if is_near(life) else MAX_MESSAGE_BYTES
        self._arrivals = Arrivals(worker, receive_tag, 2 * WINDOW_BYTES, fabric._landings, ahead)
        #: Whether parts of what is sent, and `land`, may be memory of a device.
        self.takes_device = fabric.device_memory is not None
        if fabric.device_memory is not None:
            self._out.device_memory = self._arrivals.device_memory = fabric.device_memory
        fabric._pipes[self] = None
        fabric._again[self] = None
        fabric._tags.add(receive_tag)
        try:
            self._life = watch(life)
        except ProcessLookupError:
            self._failed = True
        if self._life is not None:
            fabric._gate.selector.register(self._life, selectors.EVENT_READ, self)

    def _endpoint(self) -> int:
        """The handle of another endpoint to the neighbour."""
        address = ucx.UCXAddress.create_from_buffer(self._address)
        endpoint = ucx.UCXEndpoint.create_from_worker_address(self._fabric._worker, address, True)
        endpoint.set_close_callback(self._on_close)
        self._endpoints.append(endpoint)
        handle: int = endpoint.handle
        return handle

    def _lanes(self) -> list[Lane]:
        """The endpoints of long messages: the pipe's own, or where the neighbour is on another machine, several."""
        if self._streams == 1:
            return [Lane(self._out.endpoint, 1)]
        try:
            return [Lane(self._endpoint(), number) for number in range(1, self._streams + 1)]
        except ucx.UCXError:
            self._on_close()  # the next progress tells
            return [Lane(self._out.endpoint, 1)]

    # -- the seam

    def send(self, parts: Sequence[Buffer]) -> Ticket:
        """Hand a message to UCX, or hold it back while the neighbour takes nothing."""
        if self._ended is not None or self._failed:
            raise self._ended_error()
        length = size_bytes(parts)
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes exceeds {MAX_MESSAGE_BYTES}; send it in pieces")
        out = self._out
        ticket = out.send(parts, length)
        if out.sending or out.failed:
            self._fabric._dirty = True
        return ticket

    def send_bulk(self, source: Source) -> None:
        """Queue a source; its pieces go when little else waits."""
        if self._ended is not None or self._failed:
            raise self._ended_error()
        self._fabric._bulky[self] = None
        self._bulk.add(source, self)

    def pump(self) -> bool:
        """Let bulk go as far as there is room. True if there was."""
        if not self._bulk or self._ended is not None or self._failed:
            self._bulk.clear()
            self._fabric._bulky.pop(self, None)
            return False
        return self._bulk.pump(self)

    def land(self, target: DeviceBuffer | None) -> None:
        """Receive the payload of the next message into memory of a device, if it has that size and is not here yet:
        `take` then gives it as `Landed`. None: no more.
        """
        self._arrivals.landing = None if self._inbox else target

    @property
    def is_landing(self) -> bool:
        """Whether a message is under way into memory of a device."""
        return self._arrivals.is_landing

    def take(self, bulk: bool = True) -> memoryview | None:
        """The next whole message, or None; as `Landed` where `land` was called before. There is one queue, so `bulk`
        makes no difference here.
        """
        if self._inbox:
            message: Any = self._inbox.popleft()
            self._taken_bytes += message.nbytes
            if self._taken_bytes - self._reported_bytes >= WINDOW_BYTES // 4 and not self._released:
                self._report()
            given: memoryview = message
            return given
        if self._ended is not None:
            raise again(self._ended)
        return None

    def trust(self) -> None:
        """Take any number of messages of any legal size from here on."""
        self._trusted = True
        self._fabric._dirty = True

    @property
    def pending_bytes(self) -> int:
        """Bytes held back by the window or not yet handed on by UCX."""
        out = self._out
        if out.sending:
            out.reap()
        return out.pending_bytes

    @property
    def bulk_pending_bytes(self) -> int:
        """Bytes of bulk that UCX was not given yet."""
        return self._bulk.pending_bytes

    @property
    def left_bytes(self) -> int:
        """Bytes that UCX has handed on."""
        self._out.reap()
        return self._out.sent_bytes - self._out.sending_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes of long messages whose parts are on their way."""
        return self._arrivals.waiting_bytes

    @property
    def grain_bytes(self) -> int:
        """UCX tells when a message has left or arrived, and nothing before: the oldest that is on its way."""
        sending = self._out.sending
        return max(sending[0].nbytes if sending else 0, self._arrivals.oldest_bytes)

    @property
    def bytes_per_s(self) -> float | None:
        """UCX does not tell."""
        return None

    @property
    def least_rtt_s(self) -> float | None:
        """UCX does not tell."""
        return None

    def close(self) -> None:
        """Say FIN behind what was sent; the fabric waits for the answer and releases the endpoints."""
        self._inbox.clear()
        self._bulk.clear()
        if self._ended is None and not self._failed:
            self._ended = ChannelClosed(f"{self._name}: closed at this end")
            self._release_by = time.monotonic() + self._fabric.linger_s
            self._trusted = True  # read on, so that the answer is seen behind whatever arrives
            if not self._out.held:
                self._out.control(FIN)
        elif self._release_by is None:
            self._release()
        self._fabric._dirty = True

    def abort(self) -> None:
        """Say RST if it can be said, and release."""
        self._inbox.clear()
        self._bulk.clear()
        if self._ended is None:
            self._ended = ChannelBroken(f"{self._name}: aborted at this end")
            if not self._failed:
                self._out.drop_held()
                self._out.control(RST)
                self._release_by = time.monotonic() + ANSWER_S
                self._fabric._dirty = True
                return
        if self._release_by is None:
            self._release()

    # -- driven by the fabric

    def answer(self) -> None:
        """Tell the connector that its hello arrived."""
        self._out.control(CREDIT)

    def _report(self) -> None:
        if not self._failed and (self._ended is None or self._release_by is not None):
            self._reported_bytes = self._taken_bytes
            self._out.control(CREDIT, self._taken_bytes)

    def _advance(self) -> bool:
        """Read a control message if there is one, complete what was sent. True if anything came of it.

        One that was read may have others behind it: the fabric calls again before it sleeps.
        """
        if self._released:
            return False
        out = self._out
        moved = bool(out.sending) and out.reap()
        ended = self._ended
        try:
            if (self._trusted or not self._given) and self._slot.arrived():
                self._fabric._again[self] = None
                moved = self._read(self._slot.view) or moved
            if self._arrivals.waiting or self._fin_arrived:
                moved = self._assemble() or moved
        except (TransportError, struct.error) as error:
            if not self._failed:
                self._break(str(error))
        if out.held and not self._failed and not self._released:
            out.release_held()
            if not out.held and self._release_by is not None and not self._fin_arrived:
                out.control(FIN)
        if self._failed or out.failed:
            self._fail()
        return moved or self._ended is not ended

    def _read(self, slot: memoryview) -> bool:
        """Act on a control message. True if it was a message."""
        kind, _, _, _, value = _unpack_control(slot)
        self._answered_by = None
        if kind == DATA:
            if value > (SMALL_BYTES if self._trusted else FIRST_MESSAGE_BYTES):
                raise ChannelBroken(f"a short message of {value} bytes")
            message = memoryview(bytearray(slot[_CONTROL_BYTES : _CONTROL_BYTES + value]))
            self._given += 1
            self._arrivals.landing = None
            if self._arrivals.waiting:
                self._arrivals.behind(message)
            elif self._ended is None:
                self._inbox.append(message)
                return True
        elif kind == LONG:
            if not self._trusted:
                raise ChannelBroken("a long message before the hello was believed")
            self._arrivals.begin(slot)
            self._given += 1
        elif kind == CREDIT:
            if not self._out.credit(value):
                raise ChannelBroken("an impossible credit")
        elif kind == FIN:
            self._fin_arrived = True  # answered when all that was sent before it has arrived
        elif kind == FIN_ACK:
            if self._release_by is not None:
                self._release()
        elif kind == RST:
            self._break("the other end aborted")
        else:
            raise ChannelBroken(f"a control message of kind {kind}")
        return False

    def _assemble(self) -> bool:
        moved = False
        while (message := self._arrivals.next()) is not None:
            if self._ended is None:
                self._inbox.append(message)
                moved = True
        if self._fin_arrived and not self._arrivals.waiting:
            if not self._fin_answered:
                self._fin_answered = True
                self._out.control(FIN_ACK)
            if self._ended is None:
                self._ended = ChannelClosed(f"{self._name}: the other end closed")
                self._release_by = time.monotonic() + ANSWER_S
            elif self._release_by is not None:
                self._release_by = min(self._release_by, time.monotonic() + ANSWER_S)
        return moved

    # -- the end

    def _on_close(self, *_: object) -> None:
        # Called by UCX in the middle of its progress: only note it.
        self._failed = True
        self._fabric._dirty = True

    def _fail(self) -> None:
        if self._released:
            return
        why = "connection lost"
        try:
            for endpoint in self._endpoints:
                endpoint.raise_on_error()
        except ucx.UCXError as error:
            why = str(error).rsplit("error: ", 1)[-1]
        self._break(why)

    def _break(self, why: str) -> None:
        if self._ended is None:
            self._ended = ChannelBroken(f"{self._name}: {why}; the neighbour is gone")
        self._release()

    def _ended_error(self) -> TransportError:
        if self._ended is None:
            return ChannelBroken(f"{self._name}: connection lost; the neighbour is gone")
        return again(self._ended)

    def _expire(self, now: float) -> None:
        if self._answered_by is not None and now >= self._answered_by and self._ended is None:
            self._break(f"no answer within {CONNECT_S:g} s")
        elif self._release_by is not None:
            aborted = isinstance(self._ended, ChannelBroken) and not self._out.sending
            if now >= self._release_by or aborted:
                self._release()

    def _release(self) -> None:
        """Close the endpoints. What UCX still holds goes to the fabric, with its buffers, until it ends."""
        if self._released:
            return
        self._released = True
        fabric = self._fabric
        if self._ended is None:
            self._ended = ChannelClosed(f"{self._name}: closed at this end")
        fabric._pipes.pop(self, None)
        fabric._bulky.pop(self, None)
        fabric._again.pop(self, None)
        self._bulk.clear()
        if self._life is not None:
            fabric._gate.selector.unregister(self._life)
            os.close(self._life)
            self._life = None
        fabric._tags.discard(self._tag)
        for endpoint in self._endpoints:
            endpoint.remove_close_callback()
            endpoint.close_blocking()
        self._endpoints.clear()
        left = [*self._out.release(), *self._slot.release(), *self._arrivals.release()]
        fabric._graveyard.extend(left)
        fabric._dirty = True
