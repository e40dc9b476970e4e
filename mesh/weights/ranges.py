"""Which blocks of a model a shard needs. Pure.

The rules follow what `mesh.runtime` reads: of a stage's layers the rows of q, k, v, gate and up that belong to the
shard; o and down are cut by columns, which lie in every row and so in every block of the tensor. Names are those of
transformers and of llama.cpp. What is not known by name is taken whole: too much is slow, too little would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Protocol

from mesh.weights.manifest import Manifest, TensorEntry

_LAYER = re.compile(r"(?:^|\.)(?:layers|blk|h|blocks)\.(\d+)\.")
_BY_HEADS = re.compile(r"\.(?:self_attn\.|attn_)([qkv])(?:_proj)?\.(?:weight|bias)$")
_BY_COLUMNS = re.compile(r"\.(?:mlp\.(?:gate|up)_proj|ffn_(?:gate|up))\.(?:weight|bias)$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|token_embd|wte)\.weight$")
_HEAD = re.compile(r"^(?:lm_head|output)\.(?:weight|bias)$")


class Slice(Protocol):
    """What is needed of `mesh.runtime.assignment.Assignment`."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def kv_heads(self) -> tuple[int, int]: ...
    @property
    def heads(self) -> tuple[int, int] | None: ...
    @property
    def columns(self) -> tuple[int, int]: ...
    @property
    def vocabulary(self) -> tuple[int, int]: ...
    @property
    def first(self) -> bool: ...
    @property
    def last(self) -> bool: ...
    @property
    def leads(self) -> bool: ...


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to, or None."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def wanted(manifest: Manifest, part: Slice | None, *, cut: bool = True) -> list[int]:
    """The blocks that `part` needs, in the order of the files; without a part those of headers and settings alone.

    cut: False takes every tensor of the part's layers, and every tensor outside of the layers, whole.
    """
    needed = set(manifest.headers())
    if part is not None:
        for file, start, end in spans(manifest, part, cut=cut):
            needed.update(manifest.covering(file, start, end))
    return sorted(needed)


def spans(manifest: Manifest, part: Slice, *, cut: bool = True) -> Iterator[tuple[int, int, int]]:
    """What `part` reads of the tensors: file number, first byte, end."""
    tied = not any(_HEAD.search(tensor.name) for tensor in manifest.tensors)
    for tensor in manifest.tensors:
        rows = _rows(tensor, part, manifest, tied) if cut else _uncut(tensor, part)
        if rows is not None:
            first, end = (tensor.offset + row * tensor.size // tensor.rows for row in rows)
            yield tensor.file, first, end


def _uncut(tensor: TensorEntry, part: Slice) -> tuple[int, int] | None:
    layer = layer_of(tensor.name)
    return (0, tensor.rows) if layer is None or part.start <= layer < part.end else None


def _rows(tensor: TensorEntry, part: Slice, manifest: Manifest, tied: bool) -> tuple[int, int] | None:
    """The rows of a tensor that the part reads, or None for none of them."""
    name, rows = tensor.name, tensor.rows
    layer = layer_of(name)
    if layer is not None:
        if not part.start <= layer < part.end:
            return None
        found = _BY_HEADS.search(name)
        if found is not None:
            queries = part.heads if found[1] == "q" else None
            span, of = (part.kv_heads, manifest.kv_heads) if queries is None else (queries, manifest.heads)
            return _within(span, of, rows) if of and rows % of == 0 else (0, rows)
        if _BY_COLUMNS.search(name) and rows >= part.columns[1]:
            return part.columns
        return 0, rows
    if _HEAD.search(name):
        return _vocabulary(part, rows)
    if _EMBEDDING.search(name):
        if part.first and part.leads:
            return 0, rows
        return _vocabulary(part, rows) if tied else None
    return 0, rows


def _within(heads: tuple[int, int], of: int, rows: int) -> tuple[int, int]:
    each = rows // of
    return min(heads[0] * each, rows), min(heads[1] * each, rows)


def _vocabulary(part: Slice, rows: int) -> tuple[int, int] | None:
    if not part.last or part.vocabulary[0] >= part.vocabulary[1]:
        return None
    return min(part.vocabulary[0], rows), min(part.vocabulary[1], rows)


def layers_present(manifest: Manifest, has: Callable[[int], bool]) -> list[tuple[int, int]]:
    """The runs of layers `[start, end)` of which every block is there."""
    whole: dict[int, bool] = {}
    for tensor in manifest.tensors:
        layer = layer_of(tensor.name)
        if layer is not None and whole.get(layer, True):
            blocks = manifest.covering(tensor.file, tensor.offset, tensor.offset + tensor.size)
            whole[layer] = all(has(block) for block in blocks)
    runs: list[tuple[int, int]] = []
    for layer in sorted(layer for layer, there in whole.items() if there):
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs
