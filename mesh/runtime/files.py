"""Which files of a folder hold a model's weights. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path

from mesh.errors import ModelError


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files that make up the model, by its index where it has one. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged: fetch it again") from error
        paths = [folder / name for name in names]
    else:
        single = folder / "model.safetensors"
        paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{folder} holds no .safetensors files; weights in other formats are not read")
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{path} is missing: fetch the model again")
    return paths
