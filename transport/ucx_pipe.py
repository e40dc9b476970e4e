"""The pipe of the UCX backend: one endpoint, two tags a direction. See `transport.ucx` for how it all fits together."""

from __future__ import annotations

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
    Ticket,
    TransportError,
)
from transport.tickets import DONE, again, flat, fresh, size_bytes
from transport.ucx_binding import Array, ucx

if TYPE_CHECKING:
    from transport.ucx import UcxFabric

_CONTROL = struct.Struct("<BBHIQ")
_DATA, _LONG, _FIN, _FIN_ACK, _RST, _CREDIT = 1, 2, 3, 4, 5, 6
_PIECE = struct.Struct("<Q")
_BULK_BIT = 1 << 63
_PIECES = 32

#: A 70B model's activation is 16 KiB a token: it fits a slot, so that a hop is one message.
_SLOT_BYTES = 32 * 1024
_SLOTS = 4
#: Parts from here on are sent from where they lie.
_BULK_BYTES = 8 * 1024
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


class _Arrival:
    """A message on its way: the buffer it is assembled in and the receives it waits for."""

    __slots__ = ("buffer", "requests")

    def __init__(self, buffer: memoryview, requests: list[Any]) -> None:
        self.buffer = buffer
        self.requests = requests


class UcxPipe:
    """One endpoint and two tags a direction. Control messages are read ahead; messages are given in order."""

    def __init__(self, fabric: UcxFabric, address: bytes, *, send_tag: int, receive_tag: int, connecting: bool) -> None:
        self._fabric = fabric
        self._name = f"ucx pipe {receive_tag >> 8:014x}"
        self._endpoint: Any = ucx.UCXEndpoint.create_from_worker_address(
            fabric._worker, ucx.UCXAddress.create_from_buffer(address), True
        )
        self._send_tag, self._send_bulk = ucx.UCXXTag(send_tag), ucx.UCXXTag(send_tag | 1)
        self._receive_tag, self._receive_bulk = ucx.UCXXTag(receive_tag), ucx.UCXXTag(receive_tag | 1)
        self._tag = receive_tag
        self._failed = False
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
        self._arriving: deque[_Arrival] = deque()
        self._arriving_bytes = 0
        self._inbox: deque[memoryview] = deque()
        self._fin_arrived = False
        self._ended: TransportError | None = None
        self._release_by: float | None = None
        self._released = False
        self._slots: list[tuple[memoryview, Any]] = []
        self._posted: list[Any] = []
        self._head = 0
        for _ in range(_SLOTS):
            view = fresh(_SLOT_BYTES)
            array = Array(view)
            self._slots.append((view, array))
            self._posted.append(self._endpoint.tag_recv(array, self._receive_tag))
        fabric._pipes[self] = None
        fabric._tags.add(receive_tag)

    # -- the seam

    def send(self, parts: Sequence[Buffer]) -> Ticket:
        """Hand a message to UCX, or hold it back while the neighbour takes nothing."""
        if self._ended is not None or self._failed:
            raise self._ended_error()
        length = size_bytes(parts)
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes exceeds {MAX_MESSAGE_BYTES}; send it in pieces")
        small = length <= _SLOT_BYTES - _CONTROL.size
        if self._held or self._sent_bytes - self._credited_bytes >= _WINDOW_BYTES:
            ticket = None if small else _Tickets()
            self._held.append(((b"".join(parts),) if small else parts, length, ticket))
            self._held_bytes += length
            return DONE if ticket is None else ticket
        if small:
            self._sent_bytes += length
            self._post(b"".join((_CONTROL.pack(_DATA, 0, 0, 0, length), *parts)), self._send_tag)
            return DONE
        tickets = _Tickets()
        self._send_long(parts, length, tickets)
        return tickets

    def take(self) -> memoryview | None:
        """The next whole message, or None."""
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

    def close(self) -> None:
        """Say FIN behind what was sent; the fabric waits for the answer and releases the endpoint."""
        self._inbox.clear()
        if self._ended is None and not self._failed:
            self._ended = ChannelClosed(f"{self._name}: closed at this end")
            self._release_by = time.monotonic() + self._fabric.linger_s
            self._trusted = True  # read on, so that the answer is seen behind whatever arrives
            if not self._held:
                self._control(_FIN)
        elif self._release_by is None:
            self._release()
        self._fabric._dirty = True

    def abort(self) -> None:
        """Say RST if it can be said, and release."""
        self._inbox.clear()
        if self._ended is None:
            self._ended = ChannelBroken(f"{self._name}: aborted at this end")
            if not self._failed:
                self._held.clear()
                self._control(_RST)
                self._release_by = time.monotonic() + ANSWER_S
                self._fabric._dirty = True
                return
        if self._release_by is None:
            self._release()

    # -- sending

    def answer(self) -> None:
        """Tell the connector that its hello arrived."""
        self._control(_CREDIT)

    def _control(self, kind: int, value: int = 0) -> None:
        self._post(_CONTROL.pack(kind, 0, 0, 0, value), self._send_tag)

    def _post(self, data: Any, tag: Any) -> Any:
        """Send one UCX message and keep what it needs until it has completed."""
        array = Array(data)
        self._fabric._dirty = True
        try:
            request = self._endpoint.tag_send(array, tag)
        except ucx.UCXError:
            self._failed = True  # the next progress tells
            return _FAILED
        if not request.completed:
            self._sending.append((request, array, array.nbytes))
            self._sending_bytes += array.nbytes
        return request

    def _send_long(self, parts: Sequence[Buffer], length: int, tickets: _Tickets) -> None:
        views = [view for view in map(flat, parts) if view.nbytes]
        if len(views) > _PIECES:
            views = [memoryview(b"".join(views))]
        layout, inline, bulk, room = [], [], [], _SLOT_BYTES - _CONTROL.size - _PIECES * _PIECE.size
        for view in views:
            if view.nbytes < _BULK_BYTES and view.nbytes <= room:
                room -= view.nbytes
                layout.append(_PIECE.pack(view.nbytes))
                inline.append(view)
            else:
                layout.append(_PIECE.pack(view.nbytes | _BULK_BIT))
                bulk.append(view)
        self._sent_bytes += length
        self._post(b"".join((_CONTROL.pack(_LONG, len(views), 0, 0, length), *layout, *inline)), self._send_tag)
        tickets._requests = [self._post(view, self._send_bulk) for view in bulk]

    def _release_held(self) -> None:
        while self._held and self._sent_bytes - self._credited_bytes < _WINDOW_BYTES:
            parts, length, tickets = self._held.popleft()
            self._held_bytes -= length
            if tickets is None:
                self._sent_bytes += length
                self._post(b"".join((_CONTROL.pack(_DATA, 0, 0, 0, length), *parts)), self._send_tag)
            else:
                self._send_long(parts, length, tickets)
            if not self._held and self._release_by is not None and not self._fin_arrived:
                self._control(_FIN)

    def _report(self) -> None:
        if not self._failed and (self._ended is None or self._release_by is not None):
            self._reported_bytes = self._taken_bytes
            self._control(_CREDIT, self._taken_bytes)

    def _reap(self) -> None:
        sending = self._sending
        while sending and sending[0][0].completed:
            self._sending_bytes -= sending.popleft()[2]

    # -- receiving, driven by the fabric

    def _advance(self) -> bool:
        """Read what arrived, complete what was sent. True if a message or the end arrived."""
        if self._released:
            return False
        self._reap()
        before = len(self._inbox)
        ended = self._ended
        while self._trusted or not self._given:
            request = self._posted[self._head]
            if not request.completed:
                break
            try:
                request.check_error()
                self._read(self._slots[self._head][0])
            except ucx.UCXError:
                break  # canceled or reset: the close callback says so as well
            except (TransportError, struct.error) as error:
                self._break(str(error))
                return True
            if self._released:
                return True
            self._posted[self._head] = self._endpoint.tag_recv(self._slots[self._head][1], self._receive_tag)
            self._head = (self._head + 1) % _SLOTS
        self._assemble()
        if self._held and not self._failed:
            self._release_held()
        if self._failed:
            self._fail()
        return len(self._inbox) != before or self._ended is not ended

    def _read(self, slot: memoryview) -> None:
        kind, pieces, _, _, value = _CONTROL.unpack_from(slot)
        self._answered_by = None
        if kind == _DATA:
            if value > (_SLOT_BYTES - _CONTROL.size if self._trusted else FIRST_MESSAGE_BYTES):
                raise ChannelBroken(f"a short message of {value} bytes")
            message = memoryview(bytes(slot[_CONTROL.size : _CONTROL.size + value]))
            self._given += 1
            if self._arriving:
                self._arriving.append(_Arrival(message, []))
                self._arriving_bytes += message.nbytes
            elif self._ended is None:
                self._inbox.append(message)
        elif kind == _LONG:
            if not self._trusted or value > MAX_MESSAGE_BYTES or pieces > _PIECES:
                raise ChannelBroken(f"a long message of {value} bytes in {pieces} pieces")
            self._read_long(slot, pieces, value)
        elif kind == _CREDIT:
            if not self._credited_bytes <= value <= self._sent_bytes:
                raise ChannelBroken("an impossible credit")
            self._credited_bytes = value
        elif kind == _FIN:
            self._fin_arrived = True
            self._control(_FIN_ACK)
        elif kind == _FIN_ACK:
            if self._release_by is not None:
                self._release()
        elif kind == _RST:
            self._break("the other end aborted")
        else:
            raise ChannelBroken(f"a control message of kind {kind}")

    def _read_long(self, slot: memoryview, pieces: int, length: int) -> None:
        if self._arriving_bytes + length > MAX_MESSAGE_BYTES + 2 * _WINDOW_BYTES:
            raise ChannelBroken("more in flight than the window allows")
        buffer = fresh(length)
        words = [word for (word,) in _PIECE.iter_unpack(slot[_CONTROL.size : _CONTROL.size + pieces * _PIECE.size])]
        if sum(word & ~_BULK_BIT for word in words) != length:
            raise ChannelBroken("a layout that does not add up")
        inline, at, requests = _CONTROL.size + pieces * _PIECE.size, 0, []
        for word in words:
            size = word & ~_BULK_BIT
            if word & _BULK_BIT:
                array = Array(buffer[at : at + size])
                requests.append((self._endpoint.tag_recv(array, self._receive_bulk), array))
            else:
                buffer[at : at + size] = slot[inline : inline + size]
                inline += size
            at += size
        self._given += 1
        self._arriving.append(_Arrival(buffer, requests))
        self._arriving_bytes += length

    def _assemble(self) -> None:
        while self._arriving:
            arrival = self._arriving[0]
            while arrival.requests and arrival.requests[-1][0].completed:
                request, _ = arrival.requests.pop()
                try:
                    request.check_error()
                except ucx.UCXError:
                    arrival.requests.append((request, None))
                    return  # the endpoint failed: what was on its way is lost
            if arrival.requests:
                return
            self._arriving.popleft()
            self._arriving_bytes -= arrival.buffer.nbytes
            if self._ended is None:
                self._inbox.append(arrival.buffer)
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
        fabric._tags.discard(self._tag)
        endpoint, self._endpoint = self._endpoint, None
        endpoint.remove_close_callback()
        endpoint.close_blocking()
        fabric._worker.cancel_inflight_requests(0, 1)
        leftovers = [(request, array) for request, array, _ in self._sending]
        leftovers += [(request, self._slots[index][1]) for index, request in enumerate(self._posted)]
        leftovers += [pair for arrival in self._arriving for pair in arrival.requests]
        fabric._graveyard.extend(pair for pair in leftovers if not pair[0].completed)
        fabric._dirty = True
        self._sending.clear()
        self._sending_bytes = self._held_bytes = 0
        for _, _, tickets in self._held:
            if tickets is not None:
                tickets._requests = []
        self._held.clear()
        self._arriving.clear()
        self._slots.clear()
        self._posted.clear()
