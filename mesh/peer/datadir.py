"""A peer's data directory: one peer at a time, and what it must remember over restarts.

The lock is the kernel's (`flock`), so it goes with the process that held it, however that process ended; the file it
stands on stays and means nothing. Its content, the holder's process id, only serves the message to a second peer.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from mesh.errors import ConfigError, DataDirInUse
from mesh.gossip.absent import Known
from mesh.gossip.snapshot_file import BadSnapshot, decode, encode

logger = logging.getLogger(__name__)

LOCK_FILE = "peer.lock"
INCARNATION_FILE = "incarnation"
KNOWN_FILE = "known_peers"
_LARGEST_INCARNATION = 2**63 - 1


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace a file's content so that a crash at any moment leaves the old or the new one whole. Raises OSError.

    `mode` is what the umask is taken from; no one else can read a file of 0o600 at any moment.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # what a crash left behind has that moment's mode
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must reach the disk
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do this for a folder
            raise
    finally:
        os.close(folder)


class DataDir:
    """An open data directory. A context manager: entering locks it, leaving unlocks it.

    `now` gives the wall clock in seconds; it is used only where the incarnation file is damaged.
    Entering raises DataDirInUse where another peer holds it, ConfigError where it cannot be made or written.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self._now = now
        self._lock: int | None = None

    def __enter__(self) -> DataDir:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._refused(error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            process = f"the peer with process id {holder}" if holder.isdigit() else "another peer"
            raise DataDirInUse(
                f"data directory {self.path} is in use by {process}; stop that one or give another with --data-dir"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise self._refused(error) from None
        self._lock = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def next_incarnation(self) -> int:
        """A number larger than any this directory gave or recorded before, kept before it is given.

        1 at first. Where the file is damaged the wall clock in seconds takes over: larger than any count of restarts.
        Raises ConfigError where it cannot be kept.
        """
        number = self._read() + 1
        self._keep(number)
        return number

    def record_incarnation(self, number: int) -> None:
        """Remember an incarnation taken while running (SWIM raises it to refute a suspicion). Never lowers it."""
        if self._read() < number <= _LARGEST_INCARNATION:
            self._keep(number)

    def known_peers(self, cluster: str) -> list[Known]:
        """Whom this peer knew when it last wrote it down; nobody where that is missing, damaged or of another mesh."""
        try:
            return decode(cluster, (self.path / KNOWN_FILE).read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, BadSnapshot) as error:
            logger.warning("%s/%s is left out: %s", self.path, KNOWN_FILE, error)
            return []

    def keep_known_peers(self, cluster: str, known: Iterable[Known]) -> None:
        """Write down whom this peer knows. A full disk costs no more than a line in the log."""
        try:
            write_atomically(self.path / KNOWN_FILE, encode(cluster, known))
        except OSError as error:
            logger.warning("%s", self._refused(error))

    def _read(self) -> int:
        try:
            text = (self.path / INCARNATION_FILE).read_bytes().strip()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._refused(error) from None
        if text.isdigit() and len(text) < 20 and int(text) < _LARGEST_INCARNATION:
            return int(text)
        return int(self._now())

    def _keep(self, number: int) -> None:
        try:
            write_atomically(self.path / INCARNATION_FILE, f"{number}\n".encode())
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> ConfigError:
        """One line for what a file system can answer."""
        where = f"data directory {self.path}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ConfigError(f"{where}: no space left; free some or give another with --data-dir")
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return ConfigError(f"{where}: its file system has no file locks; give a local one with --data-dir")
        reason = error.strerror or str(error)
        return ConfigError(f"{where}: cannot be used ({reason}); give another with --data-dir")
