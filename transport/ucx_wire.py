"""What the pipes of the UCX backend write: control messages, and the layout of long ones. Pure.

A control message is 16 bytes and, for data, what follows. A long message says in its control message how it is cut:
short parts travel right there ("inline"), long ones on a tag of their own ("bulk"), from where they lie to where they
belong.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from transport.base import MAX_MESSAGE_BYTES, Buffer, ChannelBroken
from transport.device_buffers import DeviceBuffer
from transport.tickets import flat

#: Kind, number of pieces, lane, a field left free, and a value: a length or a count of bytes.
CONTROL = struct.Struct("<BBHIQ")
DATA, LONG, FIN, FIN_ACK, RST, CREDIT = 1, 2, 3, 4, 5, 6
_PIECE = struct.Struct("<Q")
_BULK_BIT = 1 << 63
_PIECES = 32
#: Long parts travel on the tags from 1 to this, each of an endpoint of its own: see `transport.ucx_send`.
LANES = 8

#: A 70B model's activation is 16 KiB a token: it fits a slot, so that a hop is one message.
SLOT_BYTES = 32 * 1024
SMALL_BYTES = SLOT_BYTES - CONTROL.size
#: Parts from here on are sent from where they lie.
_BULK_BYTES = 8 * 1024


class Layout(NamedTuple):
    """A long message as it is sent: the control message, and the parts that follow on the other tag."""

    control: bytes
    bulk: list[memoryview | DeviceBuffer]


class Piece(NamedTuple):
    """A part of a long message on arrival: `data` if it came with the layout, None if it comes on the other tag."""

    start: int
    end: int
    data: memoryview | None

    def kept(self) -> Piece:
        """Without the control message."""
        return self if self.data is None else Piece(self.start, self.end, memoryview(bytes(self.data)))


def lay_out(parts: Sequence[Buffer], length: int, lane: int = 1) -> Layout:
    """Cut a message of `length` bytes. Many parts are joined first: a layout names at most 32. Memory of a device
    (a `DeviceBuffer`, with few other parts) always follows from where it lies.

    lane: what is added to the tag that the long parts follow on.
    """
    views = [part if isinstance(part, DeviceBuffer) else flat(part) for part in parts]
    views = [view for view in views if view.nbytes]
    if len(views) > _PIECES:
        views = [memoryview(b"".join(parts))]
    sizes: list[bytes] = []
    inline: list[memoryview] = []
    bulk: list[memoryview | DeviceBuffer] = []
    room = SMALL_BYTES - _PIECES * _PIECE.size
    for view in views:
        if isinstance(view, memoryview) and view.nbytes < _BULK_BYTES and view.nbytes <= room:
            room -= view.nbytes
            sizes.append(_PIECE.pack(view.nbytes))
            inline.append(view)
        else:
            sizes.append(_PIECE.pack(view.nbytes | _BULK_BIT))
            bulk.append(view)
    return Layout(b"".join((CONTROL.pack(LONG, len(views), lane, 0, length), *sizes, *inline)), bulk)


def read_layout(slot: memoryview) -> tuple[int, int, list[Piece]]:
    """The length, the lane and the pieces of a long message, from its control message.

    Raises ChannelBroken for nonsense.
    """
    _, count, lane, _, length = CONTROL.unpack_from(slot)
    inline = CONTROL.size + count * _PIECE.size
    if length > MAX_MESSAGE_BYTES or count > _PIECES or not 1 <= lane <= LANES:
        raise ChannelBroken(f"a long message of {length} bytes in {count} pieces on lane {lane}")
    words = [word for (word,) in _PIECE.iter_unpack(slot[CONTROL.size : inline])]
    if sum(word & ~_BULK_BIT for word in words) != length:
        raise ChannelBroken("a layout that does not add up")
    pieces = []
    at = 0
    for word in words:
        size = word & ~_BULK_BIT
        if word & _BULK_BIT:
            pieces.append(Piece(at, at + size, None))
        else:
            if inline + size > slot.nbytes:
                raise ChannelBroken("a layout longer than its message")
            pieces.append(Piece(at, at + size, slot[inline : inline + size]))
            inline += size
        at += size
    return length, lane, pieces
