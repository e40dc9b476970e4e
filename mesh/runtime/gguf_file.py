"""Reading slices of tensors out of a GGUF file: only the quantised rows that are wanted are read and dequantised.

Names and layouts follow llama.cpp. Name maps and dequantisers come from the `gguf` library, the settings from
transformers. llama.cpp permutes q and k of the llama architecture for its own rotary layout; `_unpermute` undoes it, as
transformers' LlamaTensorProcessor does. Architectures that llama.cpp changes in other ways are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mesh.errors import ModelError
from mesh.weights.presence import Presence

#: Architectures whose tensors we read: llama.cpp stores them as the checkpoint does, but for llama's q and k.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
#: Rows dequantised at a time.
CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Quantised:
    """Where a tensor lies: first byte, bytes a row, quantisation type, shape."""

    offset: int
    row_bytes: int
    kind: Any
    shape: tuple[int, ...]


class GGUF:
    """The tensors of one GGUF file under their Hugging Face names."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._path = path
        self._config = config
        self._descriptor: int | None = None
        self._presence = Presence.of(path.parent)
        self._tensors, self._architecture = _index(path, config["num_hidden_layers"])

    def names(self) -> frozenset[str]:
        """Every tensor's Hugging Face name."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape; the name must be known."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """float32: what dequantising gives."""
        return torch.float32

    def read_into(self, out: torch.Tensor, name: str, start: tuple[int, ...]) -> None:
        """Fill `out` (any strides, dtype, device) with the block of `name` that begins at `start`. Raises ModelError.

        Rows of q and k can only be read in whole heads, because the permutation runs within a head.
        """
        stored = self._tensors[name]
        undo = self._undo(name)
        step = out.shape[0] if undo is not None else CHUNK_ROWS
        columns = tuple(slice(begin, begin + size) for begin, size in zip(start[1:], out.shape[1:], strict=True))
        for first in range(0, out.shape[0], max(1, step)):
            count = min(step, out.shape[0] - first)
            block = self._dequantised(stored, start[0] + first, count)
            if undo is not None:
                block = undo(block)
            out[first : first + count].copy_(torch.from_numpy(np.ascontiguousarray(block[(slice(None), *columns)])))

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _undo(self, name: str) -> Callable[[np.ndarray], np.ndarray] | None:
        if self._architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = self._config["num_attention_heads"]
            head_dim = self._config.get("head_dim") or self._config["hidden_size"] // heads
            return lambda block: _unpermute(block, head_dim)
        return None

    def _dequantised(self, stored: Quantised, first: int, count: int) -> np.ndarray:
        from gguf import dequantize

        one = len(stored.shape) == 1
        length = stored.row_bytes if one else count * stored.row_bytes
        offset = stored.offset if one else stored.offset + first * stored.row_bytes
        if self._presence is not None:
            self._presence.check(self._path, offset, length)
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            raw = os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise ModelError(f"{self._path} cannot be read: {error.strerror}") from error
        if len(raw) != length:
            raise ModelError(f"{self._path} is truncated: fetch it again")
        rows = np.frombuffer(raw, np.uint8).reshape(1 if one else count, -1)
        # The library takes unquantised kinds in their own dtype, quantised ones as bytes.
        if stored.kind.name in ("F32", "F16"):
            values = rows.view(np.float32 if stored.kind.name == "F32" else np.float16).astype(np.float32)
        else:
            values = dequantize(rows, stored.kind)
        return values[0, first : first + count] if one else values


def open_reader(path: Path) -> Any:
    """gguf's reader, over a plain view of the mapped file. Raises ValueError for a file that is not one.

    The reader slices the map once for each of some 100,000 strings of a vocabulary; a slice of a `numpy.memmap` costs
    several times one of an array (5.9 s against 2.8 s for a model of 49,152 tokens, under a profiler).
    """
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        data: Any

        def _get(self, *args: Any, **options: Any) -> Any:
            self.data = self.data.view(np.ndarray)
            return super()._get(*args, **options)

    return Reader(path)


def _unpermute(block: np.ndarray, head_dim: int) -> np.ndarray:
    heads = block.shape[0] // head_dim
    pairs = block.reshape(heads, head_dim // 2, 2, *block.shape[1:])
    return pairs.swapaxes(1, 2).reshape(block.shape)


def _index(path: Path, layers: int) -> tuple[dict[str, Quantised], str]:
    from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, get_tensor_name_map

    size = path.stat().st_size
    try:
        reader = open_reader(path)
        architecture = str(reader.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(
            f"{path} is damaged or truncated ({' '.join(str(error).split())[:200]}): fetch it again"
        ) from error
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: GGUF files of architecture {architecture} are not read; known: {', '.join(ARCHITECTURES)}"
        )
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    to_gguf = get_tensor_name_map(arch, layers)
    names = {}
    for tensor in reader.tensors:
        shape = tuple(int(length) for length in reversed(tensor.shape))
        block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        row_bytes = shape[-1] // block * block_bytes
        if int(tensor.data_offset) + int(tensor.n_bytes) > size:
            raise ModelError(f"{path} is truncated: {tensor.name} lies beyond its end; fetch it again")
        names[tensor.name] = Quantised(int(tensor.data_offset), row_bytes, tensor.tensor_type, shape)
    return {name: names[short] for name, short in _pairs(to_gguf, layers) if short in names}, architecture


def _pairs(to_gguf: Any, layers: int) -> list[tuple[str, str]]:
    """Hugging Face names beside llama.cpp's, for every name a decoder of these families can have."""
    parts = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    parts += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts]
    found = []
    for module in modules:
        short = to_gguf.get_name(module)
        if short is not None:
            found += [(f"{module}.{kind}", f"{short}.{kind}") for kind in ("weight", "bias")]
    return found
