"""Blocking until a fabric may have work: a short spin, then the kernel.

The spin is what makes a collective of two ranks cost tens of microseconds: a neighbour in lock step answers within it,
and waking a sleeping thread costs more than the answer takes. It is short because a machine with two cores computes on
both of them. The wake-up is a socket pair, which works wherever `selectors` does.
"""

from __future__ import annotations

import select
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Protocol

#: How long a wait polls before it sleeps. A reply over loopback takes 10 to 25 us; see docs/benchmarks.
SPIN_S = 50e-6

#: The longest sleep in the kernel. Wake-ups of UCX have been lost (ucxx#15); a second look costs nothing.
FALLBACK_S = 0.25


class Waitable(Protocol):
    """What `wait_any` waits for: a fabric, of whose methods these are (see `transport.base`), or a bell."""

    def progress(self) -> bool: ...
    def take_wake(self) -> bool: ...
    def arm(self) -> bool: ...
    def fileno(self) -> int: ...


class Gate:
    """A selector with a wake-up: what `fileno`, `arm`, `wait` and `wake` of every fabric are made of."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self.selector.register(self._receiver, selectors.EVENT_READ, None)
        self._woken = False
        self._closed = False

    def fileno(self) -> int:
        """The descriptor of the selector itself; a selector can be waited for by another one."""
        return self.selector.fileno()  # epoll and kqueue both have it

    def wake(self) -> None:
        """Let the current or the next wait return at once. Safe from any thread, also after close."""
        if self._woken:
            return
        self._woken = True
        try:
            self._sender.send(b"\0")
        except OSError:
            pass  # full: a wake-up is on its way already; closed: nobody waits any more

    def take_wake(self) -> bool:
        """Consume a wake-up. True if there was one."""
        if not self._woken:
            return False
        # The flag goes first, the byte second: a wake between the two may lose its byte, but `ready` sees its flag.
        self._woken = False
        try:
            while self._receiver.recv(64):
                pass
        except OSError:
            pass  # empty
        return True

    def ready(self) -> bool:
        """True if a registered descriptor has something right now, or a wake-up is due."""
        return self._woken or bool(self.selector.select(0))

    def close(self) -> None:
        """Release the descriptors. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.selector.close()
        self._receiver.close()
        self._sender.close()


def watch(selector: selectors.BaseSelector, sock: socket.socket, data: object, before: int, events: int) -> int:
    """Have `selector` look for `events` on `sock` (0: for none) where it looked for `before`. Gives `events`."""
    if events == before:
        return events
    if not before:
        selector.register(sock, events, data)
    elif not events:
        selector.unregister(sock)
    else:
        selector.modify(sock, events, data)
    return events


def block(descriptors: Sequence[int], timeout_s: float) -> None:
    """Sleep until a descriptor is readable or the time is over, exact below a millisecond where `select` allows it."""
    if timeout_s <= 0:
        return
    timeout_s = min(timeout_s, FALLBACK_S)
    if max(descriptors) < 1024:  # FD_SETSIZE
        select.select(descriptors, (), (), timeout_s)
        return
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll(timeout_s * 1000)


def wait_any(fabrics: Sequence[Waitable], timeout_s: float, *, spin_s: float = SPIN_S) -> None:
    """`Fabric.wait` over several fabrics of one thread: returns when any moved something or was woken.

    fabrics: those whose channels the caller is going to look at next. timeout_s: 0 progresses once.
    """
    now = time.perf_counter()
    deadline = now + timeout_s
    spin_end = min(deadline, now + spin_s)
    while True:
        moved = False
        for fabric in fabrics:
            if fabric.progress() or fabric.take_wake():
                moved = True
        if moved:
            return
        if time.perf_counter() >= spin_end:
            break
    for fabric in fabrics:
        if not fabric.arm():
            fabric.take_wake()
            return
    block([fabric.fileno() for fabric in fabrics], deadline - time.perf_counter())
    for fabric in fabrics:
        fabric.progress()
        fabric.take_wake()
