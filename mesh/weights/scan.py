"""Making the manifest of a folder that holds a model. Reads every byte once; what was read is remembered.

What is remembered stands beside the size and the time of each file, and is made anew where one of them changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import msgpack

from mesh.errors import ModelError
from mesh.runtime.files import weight_files
from mesh.weights.manifest import BLOCK_BYTES, MAX_NAME_CHARACTERS, MAX_TENSORS, FileEntry, Manifest, TensorEntry

#: Raised whenever what is remembered changes its form.
VERSION = 1
#: The files that go with the weights: settings, vocabularies, templates. Nothing else of a folder is ever served.
SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken")
MAX_SMALL_BYTES = 64 << 20
#: The longest header of a safetensors file that the format allows.
_MAX_HEADER_BYTES = 100_000_000


def parts(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of weights and the small files of a model's folder, by name. Raises ModelError."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model: it has no config.json")
    ggufs = sorted(folder.glob("*.gguf"))
    weights = ggufs[:1] if ggufs and not any(folder.glob("*.safetensors")) else weight_files(folder)
    small = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in SMALL and path.is_file() and path.stat().st_size <= MAX_SMALL_BYTES
    ]
    return weights, small


def stats(folder: Path) -> list[tuple[str, int, int]]:
    """What changes whenever the model does: name, time and size of each of its files. Raises ModelError, OSError."""
    weights, small = parts(folder)
    return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in (*weights, *small)]


def scan(folder: Path, name: str) -> Manifest:
    """The manifest of a folder, named `name`. Takes as long as reading it does. Raises ModelError."""
    try:
        weights, small = parts(folder)
        files, tensors = [], []
        for number, path in enumerate(weights):
            head, found = (_gguf if path.suffix == ".gguf" else _safetensors)(path)
            files.append(_entry(path, head))
            tensors += [TensorEntry(tensor, number, *place) for tensor, *place in found]
        files += [_entry(path, path.stat().st_size) for path in small]
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{folder} cannot be read as a model: {' '.join(str(error).split())[:200]}") from error
    return Manifest(name[-MAX_NAME_CHARACTERS:], tuple(files), tuple(tensors), *_heads(config))


def _entry(path: Path, head: int) -> FileEntry:
    digests = []
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = bytearray(BLOCK_BYTES)
        view = memoryview(buffer)
        for offset in range(0, size, BLOCK_BYTES):
            length = min(BLOCK_BYTES, size - offset)
            done = 0
            while done < length:
                count = file.readinto(view[done:length])
                if not count:
                    raise ModelError(f"{path} shrinks while it is read")
                done += count
            digests.append(hashlib.sha256(view[:length]).digest())
    return FileEntry(path.name, size, min(head, size), b"".join(digests))


def _safetensors(path: Path) -> tuple[int, list[tuple[str, int, int, int]]]:
    """Bytes of the header, and each tensor's name, offset, size and rows."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size, _MAX_HEADER_BYTES):
            raise ValueError(f"{path.name} has no header")
        header: dict[str, Any] = json.loads(file.read(length))
    found = []
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"{path.name}: {name} lies outside of the file")
            found.append((name, 8 + length + start, end - start, max(1, (entry["shape"] or [1])[0])))
    return 8 + length, found


def _gguf(path: Path) -> tuple[int, list[tuple[str, int, int, int]]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    found = [
        (str(each.name), int(each.data_offset), int(each.n_bytes), max(1, int(each.shape[-1])))
        for each in reader.tensors
    ]
    return min((offset for _, offset, _, _ in found), default=path.stat().st_size), found


def _heads(config: dict[str, Any]) -> tuple[int, int]:
    """Query and KV heads."""
    heads = config.get("num_attention_heads") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    good = all(isinstance(each, int) and 0 <= each <= MAX_TENSORS for each in (heads, kv_heads))
    return (heads, kv_heads) if good else (0, 0)


def _key(folder: Path) -> str:
    return hashlib.blake2b(str(folder).encode(), digest_size=16).hexdigest()


def remembered(kept: Path, folder: Path) -> Manifest | None:
    """The manifest made of this folder before, where nothing changed since."""
    try:
        document = msgpack.unpackb((kept / _key(folder)).read_bytes())
        version, path, name, known, encoded = document
        if version == VERSION and path == str(folder) and [tuple(each) for each in known] == stats(folder):
            return Manifest.decode(encoded, hashlib.sha256(encoded).digest(), name)
    except (OSError, ValueError, TypeError, ModelError):
        pass
    return None


def remember(kept: Path, folder: Path, manifest: Manifest) -> None:
    """Keep what was made. Raises OSError."""
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = kept / _key(folder)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(msgpack.packb([VERSION, str(folder), manifest.name, stats(folder), manifest.encoded]))
    part.replace(path)


def folders(kept: Path) -> list[Path]:
    """The folders of which something is remembered."""
    found = []
    for path in sorted(kept.iterdir()) if kept.is_dir() else ():
        try:
            version, folder, _, _, _ = msgpack.unpackb(path.read_bytes())
        except (OSError, ValueError, TypeError):
            continue
        if version == VERSION:
            found.append(Path(folder))
    return found
