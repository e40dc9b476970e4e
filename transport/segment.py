"""Memory that processes of one host share: each has a segment that it alone writes and the others read, and a bell.

A segment is an anonymous file (memfd_create(2)), which the others open through /proc; so there is no name to guess, to
collide or to clean up, and a process that is killed leaves nothing. It is sealed against shrinking, or a neighbour
could take pages away from under a reader. The bell is a pipe: a byte in it wakes the owner from its sleep.

Only where stores are seen in the order in which they are made and a locked instruction orders everything (x86-64: Intel
SDM volume 3, 9.2; AMD APM volume 2, 7.2): then a counter that is written behind the data says that the data is there.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import platform
import stat
import sys
import threading
from typing import Any

_TOKEN_BYTES = 16
#: Where a segment's data begins: its first page holds the token, counters and flags.
DATA_AT = 4096
_FENCE = threading.Lock()


def available() -> bool:
    """Whether this machine can share memory so."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and hasattr(os, "memfd_create")


def fence() -> None:
    """Make what was written before seen before what is written, and what is read, after: a lock taken and given."""
    with _FENCE:
        pass


class Segment:
    """This process's segment of `size` bytes of data, and its bell. Raises OSError where the system refuses."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._token = os.urandom(_TOKEN_BYTES)
        self._file = os.memfd_create("isthmus", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._file, DATA_AT + size)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.memory = memoryview(mmap.mmap(self._file, DATA_AT + size))
            self._bell, self._rope = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            os.close(self._file)
            raise
        self.memory[DATA_AT - _TOKEN_BYTES : DATA_AT] = self._token
        self._closed = False

    def offer(self) -> dict[str, Any]:
        """What another process needs to attach. Who has it and runs as the same user can read the segment."""
        return {
            "pid": os.getpid(),
            "file": self._file,
            "rope": self._rope,
            "size": self.size,
            "token": self._token.hex(),
        }

    # -- the bell, as something to wait for: see `transport.waiting.wait_any`

    name = "bell"

    def progress(self) -> bool:
        """True if somebody rang since the last time."""
        try:
            return bool(os.read(self._bell, 4096))
        except BlockingIOError:
            return False

    def take_wake(self) -> bool:
        """Nothing but the bell wakes."""
        return False

    def arm(self) -> bool:
        """Ringing keeps the descriptor readable."""
        return True

    def fileno(self) -> int:
        """Readable when somebody rang."""
        return self._bell

    def close(self) -> None:
        """Release the descriptors; the memory goes with the last view of it. Idempotent."""
        if not self._closed:
            self._closed = True
            self.memory = memoryview(b"")
            for descriptor in (self._file, self._bell, self._rope):
                os.close(descriptor)


class Attached:
    """Another process's segment, to be read, and its bell, to be rung."""

    def __init__(self, offer: dict[str, Any], size: int) -> None:
        """Raises ValueError for an offer that is malformed or leads to something else, OSError where it is out of
        reach (another user, another container).
        """
        try:
            pid, file, rope = (int(offer[key]) for key in ("pid", "file", "rope"))
            token = bytes.fromhex(offer["token"])
        except (KeyError, TypeError, ValueError):
            raise ValueError("not the offer of a segment") from None
        if pid <= 0 or file < 0 or rope < 0 or offer.get("size") != size or len(token) != _TOKEN_BYTES:
            raise ValueError("the offer of another kind of segment")
        opened = os.open(f"/proc/{pid}/fd/{file}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(opened)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_size != DATA_AT + size:
                raise ValueError("the offer leads to something that is no segment")
            if not fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ValueError("the offered segment may shrink")
            self.memory = memoryview(mmap.mmap(opened, DATA_AT + size, prot=mmap.PROT_READ))
        finally:
            os.close(opened)
        if bytes(self.memory[DATA_AT - _TOKEN_BYTES : DATA_AT]) != token:
            raise ValueError("the offer leads to another segment: the processes do not see each other's numbers")
        self._rope = -1
        self._rope = os.open(f"/proc/{pid}/fd/{rope}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISFIFO(os.fstat(self._rope).st_mode):
            self.close()
            raise ValueError("the offer's bell is none")

    def ring(self) -> None:
        """Wake the owner."""
        try:
            os.write(self._rope, b"\0")
        except OSError:
            pass  # full: it rings already; nobody there: the channel to it tells

    def close(self) -> None:
        """Release the descriptor. Idempotent."""
        if self._rope >= 0:
            os.close(self._rope)
            self._rope = -1
            self.memory = memoryview(b"")


def pack(offer: dict[str, Any]) -> bytes:
    """An offer as it travels."""
    return json.dumps(offer).encode()


def unpack(data: bytes) -> dict[str, Any]:
    """The offer; empty for anything else."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
