"""The algorithms of the all-reduce over messages, and the tree that gives a tensor out.

All add in the order of the ranks, whichever way the tensors travel: see `transport.collectives`. Each replaces `flat`
by the sum; `island` is how many consecutive ranks are near each other, which all but one of them ignore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transport.collective_choice import HIERARCHY, ONE_SHOT, PIECE_BYTES, RING, SCATTER, TREE
from transport.exchange import SUM, Exchange
from transport.tensors import add_in_order, as_bytes, as_tensor, wide

if TYPE_CHECKING:
    import torch


def one_shot(x: Exchange, flat: torch.Tensor, island: int) -> None:
    """Everybody sends everything to everybody."""
    view = as_bytes(flat)
    meta = x.meta(0)
    for rank in x.others:
        x.send_bytes(rank, meta, view)
    parts = [flat if rank == x.rank else x.receive(rank, flat.dtype, flat.numel()) for rank in range(x.size)]
    x.sent()  # `flat` is still on its way until then
    add_in_order(parts, flat)


def scattered(x: Exchange, flat: torch.Tensor, island: int) -> None:
    """Each rank adds one slice and sends it round: a reduce-scatter, then an all-gather (Thakur and others 2005)."""
    import torch

    pieces = torch.tensor_split(flat, x.size)
    own = pieces[x.rank]
    for rank in x.others:
        x.send(rank, pieces[rank])
    add_in_order(
        [own if rank == x.rank else x.receive(rank, own.dtype, own.numel()) for rank in range(x.size)],
        own,
    )
    meta, view = x.meta(SUM), as_bytes(own)
    for rank in x.others:
        x.send_bytes(rank, meta, view)
    x.sent()  # the other pieces are still on their way, and are about to be replaced
    for rank in x.others:
        pieces[rank].copy_(x.receive(rank, own.dtype, pieces[rank].numel(), SUM))


def tree(x: Exchange, flat: torch.Tensor, island: int) -> None:
    """A binomial tree collects the tensors, unadded, at rank 0, which adds them and gives the sum out."""
    import torch

    parts = [flat]  # of the ranks from this one on
    step = 1
    while step < x.size:
        if x.rank % (2 * step):
            x.send(x.rank - step, torch.cat(parts) if len(parts) > 1 else flat)
            break
        if x.rank + step < x.size:
            count = min(step, x.size - x.rank - step)
            parts += x.receive(x.rank + step, flat.dtype, count * flat.numel()).view(count, flat.numel()).unbind()
        step *= 2
    x.sent()
    if x.rank == 0:
        add_in_order(parts, flat)
    down(x, flat, 0)


def ring(x: Exchange, flat: torch.Tensor, island: int) -> None:
    """Pieces go round from rank 0, growing by each rank, and the sums go round after them."""
    carried = wide(flat.dtype)
    step = max(1, PIECE_BYTES // flat.element_size())
    pieces = [flat[at : at + step] for at in range(0, max(1, flat.numel()), step)]
    after, before = (x.rank + 1) % x.size, (x.rank - 1) % x.size
    last = x.size - 1
    for index, piece in enumerate(pieces):
        if x.rank == 0:
            x.send(after, piece.to(carried), index)
    # The neighbour before sends the sums so far (but not to rank 0) and the finished ones (but not to the last).
    due = {index for index in range(len(pieces)) if x.rank > 0}
    due |= {SUM | index for index in range(len(pieces)) if x.rank < last}
    while due:
        part, data = x.take(before, due)
        due.remove(part)
        piece = pieces[part & ~SUM]
        if part & SUM:
            x.sent()
            piece.copy_(as_tensor(data, flat.dtype, piece.numel()))
            if after != last:
                x.send(after, piece, part)
            continue
        total = as_tensor(data, carried, piece.numel())
        total.add_(piece.to(carried))
        if x.rank < last:
            x.send(after, total, part)
        else:
            piece.copy_(total)
            x.send(after, piece, SUM | part)


def islands(x: Exchange, flat: torch.Tensor, island: int) -> None:
    """Near ranks give theirs to the first of their island; a sum goes from island to island, and back."""
    island = island if 0 < island < x.size else x.size
    first = x.rank - x.rank % island
    members = range(first, min(first + island, x.size))
    if x.rank != first:
        x.send(first, flat)
        x.sent()
        flat.copy_(x.receive(first, flat.dtype, flat.numel(), SUM))
        return
    parts = [flat, *(x.receive(rank, flat.dtype, flat.numel()) for rank in members[1:])]
    carried = wide(flat.dtype)
    if first > 0:
        parts.insert(0, x.receive(first - island, carried, flat.numel()))
    if first + island < x.size:
        total = parts[0].to(carried, copy=True)
        for part in parts[1:]:
            total.add_(part.to(carried))
        x.send(first + island, total)
        flat.copy_(x.receive(first + island, flat.dtype, flat.numel(), SUM))
    else:
        add_in_order(parts, flat)
    for rank in [*([first - island] if first > 0 else []), *members[1:]]:
        x.send(rank, flat, SUM)


def down(x: Exchange, flat: torch.Tensor, root: int) -> None:
    """A binomial tree from `root`: what one has, half of the others get next."""
    number = (x.rank - root) % x.size
    step = 1
    while step < x.size:
        step *= 2
    if number:
        step = number & -number
        flat.copy_(x.receive((number - step + root) % x.size, flat.dtype, flat.numel(), SUM))
    while (step := step // 2) > 0:
        if number + step < x.size:
            x.send((number + step + root) % x.size, flat, SUM)


#: By name, with the number by which the ranks notice that they do not take the same.
ALGORITHMS: dict[str, tuple[int, Callable[[Exchange, torch.Tensor, int], None]]] = {
    ONE_SHOT: (1, one_shot),
    TREE: (2, tree),
    RING: (3, ring),
    HIERARCHY: (4, islands),
    SCATTER: (5, scattered),
}
