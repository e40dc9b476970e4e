"""No plan: every constraint in the way is listed with how much is missing."""

from __future__ import annotations

import pickle

import pytest
from meshes import MIB, SMOL, TOY, cpu, mesh, site

from topology import NoFeasiblePlan, Shortfall, Snapshot, partition

THREE = {"a-b": 20.0, "b-c": 40.0, "a-c": 60.0}
SMALL = mesh([site(name) for name in "abc"], THREE)


def refused(snapshot: Snapshot, asked: dict[str, object], **more: object) -> NoFeasiblePlan:
    with pytest.raises(NoFeasiblePlan) as refusal:
        partition(snapshot, SMOL, asked, **more)
    assert "\n" not in str(refusal.value)
    return refusal.value


def kinds(error: NoFeasiblePlan) -> set[str]:
    return {shortfall.constraint for shortfall in error.shortfalls}


def test_too_little_memory_says_needed_available_and_missing() -> None:
    error = refused(Snapshot((site("a"),), ()), {})
    (memory,) = error.shortfalls
    assert memory.constraint == "memory"
    assert memory.unit == "bytes"
    assert memory.available == 430 * MIB
    assert memory.missing == memory.required - memory.available
    assert "memory: needs 655 MB, 451 MB available, 205 MB missing" in str(error)


def test_a_limit_on_sites_names_the_number_that_would_do() -> None:
    error = refused(SMALL, {"max_sites": 1})
    assert Shortfall("max_sites", 2, 1, 1, "sites") in error.shortfalls
    assert "memory" in kinds(error)


def test_allowed_sites_that_are_too_few_are_named_beside_the_memory() -> None:
    assert kinds(refused(SMALL, {"sites": ["a"]})) == {"memory", "sites"}
    assert kinds(refused(SMALL, {"exclude_sites": ["a", "b"]})) == {"memory", "exclude_sites"}


def test_a_latency_below_the_fastest_plan_names_that_plan_s_latency() -> None:
    error = refused(SMALL, {"max_token_latency_ms": 5})
    (latency,) = error.shortfalls
    assert latency.constraint == "max_token_latency_ms"
    assert latency.required == 5
    assert latency.available == pytest.approx(65, abs=1)
    assert "allows 5 ms, the fastest plan takes 65 ms, 60 ms too many" in str(error)


def test_sites_that_cannot_reach_each_other_are_said() -> None:
    error = refused(mesh([site("a"), site("b")], {"a-b": 10}, reachable=False), {})
    assert kinds(error) == {"reachable links"}


def test_a_shape_that_needs_more_devices_says_how_many() -> None:
    assert Shortfall("stages", 4, 3, 1, "devices") in refused(SMALL, {"stages": 4}).shortfalls
    assert Shortfall("shards", 6, 3, 3, "devices") in refused(SMALL, {"stages": 2, "shards": 3}).shortfalls
    assert Shortfall("shards", 4, 3, 1, "devices") in refused(SMALL, {"shards": 4}).shortfalls
    assert Shortfall("shards", 10, 9, 1, "query heads") in refused(SMALL, {"shards": 10}).shortfalls
    assert Shortfall("stages", 31, 30, 1, "layers") in refused(SMALL, {"stages": 31}).shortfalls


def test_a_context_longer_than_the_model_s_is_refused() -> None:
    assert refused(SMALL, {"context": 9000}).shortfalls == (Shortfall("context", 9000, 8192, 808, "tokens"),)


def test_no_site_at_all_is_refused() -> None:
    assert refused(Snapshot((), ()), {}).shortfalls == (Shortfall("sites", 1, 0, 1, "sites"),)


def test_a_device_left_out_is_named_in_the_refusal() -> None:
    error = refused(Snapshot((site("a", cpu(), cpu("odd", speed=0.0)),), ()), {})
    assert "a/odd left out: memory_bandwidth is 0.0" in str(error)


def test_pieces_too_small_for_whole_layers_are_a_shortfall_too() -> None:
    sites = [site("x", *[cpu(f"c{i}", memory=110_000, reserve=0.0) for i in range(20)])]
    with pytest.raises(NoFeasiblePlan) as refusal:
        partition(Snapshot(tuple(sites), ()), TOY)
    assert refusal.value.shortfalls[0].constraint == "memory"
    assert refusal.value.shortfalls[0].missing > 0


def test_the_error_survives_pickling() -> None:
    error = refused(SMALL, {"max_sites": 1})
    again = pickle.loads(pickle.dumps(error))
    assert (again.shortfalls, str(again)) == (error.shortfalls, str(error))
