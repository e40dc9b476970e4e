"""Fronts, further rings, standbys, who gives way, what to relax, and what moves: choices a person can check by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from meshes import MIB, SMOL, TOY, assert_sound, cpu, mesh, site

from topology import Device, Held, NoFeasiblePlan, Plan, RunningJob, Snapshot, partition

ROOMY = 2**30
SIX = {f"{a}-{b}": 10.0 for a, b in ("ab", "ac", "ad", "bc", "bd", "cd")}


def rich(names: str = "abcd", **other: object) -> Snapshot:
    pairs = {pair: ms for pair, ms in SIX.items() if pair[0] in names and pair[2] in names}
    return mesh([site(name, cpu(memory=ROOMY, **other)) for name in names], pairs)


def keys(plan: Plan) -> set[str]:
    return {shard.key for shard in plan.shards}


def test_the_front_holds_the_quickest_and_the_most_productive_plan_and_marks_the_chosen() -> None:
    for objective in ("latency", "throughput", "balanced"):
        plan = partition(rich(), SMOL, {"objective": objective})
        points = [(point.token_ms, -point.tokens_per_s) for point in plan.pareto]
        assert points == sorted(points)
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
        (chosen,) = [point for point in plan.pareto if point.chosen]
        assert chosen.token_ms == plan.predicted.token_ms
        assert chosen.tokens_per_s == plan.predicted.saturated_tokens_per_s
    assert partition(rich(), SMOL, {"objective": "latency"}).pareto[0].chosen
    assert partition(rich(), SMOL, {"objective": "throughput"}).pareto[-1].chosen


def test_the_next_best_plan_and_its_price_are_said() -> None:
    fast = mesh([site("a", cpu(memory=ROOMY, speed=30e9)), site("b", cpu(memory=ROOMY, speed=20e9))], {"a-b": 5})
    plan = partition(fast, SMOL)
    assert plan.alternatives[0].layout == "b/cpu"
    assert plan.alternatives[0].costs.startswith("+3")
    assert any(line.startswith("the next best plan is b/cpu: +3") for line in plan.why)


def test_do_not_distribute_is_said_with_both_speeds() -> None:
    plan = partition(rich(), SMOL, {"objective": "latency"})
    assert plan.strategy == "single"
    assert any(line.startswith("one device on 1 site:") and "ms a token predicted" in line for line in plan.why)
    assert any(line.startswith("the best with a pipeline would be") and "times as long" in line for line in plan.why)


def test_the_bottleneck_and_the_bound_are_said_with_figures() -> None:
    plan = partition(rich(), SMOL, {"objective": "throughput"})
    (line,) = [line for line in plan.why if line.startswith("the bottleneck")]
    assert "ms between tokens" in line
    assert any(line.startswith("no plan on these devices takes less than") for line in plan.why)
    single = partition(rich(), SMOL)
    assert any(line.startswith("the bottleneck is a/cpu by its own speed") for line in single.why)


def test_requests_in_flight_fill_the_ring() -> None:
    plan = partition(rich(), SMOL, {"stages": 4})
    slowest_ms = 1e3 / plan.predicted.saturated_tokens_per_s
    assert (plan.in_flight - 1) * slowest_ms < plan.predicted.token_ms <= plan.in_flight * slowest_ms * (1 + 1e-6)
    assert partition(rich(), SMOL).in_flight == 1


def test_no_replicas_and_no_standbys_unless_asked_for() -> None:
    for objective in ("latency", "throughput", "balanced", "cost", "first_token", None):
        plan = partition(rich(), SMOL, {"objective": objective})
        assert (plan.replicas, plan.standbys, plan.share) == ((), (), 1.0)


def test_replicas_share_the_requests_by_their_rates() -> None:
    devices = {"a": 15e9, "b": 30e9, "c": 15e9}
    sites = [site(name, cpu(memory=ROOMY, speed=speed)) for name, speed in devices.items()]
    snapshot = mesh(sites, {"a-b": 150, "b-c": 150, "a-c": 150})
    plan = partition(snapshot, SMOL, {"replicas": 3})
    assert plan.share + sum(replica.share for replica in plan.replicas) == pytest.approx(1.0)
    assert plan.ring == ("b",)
    assert [replica.ring for replica in plan.replicas] == [("a",), ("c",)]
    assert plan.share > plan.replicas[0].share
    one = partition(snapshot, SMOL, {"objective": "throughput"})
    many = partition(snapshot, SMOL, {"objective": "throughput", "replicas": "auto"})
    assert many.predicted.saturated_tokens_per_s >= one.predicted.saturated_tokens_per_s
    assert len(many.memory_bytes) == 3
    assert Plan.from_dict(many.to_dict()) == many
    with pytest.raises(NoFeasiblePlan, match="replicas"):
        partition(snapshot, SMOL, {"replicas": 4})


def test_rings_that_share_a_link_share_its_bandwidth() -> None:
    sites = [site(name, cpu("c0", 400 * MIB, 90e9), cpu("c1", 400 * MIB, 90e9)) for name in "ab"]
    narrow = mesh(sites, {"a-b": 1.0}, bandwidth=SMOL.activation_bytes * 60.0)
    plan = partition(narrow, SMOL, {"replicas": 2, "shards": 1, "stages": 2, "objective": "throughput"})
    crossing = [ring for ring in (plan.ring, *(r.ring for r in plan.replicas)) if len(set(ring)) > 1]
    if len(crossing) == 2:
        assert plan.predicted.saturated_tokens_per_s <= 60.0 * (1 + 1e-6)
    wide = partition(mesh(sites, {"a-b": 1.0}), SMOL, {"replicas": 2, "shards": 1, "stages": 2})
    assert wide.predicted.saturated_tokens_per_s > 60.0


def test_replicas_hold_the_caches_of_more_requests_than_one_ring_could() -> None:
    asked = {"concurrency": 8, "context": 2048}
    with pytest.raises(NoFeasiblePlan):
        partition(rich(), SMOL, {**asked, "max_sites": 1})
    several = partition(rich(), SMOL, {**asked, "replicas": "auto"})
    assert several.concurrency * (1 + len(several.replicas)) >= 8


def test_a_loss_in_one_ring_is_made_good_in_that_ring() -> None:
    """The others recover by themselves: their devices are not free, and no ring is planned for them again."""
    asked = {"replicas": 2, "concurrency": 2, "objective": "balanced"}
    plan = partition(rich(), SMOL, asked)
    (replica,) = plan.replicas
    taken = {shard.key: shard.memory_bytes for stage in replica.stages for shard in stage.shards}
    left = rich().without({plan.stages[0].lead.site})
    sites = tuple(
        replace(
            s,
            devices=tuple(replace(d, free_bytes=d.free_bytes - taken.get(f"{s.name}/{d.name}", 0)) for d in s.devices),
        )
        for s in left.sites
    )
    again = partition(replace(left, sites=sites), SMOL, asked, previous=plan)
    assert again.replicas == ()
    assert (again.share, again.concurrency) == (plan.share, plan.concurrency)


def test_standbys_are_elsewhere_and_cover_what_is_longest_to_load() -> None:
    snapshot = mesh([site(name) for name in "abcd"], SIX)
    plan = partition(snapshot, SMOL, {"standbys": 1})
    (standby,) = plan.standbys
    assert standby.key not in keys(plan)
    covered = plan.stages[standby.stage].shards[standby.rank]
    assert standby.memory_bytes == covered.memory_bytes == max(shard.memory_bytes for shard in plan.shards)
    assert plan.memory_bytes[standby.key] == standby.memory_bytes
    with pytest.raises(NoFeasiblePlan, match="possible with standbys=2"):
        partition(snapshot, SMOL, {"standbys": 3})


def test_a_standby_takes_over_what_it_stands_by_for() -> None:
    sites = [site(name) for name in "abcd"] + [site("e")]
    pairs = {**SIX, "a-e": 10.0, "b-e": 10.0, "c-e": 10.0, "d-e": 10.0}
    snapshot = mesh(sites, pairs)
    plan = partition(snapshot, SMOL, {"standbys": 2})
    for standby in plan.standbys:
        lost = plan.stages[standby.stage].lead
        again = partition(snapshot.without({lost.site}), SMOL, {"standbys": 2}, previous=plan)
        assert again.stages[standby.stage].lead.key == standby.key
        assert any("100% of the layer weights stay" in line for line in again.why)


def test_the_least_important_job_gives_way_and_only_where_nothing_fits() -> None:
    sites = [site(name, cpu(memory=ROOMY, free_bytes=100 * MIB)) for name in "abc"]
    snapshot = mesh(sites, {"a-b": 10, "b-c": 10, "a-c": 10})
    running = [
        RunningJob("important", 5, {"a/cpu": 900 * MIB}),
        RunningJob("small", 1, {"b/cpu": 50 * MIB}),
        RunningJob("middling", 2, {"b/cpu": 900 * MIB}),
        RunningJob("minor", 1, {"c/cpu": 900 * MIB}),
    ]
    plan = partition(snapshot, SMOL, {"priority": 4}, running=running)
    assert plan.displaces == ("minor",)
    assert plan.ring == ("c",)
    assert partition(snapshot, SMOL, {"priority": 4}, running=running[::-1]) == plan
    with pytest.raises(NoFeasiblePlan):
        partition(snapshot, SMOL, {"priority": 1}, running=running)
    assert partition(rich(), SMOL, {"priority": 9}, running=running).displaces == ()


@pytest.mark.parametrize(
    ("asked", "change"),
    [
        ({"max_sites": 1}, "max_sites=2"),
        ({"sites": ["a"]}, "sites=a,b"),
        ({"exclude_sites": ["b", "c", "d"]}, "exclude_sites=c,d"),
        ({"regions": ["eu"]}, "regions=eu,us"),
        ({"exclude_regions": ["us", "e?"]}, "exclude_regions=us"),
        ({"max_token_latency_ms": 5}, "max_token_latency_ms="),
        ({"min_tokens_per_s": 5000}, "min_tokens_per_s="),
        ({"max_first_token_ms": 1}, "max_first_token_ms="),
        ({"concurrency": 500, "context": 512}, "concurrency="),
        ({"stages": 5, "shards": 1}, "no stages and shards"),
        ({"max_price_per_hour": 0.5}, "max_price_per_hour=2"),
        ({"max_sites": 1, "max_token_latency_ms": 5}, "max_token_latency_ms=55.1 and max_sites=2"),
        ({"vendors": ["rare"], "context": 2048}, "vendors=rare,test"),
    ],
)
def test_the_smallest_relaxation_is_named_and_works(asked: dict[str, object], change: str) -> None:
    regions = {"a": "eu", "b": "eu", "c": "us", "d": "us"}
    sites = [site(name, cpu(price_per_hour=1.0), region=region) for name, region in regions.items()]
    sites[0] = replace(sites[0], devices=(*sites[0].devices, replace(cpu("odd", 20 * MIB), vendor="rare")))
    if "regions" in asked:
        sites = [replace(each, region="us" if each.name != "a" else "eu") for each in sites]
    if "exclude_regions" in asked:
        sites = [replace(each, region="us" if each.name == "a" else "eu") for each in sites]
    snapshot = mesh(sites, SIX)
    with pytest.raises(NoFeasiblePlan) as refusal:
        partition(snapshot, SMOL, asked)
    assert f"{change}" in str(refusal.value)
    for relaxation in refusal.value.relaxations:
        partition(snapshot, SMOL, {**asked, **relaxation.constraints})


def test_latencies_that_drift_by_a_tenth_move_nothing() -> None:
    names = "abcd"
    pairs = {"a-b": 20.0, "a-c": 21.0, "a-d": 22.0, "b-c": 20.5, "b-d": 21.5, "c-d": 20.2}
    for asked in ({}, {"objective": "latency"}, {"objective": "balanced"}):
        plan = partition(mesh([site(name) for name in names], pairs), SMOL, asked)
        for seed in range(8):
            drift = {p: ms * (1.1 if (seed >> i % 3) & 1 else 0.9) for i, (p, ms) in enumerate(sorted(pairs.items()))}
            again = partition(mesh([site(name) for name in names], drift), SMOL, asked, previous=plan)
            assert again.stages == plan.stages


def test_weights_that_would_take_long_to_move_hold_a_plan_longer() -> None:
    pairs = {"a-b": 20.0}

    def at(speed: float, bandwidth: float, previous: Plan | None) -> Plan:
        sites = [site("a", cpu(memory=ROOMY)), site("b", cpu(memory=ROOMY, speed=speed))]
        return partition(mesh(sites, pairs, bandwidth=bandwidth), SMOL, {"objective": "latency"}, previous=previous)

    first = at(10e9, 125e6, None)
    assert first.ring == ("a",)
    assert at(22e9, 125e6, first).ring == ("b",)
    assert at(22e9, 1e6, first).ring == ("a",)


def test_of_equal_plans_the_one_whose_weights_are_there_is_taken() -> None:
    held = Held("smol", "float32", 0, 30, (0, 3), (0, 1536))
    snapshot = mesh([site("a", cpu(memory=ROOMY)), site("b", cpu(memory=ROOMY, held=(held,)))], {"a-b": 10})
    plan = partition(snapshot, SMOL)
    assert plan.ring == ("b",)
    assert any("of its weights lie there already" in line for line in plan.why)
    other = mesh(
        [site("a", cpu(memory=ROOMY)), site("b", cpu(memory=ROOMY, held=(replace(held, model="x"),)))], {"a-b": 1}
    )
    assert partition(other, SMOL).ring == ("a",)


def test_the_least_costly_plan_counts_its_price_per_token() -> None:
    def priced(name: str, speed: float, price: float) -> Device:
        return cpu(name, ROOMY, speed, price_per_hour=price)

    snapshot = Snapshot((site("x", priced("dear", 40e9, 4.0), priced("fair", 20e9, 1.0)),), ())
    plan = partition(snapshot, SMOL, {"objective": "cost"})
    assert [shard.device for shard in plan.shards] == ["fair"]
    assert any(line.startswith("it costs 1 an hour") for line in plan.why)


def test_a_plan_with_everything_is_sound() -> None:
    snapshot = rich()
    plan = partition(snapshot, TOY, {"replicas": 2, "standbys": 1, "concurrency": 4, "objective": "balanced"})
    assert_sound(plan, snapshot)
    assert len(plan.replicas) == 1
    used = [shard.key for shard in plan.shards]
    used += [shard.key for replica in plan.replicas for stage in replica.stages for shard in stage.shards]
    used += [standby.key for standby in plan.standbys]
    assert len(used) == len(set(used))


def test_one_device_serves_both_ends_of_a_private_ring() -> None:
    here, there = site("here", cpu("only", 320 * MIB)), site("there", cpu(memory=2 * ROOMY, speed=90e9))
    snapshot = mesh([here, there], {"here-there": 20})
    plan = partition(snapshot, SMOL, {"private": True}, origin="here")
    assert plan.ring == ("here", "there", "here")
    assert keys(plan) == {"here/only", "there/cpu", "here/only#1"}
    assert plan.memory_bytes["here/only"] <= 320 * MIB
    assert any("the first and the last stage share devices" in line for line in plan.why)
    again = partition(snapshot.with_freed(plan.memory_bytes), SMOL, {"private": True}, origin="here", previous=plan)
    assert again.stages == plan.stages


def test_hidden_states_are_coded_where_bandwidth_is_the_limit_and_codes_are_allowed() -> None:
    sites = [site(name, cpu(memory=480 * MIB)) for name in "ab"]
    thin, wide = (mesh(sites, {"a-b": 20.0}, bandwidth=rate) for rate in (2e6, 1e9))
    plain, coded = (partition(thin, SMOL, asked) for asked in ({}, {"codes": ["fp8", "int8"]}))
    assert [stage.code for stage in plain.stages] == ["", ""]
    assert [stage.code for stage in coded.stages] == ["int8", ""]
    saved_ms = 512 * (SMOL.activation_bytes - SMOL.hidden * (1 + 4 / 128)) / 2e6 * 1e3
    assert plain.predicted.first_token_ms - coded.predicted.first_token_ms == pytest.approx(saved_ms)
    assert any("leave a/cpu as int8" in line or "leave b/cpu as int8" in line for line in coded.why)
    assert Plan.from_dict(coded.to_dict()) == coded
    assert all(stage.code == "" for stage in partition(wide, SMOL, {"codes": ["fp8"]}).stages)


def test_rings_leave_room_for_the_standbys_that_are_asked_for() -> None:
    snapshot = mesh([site(name) for name in "abcd"], SIX)
    for replicas in (1, "auto"):
        plan = partition(snapshot, SMOL, {"objective": "throughput", "standbys": 1, "replicas": replicas})
        assert len(plan.standbys) == 1
        assert len(plan.memory_bytes) == 4
    with pytest.raises(NoFeasiblePlan, match="standbys: needs 4 devices") as refusal:
        partition(snapshot, SMOL, {"standbys": 4, "replicas": "auto"})
    assert all(shortfall.missing > 0 for shortfall in refusal.value.shortfalls)
