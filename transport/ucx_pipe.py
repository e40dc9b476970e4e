"""The pipe of the UCX backend: one endpoint, two tags a direction. See `transport.ucx` for how it all fits together.

What a message costs here is Python: a send 3 us, a receive and posting the next one 4 us (UCXX 0.52), where UCX itself
takes 0.1 us over shared memory. So nothing is called twice, and what can wait until nothing arrives does.
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
from transport.tickets import DONE, again, size_bytes
from transport.ucx_binding import Array, ucx
from transport.ucx_life import watch
from transport.ucx_receive import Arrivals, Slots
from transport.ucx_wire import (
    CONTROL,
    CREDIT,
    DATA,
    FIN,
    FIN_ACK,
    LONG,
    RST,
    SMALL_BYTES,
    lay_out,
)

if TYPE_CHECKING:
    from transport.ucx import UcxFabric

_WINDOW_BYTES = 64 << 20
#: How long a connector waits for the listener's answer, and the end that answered a FIN keeps the endpoint for it.
CONNECT_S = 10.0
ANSWER_S = 0.2


class _Failed:
    """A request that UCX refused: complete, in its way."""

    completed = True


_FAILED = _Failed()


class _Tickets:
    """The fate of a message sent from where it lies."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: list[Any] | None = None  # None: still held back by the window

    @property
    def done(self) -> bool:
        """True once UCX needs the buffers no more."""
        if self._requests is None:
            return False
        self._requests = [request for request in self._requests if not request.completed]
        return not self._requests


class UcxPipe:
    """One endpoint and two tags a direction. Control messages are read ahead; messages are given in order."""

    def __init__(
        self, fabric: UcxFabric, address: bytes, life: bytes, *, send_tag: int, receive_tag: int, connecting: bool
    ) -> None:
        self._fabric = fabric
        self._name = f"ucx pipe {receive_tag >> 8:014x}"
        self._endpoint: Any = ucx.UCXEndpoint.create_from_worker_address(
            fabric._worker, ucx.UCXAddress.create_from_buffer(address), True
        )
        self._send_tag, self._send_bulk = ucx.UCXXTag(send_tag), ucx.UCXXTag(send_tag | 1)
        self._tag = receive_tag
        self._failed = False
        self._life: int | None = None
        self._endpoint.set_close_callback(self._on_close)
        self._answered_by = time.monotonic() + CONNECT_S if connecting else None
        self._trusted = connecting
        self._given = 0
        self._sending: deque[tuple[Any, Any, int]] = deque()
        self._sending_bytes = 0
        self._held: deque[tuple[Sequence[Buffer], int, _Tickets | None]] = deque()
        self._held_bytes = 0
        self._sent_bytes = self._credited_bytes = 0
        self._taken_bytes = self._reported_bytes = 0
        self._inbox: deque[memoryview] = deque()
        self._bulk = BulkQueue()
        self._fin_arrived = False
        self._ended: TransportError | None = None
        self._release_by: float | None = None
        self._released = False
        self._slots = Slots(self._endpoint, ucx.UCXXTag(receive_tag))
        self._arrivals = Arrivals(self._endpoint, ucx.UCXXTag(receive_tag | 1), 2 * _WINDOW_BYTES)
        fabric._pipes[self] = None
        fabric._tags.add(receive_tag)
        try:
            self._life = watch(life)
        except ProcessLookupError:
            self._failed = True
        if self._life is not None:
            fabric._gate.selector.register(self._life, selectors.EVENT_READ, self)

    # -- the seam

    def send(self, parts: Sequence[Buffer]) -> Ticket:
        """Hand a message to UCX, or hold it back while the neighbour takes nothing."""
        if self._ended is not None or self._failed:
            raise self._ended_error()
        length = size_bytes(parts)
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes exceeds {MAX_MESSAGE_BYTES}; send it in pieces")
        small = length <= SMALL_BYTES
        if self._held or self._sent_bytes - self._credited_bytes >= _WINDOW_BYTES:
            ticket = None if small else _Tickets()
            self._held.append(((b"".join(parts),) if small else parts, length, ticket))
            self._held_bytes += length
            return DONE if ticket is None else ticket
        if small:
            self._sent_bytes += length
            self._post(b"".join((CONTROL.pack(DATA, 0, 0, 0, length), *parts)), self._send_tag)
            return DONE
        tickets = _Tickets()
        self._send_long(parts, length, tickets)
        return tickets

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

    def take(self, bulk: bool = True) -> memoryview | None:
        """The next whole message, or None. There is one queue, so `bulk` makes no difference here."""
        if self._inbox:
            message = self._inbox.popleft()
            self._taken_bytes += message.nbytes
            if self._taken_bytes - self._reported_bytes >= _WINDOW_BYTES // 4 and not self._released:
                self._report()
            return message
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
        self._reap()
        return self._held_bytes + self._sending_bytes

    @property
    def bulk_pending_bytes(self) -> int:
        """Bytes of bulk that UCX was not given yet."""
        return self._bulk.pending_bytes

    @property
    def least_rtt_s(self) -> float | None:
        """UCX does not tell."""
        return None

    def close(self) -> None:
        """Say FIN behind what was sent; the fabric waits for the answer and releases the endpoint."""
        self._inbox.clear()
        self._bulk.clear()
        if self._ended is None and not self._failed:
            self._ended = ChannelClosed(f"{self._name}: closed at this end")
            self._release_by = time.monotonic() + self._fabric.linger_s
            self._trusted = True  # read on, so that the answer is seen behind whatever arrives
            if not self._held:
                self._control(FIN)
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
                self._held.clear()
                self._control(RST)
                self._release_by = time.monotonic() + ANSWER_S
                self._fabric._dirty = True
                return
        if self._release_by is None:
            self._release()

    # -- sending

    def answer(self) -> None:
        """Tell the connector that its hello arrived."""
        self._control(CREDIT)

    def _control(self, kind: int, value: int = 0) -> None:
        self._post(CONTROL.pack(kind, 0, 0, 0, value), self._send_tag)

    def _post(self, data: Any, tag: Any) -> Any:
        """Send one UCX message and keep what it needs until it has completed."""
        array = Array(data)
        try:
            request = self._endpoint.tag_send(array, tag)
        except ucx.UCXError:
            self._fabric._dirty = self._failed = True  # the next progress tells
            return _FAILED
        if not request.completed:
            self._fabric._dirty = True
            self._sending.append((request, array, array.nbytes))
            self._sending_bytes += array.nbytes
        return request

    def _send_long(self, parts: Sequence[Buffer], length: int, tickets: _Tickets) -> None:
        layout = lay_out(parts, length)
        self._sent_bytes += length
        self._post(layout.control, self._send_tag)
        tickets._requests = [self._post(view, self._send_bulk) for view in layout.bulk]

    def _release_held(self) -> None:
        while self._held and self._sent_bytes - self._credited_bytes < _WINDOW_BYTES:
            parts, length, tickets = self._held.popleft()
            self._held_bytes -= length
            if tickets is None:
                self._sent_bytes += length
                self._post(b"".join((CONTROL.pack(DATA, 0, 0, 0, length), *parts)), self._send_tag)
            else:
                self._send_long(parts, length, tickets)
            if not self._held and self._release_by is not None and not self._fin_arrived:
                self._control(FIN)

    def _report(self) -> None:
        if not self._failed and (self._ended is None or self._release_by is not None):
            self._reported_bytes = self._taken_bytes
            self._control(CREDIT, self._taken_bytes)

    def _reap(self) -> None:
        sending = self._sending
        while sending and sending[0][0].completed:
            self._sending_bytes -= sending.popleft()[2]

    # -- receiving, driven by the fabric

    def _advance(self) -> bool:
        """Read what arrived, complete what was sent. True if a message or the end arrived."""
        if self._released:
            return False
        if self._sending:
            self._reap()
        before = len(self._inbox)
        ended = self._ended
        slots = self._slots
        while self._trusted or not self._given:
            try:
                slot = slots.peek()
                if slot is None:
                    break
                self._read(slot)
            except ucx.UCXError:
                break  # canceled or reset: the close callback says so as well
            except (TransportError, struct.error) as error:
                self._break(str(error))
                return True
            if self._released:
                return True
            slots.drop()
        if self._fin_arrived or len(self._arrivals):
            self._assemble()
        if self._held and not self._failed:
            self._release_held()
        if self._failed:
            self._fail()
        return len(self._inbox) != before or self._ended is not ended

    def _read(self, slot: memoryview) -> None:
        kind, _, _, _, value = CONTROL.unpack_from(slot)
        self._answered_by = None
        if kind == DATA:
            if value > (SMALL_BYTES if self._trusted else FIRST_MESSAGE_BYTES):
                raise ChannelBroken(f"a short message of {value} bytes")
            message = memoryview(bytearray(slot[CONTROL.size : CONTROL.size + value]))
            self._given += 1
            if len(self._arrivals):
                self._arrivals.behind(message)
            elif self._ended is None:
                self._inbox.append(message)
        elif kind == LONG:
            if not self._trusted:
                raise ChannelBroken("a long message before the hello was believed")
            self._arrivals.begin(slot)
            self._given += 1
        elif kind == CREDIT:
            if not self._credited_bytes <= value <= self._sent_bytes:
                raise ChannelBroken("an impossible credit")
            self._credited_bytes = value
        elif kind == FIN:
            self._fin_arrived = True
            self._control(FIN_ACK)
        elif kind == FIN_ACK:
            if self._release_by is not None:
                self._release()
        elif kind == RST:
            self._break("the other end aborted")
        else:
            raise ChannelBroken(f"a control message of kind {kind}")

    def _assemble(self) -> None:
        while (message := self._arrivals.next()) is not None:
            if self._ended is None:
                self._inbox.append(message)
        if len(self._arrivals):
            return
        if self._fin_arrived:
            if self._ended is None:
                self._ended = ChannelClosed(f"{self._name}: the other end closed")
                self._release_by = time.monotonic() + ANSWER_S
            elif self._release_by is not None:
                self._release_by = min(self._release_by, time.monotonic() + ANSWER_S)

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
            self._endpoint.raise_on_error()
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
            aborted = isinstance(self._ended, ChannelBroken) and not self._sending
            if now >= self._release_by or aborted:
                self._release()

    def _release(self) -> None:
        """Close the endpoint. Requests that UCX still holds go to the fabric, with their buffers, until they end."""
        if self._released:
            return
        self._released = True
        fabric = self._fabric
        if self._ended is None:
            self._ended = ChannelClosed(f"{self._name}: closed at this end")
        fabric._pipes.pop(self, None)
        fabric._bulky.pop(self, None)
        self._bulk.clear()
        if self._life is not None:
            fabric._gate.selector.unregister(self._life)
            os.close(self._life)
            self._life = None
        fabric._tags.discard(self._tag)
        endpoint, self._endpoint = self._endpoint, None
        endpoint.remove_close_callback()
        endpoint.close_blocking()
        fabric._worker.cancel_inflight_requests(0, 1)
        leftovers = [(request, array) for request, array, _ in self._sending]
        leftovers += self._slots.release() + self._arrivals.release()
        fabric._graveyard.extend(pair for pair in leftovers if not pair[0].completed)
        fabric._dirty = True
        self._sending.clear()
        self._sending_bytes = self._held_bytes = 0
        for _, _, tickets in self._held:
            if tickets is not None:
                tickets._requests = []
        self._held.clear()
