"""The tickets that backends hand out, and the size of a message given in parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transport.base import Buffer, Ticket, TransportError


class Done:
    """A ticket of a message whose buffers were copied or have left already."""

    __slots__ = ()
    done = True


DONE = Done()


class Pending:
    """A ticket that the backend completes."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = False


class Held:
    """A ticket of a message that its channel holds back; `sent` is the pipe's ticket once it was handed on."""

    __slots__ = ("sent",)

    def __init__(self) -> None:
        self.sent: Ticket | None = None

    @property
    def done(self) -> bool:
        """True once the buffers are free."""
        return self.sent is not None and self.sent.done


def size_bytes(parts: Sequence[Buffer]) -> int:
    """The length of a message: memoryviews may have items wider than a byte, so `len` will not do."""
    size = 0
    for part in parts:  # a loop, because every message passes here and `sum` of a generator takes twice as long
        size += part.nbytes if isinstance(part, memoryview) else len(part)
    return size


def flat(part: Buffer) -> memoryview:
    """The part as a contiguous view of bytes. Raises TypeError when it is not contiguous."""
    view = memoryview(part)
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


def again(error: TransportError) -> TransportError:
    """A fresh copy of a stored error: raising the same one twice would grow its traceback and keep frames alive."""
    return type(error)(*error.args)


def fresh(size: int) -> memoryview:
    """A writable buffer of `size` bytes, not zeroed: zeroing 8 MiB costs a millisecond."""
    return np.empty(size, np.uint8).data
