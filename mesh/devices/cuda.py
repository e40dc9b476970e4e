"""NVIDIA GPUs, through torch."""

from __future__ import annotations

from typing import Any

from mesh.devices.found import Found

#: Kept for the driver's context and the kernels torch loads: about half a gigabyte each on current cards.
_HEADROOM_BYTES = 2**30


def find(torch: Any) -> list[Found]:
    """The NVIDIA GPUs torch can use; none where torch was built without CUDA, or for ROCm."""
    if getattr(torch.version, "hip", None) is not None:
        return []
    return enumerate_gpus(torch, "cuda", "nvidia")


def enumerate_gpus(torch: Any, kind: str, vendor: str) -> list[Found]:
    """Every GPU behind `torch.cuda`, which torch's ROCm build serves too."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError:  # out of memory for a context, or held exclusively by another process: nothing to use
            continue
        found.append(
            Found(
                kind=kind,
                index=index,
                vendor=vendor,
                model=f"{properties.name} ({_version(properties)}, {properties.multi_processor_count} units)",
                torch_device=f"cuda:{index}",
                total_bytes=int(total),
                usable_bytes=max(1, int(total) - min(int(total) // 2, _HEADROOM_BYTES)),
                free_bytes=int(free),
                threads=1,
            )
        )
    return found


def _version(properties: Any) -> str:
    return str(getattr(properties, "gcnArchName", "") or f"{properties.major}.{properties.minor}")
