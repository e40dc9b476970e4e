"""First layouts where wires are missing.

Chains of regions (`topology.flow_chains`) take it that machines of a region are joined. Where some are not, machines
that hold equally many layers change places until those that follow each other are joined (`rejoined`). Where many are
not, machines are threaded one after the other along wires that exist (a beam search for the paths that hold most
layers), and each that is left holds the same layers as one on the path that it can stand in for (`threaded`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Final

from topology.flow_fast import Evaluator

#: Paths that are kept at each length.
BEAM: Final = 96
#: Times that every pair of machines is looked at; exchanges whose flow is asked for at most, some seconds' worth; and
#: by how much a flow may miss what its machines could pass if no wire were missing.
PASSES: Final = 8
TRIED: Final = 4_000
ENOUGH: Final = 0.01


def rejoined(
    evaluator: Evaluator, start: list[int], end: list[int], stop: Callable[[], bool] = lambda: False
) -> tuple[list[int], list[int]]:
    """The layout with machines in exchanged places, where missing wires hold its flow up, so that more flows."""
    start, end = list(start), list(end)
    most = min(evaluator.coverage(start, end))
    flow = evaluator.flow(start, end)[0]
    if flow >= most * (1 - ENOUGH):
        return start, end
    joined = _joined(evaluator, start, end)
    if evaluator.flow(*joined)[0] > flow:
        start, end = joined
        flow = evaluator.flow(start, end)[0]
    tried, improved = 0, True
    while improved:
        improved = False
        for i, j in _exchangeable(evaluator, start, end):
            if tried == TRIED or flow >= most * (1 - ENOUGH) or (tried % 16 == 0 and stop()):
                return start, end
            tried += 1
            there = list(start), list(end)
            for bounds in there:
                bounds[i], bounds[j] = bounds[j], bounds[i]
            if (more := evaluator.flow(*there)[0]) > flow + 1e-6:
                start[:], end[:] = there
                flow, improved = more, True
    return start, end


def _exchangeable(evaluator: Evaluator, start: list[int], end: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of machines of one kind, or with equally many layers, in different places. The lists may change on."""
    for i, j in itertools.combinations([i for i in range(evaluator.count) if end[i] > start[i]], 2):
        alike = evaluator.rates[i] == evaluator.rates[j] or end[i] - start[i] == end[j] - start[j]
        if alike and (start[i], end[i]) != (start[j], end[j]):
            yield i, j


def _joined(evaluator: Evaluator, start: list[int], end: list[int]) -> tuple[list[int], list[int]]:
    """The layout with machines in exchanged places, so that fewer wires between those that follow are missing."""
    start, end = list(start), list(end)
    used = [i for i in range(evaluator.count) if end[i] > start[i]]
    starting: dict[int, set[int]] = {}
    ending: dict[int, set[int]] = {}
    for i in used:
        starting.setdefault(start[i], set()).add(i)
        ending.setdefault(end[i], set()).add(i)

    def lacks(i: int) -> float:
        """Shares of the wires that are missing to the machines before and to those after."""
        before, after = ending.get(start[i], set()), starting.get(end[i], set())
        come = [i in evaluator.wires[j] for j in before] if start[i] else [i in evaluator.entry]
        go = [j in evaluator.wires[i] for j in after] if end[i] < evaluator.layers else [i in evaluator.exit]
        return sum(1 - sum(side) / len(side) for side in (come, go) if side)

    def exchange(i: int, j: int) -> None:
        for bounds, teams in ((start, starting), (end, ending)):
            teams[bounds[i]].remove(i)
            teams[bounds[j]].remove(j)
            bounds[i], bounds[j] = bounds[j], bounds[i]
            teams[bounds[i]].add(i)
            teams[bounds[j]].add(j)

    for _ in range(PASSES):
        improved = False
        for i, j in _exchangeable(evaluator, start, end):
            here = lacks(i) + lacks(j)
            if not here:
                continue
            exchange(i, j)
            if lacks(i) + lacks(j) < here - 1e-9:
                improved = True
            else:
                exchange(i, j)
        if not improved:
            break
    return start, end


def threaded(evaluator: Evaluator) -> tuple[list[int], list[int]] | None:
    """Starts and ends by machine, or None where no path found holds all layers. Machines left over hold one layer."""
    path = _path(evaluator)
    if path is None:
        return None
    held = [min(len(evaluator.rates[i]) - 1, evaluator.layers) for i in path]
    spare = sum(held) - evaluator.layers
    while spare > 0:  # taken back where least passes
        shrinking = [k for k in range(len(path)) if held[k] > 1]
        least = min(shrinking, key=lambda k: (evaluator.rates[path[k]][held[k]], k))
        held[least] -= 1
        spare -= 1
    start, end = [0] * evaluator.count, [min(1, len(rates) - 1) for rates in evaluator.rates]
    at, stages = 0, []
    for i, layers in zip(path, held, strict=True):
        start[i], end[i] = at, at + layers
        stages.append([i])
        at += layers
    _beside(evaluator, stages, held, start, end)
    return start, end


#: A path so far: layers that it could hold, ms, machines.
_Ranked = tuple[int, float, tuple[int, ...]]


def _path(evaluator: Evaluator) -> list[int] | None:
    """Machines one after the other that hold all layers: the path on which tokens wait least, of those kept."""
    most = [min(len(rates) - 1, evaluator.layers) for rates in evaluator.rates]
    beam: list[_Ranked] = [(most[i], evaluator.entry[i][3], (i,)) for i in sorted(evaluator.entry) if most[i]]
    found: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, evaluator.count + 1):
        for layers, ms, path in beam:
            # Every machine on a path holds a layer at least.
            if layers >= evaluator.layers >= length and path[-1] in evaluator.exit:
                found.append((ms + evaluator.exit[path[-1]][3], path))
        if found or not beam:
            break
        longer = [
            (layers + most[j], ms + wire[3], (*path, j))
            for layers, ms, path in beam
            for j, wire in evaluator.wires[path[-1]].items()
            if most[j] and j not in path
        ]
        # Those that hold most come first; of equals those with most ways on, and that wait least.
        longer.sort(key=lambda each: (-each[0], -len(evaluator.wires[each[2][-1]]), each[1], each[2]))
        ends: dict[tuple[int, frozenset[int]], _Ranked] = {}
        for each in longer:
            ends.setdefault((each[2][-1], frozenset(each[2])), each)
            if len(ends) == BEAM:
                break
        beam = list(ends.values())
    return list(min(found)[1]) if found else None


def _beside(evaluator: Evaluator, stages: list[list[int]], held: list[int], start: list[int], end: list[int]) -> None:
    """Each machine left goes beside the stage that passes least of those that it fits and is joined around."""
    used = {i for team in stages for i in team}
    left = [i for i in range(evaluator.count) if i not in used and len(evaluator.rates[i]) > 1]

    def passes(stage: int) -> float:
        return sum(evaluator.rates[i][held[stage]] for i in stages[stage])

    for i in left:
        able = []
        for k, layers in enumerate(held):
            if layers >= len(evaluator.rates[i]):
                continue
            before = i in evaluator.entry if k == 0 else any(i in evaluator.wires[j] for j in stages[k - 1])
            after = i in evaluator.exit if k == len(stages) - 1 else any(j in evaluator.wires[i] for j in stages[k + 1])
            if before and after:
                able.append(k)
        if able:
            k = min(able, key=lambda k: (passes(k), k))
            stages[k].append(i)
            start[i], end[i] = sum(held[:k]), sum(held[: k + 1])
