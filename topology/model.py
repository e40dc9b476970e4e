"""What a planner must know about a model: its shape, and so its bytes and its arithmetic.

Sizes follow the decoder-only transformer: per layer q, k, v, o and a gated MLP, plus embedding and head. A model whose
real tensors differ (biases, norms, experts) carries the measured `layer_bytes` instead of the derived one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

#: Bytes of one element, by torch's dtype name.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder-only model. `dtype` is the one it will run in (a key of `DTYPE_BYTES`)."""

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

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer: q, o (heads), k, v (KV heads), gate, up, down, two norms."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def layer_bytes(self) -> int:
        """Weight bytes of one whole layer."""
        return self.layer_parameters * self.element_bytes

    @property
    def embedding_bytes(self) -> int:
        """Weight bytes of the token embedding, and of the head: both have the shape (vocab, hidden)."""
        return self.vocab * self.hidden * self.element_bytes

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
        """Raises KeyError for a missing field; unknown fields are ignored."""
        return cls(**{f.name: document[f.name] for f in fields(cls)})
