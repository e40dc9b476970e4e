"""AMD GPUs, through torch's ROCm build. It presents them under `torch.cuda`, so their torch device is `cuda:N`."""

from __future__ import annotations

from typing import Any

from mesh.devices.cuda import enumerate_gpus
from mesh.devices.found import Found


def find(torch: Any) -> list[Found]:
    """The AMD GPUs torch can use; none where torch was not built for ROCm."""
    if getattr(torch.version, "hip", None) is None:
        return []
    return enumerate_gpus(torch, "rocm", "amd")
