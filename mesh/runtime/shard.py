"""Which block of which tensor a shard holds, and filling it: from what the worker holds already, else from disk.

Tensor parallelism follows Megatron-LM (Shoeybi et al., arXiv:1909.08053): q, k, v, gate and up are cut by rows
("colwise" in transformers' plans), o and down by columns ("rowwise"), and their outputs are summed over the shards.
Shards may hold different numbers of query heads, and each has the rows of k and v that its query heads use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mesh.errors import ModelError
from topology.heads import whole_groups

if TYPE_CHECKING:
    from mesh.runtime.assignment import Assignment
    from mesh.runtime.source import ModelSource

_BY_QUERY_HEAD = ("self_attn.q_proj", "self_attn.o_proj")
_BY_KV_HEAD = ("self_attn.k_proj", "self_attn.v_proj")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows (dim 0) or columns (dim 1) `[start, stop)` of a tensor; the whole of it where `dim` is None."""

    dim: int | None = None
    start: int = 0
    stop: int = 0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The block's shape, given the whole tensor's."""
        return tuple(self.stop - self.start if dim == self.dim else size for dim, size in enumerate(whole))


@dataclass(frozen=True, slots=True)
class Piece:
    """A block that is in memory. `tensor` is called only when it is needed: unpacking a matrix costs a copy."""

    cut: Cut
    tensor: Callable[[], torch.Tensor]


Held = Mapping[str, Piece]


def fill(out: torch.Tensor, source: ModelSource, name: str, cut: Cut, held: Held) -> None:
    """Fill `out` with a block of tensor `name`: what `held` has is copied, the rest is read. Raises ModelError."""
    whole = source.shape(name)
    if cut.dim is not None and cut.stop > whole[cut.dim]:
        raise ModelError(f"{source.path}: {name} has shape {list(whole)}, too small for {cut.start}:{cut.stop}")
    if tuple(out.shape) != cut.shape(whole):
        raise ModelError(f"{source.path}: {name} has shape {list(whole)}, which does not fit its config.json")
    piece = held.get(name)
    if piece is None or (piece.cut.dim is not None and piece.cut.dim != cut.dim):
        _read(out, source, name, cut.dim, cut.start)
        return
    if cut.dim is None:
        out.copy_(piece.tensor())
        return
    start, stop = (0, whole[cut.dim]) if piece.cut.dim is None else (piece.cut.start, piece.cut.stop)
    low, high = max(cut.start, start), min(cut.stop, stop)
    if low >= high:
        _read(out, source, name, cut.dim, cut.start)
        return
    kept = piece.tensor().narrow(cut.dim, low - start, high - low)
    out.narrow(cut.dim, low - cut.start, high - low).copy_(kept)
    for first, last in ((cut.start, low), (high, cut.stop)):
        if first < last:
            _read(out.narrow(cut.dim, first - cut.start, last - first), source, name, cut.dim, first)


def _read(out: torch.Tensor, source: ModelSource, name: str, dim: int | None, start: int) -> None:
    source.read_into(out, name, tuple(start if index == dim else 0 for index in range(out.dim())))


def cut_of(
    module: str, kind: str, whole: tuple[int, ...], *, plan: str | None, kv_heads: int, group: int, a: Assignment
) -> Cut:
    """The cut of a layer's tensor, from its module's entry in the tensor-parallel plan.

    `module` is the path within the layer ("self_attn.q_proj"), `kind` "weight" or "bias", `kv_heads` the model's,
    `group` the number of query heads that share one. Raises ModelError.
    """
    if plan not in ("colwise", "rowwise"):
        return Cut()
    if plan == "rowwise" and kind == "bias":
        return Cut()  # added once, by the lead
    dim = 0 if plan == "colwise" else 1
    if module.startswith("self_attn."):
        span, count = a.kv_heads, kv_heads
        if module in _BY_QUERY_HEAD:
            span, count = a.query_heads(group), kv_heads * group
        elif module not in _BY_KV_HEAD and a.query_heads(group) != whole_groups(a.kv_heads, group):
            raise ModelError(f"{module} can be cut between KV heads only: ask for no more shards than KV heads")
        each = whole[dim] // count
        return Cut(dim, span[0] * each, span[1] * each)
    return Cut(dim, *a.columns)
