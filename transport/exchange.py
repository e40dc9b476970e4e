"""Messages of the ranks of a group, one operation after the other: what collectives are made of.

Nothing waits for its sends before it receives, so two ranks that both send a long tensor do not deadlock. A rank that
fails tells all others, so that each of them raises at once and not at its deadline.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from transport.base import ChannelBroken, DeadlineExceeded, Fabric, Ticket, TransportError
from transport.channel import Channel, Message
from transport.frames import FIRST_LANE_KIND
from transport.tensors import as_bytes, as_tensor, dtype_code
from transport.waiting import Waitable, wait_any

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

#: The lanes of collectives, and of ranks that give up: see `transport.channel`.
COLLECTIVE = FIRST_LANE_KIND
FAILED = FIRST_LANE_KIND + 1

#: The part of a message that carries a finished sum.
SUM = 1 << 31

#: Number of the operation, which, of which dtype, and which part of it this message is; filled up to 16 bytes, so that
#: what follows is aligned.
_META = struct.Struct("<IBBxxIxxxx")


class Exchange:
    """The channels of rank `rank` of `size`, and what is under way on them. Raises as `transport.collectives.Group`."""

    def __init__(self, rank: int, size: int, channels: Mapping[int, Channel]) -> None:
        self.rank = rank
        self.size = size
        self.channels = dict(channels)
        self.others = sorted(channels)
        self.fabrics: list[Fabric] = list({id(c.fabric): c.fabric for c in channels.values()}.values())
        self.spin_s: float = getattr(self.fabrics[0], "spin_s", 0.0) if self.fabrics else 0.0
        self._sequence = 0
        self._operation = 0
        self._dtype = 0
        self._deadline = 0.0
        self._tickets: list[Ticket] = []
        self._allowed: dict[int, float] = {}

    def run(self, operation: int, tensor: torch.Tensor, timeout_s: float | None, work: Callable[[], Result]) -> Result:
        """One operation: at its end nothing is on its way any more, or all ranks know that it failed.

        operation: 1 to 255, by which ranks notice that they do different things. tensor: one like those that travel.
        """
        self._operation = operation
        self._dtype = dtype_code(tensor.dtype)
        if timeout_s is None:
            timeout_s = self.allowed_s(tensor.numel() * tensor.element_size())
        self._deadline = time.monotonic() + timeout_s
        try:
            result = work()
            if self._tickets:
                self.sent()
        except TransportError as error:
            self.tell(error)
            raise
        finally:
            self._tickets.clear()
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return result

    def allowed_s(self, nbytes: int) -> float:
        """What an operation on tensors of `nbytes` may take: each channel carries at most one of every rank."""
        if not self._sequence % 4096:
            self._allowed.clear()  # links change; asking the kernel about each costs microseconds
        found = self._allowed.get(nbytes)
        if found is None:
            found = max((channel.allowance_s(self.size * nbytes) for channel in self.channels.values()), default=0.0)
            self._allowed[nbytes] = found
        return found

    # -- within an operation

    def meta(self, part: int) -> bytes:
        """What says of a message which it is."""
        return _META.pack(self._sequence, self._operation, self._dtype, part)

    def send(self, rank: int, tensor: torch.Tensor, part: int = 0) -> None:
        """Send a flat tensor, which stays as it is until `sent`."""
        self.send_bytes(rank, self.meta(part), as_bytes(tensor))

    def send_bytes(self, rank: int, meta: bytes, view: memoryview) -> None:
        """Send bytes with `meta(part)`, which stay as they are until `sent`."""
        ticket = self.channels[rank].send(meta, view, kind=COLLECTIVE)
        if not ticket.done:
            self._tickets.append(ticket)

    def receive(self, rank: int, dtype: torch.dtype, count: int | None, part: int = 0) -> torch.Tensor:
        """The next message of `rank`, a flat tensor of `count` elements, or of any number."""
        return as_tensor(self.take(rank, (part,))[1], dtype, count)

    def take(self, rank: int, parts: Iterable[int]) -> tuple[int, memoryview]:
        """The next message of `rank`, which has to be one of `parts` of this operation."""
        channel = self.channels[rank]
        while True:
            message = channel.poll(COLLECTIVE)
            if message is None and self.size > 2:
                self._look(channel)
                message = channel.poll(COLLECTIVE)  # looking at the others may have brought it in
            if message is None:
                self._wait(channel)
                continue
            try:
                sequence, operation, dtype, part = _META.unpack(message.meta)
            except struct.error:
                sequence = operation = dtype = part = -1
            if (sequence, operation, dtype) != (self._sequence, self._operation, self._dtype) or part not in parts:
                channel.abort()
                raise ChannelBroken(
                    f"{channel.name}: called another collective than this rank; the shards run different code"
                )
            return part, message.payload

    def sent(self) -> None:
        """Wait until no buffer is in use any more."""
        while self._tickets:
            self._tickets = [ticket for ticket in self._tickets if not ticket.done]
            if self._tickets:
                self._wait(None)

    # -- waiting

    def rest(self, rank: int, deadline: float, bell: Waitable) -> None:
        """Sleep until `bell` rings or a channel brings something: what a rank does that waits for `rank` elsewhere.

        deadline: of `time.monotonic`. Raises DeadlineExceeded, and whatever has ended a channel.
        """
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"collective: still waiting for {self.channels[rank].name}")
        self._look(None)
        due = [channel.due_s for channel in self.channels.values()]
        left_s = min([left_s, *(due_s for due_s in due if due_s is not None)])
        wait_any((*self.fabrics, bell), left_s, spin_s=0.0)

    def watch(self, deadline: float) -> None:
        """What a rank does between two looks at something else than its channels. Raises as `rest`."""
        if time.monotonic() >= deadline:
            raise DeadlineExceeded("collective: a rank's GPU has not come")
        self._look(None)

    def _wait(self, channel: Channel | None) -> None:
        """Until something moved. What `channel` may have brought has been looked at: nothing here takes in more of it,
        or the wait would be for a message that is there already.
        """
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(
                f"collective {self._sequence}: still waiting for {'the send' if channel is None else channel.name}"
            )
        if channel is None:
            self._look(None)
        else:
            self._failed(channel, channel.stashed(FAILED))
        due_s = None if channel is None else channel.due_s
        wait_any(self.fabrics, left_s if due_s is None else min(left_s, due_s), spin_s=self.spin_s)

    def _look(self, but: Channel | None) -> None:
        """Whether a rank gave up: the one that is waited for may itself wait for a lost one."""
        for other in self.channels.values():
            if other is not but:
                self._failed(other, other.poll(FAILED))

    def _failed(self, channel: Channel, message: Message | None) -> None:
        if message is not None:
            raise ChannelBroken(f"{channel.name}: gave up: {bytes(message.payload[:200]).decode(errors='replace')}")

    def tell(self, error: TransportError) -> None:
        """Let the other ranks know that this one gave up."""
        for channel in self.channels.values():
            try:
                channel.send(b"", str(error)[:200].encode(), kind=FAILED)
            except TransportError:
                pass  # it knows, or is gone
