"""One accelerator pool out of sites that are far apart.

    import mesh

    job = mesh.submit(model="HuggingFaceTB/SmolLM2-135M-Instruct", constraints={"min_latency": "low"})
    job.wait()
    print(job.generate("The sea is", max_tokens=32).text)

`mesh.client.aio` has the same for trio. Importing this package costs nothing: each name loads what it needs at its
first use, so that a daemon, a worker and a command line that import `mesh.errors` do not pay for gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mesh.errors import (
    AddressInUse,
    ConfigError,
    DataDirInUse,
    DeadlineExceeded,
    IdentityError,
    IdentityRequired,
    JobCancelled,
    JobFailed,
    JobNotFound,
    MeshError,
    ModelError,
    NotAllowed,
    PeerUnreachable,
    PlanError,
    RequestError,
    WorkerError,
)

if TYPE_CHECKING:
    from mesh.client.blocking import Job, Mesh, Stream, connect, submit
    from mesh.client.values import Chunk, Generation, JobStatus
    from topology.constraints import Constraints
    from topology.plan import Plan
    from topology.snapshot import Snapshot

__all__ = [
    "AddressInUse",
    "Chunk",
    "ConfigError",
    "Constraints",
    "DataDirInUse",
    "DeadlineExceeded",
    "Generation",
    "IdentityError",
    "IdentityRequired",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobNotFound",
    "JobStatus",
    "Mesh",
    "MeshError",
    "ModelError",
    "NotAllowed",
    "PeerUnreachable",
    "Plan",
    "PlanError",
    "RequestError",
    "Snapshot",
    "Stream",
    "WorkerError",
    "connect",
    "submit",
]

_LAZY = {
    "Chunk": "mesh.client.values",
    "Constraints": "topology.constraints",
    "Generation": "mesh.client.values",
    "Job": "mesh.client.blocking",
    "JobStatus": "mesh.client.values",
    "Mesh": "mesh.client.blocking",
    "Plan": "topology.plan",
    "Snapshot": "topology.snapshot",
    "Stream": "mesh.client.blocking",
    "connect": "mesh.client.blocking",
    "submit": "mesh.client.blocking",
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
