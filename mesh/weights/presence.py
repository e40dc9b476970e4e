"""The worker's side of a cached model: a file with holes reads as zeros, and zeros are no weights.

A cached model is a folder as any other, with all files at their full lengths; only some of their blocks are there. So
whoever reads it asks here first, and holds a lock that keeps the cache from evicting what is in use. The lock is the
kernel's (`flock`): it goes with the process.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mesh.errors import ModelMissing
from mesh.weights.have import BlockMap, parse
from mesh.weights.manifest import BLOCK_BYTES, Manifest

MANIFEST_FILE, NAME_FILE, HAVE_FILE, LOCK_FILE = "manifest", "name", "have", "lock"


class Presence:
    """What is there of one cached model. Made by `of`."""

    def __init__(self, home: Path, manifest: Manifest) -> None:
        self._home = home
        self._manifest = manifest
        self._numbers = {file.name: number for number, file in enumerate(manifest.files)}
        self._have = BlockMap(manifest.blocks)
        self._lock = os.open(home / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._read()

    @classmethod
    def of(cls, folder: Path) -> Presence | None:
        """What the cache says of `folder`, or None for a folder that is not of a cache. Raises ModelMissing."""
        home = folder.parent
        if not (home / HAVE_FILE).is_file() or not (home / MANIFEST_FILE).is_file():
            return None
        try:
            root = bytes.fromhex(home.name)
        except ValueError:
            return None
        try:
            return cls(home, Manifest.decode((home / MANIFEST_FILE).read_bytes(), root, folder.name))
        except OSError as error:
            raise ModelMissing(f"the cached model {folder} cannot be read: {error.strerror}") from error

    def check(self, path: Path, offset: int, length: int) -> None:
        """Raise ModelMissing unless the bytes `[offset, offset + length)` of the file are there."""
        number = self._numbers.get(path.name)
        if number is None:
            raise ModelMissing(f"{path} is no file of its model")
        blocks = self._manifest.covering(number, offset, offset + length)
        if all(block in self._have for block in blocks):
            return
        self._read()  # they may have come since
        if not all(block in self._have for block in blocks):
            start = offset // BLOCK_BYTES
            raise ModelMissing(f"{path} is not here from MiB {start} on: the slice has to be fetched")

    def _read(self) -> None:
        _, bits = parse((self._home / HAVE_FILE).read_bytes())
        self._have = BlockMap(self._manifest.blocks, bits)

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
