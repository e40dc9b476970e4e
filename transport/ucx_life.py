"""Whether the process at the other end of a shared memory lives: the kernel tells, in the moment it ends.

Over TCP the end of a process ends its connections. Over shared memory nothing happens; UCX looks now and then whether
the process is still listed, which a killed one that nobody waited for (a zombie) is. So both ends name themselves, and
where they are processes of one kernel and one PID namespace, each holds a `pidfd` of the other (Linux 5.3), which turns
readable when the process ends. Elsewhere UCX's keep-alives have to do.
"""

from __future__ import annotations

import hashlib
import os
import struct
from functools import cache
from pathlib import Path

_WORD = struct.Struct("<8sI")
WORD_BYTES = _WORD.size
_NOWHERE = bytes(8)


@cache
def _place() -> bytes:
    """This kernel and PID namespace; zeros where they have no name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        namespace = bytes(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return _NOWHERE
    return hashlib.blake2s(boot + namespace, digest_size=8).digest()


def word() -> bytes:
    """This process, in `WORD_BYTES` bytes for the other end."""
    return _WORD.pack(_place(), os.getpid())


def is_near(word: bytes) -> bool:
    """Whether that process runs on this machine."""
    place, _ = _WORD.unpack(word)
    return bool(place == _place() and place != _NOWHERE)


def watch(word: bytes) -> int | None:
    """A descriptor that turns readable when that process ends; None where it cannot be watched, or is this one.

    The caller closes it. Raises ProcessLookupError when the process has ended already.
    """
    place, pid = _WORD.unpack(word)
    if place != _place() or place == _NOWHERE or pid in (0, os.getpid()) or pid > 0x7FFFFFFF:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (OSError, AttributeError):  # an older kernel, another system, or no descriptors left
        return None
