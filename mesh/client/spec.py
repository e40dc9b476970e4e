"""What a submission may say, checked before it is sent and again by the peer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.client.options import nearest
from mesh.errors import RequestError
from mesh.wire.v1 import mesh_pb2 as pb

if TYPE_CHECKING:
    from topology.constraints import Constraints

STRATEGIES = ("auto", "tensor_parallelism", "pipeline")


def job_spec(
    model: str | Path, strategy: str = "auto", constraints: Mapping[str, Any] | Constraints | None = None
) -> pb.JobSpec:
    """A submission on the wire. Raises RequestError for an unknown strategy or constraint, naming the nearest known."""
    if strategy not in STRATEGIES:
        raise RequestError(f"unknown strategy {strategy!r}{nearest(str(strategy), STRATEGIES)}")
    return pb.JobSpec(
        model=model_name(model),
        strategy=strategy,
        constraints_json=json.dumps(constraints_document(constraints), sort_keys=True),
    )


def model_name(model: str | Path) -> str:
    """What the peers are told: an absolute path for something of this machine, anything else as it is.

    A name that exists here as a folder or file is a path, and so is one that can be nothing else (`./x`, `~/x`,
    `x.gguf`). What is left is a Hugging Face id.
    """
    text = str(model).strip()
    if not text:
        raise RequestError("the model is empty: give a Hugging Face id, a folder or a .gguf file")
    if not isinstance(model, str):
        return _absolute(model.expanduser())
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a folder closed to us, no such home
        raise RequestError(f"the model {text[:200]!r}: {getattr(error, 'strerror', None) or error}") from None
    if exists or text.startswith(("./", "../", "~")) or text in (".", "..") or text.endswith(".gguf"):
        return _absolute(path)
    return text


def _absolute(path: Path) -> str:
    """Without `..`, but with its symbolic links: a hub cache links `x.gguf` to a blob that has lost its suffix."""
    return os.path.abspath(path)  # noqa: PTH100


def constraints_document(constraints: Mapping[str, Any] | Constraints | None) -> dict[str, Any]:
    """The constraints as a JSON object. Raises RequestError where `topology.Constraints` refuses them."""
    if not constraints:
        return {}
    # topology brings networkx: only those who constrain a plan wait for its import.
    from topology.constraints import Constraints
    from topology.errors import ConstraintError

    try:
        return Constraints.parse(constraints).to_dict()
    except ConstraintError as error:
        raise RequestError(str(error)) from None
