"""Pools of machines for the tests of flows: regions with wide wires inside and narrow, slow ones between."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

from topology.flow import SINK, SOURCE, Machine, Pool, Wire


def machine(name: str, work: float, most: int) -> Machine:
    """Passes `work` / layers tokens/s."""
    return Machine(name, tuple(work / held for held in range(1, most + 1)))


def pool(
    layers: int,
    regions: Sequence[Sequence[Machine]],
    *,
    across: float = 100.0,
    ms: float = 50.0,
    ends_ms: float = 10.0,
    within: float = 1e5,
) -> Pool:
    """Regions joined by wires of `across` tokens/s and `ms`; within one they carry `within` and take 1 ms."""
    machines = [m for region in regions for m in region]
    home = {m.name: number for number, region in enumerate(regions) for m in region}
    wires = [Wire(SOURCE, m.name, 1e6, ends_ms) for m in machines] + [
        Wire(m.name, SINK, 1e6, ends_ms) for m in machines
    ]
    for a, b in itertools.permutations(machines, 2):
        same = home[a.name] == home[b.name]
        wires.append(Wire(a.name, b.name, within if same else across, 1.0 if same else ms))
    return Pool(layers, tuple(machines), tuple(wires))


def random_pool(rng: Random, count: int, layers: int) -> Pool:
    """One to three regions of machines of up to three kinds that hold the model together, if only just."""
    kinds = [(rng.uniform(100, 1000), rng.randint(1, max(1, layers - 1))) for _ in range(rng.randint(1, 3))]
    number = rng.randint(1, min(3, count))
    regions: list[list[Machine]] = [[] for _ in range(number)]
    for i in range(count):
        work, most = rng.choice(kinds)
        regions[i % number].append(machine(f"m{i}", work, min(layers, most + 1)))
    return pool(layers, regions, across=rng.uniform(20, 400), ms=rng.uniform(20, 100))
