"""Requests are split over the rings of a job, and a replica gives way where its devices are needed."""

from types import SimpleNamespace

from mesh.jobs.job import Job
from mesh.jobs.replicas import Replicas
from topology.model import ModelSpec
from topology.plan import Plan, Predicted, Replica, Shard, Stage

SPEC = ModelSpec("toy", 6, 64, 4, 2, 16, 128, 128, False, "float32", 256)
STAGES = (Stage(0, 6, (Shard("b", "cpu0", (0, 2), (0, 128), (0, 128), 1000),)),)


def plan(*shares):
    replicas = tuple(Replica(STAGES, share, 10.0, 100.0) for share in shares)
    return Plan(SPEC, "single", 256, STAGES, Predicted(9, 9, 0, 9, 111), ("why",), share=0.5, replicas=replicas)


class Ring:
    def __init__(self, job, ring_plan):
        self.job, self.plan = job, ring_plan
        self.serving = SimpleNamespace(live=())
        self.run = object()

    def cancel(self):
        self.job.update(state="cancelled")

    def site_left(self, site):
        pass


def rings(*shares, ready=True):
    spawned = []
    replicas = Replicas(Job("j", "toy", "auto", {"replicas": 3, "context": 64}, "a"), Ring, spawned.append)
    replicas.start(plan(*shares))
    for ring in replicas:
        ring.job.update(state="ready" if ready else "loading")
    return replicas, spawned


def test_every_replica_runs_its_ring_under_a_name_of_its_own():
    replicas, spawned = rings(0.25, 0.25)
    assert [ring.job.id for ring in replicas] == ["j-r1", "j-r2"]
    assert len(spawned) == 2
    assert all(ring.plan.stages == STAGES and not ring.plan.replicas for ring in replicas)
    assert all(ring.job.constraints == {"context": 64} for ring in replicas)


def test_requests_go_where_the_fewest_are_for_the_share():
    replicas, _ = rings(0.25)
    own = SimpleNamespace(live=(1, 2))
    (ring,) = replicas
    assert replicas.choose(own, 0.75) is own  # three over 0.75 and one over 0.25 are alike: the own ring first
    ring.serving.live = (1,)
    assert replicas.choose(own, 0.75) is own
    own.live = (1, 2, 3, 4, 5, 6)
    assert replicas.choose(own, 0.75) is ring.serving


def test_a_replica_that_is_not_ready_gets_no_request():
    replicas, _ = rings(0.9, ready=False)
    own = SimpleNamespace(live=tuple(range(50)))
    assert replicas.choose(own, 0.1) is own


async def test_replicas_give_way_one_by_one_until_none_is_left():
    replicas, _ = rings(0.25, 0.25)
    first, second = replicas
    assert await replicas.give_way()
    assert (first.job.state, second.job.state) == ("ready", "cancelled")
    assert await replicas.give_way()
    assert not await replicas.give_way()
