"""Who must give way: jobs of lower priority, the fewest and least important of them, and only where nothing fits."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from topology.solve import Request, Solution, solve

#: Sets of jobs tried one by one; where there are more, jobs are let back in from the most important down.
MAX_TRIES: Final = 48
#: Work of one try.
TRY_WORK: Final = 3_000


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that runs now: its priority, and the bytes it holds by `site/device`."""

    id: str
    priority: int = 0
    held_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)


def displace(request: Request, running: Sequence[RunningJob]) -> tuple[Solution, tuple[str, ...]] | None:
    """The solution once some jobs of lower priority are gone, and their ids; None where that does not help."""
    priority = request.constraints.priority
    lower = sorted((job for job in running if job.priority < priority), key=lambda job: (job.priority, job.id))
    if not lower or _without(request, lower) is None:
        return None
    victims = _fewest(request, lower)
    solution, _ = solve(_freed(request, victims))
    return None if solution is None else (solution, tuple(sorted(job.id for job in victims)))


def _fewest(request: Request, lower: Sequence[RunningJob]) -> tuple[RunningJob, ...]:
    """The smallest set that makes room; of equally small ones the one whose most important job matters least."""
    tries = 0
    for size in range(1, len(lower)):
        sets = sorted(
            itertools.islice(itertools.combinations(lower, size), 4096),
            key=lambda jobs: (sorted((job.priority for job in jobs), reverse=True), [job.id for job in jobs]),
        )
        for jobs in sets:
            if tries >= MAX_TRIES:
                return _let_back(request, lower)
            tries += 1
            if _without(request, jobs) is not None:
                return jobs
    return tuple(lower)


def _let_back(request: Request, lower: Sequence[RunningJob]) -> tuple[RunningJob, ...]:
    gone = list(lower)
    for job in reversed(lower):
        fewer = [each for each in gone if each is not job]
        if _without(request, fewer) is not None:
            gone = fewer
    return tuple(gone)


def _without(request: Request, jobs: Sequence[RunningJob]) -> Solution | None:
    return solve(_freed(request, jobs), thorough=False, max_work=TRY_WORK)[0]


def _freed(request: Request, jobs: Sequence[RunningJob]) -> Request:
    held: Counter[str] = Counter()
    for job in jobs:
        held.update(job.held_bytes)
    return replace(request, snapshot=request.snapshot.with_freed(held))
