"""What a UCX pipe has posted to receive: control messages, and the parts of long messages on their way."""

from __future__ import annotations

from collections import deque

from transport.base import MAX_MESSAGE_BYTES, ChannelBroken
from transport.buffers import Landings
from transport.device_buffers import DeviceBuffer, Landed
from transport.tickets import fresh
from transport.ucx_direct import (
    ERRORS,
    HOST,
    IN_PROGRESS,
    TAG_FULL,
    Transfer,
    UcxFailure,
    address_of,
    check_status,
    request_free,
    status_text,
    tag_recv,
)
from transport.ucx_wire import SLOT_BYTES, Announced, read_layout


class Slot:
    """One buffer that messages of a tag are received into, one after the other.

    What arrives while none is posted waits in UCX, so that posting the next one has time until there is nothing else
    to do: what is here already is then given at once.
    """

    def __init__(self, worker: int, tag: int, size: int = SLOT_BYTES) -> None:
        """Posts nothing yet."""
        self.view = fresh(size)
        self._worker = worker
        self._tag = tag
        self._size = size
        self._address = address_of(self.view)
        self._request = 0
        self._spent = 0

    def arrived(self) -> bool:
        """Whether `view` has the next message; it has to be read before this is called again. Raises UcxFailure."""
        request = self._request
        if request:
            status = check_status(request)
            if status == IN_PROGRESS:
                return False
            self._request, self._spent = 0, request
            if status < 0:
                raise UcxFailure(status)
            return True
        if self._spent:
            request_free(self._spent)
            self._spent = 0
        request = tag_recv(self._worker, self._address, self._size, self._tag, TAG_FULL, HOST)
        if request is None:
            return True
        if request >= ERRORS:
            raise UcxFailure(request - (1 << 64))
        self._request = request
        return False

    def release(self) -> list[Transfer]:
        """Post nothing any more. What UCX still holds."""
        if self._spent:
            request_free(self._spent)
            self._spent = 0
        if not self._request:
            return []
        transfer = Transfer(self._request, self.view, self._size)
        self._request = 0
        return [] if transfer.cancel(self._worker) else [transfer]


class _Arrival:
    """A message that has to wait: for its parts, or for those before it."""

    __slots__ = ("is_long", "message", "nbytes", "transfers")

    def __init__(self, nbytes: int, message: memoryview | None = None) -> None:
        """message: one that is whole already."""
        self.nbytes = nbytes
        self.is_long = message is None
        self.message: memoryview | Landed | None = message
        self.transfers: list[Transfer] = []


class Arrivals:
    """Messages that wait for their parts, and those behind them, in order."""

    def __init__(self, worker: int, tag: int, limit_bytes: int, landings: Landings, ahead_bytes: int) -> None:
        """ahead_bytes: no further message is received into memory while so much is on its way already."""
        self._landings = landings
        self._worker = worker
        self._tag = tag
        self._limit_bytes = limit_bytes
        self._ahead_bytes = ahead_bytes
        self._posted_bytes = 0
        self._unposted: deque[tuple[_Arrival, Announced]] = deque()
        self.waiting: deque[_Arrival] = deque()
        #: Where the payload of the next message goes, if it is of this size; and where UCX is told that this lies.
        self.landing: DeviceBuffer | None = None
        self.device_memory = HOST
        #: Bytes of the messages that wait.
        self.waiting_bytes = 0

    @property
    def oldest_bytes(self) -> int:
        """Bytes of the first of them."""
        return self.waiting[0].nbytes if self.waiting else 0

    @property
    def is_landing(self) -> bool:
        """Whether a message is under way into memory of a device."""
        return any(isinstance(arrival.message, Landed) for arrival in self.waiting)

    def behind(self, message: memoryview) -> None:
        """A whole message that has to wait for those before it."""
        self.waiting.append(_Arrival(message.nbytes, message))
        self.waiting_bytes += message.nbytes

    def begin(self, slot: memoryview) -> None:
        """Receive a long message, when it is its turn. Raises ChannelBroken for an impossible layout."""
        announced = read_layout(slot)
        length = announced.length
        if self.waiting_bytes + length > MAX_MESSAGE_BYTES + self._limit_bytes:
            raise ChannelBroken("more in flight than the window allows")
        arrival = _Arrival(length)
        target, self.landing = self.landing, None  # it has one chance, messages are in order
        if target is not None and (self.waiting or not 0 < target.nbytes == length - announced.head_bytes):
            target = None
        self.waiting.append(arrival)
        self.waiting_bytes += length
        if self._posted_bytes < self._ahead_bytes and not self._unposted:
            self._post(arrival, announced, target)
        else:
            self._unposted.append((arrival, announced))

    def _post(self, arrival: _Arrival, announced: Announced, target: DeviceBuffer | None = None) -> None:
        length, lane, head_bytes, head = announced
        self._posted_bytes += length
        buffer = self._landings.take(length if target is None else head_bytes)
        address = address_of(buffer) if buffer.nbytes else 0
        parts = []
        if head is None:
            parts.append((address, head_bytes, HOST))
        else:
            buffer[:head_bytes] = head
        if target is not None:
            parts.append((target.address, target.nbytes, self.device_memory))
        elif length > head_bytes:
            parts.append((address + head_bytes, length - head_bytes, HOST))
        for where, size, memory in parts:
            request = tag_recv(self._worker, where, size, self._tag | lane, TAG_FULL, memory)
            arrival.transfers.append(Transfer(request, (buffer, target), size))
        arrival.message = buffer if target is None else Landed(buffer, target)

    def next(self) -> memoryview | Landed | None:
        """The next message that is whole, or None. Raises ChannelBroken where a part cannot arrive any more."""
        if not self.waiting:
            return None
        arrival = self.waiting[0]
        transfers = arrival.transfers
        while transfers and transfers[-1].completed:
            status = transfers.pop().status
            if status < 0:
                raise ChannelBroken(f"a part of a message did not arrive: {status_text(status)}")
        if transfers:
            return None
        self.waiting.popleft()
        self.waiting_bytes -= arrival.nbytes
        if arrival.is_long:
            self._posted_bytes -= arrival.nbytes
            while self._unposted and self._posted_bytes < self._ahead_bytes:
                self._post(*self._unposted.popleft())
        return arrival.message

    def release(self) -> list[Transfer]:
        """As `Slot.release`."""
        left = [each for arrival in self.waiting for each in arrival.transfers if not each.cancel(self._worker)]
        self.waiting.clear()
        self._unposted.clear()
        return left
