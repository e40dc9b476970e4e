"""What a UCX pipe sends: small messages whole, long ones from where they lie, within the neighbour's window.

Long parts may go over several endpoints in turn ("lanes"), each with a tag of its own, because UCX matches messages of
one tag in the order of one endpoint. Over TCP an endpoint is a connection, and one connection fills no wide link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transport.base import Buffer, Ticket
from transport.device_buffers import DeviceBuffer
from transport.tickets import DONE
from transport.ucx_direct import ERRORS, HOST, Transfer, address_of, tag_send
from transport.ucx_wire import CONTROL, DATA, SMALL_BYTES, lay_out

#: What may be on its way, or lie at the neighbour untaken. UCX itself would buffer without a bound.
WINDOW_BYTES = 64 << 20


_pack_control = CONTROL.pack


class Lane(NamedTuple):
    """An endpoint's handle and what is added to the tag of what goes over it."""

    endpoint: int
    number: int


class _Long:
    """The fate of a message sent from where it lies."""

    __slots__ = ("transfers",)

    def __init__(self) -> None:
        self.transfers: list[Transfer] | None = None  # None: still held back by the window

    @property
    def done(self) -> bool:
        """True once UCX needs the buffers no more."""
        transfers = self.transfers
        while transfers and transfers[-1].completed:
            transfers.pop()
        return not transfers and transfers is not None


class Outbox:
    """The sending half of a pipe. Nothing here waits; `failed` says that UCX has refused something."""

    def __init__(self, endpoint: int, tag: int, lanes: Callable[[], Sequence[Lane]]) -> None:
        """lanes: the endpoints that long parts go over, asked for at the first long message."""
        self.failed = False
        #: Where UCX is told that memory of a device lies.
        self.device_memory = HOST
        #: Messages that the window holds back.
        self.held: deque[tuple[Sequence[Buffer], int, _Long | None]] = deque()
        self.sent_bytes = 0
        self.sending: deque[Transfer] = deque()
        self.sending_bytes = 0
        self.endpoint = endpoint
        self._tag = tag
        self._open_lanes = lanes
        self._lanes: Sequence[Lane] = ()
        self._turn = 0
        self._held_bytes = 0
        self._window = WINDOW_BYTES

    @property
    def pending_bytes(self) -> int:
        """Bytes held back by the window or not yet handed on by UCX."""
        return self._held_bytes + self.sending_bytes

    def send(self, parts: Sequence[Buffer], length: int) -> Ticket:
        """Hand a message to UCX, or hold it back while the neighbour takes nothing."""
        if self.held or self.sent_bytes >= self._window:
            return self._hold(parts, length)
        self.sent_bytes += length
        if length <= SMALL_BYTES and not isinstance(parts[-1], DeviceBuffer):
            data = b"".join((_pack_control(DATA, 0, 0, 0, length), *parts))
            request = tag_send(self.endpoint, data, len(data), self._tag, HOST)
            if request is not None:
                self._keep(Transfer(request, data, len(data)), request)
            return DONE
        ticket = _Long()
        self._send_long(parts, length, ticket)
        return ticket

    def control(self, kind: int, value: int = 0) -> None:
        """Send a control message."""
        self.post(CONTROL.pack(kind, 0, 0, 0, value), self._tag)

    def post(self, data: bytes, tag: int) -> None:
        """Send any bytes to any tag, outside the window."""
        request = tag_send(self.endpoint, data, len(data), tag, HOST)
        if request is not None:
            self._keep(Transfer(request, data, len(data)), request)

    def credit(self, taken_bytes: int) -> bool:
        """The neighbour has taken so much in all. False when that cannot be."""
        if not self._window - WINDOW_BYTES <= taken_bytes <= self.sent_bytes:
            return False
        self._window = taken_bytes + WINDOW_BYTES
        return True

    def release_held(self) -> None:
        """Send on what the window allows by now."""
        while self.held and self.sent_bytes < self._window:
            parts, length, ticket = self.held.popleft()
            self._held_bytes -= length
            self.sent_bytes += length
            if ticket is None:
                self.post(b"".join((CONTROL.pack(DATA, 0, 0, 0, length), *parts)), self._tag)
            else:
                self._send_long(parts, length, ticket)

    def reap(self) -> bool:
        """Forget what UCX is through with. True if there was any."""
        sending = self.sending
        moved = False
        while sending and sending[0].completed:
            self.sending_bytes -= sending.popleft().nbytes
            moved = True
        return moved

    def release(self) -> list[Transfer]:
        """Nothing is sent any more: what UCX still holds. Tickets of what was held back are done."""
        left = [transfer for transfer in self.sending if not transfer.completed]
        self.sending.clear()
        self.sending_bytes = 0
        self._open_lanes, self._lanes = list, ()
        self.drop_held()
        return left

    def drop_held(self) -> None:
        """Forget what the window holds back."""
        self._held_bytes = 0
        while self.held:
            ticket = self.held.popleft()[2]
            if ticket is not None:
                ticket.transfers = []

    def _hold(self, parts: Sequence[Buffer], length: int) -> Ticket:
        self._held_bytes += length
        if length <= SMALL_BYTES and not isinstance(parts[-1], DeviceBuffer):
            self.held.append(((b"".join(parts),), length, None))
            return DONE
        ticket = _Long()
        self.held.append((parts, length, ticket))
        return ticket

    def _send_long(self, parts: Sequence[Buffer], length: int, ticket: _Long) -> None:
        lanes = self._lanes = self._lanes or self._open_lanes()
        self._turn = (self._turn + 1) % len(lanes)
        lane = lanes[self._turn]
        layout = lay_out(parts, length, lane.number)
        self.post(layout.control, self._tag)
        transfers = []
        for view in layout.bulk:
            if isinstance(view, DeviceBuffer):
                address, memory = view.address, self.device_memory
            else:
                address, memory = address_of(view), HOST
            request = tag_send(lane.endpoint, address, view.nbytes, self._tag | lane.number, memory)
            if request is not None:
                transfers.append(Transfer(request, view, view.nbytes))
                self._keep(transfers[-1], request)
        ticket.transfers = transfers

    def _keep(self, transfer: Transfer, request: int) -> None:
        if request >= ERRORS:
            self.failed = True
            return
        self.sending.append(transfer)
        self.sending_bytes += transfer.nbytes
