"""`mesh plan --cluster FILE`: planning from files alone. No peer is asked, no daemon is needed, no model is loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mesh.errors import ConfigError, MeshError, ModelError, PlanError, RequestError

if TYPE_CHECKING:
    from topology.model import ModelSpec
    from topology.plan import Plan, Shard, Stage
    from topology.snapshot import Snapshot

#: What `--schema` prints.
SCHEMAS: Final = ("cluster", "model")
#: A file larger than this is none of ours: 10,000 sites with all their links take less.
MAX_FILE_BYTES: Final = 1 << 30


def plan_offline(
    cluster: Path, model: str, strategy: str, constraints: Mapping[str, Any], *, origin: str | None = None
) -> tuple[Plan, dict[str, Any]]:
    """The plan for the cluster that a file describes, and its JSON document.

    Raises ConfigError for the cluster's file, ModelError for the model's, RequestError for a constraint and PlanError
    where no plan is possible.
    """
    from topology.errors import ConstraintError, NoFeasiblePlan, TopologyError
    from topology.partition import partition

    snapshot, notes = cluster_from(cluster)
    spec = model_from(model)
    began_s = time.monotonic()
    try:
        plan = partition(snapshot, spec, constraints, strategy=strategy, origin=origin)
    except ConstraintError as error:
        raise RequestError(str(error)) from error
    except NoFeasiblePlan as error:
        raise PlanError("; ".join((str(error), *notes))) from error
    except TopologyError as error:
        raise ModelError(str(error)) from error
    seconds = time.monotonic() - began_s
    plan = replace(plan, why=(*plan.why, *notes))
    return plan, document(plan, seconds)


def cluster_from(path: Path) -> tuple[Snapshot, tuple[str, ...]]:
    """The snapshot in a file, and what is to be said about it. Raises ConfigError naming the place."""
    from topology.cluster import read_cluster
    from topology.document import FormatError

    parsed = _json(path, ConfigError, "cluster")
    try:
        return read_cluster(parsed)
    except FormatError as error:
        raise ConfigError(f"{path}: {error}") from error


def model_from(name: str) -> ModelSpec:
    """The shape of a model: a folder with config.json, a JSON file, a .gguf file or a Hugging Face id.

    The latter two are looked at by a process of their own, for which transformers is needed. Raises ModelError.
    """
    from topology.document import FormatError
    from topology.shape_file import read_model

    path = Path(name).expanduser()
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise ModelError(f"no model at {name}: {getattr(error, 'strerror', None) or error}") from error
    if not is_dir and (not is_file or path.suffix == ".gguf"):
        return _inspected(name)
    file = path / "config.json" if is_dir else path
    if is_dir and not file.is_file():
        raise ModelError(f"{path} has no config.json: give a model's folder or a JSON file with its shape")
    parsed = _json(file, ModelError, "model")
    called = path.resolve().name if is_dir else path.stem
    try:
        return read_model(parsed, called)
    except FormatError as error:
        raise ModelError(f"{file}: {error}") from error


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a file format. Raises ConfigError for an unknown one."""
    from topology.cluster import ClusterFile
    from topology.constraints import nearest
    from topology.document import Document
    from topology.shape_file import ShapeFile

    known: dict[str, type[Document]] = {"cluster": ClusterFile, "model": ShapeFile}
    if name not in known:
        raise ConfigError(f"--schema: no file format is named {name!r}: {nearest(name, known, 'known')}")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **known[name].model_json_schema()}


def document(plan: Plan, seconds: float) -> dict[str, Any]:
    """The answer as JSON. Ranges are half open; `share` is a shard's part of the weights of its stage's layers."""
    predicted = asdict(plan.predicted)
    return {
        "model": plan.model.name,
        "objective": plan.objective,
        "strategy": plan.strategy,
        "context": plan.context,
        "stages": _stages(plan, plan.stages),
        "ring": list(plan.ring),
        "standbys": [asdict(each) for each in plan.standbys],
        "replicas": [
            {**asdict(each), "stages": _stages(plan, each.stages), "ring": list(each.ring)} for each in plan.replicas
        ],
        "predicted": {
            **predicted,
            "network_ms_per_token": plan.predicted.network_ms,
            "memory_bytes": plan.memory_bytes,
        },
        "pareto": [asdict(each) for each in plan.pareto],
        "alternatives": [asdict(each) for each in plan.alternatives],
        "why": list(plan.why),
        "seconds": round(seconds, 6),
    }


def _stages(plan: Plan, stages: tuple[Stage, ...]) -> list[dict[str, Any]]:
    from topology.cost import attention_bytes, mlp_bytes, width

    model = plan.model

    def weight(shard: Shard) -> int:
        heads = width(shard.query_heads(model))
        return attention_bytes(model, width(shard.kv_heads), heads) + mlp_bytes(model, width(shard.columns))

    answer = []
    for stage in stages:
        held = [weight(shard) for shard in stage.shards]
        shards = [{**asdict(shard), "share": part / sum(held)} for shard, part in zip(stage.shards, held, strict=True)]
        extra = {key: value for key, value in asdict(stage).items() if key not in ("start", "end", "shards")}
        answer.append({"layers": [stage.start, stage.end], "shards": shards, **extra})
    return answer


def _json(path: Path, error: type[MeshError], what: str) -> Any:
    """A JSON file of bounded size."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise error(f"{path} is too large for a {what} file: more than {MAX_FILE_BYTES} bytes")
        return json.loads(path.read_bytes())
    except OSError as failed:
        raise error(f"no {what} file at {path}: {failed.strerror or failed}") from failed
    except RecursionError as failed:
        raise error(f"{path}: nested too deeply for a {what} file") from failed
    except UnicodeDecodeError as failed:
        raise error(f"{path} is not text in UTF-8: give a {what} file in JSON") from failed
    except ValueError as failed:
        raise error(f"{path} is not JSON: {failed}") from failed


def _inspected(name: str) -> ModelSpec:
    """What `mesh.runtime.inspect` says of a model; the process dies with this one."""
    import tempfile

    import trio

    from mesh.jobs.model import SubprocessInspector

    with tempfile.TemporaryDirectory() as cache:
        return trio.run(SubprocessInspector(Path(cache)), name).spec
