"""Buffers that are used again: a fresh megabyte costs more to be mapped than to be sealed.

A buffer is lent to a message, and comes back when the ticket of that message is done, or, at the receiver, when nobody
holds the message any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np

from transport.base import Ticket
from transport.tickets import fresh

#: What is kept for the next message, once nothing is under way: pieces of bulk, or one long prompt's hidden states.
_KEPT_BYTES = 65 << 20
_MIB = 1 << 20
#: Shorter messages come out of memory that the allocator has mapped anyway.
_LANDING_BYTES = 256 << 10
#: Landings looked through for one to use again. Few are under way at a time, unless somebody keeps them all.
_KNOWN = 64


class Buffers:
    """Buffers of one sender. Sizes are rounded up: to powers of two, from 1 MiB on to whole MiB."""

    def __init__(self, allocate: Callable[[int], memoryview] = fresh) -> None:
        self._allocate = allocate
        self._free: list[memoryview] = []
        self._lent: list[tuple[Ticket, memoryview]] = []
        self._taken: memoryview | None = None

    def take(self, size: int) -> memoryview:
        """`size` bytes (1 or more) of no particular content. They are lent by `lend`, and forgotten without it."""
        if self._lent:
            self._collect()
        fitting = [buffer for buffer in self._free if buffer.nbytes >= size]
        if fitting:
            self._taken = min(fitting, key=len)
            self._free = [buffer for buffer in self._free if buffer is not self._taken]
        else:
            self._taken = self._allocate(-(-size // _MIB) * _MIB if size > _MIB else 1 << (size - 1).bit_length())
        return self._taken[:size]

    def forget(self) -> None:
        """What was taken last is not lent to anything: it is not used again."""
        self._taken = None

    def lend(self, ticket: Ticket) -> None:
        """What was taken last belongs to the message of this ticket until it is done."""
        if self._taken is not None:
            self._lent.append((ticket, self._taken))
            self._taken = None

    def _collect(self) -> None:
        """Take back what is free again, as much as may be kept."""
        under_way = []
        kept = sum(buffer.nbytes for buffer in self._free)
        for ticket, buffer in self._lent:
            if not ticket.done:
                under_way.append((ticket, buffer))
            elif kept + buffer.nbytes <= _KEPT_BYTES:
                kept += buffer.nbytes
                self._free.append(buffer)
        self._lent = under_way


class Landings:
    """Buffers that long messages are received into: one is used again once nobody holds a view of it.

    Whoever takes a message keeps it as long as it likes; that is seen by a weak reference to the array whose memory the
    views show. The buffer that was used last is used first: the processor's cache still has it.
    """

    def __init__(self, most_bytes: int = 2 * _KEPT_BYTES) -> None:
        """most_bytes: what is remembered, whether somebody holds it or not."""
        self._most_bytes = most_bytes
        #: Used last, first.
        self._known: list[tuple[weakref.ref[np.ndarray], np.ndarray]] = []
        self._known_bytes = 0

    def take(self, size: int) -> memoryview:
        """`size` bytes of no particular content."""
        if size < _LANDING_BYTES:
            return fresh(size)
        known = self._known
        for index, (shown, memory) in enumerate(known):
            if shown() is None and size <= memory.nbytes <= 2 * size:
                del known[index]
                break
        else:
            memory = np.empty(size, np.uint8)
            self._known_bytes += memory.nbytes
        array = memory[:size]
        known.insert(0, (weakref.ref(array), memory))
        while self._known_bytes > self._most_bytes or len(known) > _KNOWN:
            self._known_bytes -= known.pop()[1].nbytes  # if it is held still, it goes with its last view
        return array.data
