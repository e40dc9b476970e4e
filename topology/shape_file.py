"""The file formats of a model's shape: the planner's own JSON, and the config.json of a Hugging Face model.

    {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336, "vocab": 128256,
     "tied_embeddings": false, "bytes_per_parameter": 2}

`bytes_per_parameter` is 4, 2, 1 or 0.5. Activations and the KV cache take as many bytes as the weights, but never fewer
than two: weights of eight or four bits are computed with in sixteen. Of a config.json only the shape is read, so that
a plan needs neither weights nor a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field, field_validator

from topology.document import Document, FormatError, Whole, check, shown
from topology.model import DTYPE_BYTES, ModelSpec

#: Longest context where the file does not say: a million tokens.
LONGEST: Final = 1 << 20
#: Families whose embeddings are tied unless their config.json says otherwise, by the defaults of transformers 5.
TIED: Final = ("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2", "olmo_hybrid")
#: Bits by the names of quantisation methods that do not state them.
_BITS: Final = {"fp8": 8, "mxfp4": 4, "nvfp4": 4}

Size = Field(ge=1, le=10**9)


class ShapeFile(Document):
    """The planner's own format."""

    name: str = Field("", max_length=200)
    layers: Whole = Field(ge=1, le=100_000)
    hidden: Whole = Size
    heads: Whole = Size
    kv_heads: Whole | None = Field(None, ge=1, le=10**9, description="default: heads")
    head_dim: Whole | None = Field(None, ge=1, le=10**9, description="default: hidden / heads")
    intermediate: Whole = Size
    vocab: Whole = Size
    tied_embeddings: bool = False
    bytes_per_parameter: float = Field(2, description="4, 2, 1 or 0.5")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of activations; default: float32 for 4 bytes a parameter, else bfloat16"
    )
    context: Whole = Field(LONGEST, ge=1, le=10**9, description="the longest the model can do")

    @field_validator("bytes_per_parameter")
    @classmethod
    def _known(cls, value: float) -> float:
        if value not in (0.5, 1, 2, 4):
            raise ValueError("must be 0.5, 1, 2 or 4")
        return value


def read_model(document: Any, name: str) -> ModelSpec:
    """The model that a parsed file describes, in either format. `name` is for a file that does not name itself.

    Raises FormatError, one line that names the place, for whatever does not belong in such a file.
    """
    if isinstance(document, Mapping) and ("model_type" in document or "num_hidden_layers" in document):
        return _from_config(document, name)
    return _spec(check(ShapeFile, document), name)


def _spec(shape: ShapeFile, name: str) -> ModelSpec:
    kv_heads = shape.heads if shape.kv_heads is None else shape.kv_heads
    if shape.heads % kv_heads:
        raise FormatError("kv_heads", f"{shape.heads} heads do not divide into {kv_heads} KV heads")
    if shape.head_dim is None and shape.hidden < shape.heads:
        raise FormatError("head_dim", f"is missing, and a hidden size of {shape.hidden} gives {shape.heads} heads none")
    dtype = shape.dtype or ("float32" if shape.bytes_per_parameter == 4 else "bfloat16")
    stored = None if shape.bytes_per_parameter == DTYPE_BYTES[dtype] else float(shape.bytes_per_parameter)
    return ModelSpec(
        name=shape.name or name,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=kv_heads,
        head_dim=shape.hidden // shape.heads if shape.head_dim is None else shape.head_dim,
        intermediate=shape.intermediate,
        vocab=shape.vocab,
        tied_embeddings=shape.tied_embeddings,
        dtype=dtype,
        context=shape.context,
        bytes_per_parameter=stored,
    )


def _from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """A Hugging Face configuration of a dense decoder: llama, mistral, qwen2, qwen3, gemma, phi3 and their kin."""
    nested = config.get("text_config")
    text: Mapping[str, Any] = {**config, **nested} if isinstance(nested, Mapping) else config
    if text.get("is_encoder_decoder"):
        raise FormatError("is_encoder_decoder", "only decoder-only language models are planned for")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(text.get(key), int) and text[key] > 1:
            raise FormatError(key, "a mixture of experts cannot be planned for: its shape is not a dense decoder's")
    family = str(text.get("model_type", ""))
    dtype = text.get("dtype") or text.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise FormatError("torch_dtype", f"{shown(dtype)} is none of {', '.join(DTYPE_BYTES)}")
    shape = {
        "layers": ("num_hidden_layers", None),
        "hidden": ("hidden_size", None),
        "heads": ("num_attention_heads", None),
        "kv_heads": ("num_key_value_heads", ()),
        "head_dim": ("head_dim", ()),
        "intermediate": ("intermediate_size", None),
        "vocab": ("vocab_size", None),
        "tied_embeddings": ("tie_word_embeddings", family in TIED),
        "context": ("max_position_embeddings", LONGEST),
    }
    document: dict[str, Any] = {"dtype": dtype, "bytes_per_parameter": _stored(text, dtype)}
    for key, (theirs, default) in shape.items():
        value = text.get(theirs)
        if value is None:
            if default is None:
                raise FormatError(theirs, "is missing: the shape of a dense decoder is needed")
            value = default
        if value != ():
            document[key] = value
    try:
        return _spec(check(ShapeFile, document), name)
    except FormatError as error:
        place = shape[error.place][0] if error.place in shape else error.place
        raise FormatError(place, error.problem) from None


def _stored(text: Mapping[str, Any], dtype: str) -> float:
    """Bytes a stored weight takes, by `quantization_config` where there is one."""
    found = text.get("quantization_config")
    if not isinstance(found, Mapping):
        return DTYPE_BYTES[dtype]
    method = str(found.get("quant_method", ""))
    bits = found.get("bits") or _BITS.get(method)
    if method == "bitsandbytes":
        bits = 4 if found.get("load_in_4bit") else 8
    if bits not in (4, 8):
        raise FormatError(
            "quantization_config", f"weights of neither 4 nor 8 bits are not planned for ({shown(method)})"
        )
    return bits / 8
