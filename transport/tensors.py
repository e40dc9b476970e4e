"""Tensors as bytes, and sums that do not depend on who arrived first. Imports torch inside: not everybody has to."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transport.base import ChannelBroken

if TYPE_CHECKING:
    import torch


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """A byte by which ranks notice that they disagree about the dtype; the same in every process."""
    return zlib.crc32(str(dtype).encode()) & 0xFF


@functools.cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """What a sum of this dtype is carried in: float32 for 16-bit floats, which are then rounded once."""
    import torch

    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor flat, contiguous and on the CPU: itself where it is that already, else a copy."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()  # waits for the device's stream: UCX is not ordered with it
    return tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a flat CPU tensor. Through uint8, because numpy knows no bfloat16."""
    import torch

    return tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())


def as_tensor(data: memoryview, dtype: torch.dtype, count: int | None) -> torch.Tensor:
    """A received payload as a flat tensor of `count` elements (None: of any number), without a copy where it can be.

    Raises ChannelBroken for another size.
    """
    import torch

    due = data.nbytes - data.nbytes % dtype.itemsize if count is None else count * dtype.itemsize
    if data.nbytes != due:
        raise ChannelBroken(f"a rank sent {data.nbytes} bytes where {due} were due; the shards run different code")
    if not data.nbytes:
        return torch.empty(0, dtype=dtype)
    # frombuffer warns about read-only memory, and needs the element's alignment.
    if data.readonly:
        data = memoryview(bytearray(data))
    return torch.frombuffer(data, dtype=dtype)


def add_in_order(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """The sum of `parts` in the order given, into `out`, which may be one of them but overlaps no other.

    16-bit floats: see `wide`.
    """
    import torch

    carried = wide(out.dtype)
    if len(parts) == 1:
        out.copy_(parts[0])
    elif carried == out.dtype == parts[0].dtype and not any(part is out for part in parts[2:]):
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)
    else:
        total = torch.add(parts[0].to(carried), parts[1].to(carried))
        for part in parts[2:]:
            total.add_(part if part.dtype == carried else part.to(carried))
        out.copy_(total)
