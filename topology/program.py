"""One pass of the exact program over a small mesh: states, their best values, and the way back (`topology.exact`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from topology.candidate import Assembler
from topology.constraints import Constraints
from topology.cost import PREFILL_TOKENS, TOKEN_BYTES
from topology.picture import Picture
from topology.split import Times

Array = npt.NDArray[np.float64]
Vector = tuple[int, ...]
Combine = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """An island in a place of the ring: its time by number of layers, for each site that could lead it."""

    vector: Vector
    leads: tuple[tuple[int, int, Times], ...]  # site, kind of the lead, seconds of 0..L layers


class Islands(Protocol):
    """What a pass must know of the mesh: see `topology.exact.Exact`."""

    assembler: Assembler
    picture: Picture
    constraints: Constraints
    sites: tuple[str, ...]
    layers: int

    def choices(self, policy: str, *, first: bool, last: bool) -> dict[Vector, Choice]: ...
    def breadth(self, state: Vector) -> int: ...


class Run:
    """One pass of the program. `totals` is the best by the devices used, for all layers and with the ring closed."""

    def __init__(self, exact: Islands, policy: str, combine: Combine, limit_s: float, within: Vector) -> None:
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
            home_s = TOKEN_BYTES / path.bandwidth
            if path.reachable and carried_s <= self.limit_s:
                hop[i, j] = carried_s if self.combine is np.maximum else exact.assembler.hop_s(a, b, size)
            if path.reachable and home_s <= self.limit_s:
                closing[i, j] = home_s if self.combine is np.maximum else exact.assembler.hop_s(a, b, TOKEN_BYTES)
                if self.policy == "prefill":
                    closing[i, j] = 0.0  # the first token is there before it goes home
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
        most = exact.constraints.max_sites
        for vector, choice in exact.choices(self.policy, first=True, last=True).items():
            whole = min(float(each[layers]) for _, _, each in choice.leads)
            fits = all(a <= b for a, b in zip(vector, self.within, strict=True))
            if whole <= self.limit_s and fits and (most is None or exact.breadth(vector) <= most):
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
            if most is not None and exact.breadth(state) > most:
                continue
            reached = self._reached(here)
            for vector, tables in middle:
                following = tuple(a + b for a, b in zip(state, vector, strict=True))
                if any(a > b for a, b in zip(following, self.within, strict=True)):
                    continue
                if most is not None and exact.breadth(following) > most:
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
