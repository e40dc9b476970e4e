"""What may be asked of a plan besides the first set of constraints: each is refused where it is wrong, else obeyed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from meshes import LLAMA_70B, MIB, SMOL, cpu, gpu, mesh, site

from topology import ConstraintError, Constraints, Device, Held, NoFeasiblePlan, Plan, Snapshot, partition

ROOMY = 2**30
THREE = {"a-b": 20.0, "b-c": 40.0, "a-c": 60.0}
WIDE = mesh([site(name, cpu(memory=ROOMY)) for name in "abc"], THREE)


def test_every_key_survives_the_way_through_a_document() -> None:
    asked = {
        "objective": "throughput",
        "max_first_token_ms": 900,
        "min_tokens_per_s": 20,
        "max_price_per_hour": 4,
        "regions": ["eu-*"],
        "exclude_regions": "us-*",
        "vendors": ["nvidia"],
        "trusted_only": True,
        "private": True,
        "needs": "memory_bandwidth",
        "codes": ["fp8"],
        "concurrency": 4,
        "standbys": 1,
        "replicas": "auto",
        "priority": -3,
    }
    constraints = Constraints.parse(asked)
    assert constraints.needs == ("memory-bandwidth",)
    assert constraints.wish == "throughput"
    assert Constraints.parse(json.loads(json.dumps(constraints.to_dict()))) == constraints
    assert set(constraints.to_dict()) == set(asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"objective": "latncy"}, "did you mean 'latency'?"),
        ({"objective": "throughput", "min_latency": "low"}, "ask for different plans"),
        ({"needs": ["matmul-throughputs"]}, "did you mean 'matmul-throughput'?"),
        ({"codes": "fp4"}, "did you mean 'fp8'?"),
        ({"trusted_only": 1}, "trusted_only must be true or false, not 1"),
        ({"private": "yes"}, "private must be true or false, not 'yes'"),
        ({"replicas": 0}, 'replicas must be a whole number of at least 1, or "auto", not 0'),
        ({"standbys": -1}, "standbys must be a whole number of at least 0, not -1"),
        ({"priority": 101}, "priority must be a whole number from -100 to 100, not 101"),
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1"),
        ({"min_tokens_per_s": -1}, "min_tokens_per_s must be a number of tokens a second above 0"),
        ({"max_price_per_hour": "9"}, "max_price_per_hour must be a number of currency units an hour above 0"),
        ({"regions": "eu", "exclude_regions": "eu"}, "region 'eu' stands in regions and in exclude_regions"),
    ],
)
def test_a_wrong_value_is_refused_on_one_line(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ConstraintError) as refusal:
        Constraints.parse(asked)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_objective_is_what_min_latency_stands_for() -> None:
    for latency, objective in (("low", "latency"), ("high", "throughput")):
        plans = [partition(WIDE, SMOL, asked) for asked in ({"min_latency": latency}, {"objective": objective})]
        assert plans[0] == plans[1]
    assert partition(WIDE, SMOL).objective == "fewest_sites"


def test_each_objective_is_best_at_what_it_asks() -> None:
    rich = Device("gpu0", "cuda", "x", ROOMY, ROOMY, {"float32": 5e12}, 90e9, price_per_hour=9.0)
    poor = Device("cpu0", "cpu", "x", ROOMY, ROOMY, {"float32": 9e10}, 30e9, price_per_hour=0.1)
    sites = [site("a", rich), site("b", poor), site("c", replace(poor, name="cpu1", price_per_hour=0.11))]
    snapshot = mesh(sites, {"a-b": 3.0, "b-c": 2.0, "a-c": 4.0})
    wishes = ("latency", "throughput", "first_token", "cost", "balanced")
    plans = {wish: partition(snapshot, SMOL, {"objective": wish}).predicted for wish in wishes}
    assert min(plans.values(), key=lambda p: p.token_ms) == plans["latency"]
    assert max(plans.values(), key=lambda p: p.saturated_tokens_per_s) == plans["throughput"]
    assert min(plans.values(), key=lambda p: p.first_token_ms) == plans["first_token"]
    assert min(plans.values(), key=lambda p: p.price_per_hour / p.saturated_tokens_per_s) == plans["cost"]
    assert min(plans.values(), key=lambda p: p.token_ms / p.saturated_tokens_per_s) == plans["balanced"]
    assert plans["cost"].price_per_hour < 1 < plans["latency"].price_per_hour


def test_limits_on_rate_first_token_and_price_are_kept() -> None:
    rate = 1.5 * partition(WIDE, SMOL).predicted.saturated_tokens_per_s
    assert partition(WIDE, SMOL, {"min_tokens_per_s": rate}).predicted.saturated_tokens_per_s >= rate
    sites = [site("a", cpu(memory=ROOMY, speed=60e9, price_per_hour=5.0)), site("b", cpu(memory=ROOMY))]
    snapshot = mesh(sites, {"a-b": 20})
    assert partition(snapshot, SMOL).sites == ("a",)
    assert partition(snapshot, SMOL, {"max_price_per_hour": 1}).sites == ("b",)


def test_the_price_of_a_site_counts_once() -> None:
    devices = [cpu(f"c{i}", price_per_hour=0.25) for i in range(3)]
    plan = partition(Snapshot((site("x", *devices, price_per_hour=2.0),), ()), SMOL, strategy="pipeline")
    assert plan.predicted.price_per_hour == pytest.approx(2.0 + 0.25 * len(plan.stages))


def test_regions_are_patterns() -> None:
    sites = [site(n, cpu(memory=ROOMY), region=r) for n, r in (("a", "eu-west"), ("b", "eu-north"), ("c", "us-east"))]
    snapshot = mesh(sites, THREE)
    assert partition(snapshot, SMOL, {"regions": "us-*"}).sites == ("c",)
    assert partition(snapshot, SMOL, {"exclude_regions": ["*-west", "us-*"]}).sites == ("b",)
    assert partition(snapshot, SMOL, {"exclude_regions": "ap-*", "sites": "a"}).sites == ("a",)
    with pytest.raises(ConstraintError, match="regions names 'ap-\\*', which matches none"):
        partition(snapshot, SMOL, {"regions": "ap-*"})
    with pytest.raises(ConstraintError, match="exclude_regions names 'us-eats', which is unknown: did you mean 'us-e"):
        partition(snapshot, SMOL, {"exclude_regions": "us-eats"})


def test_vendors_and_trust_choose_devices_and_sites() -> None:
    other = replace(gpu("gpu1"), vendor="Other")
    snapshot = Snapshot((site("x", gpu(), other),), ())
    small = replace(LLAMA_70B, layers=10)
    assert partition(snapshot, small, {"vendors": "other"}).shards[0].device == "gpu1"
    with pytest.raises(ConstraintError, match="vendors names 'othr', which is unknown: did you mean 'Other'"):
        partition(snapshot, small, {"vendors": "othr"})
    doubtful = replace(WIDE, sites=(replace(WIDE.sites[0], trusted=False), *WIDE.sites[1:]))
    assert partition(doubtful, SMOL, {"trusted_only": True}).sites == ("b",)


@pytest.mark.parametrize(
    ("need", "device"),
    [("matmul-throughput", "fast"), ("memory-bandwidth", "wide"), ("memory", "big"), ("low-price", "cheap")],
)
def test_a_need_is_met_by_the_devices_measured_best(need: str, device: str) -> None:
    base = cpu("x", ROOMY, 20e9, price_per_hour=3.0)
    devices = [
        replace(base, name="big", memory_bytes=4 * ROOMY, free_bytes=4 * ROOMY),
        replace(base, name="cheap", price_per_hour=1.0),
        replace(base, name="fast", flops={"float32": 4e12}),
        replace(base, name="wide", memory_bandwidth=90e9),
    ]
    snapshot = Snapshot((site("s", *devices),), ())
    plan = partition(snapshot, SMOL, {"needs": need})
    assert [shard.device for shard in plan.shards] == [device]
    assert any(line.startswith(f"needs {need}: 1 of 4 devices have") for line in plan.why)


def test_low_latency_keeps_far_sites_out() -> None:
    sites = [site(name, cpu(memory=ROOMY, speed=90e9 if name == "c" else 15e9)) for name in "abc"]
    snapshot = mesh(sites, {"a-b": 5.0, "b-c": 80.0, "a-c": 80.0})
    assert partition(snapshot, SMOL).sites == ("c",)
    far = mesh([*sites, site("d", cpu(memory=ROOMY))], {"a-b": 5, "a-d": 6, "b-d": 6, "a-c": 80, "b-c": 80, "c-d": 80})
    assert "c" not in partition(far, SMOL, {"needs": "low-latency"}).sites


def test_concurrency_sizes_the_caches() -> None:
    one, four = (partition(WIDE, SMOL, {"concurrency": n, "context": 512}) for n in (1, 4))
    cache = SMOL.kv_bytes_per_token(SMOL.layers) * 512
    assert sum(s.memory_bytes for s in four.shards) - sum(s.memory_bytes for s in one.shards) == 3 * cache
    assert four.concurrency == 4
    with pytest.raises(NoFeasiblePlan):
        partition(WIDE, SMOL, {"concurrency": 64})


def test_private_pins_both_ends_on_the_submitting_site() -> None:
    here = site("here", cpu("c0", 200 * MIB), cpu("c1", 230 * MIB))
    snapshot = mesh([here, site("there", cpu(memory=2 * ROOMY, speed=90e9))], {"here-there": 20})
    assert partition(snapshot, SMOL).ring == ("there",)
    plan = partition(snapshot, SMOL, {"private": True}, origin="here")
    assert plan.ring == ("here", "there", "here")
    with pytest.raises(ConstraintError, match="give origin"):
        partition(snapshot, SMOL, {"private": True})
    with pytest.raises(ConstraintError, match="origin is 'her', which is unknown: did you mean 'here'"):
        partition(snapshot, SMOL, {"private": True}, origin="her")


def test_a_busy_device_is_passed_over_for_an_idle_one() -> None:
    snapshot = mesh([site("a", cpu(memory=ROOMY, load=0.9)), site("b", cpu(memory=ROOMY, speed=14e9))], {"a-b": 5})
    assert partition(snapshot, SMOL).ring == ("b",)
    odd = mesh([site("a", cpu(memory=ROOMY, load=2.0)), site("b", cpu(memory=ROOMY))], {"a-b": 5})
    assert any("a/cpu left out: load is 2.0" in line for line in partition(odd, SMOL).why)


def test_a_document_of_the_first_version_is_still_read() -> None:
    plan = partition(WIDE, SMOL)
    old = plan.to_dict()
    for name in ("objective", "concurrency", "in_flight", "share", "standbys", "replicas", "pareto", "alternatives"):
        del old[name]
    del old["displaces"], old["predicted"]["price_per_hour"], old["stages"][0]["code"]
    del old["stages"][0]["shards"][0]["dtype"]
    assert Plan.from_dict(old).stages == plan.stages
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict() | {"later": 1}))) == plan
    held = Held("smol", "float32", 0, 3, (0, 3), (0, 1536))
    snapshot = Snapshot((site("x", cpu(held=(held,))),), ())
    assert Snapshot.from_dict(json.loads(json.dumps(snapshot.to_dict()))) == snapshot
