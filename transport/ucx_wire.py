"""What the pipes of the UCX backend write: control messages, and the layout of long ones. Pure.

A control message is 16 bytes and, for data, what follows. A long message is a head and a rest. The head, where it is
short, travels in the control message; what is long follows on a tag of its own, from where it lies to where it belongs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from transport.base import MAX_MESSAGE_BYTES, Buffer, ChannelBroken
from transport.device_buffers import DeviceBuffer
from transport.tickets import flat

#: Kind, a field left free, lane, bytes of the head, and a value: a length or a count of bytes.
CONTROL = struct.Struct("<BBHIQ")
DATA, LONG, FIN, FIN_ACK, RST, CREDIT = 1, 2, 3, 4, 5, 6
#: Long parts travel on the tags from 1 to this, each of an endpoint of its own: see `transport.ucx_send`.
LANES = 8

#: A 70B model's activation is 16 KiB a token: it fits a slot, so that a hop is one message.
SLOT_BYTES = 32 * 1024
SMALL_BYTES = SLOT_BYTES - CONTROL.size


class Layout(NamedTuple):
    """A long message as it is sent: the control message, and the one or two parts that follow on the other tag."""

    control: bytes
    bulk: list[memoryview | DeviceBuffer]


class Announced(NamedTuple):
    """A long message as its control message tells of it. `head`: None if that follows on the other tag."""

    length: int
    lane: int
    head_bytes: int
    head: bytes | None


def lay_out(parts: Sequence[Buffer], length: int, lane: int = 1) -> Layout:
    """Cut a message of `length` bytes: the last part is the rest, what comes before it is joined, if it has to be.
    Memory of a device (a `DeviceBuffer`) can only be the last part, and always follows from where it lies.

    lane: what is added to the tag that the long parts follow on.
    """
    last = parts[-1]
    rest = last if isinstance(last, DeviceBuffer) else flat(last)
    head_bytes = length - rest.nbytes
    control = CONTROL.pack(LONG, 0, lane, head_bytes, length)
    if head_bytes <= SMALL_BYTES:
        return Layout(b"".join((control, *parts[:-1])), [rest] if rest.nbytes else [])
    head = flat(parts[0] if len(parts) == 2 else b"".join(parts[:-1]))
    return Layout(control, [head, rest] if rest.nbytes else [head])


def read_layout(slot: memoryview) -> Announced:
    """What the control message of a long message says. Raises ChannelBroken for nonsense."""
    _, _, lane, head_bytes, length = CONTROL.unpack_from(slot)
    if length > MAX_MESSAGE_BYTES or head_bytes > length or not 1 <= lane <= LANES:
        raise ChannelBroken(f"a long message of {head_bytes} + {length - head_bytes} bytes on lane {lane}")
    if head_bytes > SMALL_BYTES:
        return Announced(length, lane, head_bytes, None)
    if CONTROL.size + head_bytes > slot.nbytes:
        raise ChannelBroken("a layout longer than its message")
    return Announced(length, lane, head_bytes, bytes(slot[CONTROL.size : CONTROL.size + head_bytes]))
