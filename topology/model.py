"""What a planner must know about a model: its shape, and so its bytes and its arithmetic.

Sizes follow the decoder-only transformer: per layer q, k, v, o and a gated MLP, plus embedding and head. A model whose
real tensors differ (biases, norms, experts) carries the measured `layer_bytes` instead of the derived one. Weights may
be stored in fewer bytes than activations and the KV cache take: `bytes_per_parameter` tells the one, `dtype` the other.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Final

#: Bytes of one element, by torch's dtype name.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


#: Longest run of prompt tokens a stage computes at once; activation memory is sized for it.
PREFILL_CHUNK: Final = 512
#: Bytes of one logit: sampling happens in float32.
LOGIT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder-only model. `dtype` is the one it will run in (a key of `DTYPE_BYTES`).

    `bytes_per_parameter` is what a stored weight takes, 0.5 for four bits; None: as many bytes as `dtype` has.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool
    dtype: str
    context: int
    bytes_per_parameter: float | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of an activation or of the KV cache."""
        return DTYPE_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight: less than `element_bytes` where the weights are quantised."""
        return self.element_bytes if self.bytes_per_parameter is None else self.bytes_per_parameter

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer: q, o (heads), k, v (KV heads), gate, up, down, two norms."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def layer_bytes(self) -> int:
        """Weight bytes of one whole layer."""
        return math.ceil(self.layer_parameters * self.weight_bytes)

    @property
    def embedding_bytes(self) -> int:
        """Weight bytes of the token embedding, and of the head: both have the shape (vocab, hidden)."""
        return self.row_bytes * self.vocab

    @property
    def row_bytes(self) -> int:
        """Weight bytes of one row of the embedding or of the head."""
        return math.ceil(self.hidden * self.weight_bytes)

    def kv_bytes_per_token(self, layers: int) -> int:
        """KV-cache bytes of one token in `layers` layers, all KV heads."""
        return 2 * layers * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of one token's hidden state: what crosses a link between two stages."""
        return self.hidden * self.element_bytes

    def to_dict(self) -> dict[str, Any]:
        """A JSON document, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> ModelSpec:
        """Raises KeyError for a missing field that has no default; unknown fields are ignored."""
        return cls(**{f.name: document[f.name] for f in fields(cls) if f.name in document or f.default is MISSING})


def in_float32(model: ModelSpec) -> int:
    """Bytes of a shard that are in float32 whatever its dtype, at most: norms of a chunk of a prompt, and logits."""
    return PREFILL_CHUNK * 4 * model.hidden + 2 * LOGIT_BYTES * model.vocab
