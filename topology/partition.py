"""The partitioner: a pure function from what is known of the mesh to a plan, or to what is missing for one.

How it decides. Layouts of every site (one device, tensor parallelism, chains) are combined over sets of sites, first of
one site, then of two, and so on; each combination is put into the ring with the least latency, its layers are shared
out within memory, and it is priced (`topology.cost`). The best by the objective is the plan. If nothing fits while
every device keeps its reserve free, the same is done once more with the reserve.

Strategies. "auto": whatever is predicted best. "pipeline": one device a stage. "tensor_parallelism": every site that
takes part is split over all of its devices, unless one device of each is predicted faster, or the objective is
latency: then whatever is best, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from topology.checks import nearest
from topology.constraints import Constraints
from topology.eligible import check_names
from topology.errors import ConstraintError, NoFeasiblePlan, Shortfall, TopologyError
from topology.explain import why
from topology.keep import kept, steadiest
from topology.model import DTYPE_BYTES, ModelSpec
from topology.picture import look
from topology.plan import Plan
from topology.search import Outcome, Search
from topology.shortfall import shortfalls
from topology.snapshot import Snapshot

#: Values of `strategy`.
STRATEGIES: Final = ("auto", "tensor_parallelism", "pipeline")
#: KV caches are sized for this many tokens unless the model has fewer or `context` asks for another number.
DEFAULT_CONTEXT: Final = 2048


def partition(
    snapshot: Snapshot,
    model: ModelSpec,
    constraints: Constraints | Mapping[str, Any] | None = None,
    *,
    strategy: str = "auto",
    previous: Plan | None = None,
    origin: str | None = None,
) -> Plan:
    """The plan for a model on a mesh. Pure: equal arguments give equal plans, in whatever order sites came in.

    `previous` is the plan that a job runs by now: where a plan that leaves more weights in place is predicted within
    10 % of the best, it is taken. The caller gives back what the job holds with `Snapshot.with_freed` first. Site names
    in the constraints that are gone from the snapshot are then taken for lost, not for misspelt. `origin` is the site
    where the job was submitted, which `private` needs.

    Raises ConstraintError for a wrong constraint or strategy, NoFeasiblePlan with what is missing, and TopologyError
    for an impossible model or a snapshot that contradicts itself.
    """
    wishes = Constraints.parse(constraints)
    if strategy not in STRATEGIES:
        raise ConstraintError(f"unknown strategy {strategy!r}: {nearest(str(strategy), STRATEGIES, 'known')}")
    if strategy == "pipeline" and set(_widths(wishes)) != {1}:
        raise ConstraintError("strategy 'pipeline' has one shard a stage: leave shards out or take another strategy")
    if previous is None:
        check_names(snapshot, wishes, origin)
    model = _checked(replace(model, dtype=wishes.dtype) if wishes.dtype else model)
    context = wishes.context or min(model.context, DEFAULT_CONTEXT)
    _possible(model, wishes, context)
    attempts = [(wishes, True), (wishes, False)]
    if previous is not None and wishes.forced:
        # A loss can make a forced shape impossible; a running job goes on in another shape.
        free = replace(wishes, stages=None, shards=None)
        attempts += [(free, True), (free, False)]
    outcome: Outcome | None = None
    for asked, reserve in attempts:
        picture = look(snapshot, model, asked, reserve=reserve, origin=origin)
        search = Search(picture, model, context, asked, strategy)
        outcome = search.run()
        if outcome.best is None:
            continue
        chosen, extra = outcome.best, tuple[str, ...]()
        if previous is not None:
            chosen, extra = steadiest(search, chosen, kept(search, previous, outcome.best), previous)
        if asked is not wishes:
            extra += (f"the forced shape, stages={wishes.stages} shards={wishes.shards}, is no longer possible",)
        reasons = why(search, chosen, context, reserve=reserve, extra=extra, cut_short=outcome.cut_short)
        return chosen.plan(model, context, reasons, wishes.wish)
    missing = shortfalls(snapshot, model, context, wishes, strategy=strategy, outcome=outcome, origin=origin)
    raise NoFeasiblePlan(model.name, missing, look(snapshot, model, wishes).notes)


def _widths(constraints: Constraints) -> tuple[int, ...]:
    return constraints.shards if isinstance(constraints.shards, tuple) else (constraints.shards or 1,)


def _checked(model: ModelSpec) -> ModelSpec:
    """Raises TopologyError where the shape is impossible: a planner must not divide by a zero from a file."""
    for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "context"):
        value = getattr(model, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TopologyError(f"model {model.name}: {name} must be a whole number of at least 1, not {value!r}")
    if model.heads % model.kv_heads:
        raise TopologyError(f"model {model.name}: {model.heads} heads do not divide into {model.kv_heads} KV heads")
    if model.dtype not in DTYPE_BYTES:
        raise TopologyError(f"model {model.name}: dtype {model.dtype!r}: {nearest(model.dtype, DTYPE_BYTES, 'known')}")
    return model


def _possible(model: ModelSpec, wishes: Constraints, context: int) -> None:
    """Raises NoFeasiblePlan where the model itself, on any mesh, cannot be what is asked."""
    limits = [
        ("context", context, model.context, "tokens"),
        ("stages", wishes.stages or 1, model.layers, "layers"),
        ("shards", max(_widths(wishes)), model.kv_heads, "KV-head groups"),
    ]
    missing = tuple(Shortfall(name, want, have, want - have, unit) for name, want, have, unit in limits if want > have)
    if missing:
        raise NoFeasiblePlan(model.name, missing)
