"""Intel GPUs, through torch's XPU backend."""

from __future__ import annotations

from typing import Any

from mesh.devices.found import Found

#: Kept for the driver's context, as for other GPUs.
_HEADROOM_BYTES = 2**30


def find(torch: Any) -> list[Found]:
    """The Intel GPUs torch can use. Where the driver does not tell what is free, all of it counts as free."""
    backend = getattr(torch, "xpu", None)
    if backend is None or not backend.is_available():
        return []
    found = []
    for index in range(backend.device_count()):
        properties = backend.get_device_properties(index)
        total = int(properties.total_memory)
        try:
            free = int(backend.mem_get_info(index)[0])
        except (AttributeError, RuntimeError):
            free = total
        found.append(
            Found(
                kind="xpu",
                index=index,
                vendor="intel",
                model=f"{properties.name} ({getattr(properties, 'driver_version', 'unknown driver')})",
                torch_device=f"xpu:{index}",
                total_bytes=total,
                usable_bytes=max(1, total - min(total // 2, _HEADROOM_BYTES)),
                free_bytes=free,
                threads=1,
            )
        )
    return found
