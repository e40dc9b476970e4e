"""Reading slices of tensors out of safetensors files, without holding more than the slice.

The library checks a file's header once; the bytes are then read with `preadv` straight into the tensor that will keep
them. Memory maps are avoided on purpose: mapped pages count as the worker's memory for as long as the file is open, and
a file that shrinks under a map kills the process where a short read is an error with a name.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mesh.errors import ModelError
from mesh.runtime.files import weight_files
from mesh.weights.presence import Presence

#: Bytes read at a time where the wanted columns or another dtype make a copy necessary; bounds the overhead of loading.
CHUNK_BYTES = 8 << 20
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: file, first byte, shape and dtype."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Safetensors:
    """The tensors of one folder, of one file or of many with an index."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[Path, int] = {}
        self._tensors: dict[str, Stored] = {}
        self._presence = Presence.of(folder)
        for path in weight_files(folder):
            self._tensors.update(_header(path))

    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape; the name must be known."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is stored in."""
        return self._tensors[name].dtype

    def read_into(self, out: torch.Tensor, name: str, start: tuple[int, ...]) -> None:
        """Fill `out` (any strides, dtype, device) with the block of `name` that begins at `start`. Raises
        ModelError.
        """
        stored = self._tensors[name]
        row = _elements(stored.shape[1:])
        width = stored.dtype.itemsize
        direct = out.is_contiguous() and out.device.type == "cpu" and out.dtype == stored.dtype
        if direct and out.shape[1:] == stored.shape[1:]:
            self._pread(stored, _bytes_of(out), start[0] * row * width)
            return
        rows = max(1, CHUNK_BYTES // max(1, row * width))
        columns = tuple(slice(begin, begin + size) for begin, size in zip(start[1:], out.shape[1:], strict=True))
        for first in range(0, out.shape[0], rows):
            count = min(rows, out.shape[0] - first)
            block = torch.empty((count, *stored.shape[1:]), dtype=stored.dtype)
            self._pread(stored, _bytes_of(block), (start[0] + first) * row * width)
            out[first : first + count].copy_(block[(slice(None), *columns)])

    def close(self) -> None:
        """Close the files that were opened for reading."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _pread(self, stored: Stored, into: memoryview, offset: int) -> None:
        path = stored.path
        if self._presence is not None:
            self._presence.check(path, stored.offset + offset, len(into))
        try:
            descriptor = self._files.get(path)
            if descriptor is None:
                descriptor = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            done = 0
            while done < len(into):
                count = os.preadv(descriptor, [into[done:]], stored.offset + offset + done)
                if count == 0:
                    raise ModelError(f"{path} is truncated: fetch it again")
                done += count
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _header(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks that header, offsets and the file's length agree
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelError(f"{path} is damaged or truncated ({_line(error)}): fetch it again") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in DTYPES:
            continue
        offset = 8 + length + entry["data_offsets"][0]
        tensors[name] = Stored(path, offset, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return tensors


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
