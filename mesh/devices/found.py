"""What the vendors' modules hand over: a piece of hardware as discovered, before a spec narrows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """A device of this machine.

    `model` identifies the hardware well enough that a measured speed may be kept under it. `total_bytes` is all its
    memory, `usable_bytes` what jobs may have of it by default, `free_bytes` what is free of that now. `threads` is how
    many host threads a worker on it uses by default. `dtypes` are the dtypes worth measuring.
    """

    kind: str
    index: int
    vendor: str
    model: str
    torch_device: str
    total_bytes: int
    usable_bytes: int
    free_bytes: int
    threads: int
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    @property
    def label(self) -> str:
        """What a spec calls it: `cpu`, `mps`, `cuda:1`."""
        return self.kind if self.kind in ("cpu", "mps") else f"{self.kind}:{self.index}"
