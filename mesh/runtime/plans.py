"""Whether a family can be cut: its own tensor- and pipeline-parallel plans, as transformers publishes them."""

from __future__ import annotations

from typing import Any

from mesh.errors import ModelError

#: How transformers calls modules that every shard holds whole.
_WHOLE = ("replicated", "replicated_with_grad_allreduce")
_NEEDED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


def layer_plan(config: Any, where: str) -> dict[str, str]:
    """The `base_model_tp_plan` of a transformers configuration, checked. Raises ModelError for what we cannot cut.

    Wanted: a decoder with separate q, k, v and o, a plain gated MLP, and only row- and column-wise cuts.
    """
    family = config.model_type
    tp, pp = getattr(config, "base_model_tp_plan", None), getattr(config, "base_model_pp_plan", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{where}: {family} is an encoder-decoder; only decoder-only language models are served")
    if not tp or not pp or set(pp) != {"embed_tokens", "layers", "norm"}:
        raise ModelError(f"{where}: transformers publishes no tensor- and pipeline-parallel plans for {family}")
    plan = {key: value for key, value in tp.items() if key.startswith("layers.*.")}
    missing = [module for module in _NEEDED if f"layers.*.{module}" not in plan]
    strange = [f"{key} {value}" for key, value in plan.items() if value not in ("colwise", "rowwise", *_WHOLE)]
    if missing or strange:
        reason = f"it has no {missing[0]}" if missing else f"its plan says {strange[0]}"
        raise ModelError(f"{where}: {family} cannot be cut into shards yet: {reason}")
    return plan
