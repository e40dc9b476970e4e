"""A model on disk: its settings and its tensors, whatever the format. Folders of safetensors, and GGUF files.

A model is named by a folder, by a .gguf file, or by a Hugging Face id that the local hub cache holds or a hub serves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch

from mesh.errors import ModelError
from mesh.runtime.resolve import resolve


class Tensors(Protocol):
    """What both formats give; see `checkpoint.Safetensors`."""

    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read_into(self, out: torch.Tensor, name: str, start: tuple[int, ...]) -> None: ...
    def close(self) -> None: ...


class ModelSource:
    """An opened model. `config` is its config.json (for GGUF: what transformers makes of the header)."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: Tensors, *, gguf: bool) -> None:
        self.path = path
        self.config = config
        self.gguf = gguf
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors.names()

    def names(self) -> frozenset[str]:
        """Every tensor's name, as the model's own modules call it."""
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape. Raises ModelError where the model has no such tensor."""
        if name not in self._tensors.names():
            raise ModelError(f"{self.path} has no tensor {name}: its files do not fit its config.json")
        return self._tensors.shape(name)

    def read_into(self, out: torch.Tensor, name: str, start: tuple[int, ...]) -> None:
        """Fill `out` with the block of tensor `name` that begins at `start`, cast and copied as `out` needs it.

        Raises ModelError where the file is damaged: too short, of another shape, or with numbers that are not finite.
        """
        shape = self.shape(name)
        if len(start) != len(shape) or any(
            begin + size > whole for begin, size, whole in zip(start, out.shape, shape, strict=True)
        ):
            raise ModelError(f"{self.path}: tensor {name} has shape {list(shape)}, which does not fit its config.json")
        self._tensors.read_into(out, name, start)
        # One sum finds any inf or nan at the speed of reading; a mask would cost a second pass and memory.
        if out.numel() and not torch.isfinite(out.sum(dtype=torch.float32)):
            raise ModelError(f"{self.path}: tensor {name} holds numbers that are not finite; fetch the model again")

    def look_up(self, name: str, rows: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Some rows of a matrix [len(rows), columns], each read from the file: microseconds where it is cached."""
        out = torch.empty((len(rows), self.shape(name)[1]), dtype=dtype)
        for place, row in enumerate(rows):
            self._tensors.read_into(out[place : place + 1], name, (row, 0))
        return out

    def default_dtype(self) -> str:
        """The dtype the checkpoint was made in ("float32", "bfloat16", "float16"); float32 for GGUF."""
        if self.gguf:
            return "float32"
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named in ("float32", "bfloat16", "float16"):
            return str(named)
        return str(self._tensors.dtype(min(self._tensors.names()))).removeprefix("torch.")

    def close(self) -> None:
        """Close its files; reading opens them again."""
        self._tensors.close()


def open_model(path: str) -> ModelSource:
    """Open a folder (config.json and safetensors, or config.json and one .gguf), a .gguf file or a Hugging Face id.

    Raises ModelError, in one line naming the file, where there is no such model or its files are damaged.
    """
    where = resolve(path)
    if where.is_file():
        return _open_gguf(where, _gguf_config(where))
    config = read_config(where)
    ggufs = sorted(where.glob("*.gguf"))
    if ggufs and not any(where.glob("*.safetensors")):
        return _open_gguf(ggufs[0], config)
    from mesh.runtime.checkpoint import Safetensors

    return ModelSource(where, config, Safetensors(where), gguf=False)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is not a model: it has no config.json")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type")
    return config


def _open_gguf(path: Path, config: dict[str, Any]) -> ModelSource:
    from mesh.runtime.gguf_file import GGUF

    return ModelSource(path, config, GGUF(path, config), gguf=True)


def _gguf_config(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    check_gguf(path)
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    except ModelError:
        raise
    except Exception as error:  # the readers of a foreign header raise whatever they stumble on
        raise ModelError(f"{path} is damaged or of an unknown architecture ({_line(error)})") from error
    return config


def check_gguf(path: Path) -> None:
    """Raise ModelError unless the file begins as a GGUF file does."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
