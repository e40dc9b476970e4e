"""What a UCX pipe has posted to receive: slots for control messages, and the parts of long messages on their way."""

from __future__ import annotations

from collections import deque
from typing import Any

from transport.base import MAX_MESSAGE_BYTES, ChannelBroken
from transport.tickets import fresh
from transport.ucx_binding import Array, ucx
from transport.ucx_wire import SLOT_BYTES, read_layout

#: Receives posted ahead. Those that were used are posted again while nothing arrives, or when half are left.
SLOTS = 8


class Slots:
    """Receives of control messages, posted ahead in a ring."""

    def __init__(self, endpoint: Any, tag: Any) -> None:
        self.used = 0
        self._endpoint = endpoint
        self._tag = tag
        self._head = 0
        self._slots: list[tuple[memoryview, Any]] = []
        self._posted: list[Any] = []
        for _ in range(SLOTS):
            view = fresh(SLOT_BYTES)
            array = Array(view)
            self._slots.append((view, array))
            self._posted.append(endpoint.tag_recv(array, tag))

    def peek(self) -> memoryview | None:
        """The slot of the next control message, if it has arrived; `drop` frees it. Raises UCXError."""
        request = self._posted[self._head]
        if request is None or not request.completed:
            return None
        request.check_error()
        return self._slots[self._head][0]

    def drop(self) -> None:
        """The slot that `peek` gave was read. Posts receives again where few are left."""
        self._posted[self._head] = None
        self._head = (self._head + 1) % SLOTS
        self.used += 1
        if self.used > SLOTS // 2:
            self.repost()

    def repost(self) -> None:
        """Post the receives that were used again: 2 us each, and so not before the messages were read."""
        for index in range(self._head - self.used, self._head):
            try:
                self._posted[index] = self._endpoint.tag_recv(self._slots[index][1], self._tag)
            except ucx.UCXError:
                break  # the endpoint has ended, and its close callback says so
        self.used = 0

    def release(self) -> list[tuple[Any, Any]]:
        """The requests that UCX still holds, each with its array, which must live until the request has ended."""
        held = [(request, slot[1]) for request, slot in zip(self._posted, self._slots, strict=True) if request]
        self._slots.clear()
        self._posted.clear()
        self._endpoint = None
        return held


class Arrivals:
    """Messages that wait for their parts, and those behind them, in order."""

    def __init__(self, endpoint: Any, tag: Any, limit_bytes: int) -> None:
        self._endpoint = endpoint
        self._tag = tag
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._waiting: deque[tuple[memoryview, list[tuple[Any, Any]]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def behind(self, message: memoryview) -> None:
        """A whole message that has to wait for those before it."""
        self._waiting.append((message, []))
        self._bytes += message.nbytes

    def begin(self, slot: memoryview) -> None:
        """Post the receives of a long message. Raises ChannelBroken for an impossible layout."""
        length, pieces = read_layout(slot)
        if self._bytes + length > MAX_MESSAGE_BYTES + self._limit_bytes:
            raise ChannelBroken("more in flight than the window allows")
        buffer = fresh(length)
        requests = []
        for piece in pieces:
            target = buffer[piece.start : piece.end]
            if piece.data is not None:
                target[:] = piece.data
            else:
                array = Array(target)
                requests.append((self._endpoint.tag_recv(array, self._tag), array))
        self._waiting.append((buffer, requests))
        self._bytes += length

    def next(self) -> memoryview | None:
        """The next message that is whole, or None. One whose receive failed never is: the endpoint has ended."""
        if not self._waiting:
            return None
        buffer, requests = self._waiting[0]
        while requests and requests[-1][0].completed:
            try:
                requests[-1][0].check_error()
            except ucx.UCXError:
                return None
            requests.pop()
        if requests:
            return None
        self._waiting.popleft()
        self._bytes -= buffer.nbytes
        return buffer

    def release(self) -> list[tuple[Any, Any]]:
        """As `Slots.release`."""
        held = [pair for _, requests in self._waiting for pair in requests]
        self._waiting.clear()
        self._endpoint = None
        return held
