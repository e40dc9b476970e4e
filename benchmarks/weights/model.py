"""A model that is nothing but weights: one matrix a layer, random bytes, of which a part is the set of slices."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

#: The middle layers are the slices that are fetched; those at either end must not be.
LAYERS, FIRST, END = 20, 2, 18
_WRITE_BYTES = 8 << 20


def write_model(folder: Path, slice_bytes: int) -> int:
    """Write it; the slices take `slice_bytes`, rounded up. Returns the bytes of the whole."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 1}))
    columns = 1024
    rows = -(-slice_bytes // (END - FIRST) // (2 * columns))
    size = 2 * columns * rows
    header: dict[str, Any] = {
        f"model.layers.{layer}.mlp.down_proj.weight": {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [layer * size, (layer + 1) * size],
        }
        for layer in range(LAYERS)
    }
    encoded = json.dumps(header).encode()
    left = LAYERS * size
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        while left:
            file.write(os.urandom(min(left, _WRITE_BYTES)))
            left -= min(left, _WRITE_BYTES)
    return LAYERS * size


def slices() -> dict[str, Any]:
    """The assignment of the middle layers, as `mesh.runtime.assignment.Assignment.to_dict` has it."""
    return {
        "job": "benchmark", "epoch": [1, "here"], "model": "weights", "dtype": "bfloat16", "device": "cpu",
        "threads": 1, "memory_bytes": 0, "context": 8, "stage": 1, "stages": 3, "start": FIRST, "end": END,
        "rank": 0, "size": 1, "kv_heads": [0, 1], "columns": [0, 8], "vocabulary": [0, 8],
    }  # fmt: skip
