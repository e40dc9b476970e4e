"""Collectives of the ranks of one stage, over one channel to each other rank, or over memory that they share.

An all-reduce adds in the order of the ranks, ((r0 + r1) + r2) + r3, whichever way the tensors travel, so that all ranks
hold the same bits, in every run. Tensors of bfloat16 and float16 are summed in float32 and rounded once.

    one-shot    every rank sends its tensor to every other; each adds. One latency: a decode step's 2 to 64 KiB.
    scatter     each rank adds one slice of the tensor and sends it round (reduce-scatter, then all-gather)
    tree        a binomial tree collects the tensors at rank 0, which adds, and gives the sum out: few messages a rank
    ring        pieces go round from rank 0, growing by each rank, and the sums go round after them: one neighbour
    hierarchy   near ranks give theirs to the first of their island, a sum goes from island to island, and back

`collective_choice` picks by size and costs; `measure` replaces the assumed costs by measured ones. Ranks that are
processes of one host need no messages: see `transport.board`, and `transport.vendor_sums` for GPUs. What fails at one
rank fails at all, see `exchange`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from transport.base import ChannelBroken, TransportError
from transport.board import Board, BoardUnavailable
from transport.channel import Channel
from transport.collective_choice import Costs, choose
from transport.exchange import SUM, Exchange
from transport.reductions import ALGORITHMS as _ALGORITHMS
from transport.reductions import down
from transport.tensors import host
from transport.vendor_sums import Look, NoVendorLibrary, VendorSums, backend_for

if TYPE_CHECKING:
    import torch

ALGORITHMS = tuple(_ALGORITHMS)

#: Numbers of operations beside those of `transport.reductions`.
_BROADCAST, _GATHER, _ALL_GATHER, _SCATTER, _COSTS, _OFFER, _VOTE, _DEVICE_OFFER, _DEVICE_VOTE = range(16, 25)

#: Rounds of `measure`, and the bytes of its long messages.
_ROUNDS = 20
_LONG_BYTES = 1 << 20


class Group:
    """The ranks 0 to size-1 of a group, seen from `rank`. All of them call the same operations in the same order.

    channels: one for each other rank. island: how many consecutive ranks are near each other, 0 where all are alike.
    beside: whether all ranks are processes of this host that trust each other (shards of one site): then they share
    memory where they can, sealed where the channels are. All ranks have to be told the same.
    device: where this rank's tensors lie, by torch's name; ranks beside each other with a GPU each sum through the
    vendor's library where `vendor` names one for it.
    A rank that calls something else, or a tensor of another size or dtype, is found out and breaks the group: every
    operation raises ChannelBroken (also when a rank is lost), ChannelClosed, or DeadlineExceeded, and the group is then
    of no more use. timeout_s: None for what such tensors may take on these links. Close it at the end.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        channels: Mapping[int, Channel],
        *,
        island: int = 0,
        beside: bool = False,
        device: str = "cpu",
        vendor: Callable[[str], str | None] = backend_for,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}")
        if set(channels) != set(range(size)) - {rank}:
            raise ValueError(f"rank {rank} of {size} needs a channel to each other rank, got {sorted(channels)}")
        self.rank = rank
        self.size = size
        self.costs = Costs()
        self._island = island
        self._x = Exchange(rank, size, channels)
        self._chosen: dict[int, str] = {}
        self._to_meet = beside and size > 1
        self._board: Board | None = None
        self._timeout_s: float | None = None
        self._deadline = 0.0
        self._over: torch.Tensor | None = None
        self._device, self._vendor = device, vendor
        self._sums: VendorSums | None = None

    def close(self) -> None:
        """Release what the group holds; the channels stay open. Idempotent."""
        if self._board is not None:
            self._board.close()
        if self._sums is not None:
            self._sums.close()

    # -- operations

    def all_reduce_(
        self, tensor: torch.Tensor, timeout_s: float | None = None, *, algorithm: str | None = None
    ) -> torch.Tensor:
        """Replace `tensor` by its sum over all ranks, the same bits on each. Any shape, dtype and device.

        algorithm: one of those above, the same at every rank; None chooses.
        """
        if self._board is not None and algorithm is None and tensor.is_cpu:
            self._over_board(tensor, timeout_s)
            return tensor
        if self.size == 1:
            return tensor
        if self._to_meet:
            self._meet(timeout_s)
            return self.all_reduce_(tensor, timeout_s, algorithm=algorithm)
        if self._sums is not None and algorithm is None and self._sums.suits(tensor):
            sums = self._sums
            self._on_devices(tensor, timeout_s, lambda look: sums.all_reduce_(tensor, look))
            return tensor
        flat = host(tensor)
        if self._board is not None and algorithm is None:
            self._over_board(flat, timeout_s)
        else:
            name = self._choose(flat.numel() * flat.element_size()) if algorithm is None else algorithm
            number, work = _ALGORITHMS[name]
            self._x.run(number, flat, timeout_s, lambda: work(self._x, flat, self._island))
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))
        return tensor

    def broadcast_(self, tensor: torch.Tensor, root: int, timeout_s: float | None = None) -> torch.Tensor:
        """Replace `tensor` by the root's; shape and dtype must be the same on all ranks."""
        if self.size == 1:
            return tensor
        if self._to_meet:
            self._meet(timeout_s)
        if self._sums is not None and self._sums.suits(tensor):
            sums = self._sums
            self._on_devices(tensor, timeout_s, lambda look: sums.broadcast_(tensor, root, look))
            return tensor
        flat = host(tensor)
        if self._board is not None:
            self._over_board(flat, timeout_s, root)
        else:
            self._x.run(_BROADCAST, flat, timeout_s, lambda: down(self._x, flat, root))
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
            found = self._x.run(_GATHER, flat, timeout_s, lambda: self._gathered(flat, (root,)))
        return found if self.rank == root else None

    def all_gather(self, tensor: torch.Tensor, timeout_s: float | None = None) -> list[torch.Tensor]:
        """The flattened tensors of all ranks in their order, at every rank. As `gather`."""
        flat = host(tensor)
        if self.size == 1:
            return [flat]
        return self._x.run(_ALL_GATHER, flat, timeout_s, lambda: self._gathered(flat, range(self.size)))

    def scatter(
        self, tensors: Sequence[torch.Tensor] | None, like: torch.Tensor, root: int, timeout_s: float | None = None
    ) -> torch.Tensor:
        """This rank's of the root's `tensors` (one a rank, sizes may differ; None elsewhere), flat.

        like: any tensor of their dtype. Raises ValueError for another number of tensors.
        """
        if self.rank == root and (tensors is None or len(tensors) != self.size):
            raise ValueError(f"the root of a scatter gives {self.size} tensors")
        if self.rank != root or tensors is None:
            return self._x.run(_SCATTER, like, timeout_s, lambda: self._x.receive(root, like.dtype, None))
        parts = [host(part) for part in tensors]

        def give() -> torch.Tensor:
            for rank in self._x.others:
                self._x.send(rank, parts[rank])
            return parts[root]

        return self._x.run(_SCATTER, like, timeout_s, give)

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
                    self._x.run(
                        _COSTS, tensor, deadline - time.monotonic(), functools.partial(self._ping, tensor, rank)
                    )
                    times.append((time.perf_counter() - began) / 2)
                found[index] = max(found[index], sorted(times)[len(times) // 2])
        agreed = torch.tensor(found, dtype=torch.float64)
        self.broadcast_(agreed, 0, max(0.001, deadline - time.monotonic()))
        one_way_s, long_s = agreed.tolist()
        work_s = min(Costs().work_s, one_way_s / 4)
        self.costs = Costs(max(one_way_s - 2 * work_s, 1e-9), work_s, max(long_s - one_way_s, 1e-9) / _LONG_BYTES)
        self._chosen.clear()
        return self.costs

    # -- over memory

    def _meet(self, timeout_s: float | None) -> None:
        """Share memory, or agree not to: everybody offers, tries, and says whether that went well."""

        self._to_meet = False
        board: Board | None = None
        offer = b""
        try:
            sealed = any(channel.sealed for channel in self._x.channels.values())
            board = Board(self.rank, self.size, seal=sealed, spin_s=self._x.spin_s)
            offer = board.offer()
        except BoardUnavailable:
            pass
        try:
            offers = self._told(_OFFER, offer, timeout_s)
            joined = board is not None and all(offers)
            if board is not None and joined:
                try:
                    board.join(offers)
                except BoardUnavailable:
                    joined = False
            votes = self._told(_VOTE, b"y" if joined else b"n", timeout_s)
            if all(vote == b"y" for vote in votes):
                self._board = board
        finally:
            if board is not None and self._board is None:
                board.close()
        self._meet_devices(timeout_s)

    def _meet_devices(self, timeout_s: float | None) -> None:
        """The same with the library of the ranks' GPUs."""
        backend = self._vendor(self._device)
        sums = None if backend is None else VendorSums(self.rank, self.size, self._device, backend)
        try:
            offers = self._told(_DEVICE_OFFER, b"" if sums is None else sums.offer(), timeout_s)
            if sums is None or not all(offers):
                return
            deadline = time.monotonic() + (self._x.allowed_s(0) if timeout_s is None else timeout_s)
            joined = True
            try:
                sums.join(offers, lambda: self._x.watch(deadline))
            except NoVendorLibrary:
                joined = False
            votes = self._told(_DEVICE_VOTE, b"y" if joined else b"n", timeout_s)
            if all(vote == b"y" for vote in votes):
                self._sums = sums
        finally:
            if sums is not None and self._sums is None:
                sums.close()

    def _on_devices(self, tensor: torch.Tensor, timeout_s: float | None, work: Callable[[Look], None]) -> None:
        deadline = time.monotonic() + (self._x.allowed_s(tensor.nbytes) if timeout_s is None else timeout_s)
        try:
            work(lambda: self._x.watch(deadline))
        except TransportError as error:
            self._x.tell(error)
            raise
        except RuntimeError as error:  # the library's
            broken = ChannelBroken(f"the GPUs' library: {' '.join(str(error).split())[:200]}")
            self._x.tell(broken)
            raise broken from error

    def _told(self, operation: int, word: bytes, timeout_s: float | None) -> list[bytes]:
        """Every rank's word, in order."""
        import torch

        own = torch.frombuffer(bytearray(word), dtype=torch.uint8) if word else torch.empty(0, dtype=torch.uint8)
        told = self._x.run(operation, own, timeout_s, lambda: self._gathered(own, range(self.size)))
        return [bytes(each.numpy()) for each in told]

    def _over_board(self, tensor: torch.Tensor, timeout_s: float | None, root: int | None = None) -> None:
        assert self._board is not None
        self._timeout_s, self._deadline, self._over = timeout_s, 0.0, tensor
        if tensor.requires_grad:
            tensor = tensor.detach()
        try:
            if root is None:
                self._board.all_reduce_(tensor, self._pause)
            else:
                self._board.broadcast_(tensor, root, self._pause)
        except TransportError as error:
            self._x.tell(error)
            raise
        finally:
            self._over = None

    def _pause(self, rank: int) -> None:
        """`rank` has not come for longer than a moment. The clock is not looked at before."""
        if not self._deadline:
            timeout_s = self._timeout_s
            if timeout_s is None:
                assert self._over is not None
                timeout_s = self._x.allowed_s(self._over.nbytes)
            self._deadline = time.monotonic() + timeout_s
        assert self._board is not None
        self._x.rest(rank, self._deadline, self._board.segment)

    # -- the rest

    def _choose(self, nbytes: int) -> str:
        algorithm = self._chosen.get(nbytes)
        if algorithm is None:
            if len(self._chosen) > 1000:
                self._chosen.clear()
            algorithm = self._chosen[nbytes] = choose(nbytes, self.size, self.costs, self._island)
        return algorithm

    def _gathered(self, flat: torch.Tensor, roots: Iterable[int]) -> list[torch.Tensor]:
        for root in roots:
            if root != self.rank:
                self._x.send(root, flat)
        if self.rank not in roots:
            return []
        return [flat if rank == self.rank else self._x.receive(rank, flat.dtype, None) for rank in range(self.size)]

    def _ping(self, tensor: torch.Tensor, rank: int) -> None:
        """From rank 0 to `rank` and back."""
        if self.rank == 0:
            self._x.send(rank, tensor)
            self._x.receive(rank, tensor.dtype, tensor.numel(), SUM)
        elif self.rank == rank:
            self._x.send(0, self._x.receive(0, tensor.dtype, tensor.numel()), SUM)
