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
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from topology.candidate import Assembler, Candidate, Island
from topology.cost import LAYER_OVERHEAD_S, PREFILL_TOKENS, Fit, all_reduces_s, slowest_path
from topology.objective import SLACKS
from topology.picture import Node
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

Array = npt.NDArray[np.float64]
Vector = tuple[int, ...]
Combine = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """An island in a place of the ring: its time by number of layers, for each site that could lead it."""

    vector: Vector
    leads: tuple[tuple[int, int, Times], ...]  # site, kind of the lead, seconds of 0..L layers


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
        self.widest = min(widest, assembler.model.kv_heads, assembler.model.intermediate)
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
            least = min(map(self._breadth, totals))
            return _near({state: total for state, total in totals.items() if self._breadth(state) == least})

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
        least = min(map(self._breadth, totals))
        return _near({state: total for state, total in totals.items() if self._breadth(state) == least})

    def _breadth(self, state: Vector) -> int:
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
            return work_s + LAYER_OVERHEAD_S + all_reduces_s(self.picture, model, nodes, tokens)
        weights_s = (model.layer_bytes - 2 * model.row_bytes) / math.fsum(node.speed for node in nodes)
        return weights_s + LAYER_OVERHEAD_S + all_reduces_s(self.picture, model, nodes)

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


class Run:
    """One pass of the program. `totals` is the best by the devices used, for all layers and with the ring closed."""

    def __init__(self, exact: Exact, policy: str, combine: Combine, limit_s: float, within: Vector) -> None:
        self.exact, self.policy, self.combine, self.limit_s = exact, policy, combine, limit_s * (1 + 1e-12)
        self.within = within
        self._hop, self._closing = self._hops()
        self._first = self._tables(first=True, last=False)
        self._middle = self._tables(first=False, last=False)
        self._last = self._tables(first=False, last=True)
        self.best: dict[Vector, Array] = {}
        self.totals: dict[Vector, float] = {}
        self._go()

    def _hops(self) -> tuple[Array, Array]:
        """Between leads of two sites, and back to the first: seconds; for the rate, how long the link is taken."""
        exact, model = self.exact, self.exact.assembler.model
        tokens = min(PREFILL_TOKENS, exact.assembler.context) if self.policy == "prefill" else 1
        size = tokens * model.activation_bytes
        shape = (len(exact.sites), len(exact.sites))
        hop, closing = np.full(shape, math.inf), np.full(shape, math.inf)
        for (i, a), (j, b) in itertools.product(enumerate(exact.sites), repeat=2):
            path = exact.picture.path(a, b)
            carried_s = model.activation_bytes / path.bandwidth
            if path.reachable and carried_s <= self.limit_s:
                hop[i, j] = carried_s if self.combine is np.maximum else path.transfer_s(size)
                closing[i, j] = 0.0 if self.policy == "prefill" else hop[i, j]
        return hop, closing

    def _tables(self, *, first: bool, last: bool) -> list[tuple[Vector, list[tuple[int, int, Array]]]]:
        """Islands with, for each lead, the seconds of 0..L layers; what takes longer than the limit is impossible."""
        found = []
        for vector, choice in self.exact.choices(self.policy, first=first, last=last).items():
            if all(a <= b for a, b in zip(vector, self.within, strict=True)):
                leads = [(s, k, np.where(each > self.limit_s, math.inf, each)) for s, k, each in choice.leads]
                leads = [entry for entry in leads if np.isfinite(entry[2]).any()]
                if leads:
                    found.append((vector, leads))
        return found

    def _go(self) -> None:
        exact, layers = self.exact, self.exact.layers
        sites = len(exact.sites)
        most = exact.constraints.max_sites
        for vector, choice in exact.choices(self.policy, first=True, last=True).items():
            whole = min(float(each[layers]) for _, _, each in choice.leads)
            fits = all(a <= b for a, b in zip(vector, self.within, strict=True))
            if whole <= self.limit_s and fits and (most is None or exact._breadth(vector) <= most):
                self.totals[vector] = whole
        for vector, leads in self._first:
            for site, _, seconds in leads:
                self._at(vector)[site, site] = np.minimum(self._at(vector)[site, site], seconds)
        rows = np.arange(layers + 1)
        shift = rows[:, None] - rows[None, :]
        middle = [
            (v, [(s, np.where(shift >= 0, each[np.maximum(shift, 0)], math.inf)) for s, _, each in leads])
            for v, leads in self._middle
        ]
        ending = dict(self._last)
        for state in itertools.product(*(range(n + 1) for n in self.within)):
            here = self.best.get(state)
            if here is None or not np.isfinite(here).any() or sum(state) == sum(self.within):
                continue
            if most is not None and exact._breadth(state) > most:
                continue
            reached = self._reached(here)
            for vector, tables in middle:
                following = tuple(a + b for a, b in zip(state, vector, strict=True))
                if any(a > b for a, b in zip(following, self.within, strict=True)):
                    continue
                if most is not None and exact._breadth(following) > most:
                    continue
                for site, _, seconds in ending.get(vector, ()):
                    total = self._end(reached, site, seconds).min()
                    if total < self.totals.get(following, math.inf):
                        self.totals[following] = float(total)
                if following == self.within:
                    continue  # nobody is left to be the last stage
                target = self._at(following)
                for site, table in tables:
                    value = self.combine(reached[:, site, None, :], table[None]).min(axis=2)
                    np.minimum(target[:, site], value, out=target[:, site])
        assert sites
        self.totals = {state: total for state, total in self.totals.items() if math.isfinite(total)}

    def _at(self, state: Vector) -> Array:
        """The best by first lead's site, last lead's site and layers placed."""
        if state not in self.best:
            sites = len(self.exact.sites)
            self.best[state] = np.full((sites, sites, self.exact.layers + 1), math.inf)
        return self.best[state]

    def _reached(self, here: Array) -> Array:
        """The same with the hop to the next lead's site."""
        result: Array = self.combine(here[:, :, None, :], self._hop[None, :, :, None]).min(axis=1)
        return result

    def _end(self, reached: Array, site: int, seconds: Array) -> Array:
        """Totals by first lead's site and layers placed before the last stage."""
        result: Array = self.combine(
            self.combine(reached[:, site, :], seconds[None, ::-1]), self._closing[site][:, None]
        )
        return result

    def path(self, state: Vector) -> list[tuple[Vector, int]]:
        """Islands and kinds of their leads on the way to the total of `state`, found by asking which way gives it."""
        exact, total = self.exact, self.totals[state]
        whole = exact.choices(self.policy, first=True, last=True).get(state)
        for _, kind, each in whole.leads if whole else ():
            if each[exact.layers] == total:
                return [(state, kind)]
        for vector, leads in self._last:
            before = tuple(a - b for a, b in zip(state, vector, strict=True))
            if before in self.best and min(before) >= 0:
                reached = self._reached(self.best[before])
                for site, kind, seconds in leads:
                    starts, placed = np.nonzero(self._end(reached, site, seconds) == total)
                    if len(starts):
                        start, count = int(starts[0]), int(placed[0])
                        return [*self._back(before, start, site, count), (vector, kind)]
        raise AssertionError(f"no way leads to {state}")  # the program above would be at fault

    def _back(self, state: Vector, start: int, site: int, count: int) -> list[tuple[Vector, int]]:
        """The stages up to `state`, with `count` layers, from a first lead at `start`, before a lead at `site`."""
        here = self.best[state]
        value = self.combine(here[start, :, count], self._hop[:, site])
        lead = int(value.argmin())
        goal = here[start, lead, count]
        if lead == start:
            for vector, leads in self._first:
                if vector == state:
                    for at, kind, seconds in leads:
                        if at == lead and seconds[count] == goal:
                            return [(vector, kind)]
        for vector, leads in self._middle:
            before = tuple(a - b for a, b in zip(state, vector, strict=True))
            if min(before) < 0 or before not in self.best:
                continue
            reached = self._reached(self.best[before])[start]
            for at, kind, seconds in leads:
                if at == lead:
                    ways = self.combine(reached[at, : count + 1], seconds[count::-1])
                    placed = np.nonzero(ways == goal)[0]
                    if len(placed):
                        return [*self._back(before, start, at, int(placed[0])), (vector, kind)]
        raise AssertionError(f"no way leads to {state}")


def _kinds(sites: Iterable[tuple[Node, ...]]) -> list[list[Node]]:
    """The devices of each site, equal ones together, in the order of their ranks."""
    found: dict[tuple[object, ...], list[Node]] = {}
    for nodes in sites:
        for node in nodes:
            key = (node.site, node.speed, node.flops, node.usable_bytes, node.price_per_hour)
            found.setdefault(key, []).append(node)
    return list(found.values())


def _near(totals: dict[Vector, float]) -> list[Vector]:
    """The states with the least total, those of equally few devices first."""
    least_s = min(totals.values())
    near = [state for state, total in totals.items() if total <= least_s + SAME_S]
    return sorted(near, key=lambda state: (sum(state), [-n for n in state]))


def _only(totals: dict[Vector, float], state: Vector) -> list[Vector]:
    return [state] if state in totals else []
