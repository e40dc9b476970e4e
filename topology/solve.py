"""From a request to its solution: the picture, the search, further rings, standbys, and what was weighed besides.

`solve` is what planning, planning again, displacing and relaxing have in common. It gives None where nothing satisfies
the constraints, and never explains: that is `topology.explain` and `topology.relax`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from topology import dtypes
from topology.archive import Archive
from topology.around import WORK, around
from topology.candidate import Candidate
from topology.constraints import Constraints
from topology.keep import kept, steadiest
from topology.model import ModelSpec
from topology.picture import Picture, look
from topology.plan import Plan, Standby, device_of
from topology.prefer import already_there
from topology.replicas import PACKED, WORTH, Fleet, fleet, packed
from topology.search import MAX_WORK, Outcome, Search
from topology.snapshot import Snapshot
from topology.standby import place

#: Objectives whose searches make up the front, each with this much work at most: about 0.2 s.
FRONT: Final = ("latency", "throughput", "balanced")
FRONT_WORK: Final = 2_000


@dataclass(frozen=True)
class Request:
    """All that a plan depends on. `constraints` are parsed, `model` is checked.

    `dtypes` are those that devices may hold weights in, the model's first; none or one: all hold the model's.
    `keep_reserve`: try to leave the reserve of every device free, before it is used. `several`: for throughput more
    rings than one may be taken where one leaves a large mesh idle.
    """

    snapshot: Snapshot
    model: ModelSpec
    context: int
    constraints: Constraints
    strategy: str = "auto"
    origin: str | None = None
    previous: Plan | None = None
    keep_reserve: bool = True
    dtypes: tuple[str, ...] = ()
    several: bool = False

    def search(
        self, picture: Picture, constraints: Constraints, max_work: float = MAX_WORK, like: Search | None = None
    ) -> Search:
        """A search of the picture."""
        return Search(picture, self.model, self.context, constraints, self.strategy, max_work=max_work, like=like)

    def look(self, constraints: Constraints, *, reserve: bool, dtypes: Mapping[str, str] | None = None) -> Picture:
        """The picture under these constraints, with these `dtypes` by `site/device`."""
        return look(self.snapshot, self.model, constraints, reserve=reserve, origin=self.origin, dtypes=dtypes)


@dataclass(frozen=True)
class Solution:
    """What was chosen, and what it was chosen from. `extra` are sentences for the plan's reasons."""

    search: Search
    chosen: Candidate
    archive: Archive
    fleet: Fleet | None = None
    standbys: tuple[Standby, ...] = ()
    reserve: bool = True
    cut_short: bool = False
    price_per_hour: float = 0.0
    extra: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Tokens a second of all rings."""
        return self.chosen.rate if self.fleet is None else self.fleet.rate

    @property
    def sites(self) -> frozenset[str]:
        """Sites of all rings, standbys apart."""
        return self.chosen.sites if self.fleet is None else self.fleet.sites


def solve(
    request: Request, *, thorough: bool = True, max_work: float = MAX_WORK, spent: list[float] | None = None
) -> tuple[Solution | None, Outcome]:
    """The solution if there is one, and how the last search ended.

    `thorough`: look for the whole front as well. The work of each search is added to `spent`.
    """
    if request.previous is not None:
        # Replicas recover by themselves: this is about one ring, which need not give the rate of all.
        request = replace(request, constraints=_one_ring(request.constraints, request.previous))
    near = around(request.snapshot, request.previous)
    if near is not None:
        solution, outcome = solve(replace(request, snapshot=near), thorough=thorough, max_work=min(WORK, max_work))
        if solution is not None:
            line = f"planned again among {len(near.sites)} sites: those left of the plan and near, or most capable"
            return replace(solution, extra=(*solution.extra, line)), outcome
    wishes = request.constraints
    outcome = Outcome(None, None, False)
    for asked, reserve in _attempts(request):
        extra = (_lost(wishes),) if asked is not wishes else ()
        if len(request.dtypes) > 1:
            solution, outcome = _with_dtypes(request, asked, reserve, max_work, spent)
        else:
            solution, outcome = _on(request, request.look(asked, reserve=reserve), asked, max_work, spent)
        if solution is not None:
            if thorough and request.previous is None and solution.fleet is None and asked.replicas == 1:
                solution = replace(solution, archive=_whole_front(request, solution.search, solution.archive))
            return (
                replace(solution, reserve=reserve, cut_short=outcome.cut_short, extra=solution.extra + extra),
                outcome,
            )
    return None, outcome


def _on(
    request: Request, picture: Picture, asked: Constraints, max_work: float, spent: list[float] | None
) -> tuple[Solution | None, Outcome]:
    """The solution on one picture."""
    if asked.replicas != 1:
        return _fleet(request, picture, asked, max_work), Outcome(None, None, False)
    search = request.search(picture, asked, max_work)
    outcome = search.run()
    if spent is not None:
        spent.append(search.assembler.work)
    if outcome.best is None:
        return None, outcome
    several = _several(request, search, outcome.best)
    return (_single(request, search, outcome.best) if several is None else several), outcome


def _several(request: Request, search: Search, best: Candidate) -> Solution | None:
    """Several rings, for throughput on a large mesh, where they give clearly more than the best single one."""
    wishes = search.constraints
    if not (request.several and search.large and wishes.wish == "throughput" and request.previous is None):
        return None
    found = packed(search, PACKED)
    if found is None or found.rate < WORTH * best.rate:
        return None
    solution = _with_rings(request, search.picture, wishes, found)
    if solution is None:
        return None
    line = (
        f"one ring would give {best.rate:.3g} tokens/s: its {len(best.fits)} stages on {len(best.sites)} sites keep no "
        f"more devices busy; replicas=1 asks for it"
    )
    return replace(solution, extra=(line,))


def _with_dtypes(
    request: Request, asked: Constraints, reserve: bool, max_work: float, spent: list[float] | None
) -> tuple[Solution | None, Outcome]:
    """The best solution over the dtypes that devices may hold weights in. A running plan's devices keep theirs."""
    model, keys = request.model, [f"{site.name}/{d.name}" for site in request.snapshot.sites for d in site.devices]
    pictures = {
        dtype: request.look(asked, reserve=reserve, dtypes=dict.fromkeys(keys, dtype)) for dtype in request.dtypes
    }
    choices = dtypes.options(pictures, model.dtype)
    for shard in request.previous.shards if request.previous is not None else ():
        key, dtype = f"{shard.site}/{device_of(shard.device)}", shard.dtype or model.dtype
        if key in choices and dtype in pictures and key in dtypes.nodes_of(pictures[dtype]):
            choices[key] = (dtype,)
    last = Outcome(None, None, False)

    def attempt(choice: Mapping[str, str]) -> dtypes.Answer | None:
        nonlocal last
        picture = request.look(asked, reserve=reserve, dtypes=choice)
        solution, last = _on(request, picture, asked, max_work / dtypes.SEARCHES, spent)
        if solution is None:
            return None
        rings = (solution.chosen,) if solution.fleet is None else solution.fleet.rings
        used = tuple(f"{s.site}/{device_of(s.device)}" for ring in rings for stage in ring.stages for s in stage.shards)
        cost = (-solution.rate,) if solution.fleet is not None else solution.chosen.cost(asked.wish)
        return dtypes.Answer(cost, used, (solution, last))

    best = dtypes.choose(choices, pictures, attempt)
    if best is None:
        return None, last
    solution, outcome = best.found
    told = dtypes.reasons(solution.chosen, choices, pictures, model)
    return replace(solution, extra=(*solution.extra, *told)), outcome


def _attempts(request: Request) -> Iterator[tuple[Constraints, bool]]:
    """Constraints, and whether to keep the reserve free; as asked first."""
    wishes = request.constraints
    if request.keep_reserve:
        yield wishes, True
    yield wishes, False
    if request.previous is not None and wishes.forced:
        # A loss can make a forced shape impossible; a running job goes on in another shape.
        free = replace(wishes, stages=None, shards=None)
        yield from ((free, True), (free, False))


def _one_ring(wishes: Constraints, previous: Plan) -> Constraints:
    if wishes.replicas == 1:
        return wishes
    requests = None if wishes.concurrency is None else previous.concurrency
    return replace(wishes, replicas=1, min_tokens_per_s=None, concurrency=requests)


def _lost(wishes: Constraints) -> str:
    return f"the forced shape, stages={wishes.stages} shards={wishes.shards}, is no longer possible"


def _single(request: Request, search: Search, best: Candidate) -> Solution | None:
    previous, wishes = request.previous, search.constraints
    archive = search.assembler.archive
    extra: tuple[str, ...] = ()
    chosen = best
    if previous is not None:
        chosen, extra = steadiest(search, best, kept(search, previous, best), previous)
    else:
        chosen, extra = already_there(request.snapshot, search, best)
    solution = _with_standbys(search, chosen, wishes)
    if solution is None and previous is not None:
        # A running job goes on with fewer standbys rather than not at all.
        fewer = (replace(wishes, standbys=count) for count in range(wishes.standbys - 1, -1, -1))
        solution = next(s for asked in fewer if (s := _with_standbys(search, chosen, asked)) is not None)
        extra += (f"{len(solution.standbys)} of {wishes.standbys} standbys are left",)
    if solution is None:
        rest = (candidate for candidate in archive.best if candidate.identity != chosen.identity)
        within = (c for c in rest if wishes.max_sites is None or len(c.sites) <= wishes.max_sites)
        solution = next((s for c in within if (s := _with_standbys(search, c, wishes)) is not None), None)
        extra += ("a better plan would leave no room for the standbys",)
    if solution is None:
        return None
    return replace(solution, archive=archive, extra=extra)


def _with_standbys(search: Search, chosen: Candidate, wishes: Constraints) -> Solution | None:
    standbys: tuple[Standby, ...] = ()
    price = chosen.price_per_hour
    if wishes.standbys:
        picture = search.picture
        taken = {node.key for each in chosen.fits for node in each.nodes}
        placed = place(picture, search.model, chosen, wishes.standbys, taken)
        if placed is None:
            return None
        standbys = placed
        price = _price(picture, taken | {each.key for each in standbys})
        if standbys and wishes.max_price_per_hour is not None and price > wishes.max_price_per_hour * (1 + 1e-12):
            return None
    return Solution(search, chosen, search.assembler.archive, standbys=standbys, price_per_hour=price)


def _price(picture: Picture, keys: set[str]) -> float:
    return picture.price_per_hour(node for nodes in picture.nodes.values() for node in nodes if node.key in keys)


def _whole_front(request: Request, search: Search, archive: Archive) -> Archive:
    """The archive with what searches for the other figures of the front find."""
    wishes = search.constraints
    whole = Archive(wishes.wish)
    whole.merge(archive)
    for objective in FRONT:
        if objective != wishes.wish:
            asked = replace(wishes, objective=objective, min_latency="medium")
            other = request.search(search.picture, asked, FRONT_WORK, like=search)
            other.run()
            whole.merge(other.assembler.archive)
    return whole


def _fleet(request: Request, picture: Picture, asked: Constraints, max_work: float) -> Solution | None:
    done: dict[int, Solution] = {}

    def accept(found: Fleet) -> bool:
        solution = _with_rings(request, picture, asked, found)
        if solution is not None:
            done[id(found)] = solution
        return solution is not None

    def make(left: Picture, wishes: Constraints) -> Search:
        return request.search(left, wishes, max_work)

    found = fleet(picture, asked, make, accept)
    return None if found is None else done[id(found)]


def _with_rings(request: Request, picture: Picture, asked: Constraints, found: Fleet) -> Solution | None:
    """The rings with their standbys, which cover the first of them; None where there is no room or money for those."""
    search, chosen = found.searches[0], found.rings[0]
    taken = {node.key for ring in found.rings for each in ring.fits for node in each.nodes}
    standbys: tuple[Standby, ...] | None = ()
    if asked.standbys:
        standbys = place(picture, request.model, chosen, asked.standbys, taken)
    if standbys is None:
        return None
    price = _price(picture, taken | {each.key for each in standbys})
    if asked.max_price_per_hour is not None and price > asked.max_price_per_hour * (1 + 1e-12):
        return None
    several = found if len(found.rings) > 1 else None
    archive = search.assembler.archive
    return Solution(search, chosen, archive, fleet=several, standbys=standbys, price_per_hour=price)
