"""Small changes to a layout, for a search to try. Layers are cut at *boundaries*: every start and end in use.

Wires join machines only where one ends and another starts, so a change that loses the common boundaries loses the
flow. Every move here keeps to them, or moves a boundary together with all that stand at it. Layers wander between any
two *columns* (the layers between two boundaries) at once, everything between them shifting along: balancing two far
stages is then one step, not one per stage between.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

#: New ranges by machine: what a move changes.
Change = dict[int, tuple[int, int]]


class Moves:
    """Random changes to layouts of machines that hold up to `most[i]` layers of `layers`.

    `reach[i]` are the machines a wire joins with i, either way.
    """

    def __init__(self, layers: int, most: Sequence[int], reach: Sequence[frozenset[int]], rng: Random) -> None:
        self._layers = layers
        self._most = most
        self._reach = reach
        self._rng = rng
        self._movable = [i for i, held in enumerate(most) if held]
        self._kinds = (
            self._wander,
            self._wander,
            self._wander,
            self._settle,
            self._settle,
            self._edge,
            self._edge,
            self._swap,
            self._swap,
            self._split,
            self._merge,
        )

    def propose(self, start: Sequence[int], end: Sequence[int]) -> Change:
        """A change to try; empty where the kind drawn is not possible here."""
        return self._rng.choice(self._kinds)(start, end)

    def _wander(self, start: Sequence[int], end: Sequence[int]) -> Change:
        """Some layers go from one column to another, for all machines or for one chain of them."""
        rng = self._rng
        members = self._movable if rng.random() < 0.5 else self._chain(rng.choice(self._movable), start, end)
        cuts = sorted({0, self._layers, *(start[i] for i in members), *(end[i] for i in members)})
        if len(cuts) < 3:
            return {}
        giving, taking = rng.sample(range(len(cuts) - 1), 2)
        room = cuts[giving + 1] - cuts[giving] - 1
        if room < 1:
            return {}
        step = 1 if room == 1 or rng.random() < 0.8 else 2
        if giving < taking:
            low, high, shift = cuts[giving + 1], cuts[taking], -step
        else:
            low, high, shift = cuts[taking + 1], cuts[giving], step
        change: Change = {}
        for i in members:
            a = start[i] + shift if low <= start[i] <= high else start[i]
            b = end[i] + shift if low <= end[i] <= high else end[i]
            if b - a > self._most[i]:
                return {}
            if (a, b) != (start[i], end[i]):
                change[i] = (a, b)
        return change

    def _chain(self, first: int, start: Sequence[int], end: Sequence[int]) -> list[int]:
        """Machines that a token may meet on one way: joined at boundaries, transitively, but not at layer 0 alone."""
        members, edge = {first}, [first]
        while edge:
            i = edge.pop()
            for j in self._reach[i]:
                if j not in members and (end[i] == start[j] or end[j] == start[i] or start[i] == start[j] > 0):
                    members.add(j)
                    edge.append(j)
        return sorted(members)

    def _settle(self, start: Sequence[int], end: Sequence[int]) -> Change:
        """A machine goes elsewhere, between boundaries in use."""
        rng = self._rng
        i = rng.choice(self._movable)
        cuts = sorted({0, self._layers, *start, *end})
        a = rng.choice(cuts[:-1])
        ends = [b for b in cuts if a < b <= a + self._most[i]]
        if not ends:
            return {i: (a, a + rng.randint(1, self._most[i]))}
        b = rng.choice(ends[-3:])
        return {i: (a, b)} if (a, b) != (start[i], end[i]) else {}

    def _edge(self, start: Sequence[int], end: Sequence[int]) -> Change:
        """One end of a machine's layers moves to the boundary before or behind it, or by a layer."""
        rng = self._rng
        i = rng.choice(self._movable)
        a, b = start[i], end[i]
        cuts = sorted({0, self._layers, *start, *end}) if rng.random() < 0.7 else range(self._layers + 1)
        if rng.random() < 0.5:
            near = [c for c in cuts if c != a and c < b and b - c <= self._most[i]]
            near = near[-4:] if near and near[-1] > a else near[-3:]
            return {i: (rng.choice(near), b)} if near else {}
        near = [c for c in cuts if c != b and c > a and c - a <= self._most[i]]
        return {i: (a, rng.choice(near))} if near else {}

    def _swap(self, start: Sequence[int], end: Sequence[int]) -> Change:
        """Two machines change places."""
        if len(self._movable) < 2:
            return {}
        i, j = self._rng.sample(self._movable, 2)
        if (start[i], end[i]) == (start[j], end[j]):
            return {}
        if end[i] - start[i] > self._most[j] or end[j] - start[j] > self._most[i]:
            return {}
        return {i: (start[j], end[j]), j: (start[i], end[i])}

    def _split(self, start: Sequence[int], end: Sequence[int]) -> Change:
        """Of machines that hold the same layers, some take the first part of them and the others the rest."""
        rng = self._rng
        i = rng.choice(self._movable)
        a, b = start[i], end[i]
        team = [j for j in self._movable if (start[j], end[j]) == (a, b)]
        if len(team) < 2 or b - a < 2:
            return {}
        cut = rng.randint(a + 1, b - 1)
        rng.shuffle(team)
        heads = rng.randint(1, len(team) - 1)
        return {j: (a, cut) if k < heads else (cut, b) for k, j in enumerate(team)}

    def _merge(self, start: Sequence[int], end: Sequence[int]) -> Change:
        """Two machines that follow each other hold the layers of both, side by side."""
        rng = self._rng
        i = rng.choice(self._movable)
        after = [j for j in self._movable if start[j] == end[i] and j in self._reach[i]]
        if not after:
            return {}
        j = rng.choice(after)
        a, b = start[i], end[j]
        return {i: (a, b), j: (a, b)} if b - a <= min(self._most[i], self._most[j]) else {}
