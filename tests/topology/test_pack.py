"""Rings for throughput on large meshes: close to a bound that holds for every plan, over as many rings as pay."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import SMOL, assert_sound, cpu
from meshes import mesh as small_mesh
from meshes import site as small_site

from benchmarks.planner import mesh, model
from topology import Constraints, ModelSpec, NoFeasiblePlan, Plan, Snapshot, partition
from topology.bounds import bounds
from topology.candidate import Assembler
from topology.pack import Packer
from topology.picture import look

THROUGHPUT = Constraints(objective="throughput", context=2048)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return mesh(24, 4, 1)


def packer(snapshot: Snapshot, spec: ModelSpec) -> Packer:
    return Packer(Assembler(look(snapshot, spec, THROUGHPUT), spec, 2048, THROUGHPUT))


@pytest.mark.parametrize("needs", [1, 4])
def test_one_ring_is_within_a_third_of_what_any_ring_could_give(snapshot: Snapshot, needs: int) -> None:
    spec = model(snapshot, needs)
    plan = partition(snapshot, spec, {"objective": "throughput", "context": 2048, "replicas": 1})
    assert_sound(plan, snapshot)
    assert plan.replicas == ()
    best = bounds(look(snapshot, spec, THROUGHPUT), spec, 2048)
    assert best.ring_rate / 1.5 <= plan.predicted.saturated_tokens_per_s <= best.ring_rate


def test_several_rings_are_taken_where_one_leaves_the_mesh_idle_and_only_for_throughput(snapshot: Snapshot) -> None:
    spec = model(snapshot, 1)
    one = partition(snapshot, spec, {"objective": "throughput", "context": 2048, "replicas": 1})
    plan = partition(snapshot, spec, {"objective": "throughput", "context": 2048})
    assert plan.replicas
    assert plan.predicted.saturated_tokens_per_s >= 1.25 * one.predicted.saturated_tokens_per_s
    assert plan.share + sum(replica.share for replica in plan.replicas) == pytest.approx(1.0)
    assert any(line.startswith("one ring would give") and "replicas=1" in line for line in plan.why)
    rings = [plan.stages, *(replica.stages for replica in plan.replicas)]
    held = [shard.key for stages in rings for stage in stages for shard in stage.shards]
    assert len(set(held)) == len(held)
    best = bounds(look(snapshot, spec, THROUGHPUT), spec, 2048)
    assert best.rate / 1.5 <= plan.predicted.saturated_tokens_per_s <= best.rate
    for objective in ("latency", "cost", "balanced"):
        assert partition(snapshot, spec, {"objective": objective, "context": 2048}).replicas == ()
    assert Plan.from_dict(plan.to_dict()) == plan


def test_asked_for_rings_are_laid_out_on_disjoint_sites(snapshot: Snapshot) -> None:
    plan = partition(snapshot, model(snapshot, 1), {"objective": "throughput", "context": 2048, "replicas": 4})
    assert len(plan.replicas) == 3
    sites = [{s.site for stage in ring.stages for s in stage.shards} for ring in (plan, *plan.replicas)]
    assert not any(a & b for a, b in itertools.combinations(sites, 2))


def test_a_ring_keeps_to_links_that_carry_its_pace(snapshot: Snapshot) -> None:
    """Half of the sites are behind links so narrow that a ring through them would be slower than one without."""
    spec = model(snapshot, 1)
    behind = {site.name for site in snapshot.sites[::2]}
    links = tuple(
        replace(link, bandwidth=1e4 if (link.source in behind) != (link.target in behind) else link.bandwidth)
        for link in snapshot.links
    )
    ring = packer(replace(snapshot, links=links), spec).ring()
    assert ring is not None
    assert ring.sites <= behind or not ring.sites & behind
    assert ring.rate > 1e4 / spec.activation_bytes


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([2e9, 5e9, 30e9]), st.integers(150, 900)), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([0.1, 3.0, 60.0]),
)
def test_no_plan_gives_more_than_the_bounds_say(sites: list[list[tuple[float, int]]], rtt_ms: float) -> None:
    named = [
        small_site(name, *(cpu(f"c{i}", mib * 2**20, speed) for i, (speed, mib) in enumerate(held)))
        for name, held in zip("abc", sites, strict=False)
    ]
    names = [each.name for each in named]
    snapshot = small_mesh(named, {f"{a}-{b}": rtt_ms for a, b in itertools.combinations(names, 2)})
    for asked in (
        {"objective": "throughput"},
        {"objective": "latency"},
        {"objective": "throughput", "replicas": "auto"},
    ):
        try:
            plan = partition(snapshot, SMOL, asked)
        except NoFeasiblePlan:
            continue
        best = bounds(look(snapshot, SMOL, Constraints(), reserve=False), SMOL, plan.context)
        most = best.rate if plan.replicas else best.ring_rate
        assert plan.predicted.saturated_tokens_per_s <= most * (1 + 1e-6)
        assert plan.predicted.token_ms / 1e3 >= best.token_s * (1 - 1e-6)
