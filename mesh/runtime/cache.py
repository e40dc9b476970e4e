"""The keys and values of the sequences under way, for the layers and KV heads of one shard.

A sequence's buffers start small and double up to the context, layer by layer, so that growing never holds two copies of
everything. Attention reads only what is filled.
"""

from __future__ import annotations

import torch

from mesh.errors import RequestError

#: Positions a new sequence has room for: a short chat turn without growing; 3 MB for the small model in float32.
FIRST_POSITIONS = 64


class Sequence:
    """One request's keys and values. `filled` positions are valid; buffers are [2, kv_heads, positions, head_dim]."""

    __slots__ = ("buffers", "filled", "room")

    def __init__(self, buffers: list[torch.Tensor], room: int) -> None:
        self.buffers = buffers
        self.room = room
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self.buffers)


class KVCache:
    """Sequences by request. Nothing is shared between requests, so dropping one frees all that it held."""

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape = (2, kv_heads, head_dim)
        self._layers = layers
        self._context = context
        self._options = {"dtype": dtype, "device": device}
        self._sequences: dict[str, Sequence] = {}

    def open(self, request: str, position: int, count: int) -> Sequence:
        """The request's sequence with room for `count` positions from `position` on; what lay beyond is forgotten.

        Raises RequestError where positions would be left out or the context is exceeded.
        """
        sequence = self._sequences.get(request)
        filled = 0 if sequence is None else sequence.filled
        if position > filled:
            raise RequestError(f"request {request}: position {position} given, but only {filled} are filled")
        if position + count > self._context:
            raise RequestError(f"request {request}: {position + count} positions exceed the context of {self._context}")
        if sequence is None:
            sequence = self._sequences[request] = Sequence([], 0)
        if position + count > sequence.room:
            self._grow(sequence, position, position + count)
        sequence.filled = position
        return sequence

    def drop(self, request: str) -> None:
        """Forget a request; unknown ones are no mistake."""
        self._sequences.pop(request, None)

    def clear(self) -> None:
        """Forget every request."""
        self._sequences.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held by all sequences."""
        return sum(sequence.nbytes for sequence in self._sequences.values())

    def _grow(self, sequence: Sequence, keep: int, positions: int) -> None:
        room = max(sequence.room, FIRST_POSITIONS)
        while room < positions:
            room *= 2
        room = min(room, self._context)
        two, heads, dim = self._shape
        for layer in range(self._layers):
            grown = torch.empty((two, heads, room, dim), **self._options)  # type: ignore[call-overload]
            if sequence.buffers and layer < len(sequence.buffers):
                grown[:, :, :keep].copy_(sequence.buffers[layer][:, :, :keep])
                sequence.buffers[layer] = grown
            else:
                sequence.buffers.append(grown)
        sequence.room = room
