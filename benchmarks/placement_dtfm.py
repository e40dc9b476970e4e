"""DT-FM's cases: which 8 of 64 devices share a pipeline stage, and in which order the stages follow, by its cost model.

All devices of a stage exchange gradients (data parallelism), and devices of neighbouring stages activations, one to
one. The cost, in seconds of communication an iteration (Yuan et al., NeurIPS 2022, arXiv:2206.01288, section 3):

    stage:    the largest, over devices, of the sum over the others of 2 * (delay + gradient / (bandwidth * degree))
    two stages: the least, over pairings, of the largest delay + activation / bandwidth of a pair
    total:    the worst stage + 2 * the cheapest open path through all stages

Devices of a region are alike, so a stage is how many of each region it has. The published search is genetic, with the
order solved for every candidate; here the order is part of what annealing changes, so that a step touches two stages
and the hops beside them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.placement_case import CaseError, Count, Rate, Size, first_problem

#: Sizes of the published job, as its code has them (2024 where 2048 was meant): gigabytes a stage.
LAYERS_A_STAGE: Final = 3
GRADIENT_GB: Final = 1.3 * 4 * LAYERS_A_STAGE / 24
ACTIVATION_GB: Final = 2024 * 2048 * 2 * (1.25e5 / 2048) / 2**30
#: Exchanges to try from each start, and starts: 3 s at most a case on one core of an AMD EPYC.
STEPS: Final = 8_000
STARTS: Final = 2
#: Temperatures in seconds of cost.
HOT_S: Final = 3.0
COLD_S: Final = 0.02

#: How many devices of each region a stage has.
Stage = tuple[int, ...]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Job(_Part):
    """How many stages, and devices in each."""

    pipeline_stages: Annotated[int, Field(ge=2, le=64, strict=True)]
    data_parallel: Annotated[int, Field(ge=1, le=256, strict=True)]


class World(_Part):
    """One case: devices by region, and delay (ms) and bandwidth (Gbit/s) between and within regions."""

    name: str = ""
    groups: Annotated[tuple[tuple[str, Count], ...], Field(min_length=1)]
    delay_ms_by_group_pair: tuple[tuple[Rate, ...], ...]
    bandwidth_gbit_s_by_group_pair: tuple[tuple[Size, ...], ...]
    derived_scheduler_cost_s: dict[str, Any] = {}

    @model_validator(mode="after")
    def _square(self) -> World:
        for field in ("delay_ms_by_group_pair", "bandwidth_gbit_s_by_group_pair"):
            rows = getattr(self, field)
            if len(rows) != len(self.groups) or any(len(row) != len(self.groups) for row in rows):
                raise ValueError(f"{field} must have {len(self.groups)} rows and columns, one for each group")
        return self


class Document(_Part):
    """The whole file."""

    case: str = ""
    job: Job
    cases: Annotated[tuple[World, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Found:
    """Stages in order and the cost of an iteration in seconds: the worst stage, twice the path, and both together."""

    stages: tuple[Stage, ...]
    data_parallel_s: float
    pipeline_s: float

    @property
    def total_s(self) -> float:
        """What the published search minimises."""
        return self.data_parallel_s + self.pipeline_s


class Costs:
    """The cost model of one case."""

    def __init__(self, world: World, job: Job) -> None:
        delay_s = [[ms / 1e3 for ms in row] for row in world.delay_ms_by_group_pair]
        gbit_s = world.bandwidth_gbit_s_by_group_pair
        every = range(len(world.groups))
        degree = job.data_parallel
        self.exchange_s = [
            [2 * (delay_s[a][b] + GRADIENT_GB * 8 / (gbit_s[a][b] * degree)) for b in every] for a in every
        ]
        self.hop_s = [[delay_s[a][b] + ACTIVATION_GB * 8 / gbit_s[a][b] for b in every] for a in every]
        self._worst_s = [[max(self.hop_s[a][b], self.hop_s[b][a]) for b in every] for a in every]
        self._limits = sorted({cost for row in self._worst_s for cost in row})
        self._stages: dict[Stage, float] = {}
        self._hops: dict[tuple[Stage, Stage], float] = {}

    def stage_s(self, stage: Stage) -> float:
        """The slowest device's exchanges with the others of its stage."""
        if stage not in self._stages:
            self._stages[stage] = max(
                math.fsum((count - (a == b)) * self.exchange_s[a][b] for b, count in enumerate(stage))
                for a, present in enumerate(stage)
                if present
            )
        return self._stages[stage]

    def between_s(self, one: Stage, other: Stage) -> float:
        """The bottleneck of the best pairing of two stages: the least limit under which all devices find a partner."""
        if (one, other) not in self._hops:
            low, high = 0, len(self._limits) - 1
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self._pairs(one, other, self._limits[middle]) else (middle + 1, high)
            self._hops[one, other] = self._hops[other, one] = self._limits[low]
        return self._hops[one, other]

    def _pairs(self, one: Stage, other: Stage, limit: float) -> bool:
        """Whether all devices find a partner within the limit: augmenting paths (Kuhn, 1955) over single devices."""
        theirs = [b for b, count in enumerate(other) for _ in range(count)]
        near = [[k for k, b in enumerate(theirs) if self._worst_s[a][b] <= limit] for a in range(len(one))]
        partner = [-1] * len(theirs)

        def finds(region: int, seen: set[int]) -> bool:
            for k in near[region]:
                if k not in seen:
                    seen.add(k)
                    if partner[k] < 0 or finds(partner[k], seen):
                        partner[k] = region
                        return True
            return False

        return all(finds(a, set()) for a, count in enumerate(one) for _ in range(count))

    def priced(self, stages: Sequence[Stage]) -> Found:
        """The cost of stages in this order."""
        path_s = math.fsum(self.between_s(a, b) for a, b in itertools.pairwise(stages))
        return Found(tuple(stages), max(map(self.stage_s, stages)), 2 * path_s)


def parse(document: dict[str, Any]) -> Document:
    """The cases in a document. Raises CaseError with the JSON path of the first thing wrong."""
    try:
        parsed = Document.model_validate(document)
    except ValidationError as error:
        raise CaseError(first_problem(error)) from None
    places = parsed.job.pipeline_stages * parsed.job.data_parallel
    for number, world in enumerate(parsed.cases):
        devices = sum(count for _, count in world.groups)
        if devices != places:
            raise CaseError(f"$.cases[{number}].groups: {devices} devices, and the job's stages take {places}")
    return parsed


def search(world: World, job: Job, *, rng: Random, stop: Callable[[], bool] = lambda: False) -> Found:
    """Stages and their order by annealing, from devices in the order of the file and from mixed ones."""
    costs = Costs(world, job)
    devices = [region for region, (_, count) in enumerate(world.groups) for _ in range(count)]
    best = costs.priced(_stages(devices, job, len(world.groups)))
    for start in range(STARTS):
        if start % 2:
            # One device of each region after the other: every stage as mixed as can be.
            mixed = [(place, region) for region, (_, n) in enumerate(world.groups) for place in range(n)]
            devices = [region for _, region in sorted(mixed)]
        else:
            devices = [region for region, (_, count) in enumerate(world.groups) for _ in range(count)]
        found = _annealed(costs, _stages(devices, job, len(world.groups)), rng, stop)
        best = min(best, found, key=lambda f: f.total_s)
    return best


def _stages(devices: Sequence[int], job: Job, regions: int) -> list[Stage]:
    size = job.data_parallel
    rows = [devices[k * size : (k + 1) * size] for k in range(job.pipeline_stages)]
    return [tuple(row.count(region) for region in range(regions)) for row in rows]


def _annealed(costs: Costs, stages: list[Stage], rng: Random, stop: Callable[[], bool]) -> Found:
    here = best = costs.priced(stages)
    for step in range(STEPS):
        if step % 64 == 0 and stop():
            break
        there = costs.priced(_neighbour(here.stages, rng))
        temperature = HOT_S * (COLD_S / HOT_S) ** (step / STEPS)
        if there.total_s - here.total_s <= -temperature * math.log(1.0 - rng.random()):
            here = there
            best = min(best, here, key=lambda f: f.total_s)
    return best


def _neighbour(stages: Sequence[Stage], rng: Random) -> list[Stage]:
    changed = list(stages)
    a, b = rng.sample(range(len(stages)), 2)
    kind = rng.random()
    if kind < 0.15:
        changed[a], changed[b] = changed[b], changed[a]
    elif kind < 0.3:
        low, high = sorted((a, b))
        changed[low : high + 1] = reversed(changed[low : high + 1])
    else:
        # Devices of two regions change places between two stages: one, or as many as there are.
        ours = rng.choice([r for r, count in enumerate(stages[a]) if count])
        theirs = rng.choice([r for r, count in enumerate(stages[b]) if count])
        number = 1 if kind < 0.8 else min(stages[a][ours], stages[b][theirs])
        for stage, out, into in ((a, ours, theirs), (b, theirs, ours)):
            row = list(changed[stage])
            row[out] -= number
            row[into] += number
            changed[stage] = tuple(row)
    return changed


def devices(world: World, found: Found) -> list[list[int]]:
    """The devices of each stage, by their number in the order of `groups`."""
    first = [sum(count for _, count in world.groups[:region]) for region in range(len(world.groups))]
    stages: list[list[int]] = []
    for stage in found.stages:
        stages.append([first[region] + k for region, count in enumerate(stage) for k in range(count)])
        first = [start + count for start, count in zip(first, stage, strict=True)]
    return stages


def published_s(world: World) -> float | None:
    """The total cost of the published search, where the file has it."""
    cost = world.derived_scheduler_cost_s.get("gcma", {})
    totals = cost.get("cost") if isinstance(cost, dict) else None
    return float(totals[2]) if isinstance(totals, list) and len(totals) == 3 else None
