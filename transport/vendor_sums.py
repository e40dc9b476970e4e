"""Sums of ranks whose GPUs one host holds, by the vendor's own library (NCCL, RCCL) through torch.distributed.

The ranks are processes of one site and host, each with a GPU of its own, and have channels to one another. They meet
over a file that rank 0 makes in a folder of its own and names over the channels: nothing listens, and nobody else can
join. The channels go on to tell of a rank's death while a sum is under way, which the library by itself does not.

The order in which the library adds depends on the size, the GPUs and their links, not on who comes first: the same job
on the same devices gets the same bits, another split may round otherwise.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgpack

if TYPE_CHECKING:
    import torch

#: The library's own limit. Ours are shorter and come first; it is for threads that nobody looks after any more.
_LIMIT: Final = timedelta(minutes=10)
#: Awake for as long as most sums take, then looking again this often.
_SPIN_S, _NAP_S = 200e-6, 50e-6
#: Offers are a folder's name and a GPU's: more is none.
_MOST_BYTES: Final = 4096

#: Called while a rank waits; raises what ends the wait.
Look = Callable[[], None]


class NoVendorLibrary(Exception):
    """These ranks cannot use it: they exchange through the host. One line: why."""


def backend_for(device: str) -> str | None:
    """The library for a device by torch's name for it, None where there is none: a CPU, or torch without it."""
    if not device.startswith("cuda"):
        return None
    import torch.distributed

    available = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return "nccl" if available else None


class VendorSums:
    """The process group of one rank. Made by each, then `join` with all offers; the same calls in the same order.

    backend: "nccl", or "gloo" (which works without a GPU, and is what the tests use).
    """

    def __init__(self, rank: int, size: int, device: str, backend: str) -> None:
        self.rank, self.size, self.device, self.backend = rank, size, device, backend
        self._folder = Path(tempfile.mkdtemp(prefix="isthmus-sums-")) if rank == 0 else None
        self._group: Any = None
        self._closed = False

    def offer(self) -> bytes:
        """What the other ranks need: who this rank's GPU is, and of rank 0 where they meet."""
        folder = "" if self._folder is None else str(self._folder)
        told: bytes = msgpack.packb([self.backend, _identity(self.device), folder])
        return told

    def join(self, offers: Sequence[bytes], look: Look) -> None:
        """Meet the other ranks, given their offers in order. Raises NoVendorLibrary, and what `look` raises."""
        told = [_read(offer) for offer in offers]
        if {backend for backend, _, _ in told} != {self.backend}:
            raise NoVendorLibrary("the ranks have different libraries")
        gpus = [gpu for _, gpu, _ in told if gpu]
        if len(set(gpus)) != len(gpus):
            raise NoVendorLibrary("two ranks share a GPU")
        failure: list[BaseException] = []

        def meet() -> None:
            try:
                self._group = _process_group(self, Path(told[0][2]) / "store")
                self._warm()
            except BaseException as error:
                failure.append(error)
            if self._closed:  # nobody waited for it
                self.close()

        # The library blocks until all have come, and one may die before: so it does that in a thread of its own.
        thread = threading.Thread(target=meet, daemon=True, name="vendor sums")
        thread.start()
        while thread.is_alive():
            thread.join(_NAP_S)
            look()
        if failure:
            raise NoVendorLibrary(" ".join(str(failure[0]).split())[:200])

    def suits(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies where this group works."""
        return str(tensor.device) == self.device and tensor.is_contiguous()

    def all_reduce_(self, tensor: torch.Tensor, look: Look) -> None:
        """Replace `tensor` by the sum over all ranks. Raises what `look` raises, and RuntimeError of the library."""
        _wait(self._group.allreduce([tensor]), look)

    def broadcast_(self, tensor: torch.Tensor, root: int, look: Look) -> None:
        """Replace `tensor` by the root's. Raises as `all_reduce_`."""
        import torch.distributed

        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        _wait(self._group.broadcast([tensor], options), look)

    def close(self) -> None:
        """End what is under way and release the folder. Idempotent."""
        self._closed = True
        group, self._group = self._group, None
        if group is not None:
            try:
                group.abort()
            except RuntimeError:
                pass  # it was broken already
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _warm(self) -> None:
        """The first sum sets up the connections between the GPUs."""
        import torch

        tensor = torch.ones(1, device=self.device)
        self._group.allreduce([tensor]).wait()
        if tensor.item() != self.size:
            raise RuntimeError(f"a sum of {self.size} ones gave {tensor.item()}")


def _wait(work: Any, look: Look) -> None:
    began = time.monotonic()
    while not work.is_completed():
        look()
        if time.monotonic() - began > _SPIN_S:
            time.sleep(_NAP_S)
    work.wait()  # orders the device's stream behind the sum, and raises what went wrong


def _identity(device: str) -> str:
    """What tells a GPU from all others of the host; empty for what is no GPU."""
    if not device.startswith("cuda"):
        return ""
    import torch

    properties: Any = torch.cuda.get_device_properties(device)
    return str(properties.uuid)


def _read(offer: bytes) -> tuple[str, str, str]:
    try:
        backend, gpu, folder = msgpack.unpackb(offer[:_MOST_BYTES])
        if all(isinstance(word, str) for word in (backend, gpu, folder)):
            return backend, gpu, folder
    except (ValueError, TypeError, msgpack.UnpackException):
        pass
    raise NoVendorLibrary("a rank's offer is none")


def _process_group(sums: VendorSums, path: Path) -> Any:
    from torch import distributed

    # What torch.distributed makes for `init_process_group`, without the one global group that allows a process.
    parts: Any = distributed
    store = parts.FileStore(str(path), sums.size)
    store.set_timeout(_LIMIT)
    if sums.backend == "gloo":
        return parts.ProcessGroupGloo(store, sums.rank, sums.size, _LIMIT)
    import torch

    torch.cuda.set_device(sums.device)
    options = parts.ProcessGroupNCCL.Options()
    options._timeout = _LIMIT
    return parts.ProcessGroupNCCL(store, sums.rank, sums.size, options)
