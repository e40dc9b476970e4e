"""The limits a container or a service manager puts on this process, read from the control groups of Linux.

Both hierarchies are read: version 2 (`memory.max`, `cpu.max`) and version 1 (`memory.limit_in_bytes`,
`cpu.cfs_quota_us`). A limit on any ancestor holds too, so the smallest on the way to the root counts. A path in
/proc/self/cgroup may not exist inside a container's own mount; the walk to the root then ends where the limit is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: Version 1 writes "no limit" as the largest page-aligned 63-bit number; anything near it is none.
_UNLIMITED_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The limits that hold for a process, None where there is none.

    `memory_free_bytes` is what may still be allocated below the tightest limit; page cache that the kernel would drop
    counts as free. `cpus` is CPU time per wall time, such as 1.5.
    """

    memory_limit_bytes: int | None = None
    memory_free_bytes: int | None = None
    cpus: float | None = None


def read_cgroup(root: Path = Path("/")) -> Cgroup:
    """The limits of this process; where a file is missing, none. `root` is the file system's root, another in tests."""
    limits: list[tuple[int, int]] = []
    cpus: list[float] = []
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",")
        if not controllers:
            for folder in _ancestors(mount, path):
                limits += _memory(folder, "memory.max", "memory.current", "inactive_file")
                cpus += _quota(_text(folder / "cpu.max").split())
        if "memory" in names:
            for folder in _ancestors(mount / "memory", path):
                limits += _memory(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if "cpu" in names:
            for base in (mount / "cpu", mount / "cpu,cpuacct"):
                for folder in _ancestors(base, path):
                    cpus += _quota([_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")])
    return Cgroup(
        memory_limit_bytes=min((limit for limit, _ in limits), default=None),
        memory_free_bytes=min((free for _, free in limits), default=None),
        cpus=min(cpus, default=None),
    )


def _ancestors(mount: Path, path: str) -> list[Path]:
    """The folder of a control group and those above it, up to the mount."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _memory(folder: Path, limit_file: str, usage_file: str, cache_key: str) -> list[tuple[int, int]]:
    limit = _number(_text(folder / limit_file))
    if limit is None or limit >= _UNLIMITED_BYTES:
        return []
    usage = _number(_text(folder / usage_file)) or 0
    stat = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    cached = _number(stat.get(cache_key, "")) or 0
    return [(limit, max(0, limit - max(0, usage - cached)))]


def _quota(words: list[str]) -> list[float]:
    """CPUs from a quota and a period in microseconds. `max` and -1 mean none."""
    if len(words) != 2:
        return []
    quota, period = _number(words[0]), _number(words[1])
    return [quota / period] if quota is not None and period and quota > 0 else []


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
