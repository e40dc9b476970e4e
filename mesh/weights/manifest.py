"""What a model is, byte by byte: its files, the hashes of their blocks, and where in them each tensor lies. Pure.

What the model is called is no part of it: two sites may keep the same files under two names.

A manifest is made once by a peer that has the model's files, and names the model for everybody: its *root* is the
SHA-256 of its bytes, and it holds the SHA-256 of every block, so whoever knows the root can check each block by itself,
whoever sent it (a Merkle tree of two levels, as in BitTorrent's metainfo, BEP 3). Blocks never span files.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import msgpack

from mesh.errors import ModelError

#: A chunk of the wide-area transport, and small beside a slice: of 16 layers' worth a few blocks are fetched in vain.
BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 32
#: 140 GB of weights make 4.5 MB of hashes; bounds of what somebody else's manifest may claim.
MAX_MANIFEST_BYTES = 64 << 20
MAX_FILES, MAX_TENSORS, MAX_BYTES = 4096, 1 << 20, 1 << 46
MAX_NAME_CHARACTERS = 200
VERSION = 1
#: A file or folder name that cannot leave the folder it is written to.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: `head` bytes at its beginning belong to every slice (a header; all of a small file)."""

    name: str
    size: int
    head: int
    digests: bytes = field(repr=False)

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return blocks_in(self.size)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `size` bytes from `offset` of file number `file`, in `rows` equal rows."""

    name: str
    file: int
    offset: int
    size: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """A model's files and tensors. `heads` and `kv_heads` are the model's numbers of query and KV heads; 0 where its
    settings do not say.
    """

    name: str
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    heads: int = 0
    kv_heads: int = 0

    @cached_property
    def encoded(self) -> bytes:
        """The bytes whose hash is the root."""
        files = [[f.name, f.size, f.head, f.digests] for f in self.files]
        tensors = [[t.name, t.file, t.offset, t.size, t.rows] for t in self.tensors]
        packed: bytes = msgpack.packb([VERSION, BLOCK_BYTES, files, tensors, self.heads, self.kv_heads])
        return packed

    @cached_property
    def root(self) -> bytes:
        """The model's identity: 32 bytes."""
        return hashlib.sha256(self.encoded).digest()

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The number of each file's first block, and at the end that of all blocks."""
        return tuple(accumulate((file.blocks for file in self.files), initial=0))

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return self.firsts[-1]

    @property
    def total_bytes(self) -> int:
        """The size of all files."""
        return sum(file.size for file in self.files)

    def place(self, block: int) -> tuple[int, int, int]:
        """File number, offset and length of a block. Raises IndexError where there is no such block."""
        if not 0 <= block < self.blocks:
            raise IndexError(block)
        file = bisect_right(self.firsts, block) - 1
        offset = (block - self.firsts[file]) * BLOCK_BYTES
        return file, offset, min(BLOCK_BYTES, self.files[file].size - offset)

    @property
    def folder(self) -> str:
        """The name of the model's folder in a cache."""
        return safe_name(self.name)

    def size_of(self, block: int) -> int:
        """Bytes of a block."""
        return self.place(block)[2]

    def fits(self, block: int, data: bytes | memoryview) -> bool:
        """Whether `data` is what the block holds."""
        file, offset, length = self.place(block)
        at = offset // BLOCK_BYTES * DIGEST_BYTES
        known = self.files[file].digests[at : at + DIGEST_BYTES]
        return len(data) == length and hashlib.sha256(data).digest() == known

    def covering(self, file: int, start: int, end: int) -> range:
        """The blocks that hold bytes `[start, end)` of a file."""
        if start >= end:
            return range(0)
        first = self.firsts[file]
        return range(first + start // BLOCK_BYTES, first + (end - 1) // BLOCK_BYTES + 1)

    def headers(self) -> Iterator[int]:
        """The blocks that every slice needs."""
        for number, file in enumerate(self.files):
            yield from self.covering(number, 0, file.head)

    @classmethod
    def decode(cls, data: bytes, root: bytes, name: str) -> Manifest:
        """Rebuild a manifest that came from somebody else, of a model called `name` here.

        Raises ModelError unless it is the one that `root` names.
        """
        if len(data) > MAX_MANIFEST_BYTES or hashlib.sha256(data).digest() != root:
            raise ModelError(f"the manifest sent for the model {root.hex()[:12]} is another's")
        try:
            return cls._checked(msgpack.unpackb(data, strict_map_key=False), name)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ModelError(f"the manifest of the model {root.hex()[:12]} is not one: {error}") from None

    @classmethod
    def _checked(cls, document: Any, name: str) -> Manifest:
        version, block, files, tensors, heads, kv_heads = document
        if (version, block) != (VERSION, BLOCK_BYTES):
            raise ValueError(f"version {version} with blocks of {block} bytes is unknown here")
        if not (
            0 < len(files) <= MAX_FILES
            and len(tensors) <= MAX_TENSORS
            and 0 <= min(heads, kv_heads) <= max(heads, kv_heads) <= MAX_TENSORS
        ):
            raise ValueError("a count is out of bounds")
        found = tuple(_file(*entry) for entry in files)
        if len({file.name for file in found}) != len(found) or sum(file.size for file in found) > MAX_BYTES:
            raise ValueError("files of one name, or too many bytes")
        return cls(
            name[-MAX_NAME_CHARACTERS:] or "model",
            found,
            tuple(_tensor(found, *entry) for entry in tensors),
            int(heads),
            int(kv_heads),
        )


def blocks_in(size: int) -> int:
    """How many blocks hold so many bytes."""
    return -(-size // BLOCK_BYTES)


def safe_name(name: str) -> str:
    """A name that can be a folder's, made of any other."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[-120:].lstrip("-._") or "model"


def safe(name: str) -> str:
    """`name`, which must be usable as the name of a file. Raises ValueError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a file")
    return name


def _file(name: str, size: int, head: int, digests: bytes) -> FileEntry:
    if not (0 <= head <= size <= MAX_BYTES and len(digests) == blocks_in(size) * DIGEST_BYTES):
        raise ValueError(f"the file {safe(name)} has wrong sizes")
    return FileEntry(safe(name), int(size), int(head), bytes(digests))


def _tensor(  # noqa: PLR0917 - the fields as they travel
    files: tuple[FileEntry, ...], name: str, file: int, offset: int, size: int, rows: int
) -> TensorEntry:
    if not (0 <= file < len(files) and offset >= 0 and size >= 0 and offset + size <= files[file].size and rows > 0):
        raise ValueError(f"the tensor {str(name)[:80]!r} lies outside of its file")
    return TensorEntry(str(name), int(file), int(offset), int(size), int(rows))
