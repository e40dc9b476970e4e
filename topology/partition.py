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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from topology.archive import alternatives, pareto
from topology.checks import nearest
from topology.constraints import Constraints
from topology.displace import RunningJob, displace
from topology.dtypes import allowed
from topology.eligible import check_names
from topology.errors import ConstraintError, NoFeasiblePlan, Shortfall, TopologyError
from topology.explain import why
from topology.model import DTYPE_BYTES, ModelSpec
from topology.picture import look
from topology.plan import Plan, Replica
from topology.relax import relaxations
from topology.shortfall import shortfalls
from topology.snapshot import Snapshot
from topology.solve import Request, Solution, solve

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
    running: Sequence[RunningJob] = (),
) -> Plan:
    """The plan for a model on a mesh. Pure: equal arguments give equal plans, in whatever order sites came in.

    `previous` is the plan that a job runs by now: a plan that keeps what is still there is taken where the best is
    not much better, and the more that would have to move the less it may be (`topology.keep`). The caller gives back
    what the job holds with `Snapshot.with_freed` first. Site names in the constraints that are gone from the snapshot
    are then taken for lost, not for misspelt. `origin` is the site where the job was submitted, which `private` needs.
    `running` are the jobs that may be displaced where their
    priority is lower; `Plan.displaces` names those that must be.

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
    dtypes = allowed(wishes.dtype, _checked(model).dtype)
    model = replace(model, dtype=dtypes[0])
    context = wishes.context or min(model.context, DEFAULT_CONTEXT)
    _possible(model, wishes, context)
    # The bytes of weights that are quantised do not depend on a dtype.
    several = dtypes if model.bytes_per_parameter is None else dtypes[:1]
    # Not asked how many rings: one is planned, and where that leaves a large mesh idle, several are.
    rings, wishes = wishes.replicas, replace(wishes, replicas=wishes.replicas or 1)
    request = Request(
        snapshot, model, context, wishes, strategy, origin, previous, dtypes=several, several=rings is None
    )
    solution, outcome = solve(request)
    displaces: tuple[str, ...] = ()
    if solution is None and (given_way := displace(request, running)) is not None:
        solution, displaces = given_way
    if solution is not None:
        return _plan(request, solution, displaces)
    missing = shortfalls(snapshot, model, context, wishes, strategy=strategy, outcome=outcome, origin=origin)
    raise NoFeasiblePlan(model.name, missing, look(snapshot, model, wishes).notes, relaxations(request))


def _plan(request: Request, solution: Solution, displaces: tuple[str, ...]) -> Plan:
    """The value that peers exchange, with all its reasons."""
    chosen, fleet = solution.chosen, solution.fleet
    front, others = pareto(solution.archive.front, chosen), alternatives(solution.archive.best, chosen)
    reasons = why(request, solution, displaces)
    plan = chosen.plan(request.model, request.context, reasons, request.constraints.wish)
    rings = () if fleet is None else tuple(zip(fleet.rings, fleet.shares, fleet.rates, strict=True))
    return replace(
        plan,
        predicted=replace(plan.predicted, saturated_tokens_per_s=solution.rate, price_per_hour=solution.price_per_hour),
        share=rings[0][1] if rings else request.previous.share if request.previous else 1.0,
        standbys=solution.standbys,
        replicas=tuple(Replica(ring.stages, share, ring.token_s * 1e3, rate) for ring, share, rate in rings[1:]),
        pareto=front,
        alternatives=others,
        displaces=displaces,
    )


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
        ("shards", max(_widths(wishes)), model.heads, "query heads"),
    ]
    missing = tuple(Shortfall(name, want, have, want - have, unit) for name, want, have, unit in limits if want > have)
    if missing:
        raise NoFeasiblePlan(model.name, missing)
