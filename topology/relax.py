"""What to give up for an impossible request: the smallest change of one constraint, or else of two, that makes a plan.

Every relaxation is found by lifting the constraint, tightened to what the plan found then needs, and verified by
planning again under it. Limits end at what is achievable, counts by bisection, lists at the names to add or drop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from topology.constraints import Constraints
from topology.eligible import matches
from topology.errors import Relaxation
from topology.model import DTYPE_BYTES
from topology.solve import Request, Solution, solve

#: Work of one try and of all together (`Assembler.work`: about 0.1 ms a unit), how many tries, how many pairs of them.
TRY_WORK: Final = 2_000
MAX_WORK: Final = 12_000
MAX_TRIES: Final = 120
MAX_PAIRS: Final = 24
#: Entries of a list that are left out one at a time.
MAX_ENTRIES: Final = 16
#: Shortest context that is worth proposing.
LEAST_CONTEXT: Final = 128

#: Limits, and the objective that comes nearest to meeting each.
_LIMITS: Final = {
    "max_token_latency_ms": "latency",
    "max_first_token_ms": "first_token",
    "min_tokens_per_s": "throughput",
    "max_price_per_hour": "cost",
}
_FLAGS: Final = ("trusted_only", "private")
_LISTS: Final = ("sites", "exclude_sites", "regions", "exclude_regions", "vendors", "needs")
_DROPPED: Final = ("exclude_sites", "exclude_regions", "needs")
_COUNTS: Final = ("standbys", "replicas", "concurrency", "context")


@dataclass
class _Tries:
    """Plans made, counted: a refusal must come in seconds on any mesh."""

    request: Request
    left: int = MAX_TRIES
    spent: list[float] = field(default_factory=list)

    def solve(self, wishes: Constraints, *, keep_reserve: bool = False) -> Solution | None:
        if self.left <= 0 or sum(self.spent) > MAX_WORK:
            return None
        self.left -= 1
        request = self.request
        context = wishes.context or request.context
        lower = wishes.dtype if wishes.dtype != request.constraints.dtype else None
        asked = replace(request, constraints=wishes, context=context, previous=None, keep_reserve=keep_reserve)
        if isinstance(lower, str):
            asked = replace(asked, model=replace(request.model, dtype=lower), dtypes=(lower,))
        return solve(asked, thorough=False, max_work=TRY_WORK, spent=self.spent)[0]


def relaxations(request: Request) -> tuple[Relaxation, ...]:
    """The smallest change of each single constraint that would do; of the first pair that does where none would."""
    tries = _Tries(request)
    asked = request.constraints
    names = _active(request)
    single = [found for name in names if (found := _relaxed(tries, asked, (name,))) is not None]
    if single:
        return tuple(single)
    for pair in itertools.islice(itertools.combinations(names, 2), MAX_PAIRS):
        found = _relaxed(tries, asked, pair)
        if found is not None:
            return (found,)
    return ()


def _active(request: Request) -> list[str]:
    asked, model = request.constraints, request.model
    names = [name for name in _LIMITS if getattr(asked, name) is not None]
    names += [name for name in ("max_sites", *_LISTS, *_FLAGS) if getattr(asked, name)]
    names += ["standbys"] if asked.standbys else []
    names += ["replicas"] if asked.replicas not in (1, "auto") else []
    names += ["concurrency"] if asked.requests > 1 else []
    names += ["context"] if request.context > LEAST_CONTEXT else []
    names += ["stages and shards"] if asked.forced else []
    if DTYPE_BYTES[model.dtype] > 2 and model.bytes_per_parameter is None:
        names.append("dtype")
    return names


def _relaxed(tries: _Tries, asked: Constraints, names: Sequence[str]) -> Relaxation | None:
    """The tightest constraints with only `names` changed under which there is a plan."""
    request = tries.request
    lifted = asked
    for name in names:
        lifted = _lifted(lifted, name)
    if len(names) == 1 and names[0] in _DROPPED:
        # One entry less may do.
        entries = getattr(asked, names[0])
        fewer = [_with(asked, names[0], tuple(e for e in entries if e != entry)) for entry in entries[:MAX_ENTRIES]]
        lifted = next((wishes for wishes in fewer if tries.solve(wishes) is not None), lifted)
    guide = _guide(lifted, names)
    solution = tries.solve(guide)
    if solution is None:
        return None
    result = lifted
    # Counts last: they are searched for with everything else in its place.
    for name in sorted(names, key=lambda name: name in _COUNTS):
        if name in _COUNTS:
            result = _largest(tries, request, asked, result, name)
        else:
            result = _tightened(request, asked, result, name, solution)
    verified = tries.solve(result, keep_reserve=True)
    if verified is None:
        result, verified = lifted, tries.solve(lifted, keep_reserve=True)
    if verified is None:
        return None
    changes = tuple((name, _value(result, name)) for name in names)
    return Relaxation(
        changes, verified.chosen.layout, verified.chosen.token_s * 1e3, constraints=_document(result, asked)
    )


def _lifted(wishes: Constraints, name: str) -> Constraints:
    if name == "stages and shards":
        return replace(wishes, stages=None, shards=None)
    if name == "context":
        return replace(wishes, context=LEAST_CONTEXT)
    if name == "dtype":
        return replace(wishes, dtype="bfloat16")
    empty: Any = {"standbys": 0, "replicas": 1, "trusted_only": False, "private": False}.get(name)
    return _with(wishes, name, () if name in _LISTS else empty)


def _guide(lifted: Constraints, names: Sequence[str]) -> Constraints:
    """With the objective that shows how little has to be given up: the limit's own, else as few sites as fit."""
    objective = next((_LIMITS[name] for name in names if name in _LIMITS), None)
    return replace(lifted, objective=objective, min_latency="medium")


def _tightened(request: Request, asked: Constraints, result: Constraints, name: str, solution: Solution) -> Constraints:
    """`result` with constraint `name` set to what the solution needs."""
    chosen, sites = solution.chosen, {site.name: site for site in request.snapshot.sites}
    used = [sites[site] for site in sorted(solution.sites)]
    devices = {shard.key for stage in chosen.stages for shard in stage.shards}
    vendors = {d.vendor for site in used for d in site.devices if f"{site.name}/{d.name}" in devices}
    values: dict[str, Callable[[], Any]] = {
        "max_token_latency_ms": lambda: _up(chosen.token_s * 1e3),
        "max_first_token_ms": lambda: _up(chosen.first_token_s * 1e3),
        "min_tokens_per_s": lambda: _down(solution.rate),
        "max_price_per_hour": lambda: _up(solution.price_per_hour),
        "max_sites": lambda: len(solution.sites),
        "sites": lambda: (*asked.sites, *(site.name for site in used)),
        "exclude_sites": lambda: (
            result.exclude_sites or tuple(n for n in asked.exclude_sites if n not in solution.sites)
        ),
        "regions": lambda: (
            *asked.regions,
            *(site.region for site in used if site.region and not matches(site.region, asked.regions)),
        ),
        "exclude_regions": lambda: (
            result.exclude_regions
            or tuple(p for p in asked.exclude_regions if not any(matches(site.region, (p,)) for site in used))
        ),
        "vendors": lambda: (*asked.vendors, *vendors),
    }
    return _with(result, name, values[name]()) if name in values else result


def _largest(tries: _Tries, request: Request, asked: Constraints, result: Constraints, name: str) -> Constraints:
    """`result` with the largest count below the asked one that still has a plan, by bisection."""
    unit = 64 if name == "context" else 1
    low = {"standbys": 0, "context": LEAST_CONTEXT // unit}.get(name, 1)
    wanted = request.context if name == "context" else getattr(asked, name)
    high = -(-int(wanted) // unit)
    while high - low > 1:
        middle = (low + high) // 2
        if tries.solve(_with(result, name, middle * unit)) is not None:
            low = middle
        else:
            high = middle
    return _with(result, name, low * unit)


def _with(wishes: Constraints, name: str, value: Any) -> Constraints:
    changed: dict[str, Any] = {name: value}
    return replace(wishes, **changed)


def _value(wishes: Constraints, name: str) -> Any:
    return None if name == "stages and shards" else getattr(wishes, name)


def _document(result: Constraints, asked: Constraints) -> dict[str, Any]:
    """What to ask instead, as a mapping."""
    document = result.to_dict()
    return {key: value for key, value in document.items() if value != asked.to_dict().get(key)} | {
        key: None for key in asked.to_dict() if key not in document
    }


def _up(value: float) -> float:
    """Rounded up to three figures."""
    step = 10 ** (math.floor(math.log10(value)) - 2) if value > 0 else 1.0
    return float(f"{math.ceil(value / step * (1 - 1e-12)) * step:.6g}")


def _down(value: float) -> float:
    """Rounded down to three figures."""
    step = 10 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / step) * step:.6g}")
