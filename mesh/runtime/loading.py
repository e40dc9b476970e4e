"""Bringing up a worker's model: the memory is counted before it is taken, and a refusal says how much was missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from mesh.errors import WorkerError
from mesh.runtime.assignment import Assignment
from mesh.runtime.work import Work
from topology.model import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

    from mesh.runtime.stage import Collectives

Progress = Callable[[int, int], None]


class Model(Protocol):
    """What the engine needs of `mesh.runtime.stage.StageModel`."""

    def forward(
        self,
        request: str,
        position: int,
        *,
        tokens: list[int] | None = None,
        hidden: torch.Tensor | None = None,
        count: int | None = None,
        group: Collectives | None = None,
        logits: bool = True,
        timeout_s: float | None = None,
    ) -> torch.Tensor: ...
    def drop(self, request: str) -> None: ...
    def drop_all(self) -> None: ...
    def work(self, position: int) -> Work | None: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def hidden(self) -> int: ...


#: Loads an assignment; the model held so far, if any, gives up the slices that overlap and is spent afterwards.
Loader = Callable[[Assignment, Model | None, Progress], Model]


def load_stage(assignment: Assignment, former: Model | None, progress: Progress) -> Model:
    """The real loader. Raises ModelError, and WorkerError where weights and KV caches exceed what was granted."""
    from mesh.runtime.source import open_model
    from mesh.runtime.stage import StageModel

    source = open_model(assignment.model)
    try:
        kv_bytes = kv_cache_bytes(assignment, source.config)
    finally:
        source.close()
    checked = False

    def watched(done_bytes: int, total_bytes: int) -> None:
        nonlocal checked
        if not checked:
            checked = True
            check_memory(assignment, total_bytes, kv_bytes)
        progress(done_bytes, total_bytes)

    try:
        if isinstance(former, StageModel):
            return former.reload(assignment, watched)
        return StageModel.load(assignment, watched)
    except MemoryError:
        raise WorkerError(_short(assignment, f"the {assignment.dtype} weights did not fit")) from None
    except RuntimeError as error:
        # torch has no class of its own for a CPU allocation that failed; on an accelerator it is OutOfMemoryError.
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower():
            raise WorkerError(_short(assignment, f"the {assignment.dtype} weights did not fit")) from error
        raise


def kv_cache_bytes(assignment: Assignment, config: dict[str, object]) -> int:
    """Bytes of this shard's KV caches for all full contexts at once, from the model's config.json."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim")
    if not isinstance(head_dim, int):
        if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
            return 0
        head_dim = hidden // heads
    groups = assignment.kv_heads[1] - assignment.kv_heads[0]
    layers = assignment.end - assignment.start
    return 2 * layers * groups * head_dim * assignment.context * assignment.requests * DTYPE_BYTES[assignment.dtype]


def check_memory(assignment: Assignment, weight_bytes: int, kv_bytes: int) -> None:
    """Raise WorkerError where the shard would take more than its plan granted. A grant of 0 means: not limited."""
    if 0 < assignment.memory_bytes < weight_bytes + kv_bytes:
        parts = f"{weight_bytes / 1e6:.0f} MB of weights and {kv_bytes / 1e6:.0f} MB of KV caches"
        raise WorkerError(_short(assignment, f"it needs {parts}"))


def _short(assignment: Assignment, why: str) -> str:
    shard = f"layers {assignment.start} to {assignment.end} on {assignment.device}"
    return f"{shard}: {why}, granted are {assignment.memory_bytes / 1e6:.0f} MB; give the device more or plan again"
