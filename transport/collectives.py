"""Collectives of the ranks of one stage, over one channel to each other rank.

An all-reduce adds in the order of the ranks, ((r0 + r1) + r2) + r3, whichever way the tensors travel, so that all ranks
hold the same bits, in every run. Tensors of bfloat16 and float16 are summed in float32 and rounded once.

    one-shot    every rank sends its tensor to every other; each adds. One latency: a decode step's 2 to 64 KiB.
    scatter     each rank adds one slice of the tensor and sends it round (reduce-scatter, then all-gather)
    tree        a binomial tree collects the tensors at rank 0, which adds, and gives the sum out: few messages a rank
    ring        pieces go round from rank 0, growing by each rank, and the sums go round after them: one neighbour
    hierarchy   near ranks give theirs to the first of their island, a sum goes from island to island, and back

`collective_choice` picks by size and costs; `measure` replaces the assumed costs by measured ones. Nothing waits for
its sends before it receives, so two ranks that both send a long tensor do not deadlock. A rank that fails tells all
others, so that each of them raises at once and not at its deadline.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from transport.base import ChannelBroken, DeadlineExceeded, Fabric, Ticket, TransportError
from transport.channel import Channel, Message
from transport.collective_choice import HIERARCHY, ONE_SHOT, PIECE_BYTES, RING, SCATTER, TREE, Costs, choose
from transport.frames import FIRST_LANE_KIND
from transport.tensors import add_in_order, as_bytes, as_tensor, dtype_code, host, wide
from transport.waiting import wait_any

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

#: The lanes of collectives, and of ranks that give up: see `transport.channel`.
COLLECTIVE = FIRST_LANE_KIND
FAILED = FIRST_LANE_KIND + 1

#: Number of the operation, which, of which dtype, and which part of it this message is; filled up to 16 bytes, so that
#: what follows is aligned.
_META = struct.Struct("<IBBxxIxxxx")
_REDUCE, _TREE, _RING, _ISLANDS, _SCATTERED, _SHARED, _BROADCAST, _GATHER, _ALL_GATHER, _SCATTER, _COSTS = range(1, 12)
_SUM = 1 << 31  # the part of a message that carries a finished sum

#: Rounds of `measure`, and the bytes of its long messages.
_ROUNDS = 20
_LONG_BYTES = 1 << 20


class Group:
    """The ranks 0 to size-1 of a group, seen from `rank`. All of them call the same operations in the same order.

    channels: one for each other rank. island: how many consecutive ranks are near each other, 0 where all are alike.
    A rank that calls something else, or a tensor of another size or dtype, is found out and breaks the group: every
    operation raises ChannelBroken (also when a rank is lost), ChannelClosed, or DeadlineExceeded, and the group is then
    of no more use. timeout_s: None for what such tensors may take on these links.
    """

    def __init__(self, rank: int, size: int, channels: Mapping[int, Channel], *, island: int = 0) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}")
        if set(channels) != set(range(size)) - {rank}:
            raise ValueError(f"rank {rank} of {size} needs a channel to each other rank, got {sorted(channels)}")
        self.rank = rank
        self.size = size
        self.costs = Costs()
        self._island = island
        self._channels = dict(channels)
        self._others = sorted(channels)
        self._fabrics: list[Fabric] = list({id(c.fabric): c.fabric for c in channels.values()}.values())
        self._spin_s: float = getattr(self._fabrics[0], "spin_s", 0.0) if self._fabrics else 0.0
        self._sequence = 0
        self._operation = 0
        self._dtype = 0
        self._deadline = 0.0
        self._tickets: list[Ticket] = []
        self._chosen: dict[int, str] = {}
        self._allowed: dict[int, float] = {}

    # -- operations

    def all_reduce_(
        self, tensor: torch.Tensor, timeout_s: float | None = None, *, algorithm: str | None = None
    ) -> torch.Tensor:
        """Replace `tensor` by its sum over all ranks, the same bits on each. Any shape, dtype and device.

        algorithm: one of those above, the same at every rank; None chooses.
        """
        if self.size == 1:
            return tensor
        flat = host(tensor)
        nbytes = flat.numel() * flat.element_size()
        if algorithm is None:
            algorithm = self._chosen.get(nbytes)
            if algorithm is None:
                if len(self._chosen) > 1000:
                    self._chosen.clear()
                algorithm = self._chosen[nbytes] = choose(nbytes, self.size, self.costs, self._island)
        operation, work = _ALGORITHMS[algorithm]
        self._run(operation, flat, timeout_s, lambda: work(self, flat))
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))
        return tensor

    def broadcast_(self, tensor: torch.Tensor, root: int, timeout_s: float | None = None) -> torch.Tensor:
        """Replace `tensor` by the root's; shape and dtype must be the same on all ranks."""
        if self.size == 1:
            return tensor
        flat = host(tensor)
        self._run(_BROADCAST, flat, timeout_s, lambda: self._down(flat, root))
        if self.rank != root and flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))
        return tensor

    def gather(self, tensor: torch.Tensor, root: int, timeout_s: float | None = None) -> list[torch.Tensor] | None:
        """At the root, the flattened tensors of all ranks in their order (sizes may differ); elsewhere None.

        The root's own is `tensor` flattened; the others are on the CPU. One dtype for all.
        """
        flat = host(tensor)
        found: list[torch.Tensor] | None = [flat]
        if self.size > 1:
            found = self._run(_GATHER, flat, timeout_s, lambda: self._gathered(flat, (root,)))
        return found if self.rank == root else None

    def all_gather(self, tensor: torch.Tensor, timeout_s: float | None = None) -> list[torch.Tensor]:
        """The flattened tensors of all ranks in their order, at every rank. As `gather`."""
        flat = host(tensor)
        if self.size == 1:
            return [flat]
        return self._run(_ALL_GATHER, flat, timeout_s, lambda: self._gathered(flat, range(self.size)))

    def scatter(
        self, tensors: Sequence[torch.Tensor] | None, like: torch.Tensor, root: int, timeout_s: float | None = None
    ) -> torch.Tensor:
        """This rank's of the root's `tensors` (one a rank, sizes may differ; None elsewhere), flat.

        like: any tensor of their dtype. Raises ValueError for another number of tensors.
        """
        if self.rank == root and (tensors is None or len(tensors) != self.size):
            raise ValueError(f"the root of a scatter gives {self.size} tensors")
        if self.rank != root or tensors is None:
            return self._run(_SCATTER, like, timeout_s, lambda: self._receive(root, like.dtype, None))
        parts = [host(part) for part in tensors]

        def give() -> torch.Tensor:
            for rank in self._others:
                self._send(rank, parts[rank])
            return parts[root]

        return self._run(_SCATTER, like, timeout_s, give)

    def measure(self, timeout_s: float) -> Costs:
        """Measure what messages cost between these ranks, and choose by that from here on. The same at every rank.

        Rank 0 exchanges short and long messages with each other one in turn; the worst of the medians count.
        """
        import torch

        if self.size == 1:
            return self.costs
        deadline = time.monotonic() + timeout_s
        short, long = torch.zeros(2), torch.zeros(_LONG_BYTES // 4)
        found = [0.0, 0.0]
        for rank in range(1, self.size):
            for index, tensor in enumerate((short, long)):
                times = []
                for _ in range(_ROUNDS if index == 0 else _ROUNDS // 4):
                    began = time.perf_counter()
                    self._run(_COSTS, tensor, deadline - time.monotonic(), functools.partial(self._ping, tensor, rank))
                    times.append((time.perf_counter() - began) / 2)
                found[index] = max(found[index], sorted(times)[len(times) // 2])
        agreed = torch.tensor(found, dtype=torch.float64)
        self.broadcast_(agreed, 0, max(0.001, deadline - time.monotonic()))
        one_way_s, long_s = agreed.tolist()
        work_s = min(Costs().work_s, one_way_s / 4)
        self.costs = Costs(max(one_way_s - 2 * work_s, 1e-9), work_s, max(long_s - one_way_s, 1e-9) / _LONG_BYTES)
        self._chosen.clear()
        return self.costs

    # -- algorithms of the all-reduce: each replaces `flat` by the sum

    def _one_shot(self, flat: torch.Tensor) -> None:
        view = as_bytes(flat)
        meta = self._meta(0)
        for rank in self._others:
            self._send_bytes(rank, meta, view)
        parts = [
            flat if rank == self.rank else self._receive(rank, flat.dtype, flat.numel()) for rank in range(self.size)
        ]
        self._sent()  # `flat` is still on its way until then
        add_in_order(parts, flat)

    def _scattered(self, flat: torch.Tensor) -> None:
        import torch

        pieces = torch.tensor_split(flat, self.size)
        own = pieces[self.rank]
        for rank in self._others:
            self._send(rank, pieces[rank])
        add_in_order(
            [own if rank == self.rank else self._receive(rank, own.dtype, own.numel()) for rank in range(self.size)],
            own,
        )
        meta, view = self._meta(_SUM), as_bytes(own)
        for rank in self._others:
            self._send_bytes(rank, meta, view)
        self._sent()  # the other pieces are still on their way, and are about to be replaced
        for rank in self._others:
            pieces[rank].copy_(self._receive(rank, own.dtype, pieces[rank].numel(), _SUM))

    def _tree(self, flat: torch.Tensor) -> None:
        import torch

        parts = [flat]  # of the ranks from this one on
        step = 1
        while step < self.size:
            if self.rank % (2 * step):
                self._send(self.rank - step, torch.cat(parts) if len(parts) > 1 else flat)
                break
            if self.rank + step < self.size:
                count = min(step, self.size - self.rank - step)
                parts += (
                    self._receive(self.rank + step, flat.dtype, count * flat.numel()).view(count, flat.numel()).unbind()
                )
            step *= 2
        self._sent()
        if self.rank == 0:
            add_in_order(parts, flat)
        self._down(flat, 0)

    def _ring(self, flat: torch.Tensor) -> None:
        carried = wide(flat.dtype)
        step = max(1, PIECE_BYTES // flat.element_size())
        pieces = [flat[at : at + step] for at in range(0, max(1, flat.numel()), step)]
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        last = self.size - 1
        for index, piece in enumerate(pieces):
            if self.rank == 0:
                self._send(after, piece.to(carried), index)
        # The neighbour before sends the sums so far (but not to rank 0) and the finished ones (but not to the last).
        due = {index for index in range(len(pieces)) if self.rank > 0}
        due |= {_SUM | index for index in range(len(pieces)) if self.rank < last}
        while due:
            part, data = self._take(before, due)
            due.remove(part)
            piece = pieces[part & ~_SUM]
            if part & _SUM:
                self._sent()
                piece.copy_(as_tensor(data, flat.dtype, piece.numel()))
                if after != last:
                    self._send(after, piece, part)
                continue
            total = as_tensor(data, carried, piece.numel())
            total.add_(piece.to(carried))
            if self.rank < last:
                self._send(after, total, part)
            else:
                piece.copy_(total)
                self._send(after, piece, _SUM | part)

    def _islands(self, flat: torch.Tensor) -> None:
        island = self._island if 0 < self._island < self.size else self.size
        first = self.rank - self.rank % island
        members = range(first, min(first + island, self.size))
        if self.rank != first:
            self._send(first, flat)
            self._sent()
            flat.copy_(self._receive(first, flat.dtype, flat.numel(), _SUM))
            return
        parts = [flat, *(self._receive(rank, flat.dtype, flat.numel()) for rank in members[1:])]
        carried = wide(flat.dtype)
        if first > 0:
            parts.insert(0, self._receive(first - island, carried, flat.numel()))
        if first + island < self.size:
            total = parts[0].to(carried, copy=True)
            for part in parts[1:]:
                total.add_(part.to(carried))
            self._send(first + island, total)
            flat.copy_(self._receive(first + island, flat.dtype, flat.numel(), _SUM))
        else:
            add_in_order(parts, flat)
        for rank in [*([first - island] if first > 0 else []), *members[1:]]:
            self._send(rank, flat, _SUM)

    # -- the rest

    def _down(self, flat: torch.Tensor, root: int) -> None:
        """A binomial tree from `root`: what one has, half of the others get next."""
        number = (self.rank - root) % self.size
        step = 1
        while step < self.size:
            step *= 2
        if number:
            step = number & -number
            flat.copy_(self._receive((number - step + root) % self.size, flat.dtype, flat.numel(), _SUM))
        while (step := step // 2) > 0:
            if number + step < self.size:
                self._send((number + step + root) % self.size, flat, _SUM)

    def _gathered(self, flat: torch.Tensor, roots: Iterable[int]) -> list[torch.Tensor]:
        for root in roots:
            if root != self.rank:
                self._send(root, flat)
        if self.rank not in roots:
            return []
        return [flat if rank == self.rank else self._receive(rank, flat.dtype, None) for rank in range(self.size)]

    def _ping(self, tensor: torch.Tensor, rank: int) -> None:
        """From rank 0 to `rank` and back."""
        if self.rank == 0:
            self._send(rank, tensor)
            self._receive(rank, tensor.dtype, tensor.numel(), _SUM)
        elif self.rank == rank:
            self._send(0, self._receive(0, tensor.dtype, tensor.numel()), _SUM)

    # -- messages

    def _run(self, operation: int, tensor: torch.Tensor, timeout_s: float | None, work: Callable[[], Result]) -> Result:
        """One operation: at its end nothing is on its way any more, or all ranks know that it failed."""
        self._operation = operation
        self._dtype = dtype_code(tensor.dtype)
        if timeout_s is None:
            timeout_s = self._allowed_s(tensor.numel() * tensor.element_size())
        self._deadline = time.monotonic() + timeout_s
        try:
            result = work()
            if self._tickets:
                self._sent()
        except TransportError as error:
            self._tell(error)
            raise
        finally:
            self._tickets.clear()
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return result

    def _allowed_s(self, nbytes: int) -> float:
        """What an operation on tensors of `nbytes` may take: each channel carries at most one of every rank."""
        if not self._sequence % 4096:
            self._allowed.clear()  # links change; asking the kernel about each costs microseconds
        found = self._allowed.get(nbytes)
        if found is None:
            found = max((channel.allowance_s(self.size * nbytes) for channel in self._channels.values()), default=0.0)
            self._allowed[nbytes] = found
        return found

    def _meta(self, part: int) -> bytes:
        return _META.pack(self._sequence, self._operation, self._dtype, part)

    def _send(self, rank: int, tensor: torch.Tensor, part: int = 0) -> None:
        self._send_bytes(rank, self._meta(part), as_bytes(tensor))

    def _send_bytes(self, rank: int, meta: bytes, view: memoryview) -> None:
        ticket = self._channels[rank].send(meta, view, kind=COLLECTIVE)
        if not ticket.done:
            self._tickets.append(ticket)

    def _receive(self, rank: int, dtype: torch.dtype, count: int | None, part: int = 0) -> torch.Tensor:
        return as_tensor(self._take(rank, (part,))[1], dtype, count)

    def _take(self, rank: int, parts: Iterable[int]) -> tuple[int, memoryview]:
        """The next message of `rank`, which has to be one of `parts` of this operation."""
        channel = self._channels[rank]
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

    def _sent(self) -> None:
        """Wait until no buffer is in use any more."""
        while self._tickets:
            self._tickets = [ticket for ticket in self._tickets if not ticket.done]
            if self._tickets:
                self._wait(None)

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
        wait_any(self._fabrics, left_s if due_s is None else min(left_s, due_s), spin_s=self._spin_s)

    def _look(self, but: Channel | None) -> None:
        """Whether a rank gave up: the one that is waited for may itself wait for a lost one."""
        for other in self._channels.values():
            if other is not but:
                self._failed(other, other.poll(FAILED))

    def _failed(self, channel: Channel, message: Message | None) -> None:
        if message is not None:
            raise ChannelBroken(f"{channel.name}: gave up: {bytes(message.payload[:200]).decode(errors='replace')}")

    def _tell(self, error: TransportError) -> None:
        """Let the other ranks know that this one gave up."""
        for channel in self._channels.values():
            try:
                channel.send(b"", str(error)[:200].encode(), kind=FAILED)
            except TransportError:
                pass  # it knows, or is gone


_ALGORITHMS: dict[str, tuple[int, Callable[[Group, torch.Tensor], None]]] = {
    ONE_SHOT: (_REDUCE, Group._one_shot),
    SCATTER: (_SCATTERED, Group._scattered),
    TREE: (_TREE, Group._tree),
    RING: (_RING, Group._ring),
    HIERARCHY: (_ISLANDS, Group._islands),
}
ALGORITHMS = tuple(_ALGORITHMS)
