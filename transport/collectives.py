"""Collectives of the ranks of one stage, over one channel to each other rank.

The all-reduce is one-shot: every rank sends its tensor to every other and sums all of them in the order of the ranks,
so all ranks hold the same bits, whatever arrived first. For the sizes of a decode step (2 to 64 KiB) the latency of one
exchange is all that counts; a ring would pay it 2(n-1) times. From `SCATTER_BYTES` on, with more than two ranks, every
rank sums one slice and sends it round (reduce-scatter, then all-gather), which moves 2(n-1)/n tensors instead of n-1;
the order of the sum, and so the bits, stay the same.

Tensors of bfloat16 and float16 are summed in float32 and rounded once. Nothing waits for its sends before it receives,
so two ranks that both send a long tensor do not deadlock.
"""

from __future__ import annotations

import functools
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transport.base import ChannelBroken, DeadlineExceeded, Fabric, Ticket
from transport.channel import Channel
from transport.frames import FIRST_LANE_KIND
from transport.waiting import wait_any

if TYPE_CHECKING:
    import torch

#: The lane of collectives: see `transport.channel`.
COLLECTIVE = FIRST_LANE_KIND

#: From here on more than two ranks share the summing.
SCATTER_BYTES = 256 * 1024

_META = struct.Struct("<IBB")
_REDUCE, _SCATTER, _SHARE, _BROADCAST, _GATHER = range(1, 6)


class Group:
    """The ranks 0 to size-1 of a group, seen from `rank`. All of them call the same operations in the same order.

    channels: one for each other rank. A rank that calls something else, or a tensor of another size or dtype, is found
    out and breaks the group: every operation raises ChannelBroken (also when a rank is lost), ChannelClosed, or
    DeadlineExceeded, and the group is then of no more use.
    """

    def __init__(self, rank: int, size: int, channels: Mapping[int, Channel]) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}")
        if set(channels) != set(range(size)) - {rank}:
            raise ValueError(f"rank {rank} of {size} needs a channel to each other rank, got {sorted(channels)}")
        self.rank = rank
        self.size = size
        self._channels = dict(channels)
        self._others = sorted(channels)
        self._fabrics: list[Fabric] = list({id(c.fabric): c.fabric for c in channels.values()}.values())
        self._sequence = 0

    def all_reduce_(self, tensor: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """Replace `tensor` by its sum over all ranks, the same bits on each. Any shape, dtype and device."""
        if self.size == 1:
            return tensor
        import torch

        deadline = time.monotonic() + timeout_s
        host = _host(tensor)
        if self.size > 2 and host.numel() * host.element_size() >= SCATTER_BYTES:
            result = self._reduce_scattered(host, deadline)
        else:
            arrived = self._exchange(_REDUCE, tensor.dtype, dict.fromkeys(self._others, host), self._others, deadline)
            parts = [_tensor(arrived[rank], host) if rank != self.rank else host for rank in range(self.size)]
            if len(parts) == 2 and host.data_ptr() == tensor.data_ptr():
                torch.add(parts[0], parts[1], out=host)
                return tensor
            result = _sum(parts)
        tensor.copy_(result.view(tensor.shape))
        return tensor

    def broadcast_(self, tensor: torch.Tensor, root: int, timeout_s: float) -> torch.Tensor:
        """Replace `tensor` by the root's; shape and dtype must be the same on all ranks."""
        if self.size == 1:
            return tensor
        deadline = time.monotonic() + timeout_s
        host = _host(tensor)
        if self.rank == root:
            self._exchange(_BROADCAST, tensor.dtype, dict.fromkeys(self._others, host), (), deadline)
            return tensor
        data = self._exchange(_BROADCAST, tensor.dtype, {}, (root,), deadline)[root]
        tensor.copy_(_tensor(data, host).view(tensor.shape))
        return tensor

    def gather(self, tensor: torch.Tensor, root: int, timeout_s: float) -> list[torch.Tensor] | None:
        """At the root, the flattened tensors of all ranks in their order (sizes may differ); elsewhere None.

        The root's own is `tensor` flattened; the others are on the CPU. One dtype for all.
        """
        host = _host(tensor)
        if self.size == 1:
            return [host]
        deadline = time.monotonic() + timeout_s
        if self.rank != root:
            self._exchange(_GATHER, tensor.dtype, {root: host}, (), deadline)
            return None
        arrived = self._exchange(_GATHER, tensor.dtype, {}, self._others, deadline)
        return [host if rank == root else _tensor(arrived[rank], host, any_size=True) for rank in range(self.size)]

    def _reduce_scattered(self, host: torch.Tensor, deadline: float) -> torch.Tensor:
        import torch

        pieces = torch.tensor_split(host, self.size)
        mine = pieces[self.rank]
        arrived = self._exchange(
            _SCATTER, host.dtype, {rank: pieces[rank] for rank in self._others}, self._others, deadline
        )
        own = _sum([mine if rank == self.rank else _tensor(arrived[rank], mine) for rank in range(self.size)])
        arrived = self._exchange(_SHARE, host.dtype, dict.fromkeys(self._others, own), self._others, deadline)
        return torch.cat(
            [own if rank == self.rank else _tensor(arrived[rank], pieces[rank]) for rank in range(self.size)]
        )

    def _exchange(
        self,
        operation: int,
        dtype: torch.dtype,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Sequence[int],
        deadline: float,
    ) -> dict[int, memoryview]:
        """Send each tensor to its rank and collect one payload from each of `incoming`; then all buffers are free."""
        meta = _META.pack(self._sequence, operation, _dtype_code(dtype))
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        tickets: list[Ticket] = []
        view: memoryview | None = None
        last: Any = None
        for rank, tensor in outgoing.items():
            if tensor is not last or view is None:
                view, last = _bytes(tensor), tensor
            ticket = self._channels[rank].send(meta, view, kind=COLLECTIVE)
            if not ticket.done:
                tickets.append(ticket)
        waiting = list(incoming)
        arrived: dict[int, memoryview] = {}
        while True:
            for rank in tuple(waiting):
                message = self._channels[rank].poll(COLLECTIVE)
                if message is not None:
                    if message.meta != meta:
                        self._desynchronised(rank)
                    arrived[rank] = message.payload
                    waiting.remove(rank)
            if tickets:
                tickets = [ticket for ticket in tickets if not ticket.done]
            if not waiting and not tickets:
                return arrived
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                names = ", ".join(self._channels[rank].name for rank in waiting) or "the send"
                raise DeadlineExceeded(f"collective {self._sequence}: still waiting for {names}")
            if not waiting:
                # Nobody is read from, so look after those that are sent to: their end would go unnoticed.
                for rank in outgoing:
                    self._channels[rank].check()
            due = [due_s for rank in waiting if (due_s := self._channels[rank].due_s) is not None]
            wait_any(self._fabrics, min([left_s, *due]), spin_s=getattr(self._fabrics[0], "spin_s", 0.0))

    def _desynchronised(self, rank: int) -> None:
        channel = self._channels[rank]
        channel.abort()
        raise ChannelBroken(f"{channel.name}: called another collective than this rank; the shards run different code")


@functools.cache
def _dtype_code(dtype: torch.dtype) -> int:
    """A byte by which ranks notice that they disagree about the dtype; the same in every process."""
    return zlib.crc32(str(dtype).encode()) & 0xFF


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor flat, contiguous and on the CPU: itself where it is that already, else a copy."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()  # waits for the device's stream: UCX is not ordered with it
    return tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a flat CPU tensor. Through uint8, because numpy knows no bfloat16."""
    import torch

    return tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _tensor(data: memoryview, like: torch.Tensor, *, any_size: bool = False) -> torch.Tensor:
    """A received payload as a flat tensor of the dtype of `like`, without a copy where it can be written to."""
    import torch

    if any_size and data.nbytes % like.element_size() == 0:
        pass
    elif data.nbytes != like.numel() * like.element_size():
        raise ChannelBroken(
            f"a rank sent {data.nbytes} bytes where {like.numel() * like.element_size()} were due; "
            "the shards run different code"
        )
    if not data.nbytes:
        return torch.empty(0, dtype=like.dtype)
    # frombuffer warns about read-only memory, and needs the element's alignment.
    if data.readonly:
        data = memoryview(bytearray(data))
    return torch.frombuffer(data, dtype=like.dtype)


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the order given, of 16-bit floats in float32 with one rounding at the end."""
    import torch

    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = torch.add(parts[0].to(wide), parts[1].to(wide))
    for part in parts[2:]:
        total.add_(part.to(wide))
    return total.to(dtype)
