"""The models that came from other sites, on this site's disk, within a limit of bytes.

    ROOT/manifest     the model's manifest, whose hash is ROOT
    ROOT/name         what it is called
    ROOT/have         which blocks are there (`mesh.weights.have`); its time is when the model was last wanted
    ROOT/lock         held by workers that have the model open (`mesh.weights.presence`)
    ROOT/NAME/        the model's folder: files of full length with holes

A model is evicted whole, the one that was wanted longest ago first, and never while somebody uses it or fetches it.
What a fetch will bring counts from its beginning, so that several at once stay within the limit together. That is kept
in memory alone: after a kill the room is free again, and what had come counts as what it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from mesh.errors import ModelError
from mesh.weights.have import HaveFile
from mesh.weights.manifest import Manifest
from mesh.weights.presence import HAVE_FILE, LOCK_FILE, MANIFEST_FILE, NAME_FILE

#: So many of those that hold the cache's room are named where it is too small.
NAMED = 4


class Occupant(NamedTuple):
    """A model in the cache: its root, the bytes it takes, and when it was last wanted."""

    root: bytes
    bytes: int
    used_at: float


def victims(occupants: Iterable[Occupant], need: int, limit: int, kept: Collection[bytes]) -> list[bytes] | None:
    """Whom to evict so that `need` more bytes fit into `limit`; None where even that does not help. Pure."""
    held = sorted(occupants, key=lambda occupant: (occupant.used_at, occupant.root))
    over = sum(occupant.bytes for occupant in held) + need - limit
    chosen = []
    for occupant in held:
        if over <= 0:
            break
        if occupant.root not in kept and occupant.bytes:
            chosen.append(occupant.root)
            over -= occupant.bytes
    return chosen if over <= 0 else None


class CachedModel:
    """One model of the cache, open for writing and reading."""

    def __init__(self, home: Path, manifest: Manifest) -> None:
        """Make or open it. Raises OSError."""
        self.home = home
        self.manifest = manifest
        self.folder = home / manifest.folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = home / MANIFEST_FILE
        if not path.exists():
            part = home / f".{MANIFEST_FILE}"
            part.write_bytes(manifest.encoded)
            (home / NAME_FILE).write_text(manifest.name)
            part.replace(path)
        self._descriptors: list[int] = []
        for file in manifest.files:
            descriptor = os.open(self.folder / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._descriptors.append(descriptor)
            if os.fstat(descriptor).st_size != file.size:
                os.ftruncate(descriptor, file.size)
        self._have = HaveFile(home / HAVE_FILE, manifest.blocks)
        self.have = self._have.map

    def check(self) -> int:
        """After the machine was started again: take out the blocks that are not what their hash says. Their number."""
        if self._have.trusted:
            return 0
        lost = [block for block in range(self.have.blocks) if block in self.have and not self._good(block)]
        for block in lost:
            self.have.discard(block)
        self._have.trusted = True
        self._have.save()
        return len(lost)

    def _good(self, block: int) -> bool:
        data = self.read(block)
        return data is not None and self.manifest.fits(block, data)

    def write(self, block: int, data: bytes | memoryview) -> bool:
        """Keep a block if it is what its hash says; False where it is not. Raises OSError (a full disk)."""
        good = self.put(block, data)
        if good:
            self.mark(block)
        return good

    def mark(self, block: int) -> None:
        """A block that was `put` is there. Raises OSError."""
        self._have.add(block)

    def put(self, block: int, data: bytes | memoryview) -> bool:
        """The part of `write` that takes time, for any thread: check and write. It counts once it is marked."""
        if not self.manifest.fits(block, data):
            return False
        file, offset, length = self.manifest.place(block)
        done = 0
        view = memoryview(data)
        while done < length:
            done += os.pwrite(self._descriptors[file], view[done:], offset + done)
        return True

    def read(self, block: int) -> bytes | None:
        """A block's bytes, or None where it is not there."""
        if block not in self.have:
            return None
        file, offset, length = self.manifest.place(block)
        data = os.pread(self._descriptors[file], length, offset)
        return data if len(data) == length else None

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        whole = len(self.have) == self.manifest.blocks
        if whole:
            return self.manifest.total_bytes
        return sum(self.manifest.size_of(block) for block in range(self.have.blocks) if block in self.have)

    def touch(self) -> None:
        """It is wanted now."""
        os.utime(self.home / HAVE_FILE)

    def close(self) -> None:
        """Close the files. Idempotent."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._have.close()


class Cache:
    """The cache below `path`. `limit` gives the bytes it may take; it is asked whenever something is to be added."""

    def __init__(self, path: Path, limit: Callable[[int], int]) -> None:
        """`limit(used)` is told what the cache takes now. Opens what is there; what is damaged is removed."""
        self.path = path
        self._limit = limit
        self.models: dict[bytes, CachedModel] = {}
        self.pins: dict[bytes, int] = {}
        self._reserved: dict[bytes, tuple[str, int]] = {}
        for home in sorted(path.iterdir()) if path.is_dir() else ():
            try:
                root = bytes.fromhex(home.name)
                name = (home / NAME_FILE).read_text()
                manifest = Manifest.decode((home / MANIFEST_FILE).read_bytes(), root, name)
                self.models[root] = CachedModel(home, manifest)
            except (ValueError, OSError, ModelError):
                shutil.rmtree(home, ignore_errors=True)

    def open(self, manifest: Manifest) -> CachedModel:
        """The model of that manifest, new and empty where it is not there. Raises OSError."""
        model = self.models.get(manifest.root)
        if model is None:
            model = self.models[manifest.root] = CachedModel(self.path / manifest.root.hex(), manifest)
        model.touch()
        return model

    def used(self) -> list[Occupant]:
        """What is there."""
        return [Occupant(root, model.bytes, _used_at(model)) for root, model in self.models.items()]

    def reserve(self, manifest: Manifest, blocks: Iterable[int]) -> list[bytes]:
        """Keep room for these blocks of a model until `settle`; what is there needs none. The roots that were evicted.

        Raises ModelError where all that could be evicted would not make room enough.
        """
        root, own = manifest.root, self.models.get(manifest.root)
        need = sum(manifest.size_of(block) for block in blocks if own is None or block not in own.have)
        used = self.used()
        limit = self._limit(sum(each.bytes for each in used))
        present = {each.root: each for each in used}
        for other, (_, size) in self._reserved.items():
            if other != root:
                present[other] = Occupant(
                    other, max(size, present[other].bytes if other in present else 0), time.time()
                )
        kept = {each for each in present if each == root or each in self._reserved or self.in_use(each)}
        chosen = victims(present.values(), need, limit, kept)
        if chosen is None:
            raise ModelError(self._no_room(manifest, need, limit, [present[each] for each in kept]))
        for each in chosen:
            self.evict(each)
        self._reserved[root] = (manifest.name, need + (0 if own is None else own.bytes))
        return chosen

    def settle(self, root: bytes) -> None:
        """The fetch of a model is over, one way or another: it takes what it takes."""
        self._reserved.pop(root, None)

    def _no_room(self, manifest: Manifest, need: int, limit: int, kept: list[Occupant]) -> str:
        """What is needed, what is free, and what holds the rest, in one line."""
        free = max(0, limit - sum(each.bytes for each in kept))
        holders = []
        for each in sorted(kept, key=lambda each: -each.bytes)[:NAMED]:
            if each.bytes and each.root == manifest.root:
                holders.append(f"{each.bytes / 1e6:.0f} MB are there of it")
            elif each.bytes and each.root in self._reserved:
                holders.append(
                    f"{self._reserved[each.root][0]}, which is being fetched, holds {each.bytes / 1e6:.0f} MB"
                )
            elif each.bytes:
                holders.append(f"{self.models[each.root].manifest.name}, in use, holds {each.bytes / 1e6:.0f} MB")
        held = "".join(f", {holder}" for holder in holders)
        return (
            f"the weights of {manifest.name} need {need / 1e6:.0f} MB more and the cache has room for "
            f"{free / 1e6:.0f} MB of its {limit / 1e6:.0f} MB{held}: "
            f"raise weights_cache, free disk space in {self.path} or end what uses it"
        )

    def evict(self, root: bytes) -> None:
        """Remove a model and its files."""
        model = self.models.pop(root)
        model.close()
        # The manifest goes first: what a crash leaves of the rest is removed at the next start.
        with contextlib.suppress(OSError):
            (model.home / MANIFEST_FILE).unlink()
        shutil.rmtree(model.home, ignore_errors=True)

    def _in_use(self, root: bytes) -> bool:
        try:
            descriptor = os.open(self.models[root].home / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def in_use(self, root: bytes) -> bool:
        """Whether a worker has the model open, or a fetch is under way."""
        return bool(self.pins.get(root)) or self._in_use(root)

    def close(self) -> None:
        """Close every model."""
        for model in self.models.values():
            model.close()


def _used_at(model: CachedModel) -> float:
    try:
        return (model.home / HAVE_FILE).stat().st_mtime
    except OSError:
        return time.time()


def disk_full(error: OSError) -> bool:
    """Whether a write failed for want of room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
