"""Further rings of one job: each a coordinator of its own that recovers by itself; requests go to all of them.

A replica is a job inside the job, under a name of its own, so that its epochs, workers and channels are apart from
those of its siblings. It begins with the ring that the job's plan laid out for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import trio

from mesh.jobs.job import Job
from topology.plan import Plan, Replica

if TYPE_CHECKING:
    from mesh.jobs.serving import Serving

#: How long a replica may take to give back its memory when its job needs it.
YIELD_S = 5.0


class Ring(Protocol):
    """What is needed of a coordinator."""

    job: Job
    serving: Serving

    def cancel(self) -> None: ...
    def site_left(self, site: str) -> None: ...
    async def run(self) -> None: ...


class Replicas:
    """The rings of `job` beside its own. `make(job, plan)` gives the coordinator of one, `spawn` runs it."""

    def __init__(self, job: Job, make: Callable[[Job, Plan], Ring], spawn: Callable[..., None]) -> None:
        self._job = job
        self._make = make
        self._spawn = spawn
        self._rings: list[tuple[float, Ring]] = []
        self._started = 0

    def __iter__(self) -> Iterator[Ring]:
        return (ring for _, ring in self._rings)

    def start(self, plan: Plan) -> None:
        """Begin every replica of the job's first plan."""
        wishes = {key: value for key, value in self._job.constraints.items() if key not in ("replicas", "standbys")}
        for replica in plan.replicas:
            self._started += 1
            name = f"{self._job.id}-r{self._started}"
            job = Job(name, self._job.model, self._job.strategy, wishes, self._job.owner)
            ring = self._make(job, _alone(plan, replica))
            self._rings.append((replica.share, ring))
            self._spawn(ring.run)

    def choose(self, own: Serving, share: float) -> Serving:
        """Where the next request goes: the ring with the fewest live requests for its share."""
        ready = [(part, ring.serving) for part, ring in self._rings if ring.job.state == "ready"]
        return min([(share, own), *ready], key=lambda each: (len(each[1].live) + 1) / max(each[0], 1e-9))[1]

    async def give_way(self) -> bool:
        """End the youngest replica, so that its devices can take the place of what was lost. False: there is none."""
        if not self._rings:
            return False
        _, ring = self._rings.pop()
        ring.cancel()
        with trio.move_on_after(YIELD_S):
            while not ring.job.ended:
                await ring.job.changed()
        return True

    def cancel(self) -> None:
        """End all of them."""
        for _, ring in self._rings:
            ring.cancel()


def _alone(plan: Plan, replica: Replica) -> Plan:
    """A replica's ring as a plan of its own."""
    predicted = replace(plan.predicted, token_ms=replica.token_ms, saturated_tokens_per_s=replica.tokens_per_s)
    why = (f"a further ring of the model: it takes {replica.share:.0%} of the requests",)
    return replace(
        plan, stages=replica.stages, predicted=predicted, why=why, standbys=(), replicas=(), pareto=(), alternatives=()
    )
