"""The CPU of this machine: model, cores that may be used, memory that may be used. Needs no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import psutil

from mesh.devices.cgroup import Cgroup, read_cgroup
from mesh.devices.found import Found

#: Kept for the system, the daemon and the worker's own code: a tenth of the memory, and at least this much, but never
#: more than half. A worker with torch loaded takes about 300 MB before the first weight.
_HEADROOM_BYTES = 2**30
_VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel", "ARM": "arm", "Apple": "apple"}


def find(root: Path = Path("/")) -> Found:
    """The CPU as one device, within the control groups' limits. `root` stands for the file system's root in tests."""
    cgroup = read_cgroup(root)
    memory = psutil.virtual_memory()
    total = min(memory.total, cgroup.memory_limit_bytes or memory.total)
    free = memory.available if cgroup.memory_free_bytes is None else min(memory.available, cgroup.memory_free_bytes)
    usable = total - min(total // 2, max(total // 10, _HEADROOM_BYTES))
    vendor, model = identity(root)
    return Found(
        kind="cpu",
        index=0,
        vendor=vendor,
        model=model,
        torch_device="cpu",
        total_bytes=total,
        usable_bytes=usable,
        free_bytes=min(free, total),
        threads=usable_threads(cgroup),
    )


def usable_threads(cgroup: Cgroup) -> int:
    """Threads worth running: physical cores (a second thread adds no matrix units), within affinity and quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows know no affinity call
        allowed = os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    if cgroup.cpus is not None:
        cores = min(cores, int(cgroup.cpus))  # rounded down: a throttled thread stalls all that wait for it
    return max(1, cores)


def identity(root: Path = Path("/")) -> tuple[str, str]:
    """Vendor and model, such as ("amd", "AMD EPYC 9B14 (25/17/1)").

    Family, model and stepping stand beside the name because virtual machines blur it ("AMD EPYC" for every generation).
    """
    try:
        text = (root / "proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return _identity_elsewhere()
    first: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    vendor = _VENDORS.get(first.get("vendor_id", ""), "arm" if "CPU implementer" in first else "unknown")
    name = first.get("model name") or platform.machine()
    keys = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    numbers = "/".join(first[key] for key in keys if key in first)
    return vendor, f"{name} ({numbers})" if numbers else name


def _identity_elsewhere() -> tuple[str, str]:
    """macOS tells through sysctl; anywhere else Python's own guess has to do."""
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            name = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            name = platform.processor() or platform.machine()
        return ("apple" if name.startswith("Apple") else "intel"), name
    name = platform.processor() or platform.machine() or "unknown"
    return next((short for long, short in _VENDORS.items() if long in name), "unknown"), name
