"""What a worker's decoding steps had to do and how long they took: by this its daemon knows the device's pace."""

from __future__ import annotations

from typing import Any, NamedTuple

from mesh.runtime.assignment import Assignment
from topology.model import DTYPE_BYTES


class Work(NamedTuple):
    """What decoding steps take by `topology.snapshot.Decoding`: layers, output rows of matrices, bytes read."""

    layers: float = 0.0
    rows: float = 0.0
    size_bytes: float = 0.0


class Decoded(NamedTuple):
    """All decoding steps of a worker so far: how many, seconds they computed (without collectives), and their work."""

    steps: float = 0
    seconds: float = 0.0
    layers: float = 0.0
    rows: float = 0.0
    size_bytes: float = 0.0

    def after(self, seconds: float, work: Work) -> Decoded:
        """With one step more."""
        return Decoded(
            self.steps + 1,
            self.seconds + seconds,
            self.layers + work.layers,
            self.rows + work.rows,
            self.size_bytes + work.size_bytes,
        )

    def since(self, before: Decoded) -> Decoded:
        """What was done between two reports."""
        return Decoded(*(new - old for new, old in zip(self, before, strict=True)))


NOTHING_DECODED = Decoded()


def step_work(a: Assignment, config: dict[str, Any], hidden: int, head_dim: int) -> tuple[Work, float] | None:
    """One decoding step of a shard at an empty cache, and the bytes that each filled position adds.

    `config` is the model's config.json, None is given where it does not say its heads; `hidden` and `head_dim` are the
    elements of a hidden state and of a head.
    """
    every = config.get("num_attention_heads")
    shared = config.get("num_key_value_heads") or every
    if not (isinstance(every, int) and isinstance(shared, int) and 0 < shared <= every):
        return None
    kv_heads = a.kv_heads[1] - a.kv_heads[0]
    heads = a.query_heads(every // shared)
    queries, columns = heads[1] - heads[0], a.columns[1] - a.columns[0]
    layers, element = a.end - a.start, DTYPE_BYTES[a.dtype]
    head_rows = a.vocabulary[1] - a.vocabulary[0] if a.last else 0
    rows = layers * ((queries + 2 * kv_heads) * head_dim + 2 * columns + 2 * hidden) + head_rows
    weights = layers * hidden * (2 * (queries + kv_heads) * head_dim + 3 * columns) + head_rows * hidden
    return Work(layers, rows, weights * element), 2.0 * layers * kv_heads * head_dim * element
