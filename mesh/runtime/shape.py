"""The settings the fused path needs, out of a config.json; and which families it covers.

The families are the ones whose decoder layer is: RMSNorm, attention with rotary embeddings and grouped KV heads,
RMSNorm, gated SiLU MLP. A setting that is missing or unknown sends a model down the general path, which leaves every
default to transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

#: What transformers publishes for these families as `base_model_tp_plan` (a test holds the two together).
TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_NEEDED = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """One model of these families. `windows` holds, per layer, the sliding window in positions, or None."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    tied: bool
    qk_norm: bool
    rope: tuple[tuple[str, Any], ...]
    windows: tuple[int | None, ...]

    @property
    def group(self) -> int:
        """Query heads to a KV head."""
        return self.heads // self.kv_heads


def shape_of(config: dict[str, Any]) -> Shape | None:
    """The shape, or None where the fused path does not cover the model."""
    family = config["model_type"]
    rope = _rope(config)
    if (
        family not in FAMILIES
        or rope is None
        or any(not isinstance(config.get(key), int | float) for key in _NEEDED)
        or config.get("hidden_act") != "silu"
        or config.get("quantization_config")
        or (family == "qwen3" and not config.get("head_dim"))
        or config["num_attention_heads"] % config["num_key_value_heads"]
    ):
        return None
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    windows = _windows(config, layers)
    if windows is None:
        return None
    return Shape(
        layers=layers,
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        eps=config["rms_norm_eps"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        rope=tuple(sorted(rope.items())),
        windows=windows,
    )


def inverse_frequencies(shape: Shape) -> torch.Tensor:
    """float32 [head_dim / 2]: the rotary embedding's frequencies, scaled as Llama 3.1 or linearly where asked for."""
    rope = dict(shape.rope)
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float) / shape.head_dim
    frequencies: torch.Tensor = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "linear":
        return frequencies / float(rope["factor"])
    if rope["rope_type"] == "default":
        return frequencies
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(medium, smoothed, scaled)


def _rope(config: dict[str, Any]) -> dict[str, Any] | None:
    rope = config.get("rope_parameters")
    if rope is None:  # the form of transformers 4
        theta, scaling = config.get("rope_theta"), config.get("rope_scaling") or {}
        rope = {"rope_theta": theta, **scaling, "rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
    kinds = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    needed = kinds.get(rope.get("rope_type", "default"))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if needed is None or partial not in (None, 1, 1.0):
        return None
    values = {key: rope.get(key) for key in ("rope_theta", *needed)}
    if any(not isinstance(value, int | float) for value in values.values()):
        return None
    return {**values, "rope_type": rope.get("rope_type", "default")}


def _windows(config: dict[str, Any], layers: int) -> tuple[int | None, ...] | None:
    """Mistral slides in all layers, Qwen from `max_window_layers` on where told to; `layer_types` says it outright."""
    window, kinds, family = config.get("sliding_window"), config.get("layer_types"), config["model_type"]
    if family == "llama" or window is None or (family.startswith("qwen") and not config.get("use_sliding_window")):
        return (None,) * layers
    if kinds is not None:
        if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            return None
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family == "mistral":
        return (window,) * layers
    first = config.get("max_window_layers")
    return None if first is None else tuple(window if layer >= first else None for layer in range(layers))
