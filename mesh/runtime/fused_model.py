"""The fused path's whole shard: embedding, layers, last norm and head, with what a reload may keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from mesh.errors import ModelError
from mesh.runtime.assignment import Assignment
from mesh.runtime.cache import Sequence
from mesh.runtime.fused import AllReduce, FusedLayer, FusedStack, cut_to, rms_norm
from mesh.runtime.matrix import Matrix, packs
from mesh.runtime.shape import Shape
from mesh.runtime.shard import TORCH_DTYPES, Cut, Piece, fill
from mesh.runtime.source import ModelSource

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class FusedModel:
    """One shard of a model of the llama family."""

    def __init__(self, shape: Shape, source: ModelSource, a: Assignment, keep: FusedModel | None = None) -> None:
        self._shape = shape
        self._source = source
        self._a = a
        self.kv_heads, self.head_dim, self.hidden, self.vocab = (
            shape.kv_heads,
            shape.head_dim,
            shape.hidden,
            shape.vocab,
        )
        self._stack = FusedStack(shape, a)
        self._embedding: torch.Tensor | None = None if keep is None else keep._embedding
        self._head: tuple[Cut, Matrix] | None = None if keep is None else keep._head
        self._norm: torch.Tensor | None = None
        self._kept: dict[int, FusedLayer] = {} if keep is None else keep._stack.layers

    def load(self, progress: Callable[[int, int], None]) -> None:
        """Bring in every block: kept, copied from what is held, or read. `progress(done, total)` counts bytes."""
        a = self._a
        # What is no longer wanted goes first, so that old and new never lie in memory together.
        for index in [index for index in self._kept if not a.start <= index < a.end]:
            del self._kept[index]
        total = self.planned_bytes()
        done = 0
        progress(done, total)
        for index in range(a.start, a.end):
            layer = self._kept.pop(index, None)
            if layer is None or layer.ranges != cut_to(a, self._shape):
                layer = FusedLayer(index, self._shape, self._source, a, {} if layer is None else layer.pieces())
            self._stack.layers[index] = layer
            done += layer.nbytes
            progress(done, total)
        self._load_head()
        self._load_embedding()
        progress(total, total)

    def planned_bytes(self) -> int:
        """Bytes the shard's blocks take, from shapes alone."""
        a, s = self._a, self._shape
        spans = (a.query_heads(s.group), a.kv_heads, a.columns)
        heads, kv, columns = (stop - start for start, stop in spans)
        layer = 2 * (heads + kv) * s.head_dim * s.hidden + 3 * columns * s.hidden + 2 * s.hidden
        head = (a.vocabulary[1] - a.vocabulary[0]) * s.hidden if a.last else 0
        embedding = s.vocab * s.hidden if self._embeds and not self._looks_up else 0
        return int((layer * (a.end - a.start) + head + embedding) * TORCH_DTYPES[a.dtype].itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held."""
        parts = [layer.nbytes for layer in self._stack.layers.values()]
        parts += [part.nbytes for part in (self._norm, self._embedding) if part is not None]
        if self._head is not None and (self._head[1].packed or self._head[1].dense() is not self._embedding):
            parts.append(self._head[1].nbytes)
        return sum(parts)

    def embed(self, tokens: list[int]) -> torch.Tensor:
        """Hidden states [n, hidden] of token ids; on the first stage's lead only."""
        if self._embedding is not None:
            return functional.embedding(torch.tensor(tokens, device=self._a.device), self._embedding)
        return self._source.look_up(EMBEDDING, tokens, TORCH_DTYPES[self._a.dtype])

    def run(
        self, x: torch.Tensor, position: int, sequence: Sequence, all_reduce: AllReduce | None, *, logits: bool
    ) -> torch.Tensor:
        """Hidden states through the layers, or with `logits` the last one through norm and head: [rows held]."""
        x = self._stack.run(x, position, sequence, all_reduce)
        if not logits:
            return x
        if self._head is None or self._norm is None:
            return x.new_empty(0)
        return self._head[1](rms_norm(x[-1:], self._norm, self._shape.eps))[0]

    @property
    def _embeds(self) -> bool:
        return self._a.first and self._a.leads

    @property
    def _looks_up(self) -> bool:
        """Whether token embeddings are read from the file, row by row.

        Where the head is the same matrix and is packed, a second copy for some thousand bytes a token is not worth its
        memory; a row read from the page cache takes microseconds.
        """
        a = self._a
        packed = torch.device(a.device).type == "cpu" and packs(TORCH_DTYPES[a.dtype])
        return self._shape.tied and a.last and a.vocabulary[0] < a.vocabulary[1] and packed

    def _load_head(self) -> None:
        a = self._a
        low, high = a.vocabulary
        if not a.last or low >= high:
            self._head, self._norm = None, None
            return
        name, cut, old = EMBEDDING if self._shape.tied else HEAD, Cut(0, low, high), self._head
        if old is None or old[0] != cut:
            held = {} if old is None else {name: Piece(old[0], old[1].dense)}
            block = torch.empty((high - low, self.hidden), dtype=TORCH_DTYPES[a.dtype], device=a.device)
            fill(block, self._source, name, cut, held)
            self._head = (cut, Matrix(block))
        self._norm = torch.empty(self.hidden, dtype=TORCH_DTYPES[a.dtype], device=a.device)
        fill(self._norm, self._source, NORM, Cut(), {})

    def _load_embedding(self) -> None:
        if not self._embeds or self._looks_up:
            shape = self._source.shape(EMBEDDING)
            if self._embeds and shape != (self.vocab, self.hidden):
                raise ModelError(f"{self._source.path}: {EMBEDDING} has shape {list(shape)}, unlike config.json")
            self._embedding = None
            return
        if self._embedding is None:
            whole = self._head is not None and self._shape.tied and self._head[0] == Cut(0, 0, self.vocab)
            if whole and self._head is not None:
                self._embedding = self._head[1].dense()  # not packed here, so it is the same tensor
                return
            table = torch.empty((self.vocab, self.hidden), dtype=TORCH_DTYPES[self._a.dtype], device=self._a.device)
            fill(table, self._source, EMBEDDING, Cut(), {})
            self._embedding = table
