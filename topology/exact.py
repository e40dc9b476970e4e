"""The best plan of a small mesh, proved: a dynamic program over all ways to form stages of its devices.

A plan is a sequence of stages, each an island with a lead and a number of layers. What it costs so far depends on the
devices used, the site of the first lead, the site of the last lead, and the layers placed: that is the state. A stage
more adds its time and the hop to it (or, for the rate, raises the slowest of both), so the best of every state follows
from the best of smaller ones. Devices of a site that are equal in every figure are told apart by their number alone.

Stage times come from `Assembler.ladder`: shares that are fastest where memory allows, and otherwise hold more layers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from topology.candidate import Assembler, Candidate, Island
from topology.cost import PREFILL_TOKENS, Fit, all_reduces_s, overhead_s, slowest_path
from topology.objective import SLACKS
from topology.picture import Node
from topology.program import Choice, Combine, Run, Vector
from topology.split import Times, level_out, times

#: A mesh with more islands than this, or more steps of the program, is not solved exactly. The steps are array
#: operations of about 10 us, and cells of about 2 ns (numpy 2, one core of an AMD EPYC).
MAX_ISLANDS: Final = 260
MAX_S: Final = 0.3
STEP_S, CELL_S, FIT_S = 12e-6, 2e-9, 250e-6
#: Plans on the front of latency and rate that are looked for at most.
MAX_FRONT: Final = 24
#: Equally good choices of devices that are compared further, and next best ones that are priced.
TIES: Final = 8
ALTERNATIVES: Final = 4
#: Totals that differ by less count as equal: nanoseconds decide (`topology.objective`).
SAME_S: Final = 1e-9


class Exact:
    """The program for one assembler, that is one picture, model, context and set of constraints."""

    def __init__(
        self, assembler: Assembler, *, widest: int, near: Collection[frozenset[str]] = (), max_s: float = MAX_S
    ) -> None:
        """`near`: sites among which tensor parallelism pays. `max_s`: time that may be spent, by estimate."""
        self._near, self._max_s = near, min(max_s, MAX_S)
        self.assembler, self.layers = assembler, assembler.model.layers
        self.picture, self.constraints = assembler.picture, assembler.constraints
        self.sites = self.picture.sites
        self.kinds = _kinds(self.picture.nodes[name] for name in self.sites)
        self.counts = tuple(len(kind) for kind in self.kinds)
        self.widest = min(widest, assembler.model.heads, assembler.model.intermediate)
        self._choices: dict[tuple[str, bool, bool], dict[Vector, Choice]] = {}
        self._bounds = {vector: self._bound(vector) for vector in self._vectors()} if self.affordable else {}
        self._limit_s, self._few = math.inf, False

    @property
    def affordable(self) -> bool:
        """Whether the program is small enough to be run. Depends on the mesh and the model alone."""
        states = math.prod(n + 1 for n in self.counts)
        steps = math.prod((n + 1) * (n + 2) // 2 for n in self.counts)
        if states > MAX_ISLANDS or self.layers > 512:
            return False
        cells = steps * len(self.sites) * (self.layers + 1) ** 2 * min(len(self.sites), 2.5)
        return steps * 5 * STEP_S + cells * CELL_S + states * 8 * FIT_S < self._max_s

    def candidates(self) -> list[Candidate]:
        """Plans among which is the best of all by what the constraints wish; where limits are set, the front too."""
        wish = self.constraints.wish
        if wish in ("latency", "first_token", "throughput"):
            # A plan of few islands is soon found, and rules most others out.
            self._few = True
            first = getattr(self, f"_{wish}")()
            self._few = False
            self._choices.clear()
            figure = {"latency": "token_s", "first_token": "first_token_s", "throughput": "slowest_s"}[wish]
            self._limit_s = min((getattr(candidate, figure) for candidate in first), default=math.inf)
        front = wish == "balanced" or (self.constraints.concurrency is not None and wish in ("throughput", "cost"))
        found = self._front() if front else getattr(self, f"_{wish}")()
        if all(candidate.excess for candidate in found) and found:
            found = [*found, *self._front(), *self._first_token()]
        return found

    def _latency(self) -> list[Candidate]:
        return self._plans(self._run("speed", np.add), _near)

    def _first_token(self) -> list[Candidate]:
        return self._plans(self._run("prefill", np.add), _near)

    def _fewest_sites(self) -> list[Candidate]:
        def fewest(totals: dict[Vector, float]) -> list[Vector]:
            least = min(map(self.breadth, totals))
            return _near({state: total for state, total in totals.items() if self.breadth(state) == least})

        return self._plans(self._run("speed", np.add), fewest)

    def _throughput(self) -> list[Candidate]:
        totals = self._run("speed", np.maximum).totals
        if not totals:
            return []
        least_s = min(totals.values())
        return self._plans(self._run("speed", np.add, limit_s=least_s), self._narrowest)

    def _cost(self) -> list[Candidate]:
        """By price times the slowest stage; where nothing costs anything, by latency."""
        totals = self._run("speed", np.maximum).totals
        prices = {state: self._price(state) * total for state, total in totals.items()}
        if not prices or min(prices.values()) == 0:
            return self._latency()
        ranked = sorted(prices, key=lambda state: (prices[state], state))[:4]
        found: list[Candidate] = []
        for state in ranked:
            run = self._run("speed", np.add, limit_s=totals[state], within=state)
            found += self._plans(run, functools.partial(_only, state=state))
        return found

    def _front(self) -> list[Candidate]:
        found: list[Candidate] = []
        limit_s = math.inf
        for _ in range(MAX_FRONT):
            fresh = self._plans(self._run("speed", np.add, limit_s=limit_s), _near)
            if not fresh:
                break
            found += fresh
            limit_s = min(candidate.slowest_s for candidate in fresh) * (1 - 1e-9)
        return found

    def _narrowest(self, totals: dict[Vector, float]) -> list[Vector]:
        least = min(map(self.breadth, totals))
        return _near({state: total for state, total in totals.items() if self.breadth(state) == least})

    def breadth(self, state: Vector) -> int:
        """Sites that the devices of a state belong to."""
        return len({self.kinds[i][0].site for i, n in enumerate(state) if n})

    def _price(self, state: Vector) -> float:
        return self.picture.price_per_hour(node for kind, n in zip(self.kinds, state, strict=True) for node in kind[:n])

    def _run(self, policy: str, combine: Combine, *, limit_s: float = math.inf, within: Vector | None = None) -> Run:
        self.assembler.work += 1
        return Run(self, policy, combine, limit_s, within or self.counts)

    def choices(self, policy: str, *, first: bool, last: bool) -> dict[Vector, Choice]:
        """Every island that may stand in that place, by its vector."""
        key = (policy, first, last)
        if key not in self._choices:
            found = {}
            for vector in self._bounds:
                if self._wanted(vector) and self._may(vector, first=first, last=last):
                    leads = self._leads(vector, policy, first, last)
                    if leads:
                        found[vector] = Choice(vector, leads)
            self._choices[key] = found
        return self._choices[key]

    def _vectors(self) -> Iterator[Vector]:
        """Every island that could do any work at all."""
        for vector in itertools.product(*(range(n + 1) for n in self.counts)):
            if 0 < sum(vector) <= self.widest:
                sites = frozenset(self.kinds[i][0].site for i, n in enumerate(vector) if n)
                if len(sites) == 1 or self.constraints.wish != "fewest_sites" or sites in self._near:
                    yield vector

    def _bound(self, vector: Vector) -> float:
        """Seconds of a layer that no sharing comes below."""
        model, nodes = self.assembler.model, self.island(vector, (0,) * len(vector), None)
        if self.constraints.wish == "first_token":
            tokens = min(PREFILL_TOKENS, self.assembler.context)
            operations = 2 * (model.layer_parameters - 2 * model.hidden) * tokens
            work_s = operations / math.fsum(node.flops for node in nodes)
            return work_s + overhead_s(nodes) + all_reduces_s(self.picture, model, nodes, tokens)
        weights_s = (model.layer_bytes - 2 * model.row_bytes) / math.fsum(node.speed for node in nodes)
        return weights_s + overhead_s(nodes) + all_reduces_s(self.picture, model, nodes)

    def _wanted(self, vector: Vector) -> bool:
        """Whether a stage of this island may be in a plan as good as those that are known already."""
        sites = {self.kinds[i][0].site for i, n in enumerate(vector) if n}
        if self._few:  # single devices, and whole sites
            whole = all(n == self.counts[i] for i, n in enumerate(vector) if self.kinds[i][0].site in sites and n)
            return sum(vector) == 1 or (len(sites) == 1 and whole)
        least_s = 0.0 if self.constraints.wish == "throughput" else min(self._bounds.values())
        return self._bounds[vector] + (self.layers - 1) * least_s <= self._limit_s

    def _may(self, vector: Vector, *, first: bool, last: bool) -> bool:
        nodes = self.island(vector, (0,) * len(vector), None)
        if self.constraints.private and (first or last) and any(n.site != self.picture.origin for n in nodes):
            return False
        return slowest_path(self.picture, nodes).reachable

    def _leads(self, vector: Vector, policy: str, first: bool, last: bool) -> tuple[tuple[int, int, Times], ...]:
        """For each site of the island the times under the best lead there. A lead costs memory at both ends only."""
        found: dict[int, tuple[int, int, Times]] = {}
        for kind, count in enumerate(vector):
            if not count:
                continue
            site = self.sites.index(self.kinds[kind][0].site)
            if site in found and not (first or last):
                continue
            steps = self.assembler.ladder(self.island(vector, (0,) * len(vector), kind), policy, first, last)
            if not steps:
                continue
            seconds = times(steps, self.layers, policy)
            known = found.get(site)
            # Of two leads the one that is never slower is kept; otherwise the lesser sum, an approximation.
            if known is None or np.nan_to_num(seconds, posinf=1e6).sum() < np.nan_to_num(known[2], posinf=1e6).sum():
                found[site] = (site, kind, seconds)
        return tuple(found.values())

    def island(self, vector: Vector, used: Vector, lead: int | None) -> Island:
        """The devices of an island: of each kind those that come next after the `used` ones, the lead first."""
        nodes = [self.kinds[i][used[i] + k] for i, n in enumerate(vector) for k in range(n)]
        nodes.sort(key=lambda node: node.rank)
        if lead is not None:
            head = self.kinds[lead][used[lead]]
            nodes.remove(head)
            nodes.insert(0, head)
        return tuple(nodes)

    def _plans(self, run: Run, choose: Callable[[dict[Vector, float]], list[Vector]]) -> list[Candidate]:
        if not run.totals:
            return []
        chosen = choose(run.totals)[:TIES]
        # The next best devices are priced as well, to be remembered as alternatives.
        others = sorted(run.totals, key=lambda state: (run.totals[state], state))[:ALTERNATIVES]
        plans = {state: self._plan(run, run.path(state)) for state in dict.fromkeys([*chosen, *others])}
        return [plan for state in chosen if (plan := plans[state]) is not None]

    def _plan(self, run: Run, path: Sequence[tuple[Vector, int]]) -> Candidate | None:
        """The candidate of a path, its layers evened out as far as that costs nothing."""
        used = (0,) * len(self.counts)
        ladders: list[tuple[Fit, ...]] = []
        for index, (vector, lead) in enumerate(path):
            island = self.island(vector, used, lead)
            place = (index == 0, index == len(path) - 1)
            ladders.append(self.assembler.ladder(island, run.policy, *place))
            used = tuple(a + b for a, b in zip(used, vector, strict=True))
        slack = SLACKS["fewest_sites"][0] if self.constraints.wish == "fewest_sites" else 0.0
        return level_out(self.assembler, ladders, run.policy, limit_s=run.limit_s, slack=slack)


def _kinds(sites: Iterable[tuple[Node, ...]]) -> list[list[Node]]:
    """The devices of each site, equal ones together, in the order of their ranks."""
    found: dict[tuple[object, ...], list[Node]] = {}
    for nodes in sites:
        for node in nodes:
            key = (node.site, node.speed, node.flops, node.usable_bytes, node.price_per_hour, node.pace)
            found.setdefault(key, []).append(node)
    return list(found.values())


def _near(totals: dict[Vector, float]) -> list[Vector]:
    """The states with the least total, those of equally few devices first."""
    least_s = min(totals.values())
    near = [state for state, total in totals.items() if total <= least_s + SAME_S]
    return sorted(near, key=lambda state: (sum(state), [-n for n in state]))


def _only(totals: dict[Vector, float], state: Vector) -> list[Vector]:
    return [state] if state in totals else []
