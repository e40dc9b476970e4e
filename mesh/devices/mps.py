"""Apple's GPUs, through torch's Metal Performance Shaders backend. They share the machine's memory."""

from __future__ import annotations

import platform
from typing import Any

from mesh.devices.found import Found


def find(torch: Any) -> list[Found]:
    """The Apple GPU, if torch can use one. Its memory is what Metal recommends as the most a process should take."""
    backend = getattr(torch.backends, "mps", None)
    if backend is None or not backend.is_available():
        return []
    total = int(torch.mps.recommended_max_memory())
    used = int(torch.mps.driver_allocated_memory())
    return [
        Found(
            kind="mps",
            index=0,
            vendor="apple",
            model=f"mps {platform.machine()} macOS {platform.mac_ver()[0]} {total}",
            torch_device="mps",
            total_bytes=total,
            usable_bytes=max(1, total - total // 10),
            free_bytes=max(0, total - used),
            threads=1,
        )
    ]
