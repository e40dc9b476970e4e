"""Which blocks of a model a cache folder holds: a bit each, in a file that stays true when a process is killed.

A block is written before its bit is, and both go to the kernel at once, so a killed process loses neither. A machine
that loses power may keep the bit and lose the block: so the file carries the kernel's boot id, and whoever finds
another one there checks every block by its hash before it believes the bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"ISTHAVE1"
_BOOT_BYTES = 40
_HEADER_BYTES = len(_MAGIC) + _BOOT_BYTES
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> bytes:
    """What names this run of the machine; empty where the system does not tell, and then nothing is believed."""
    try:
        return _BOOT_ID.read_bytes().strip()[:_BOOT_BYTES]
    except OSError:
        return b""


class BlockMap:
    """A set of block numbers below `blocks`, as bits. Pure."""

    def __init__(self, blocks: int, bits: bytes = b"") -> None:
        self.blocks = blocks
        size = -(-blocks // 8)
        self._bits = bytearray(bits[:size].ljust(size, b"\0"))
        if blocks & 7 and size:
            self._bits[-1] &= (1 << (blocks & 7)) - 1  # bits beyond the last block mean nothing

    def __contains__(self, block: int) -> bool:
        return 0 <= block < self.blocks and bool(self._bits[block >> 3] & 1 << (block & 7))

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()

    def add(self, block: int) -> None:
        """Put a block in. Raises IndexError beyond the last."""
        if not 0 <= block < self.blocks:
            raise IndexError(block)
        self._bits[block >> 3] |= 1 << (block & 7)

    def discard(self, block: int) -> None:
        """Take a block out."""
        if block in self:
            self._bits[block >> 3] &= ~(1 << (block & 7))

    def __iter__(self) -> Iterator[int]:
        return (block for block in range(self.blocks) if block in self)

    def byte(self, block: int) -> tuple[int, bytes]:
        """The byte that holds a block's bit, and its place."""
        return block >> 3, bytes(self._bits[block >> 3 : (block >> 3) + 1])

    @property
    def bits(self) -> bytes:
        """All bits: block 0 is the lowest of the first byte."""
        return bytes(self._bits)


class HaveFile:
    """A BlockMap on disk. `trusted` is False where the machine was started again since it was written."""

    def __init__(self, path: Path, blocks: int) -> None:
        """Open or make the file. Raises OSError. A damaged file counts as empty."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        header, bits = parse(os.pread(self._descriptor, _HEADER_BYTES + -(-blocks // 8), 0))
        self.map = BlockMap(blocks, bits)
        self.trusted = (bool(header) and header == boot_id()) or not len(self.map)
        if self.trusted:
            self.save()

    def add(self, block: int) -> None:
        """Put a block in whose bytes were written before."""
        self.map.add(block)
        place, byte = self.map.byte(block)
        os.pwrite(self._descriptor, byte, _HEADER_BYTES + place)

    def save(self) -> None:
        """Write all of it, under this run of the machine."""
        os.pwrite(self._descriptor, _MAGIC + boot_id().ljust(_BOOT_BYTES, b"\0") + self.map.bits, 0)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def parse(data: bytes) -> tuple[bytes, bytes]:
    """The boot id and the bits of a file's bytes; both empty where it is not one."""
    if len(data) < _HEADER_BYTES or not data.startswith(_MAGIC):
        return b"", b""
    return data[len(_MAGIC) : _HEADER_BYTES].rstrip(b"\0"), data[_HEADER_BYTES:]
