"""The choices a person would check by hand: one device, tensor parallelism, pipeline, reserve, strategies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from meshes import LLAMA_70B, MIB, SMOL, assert_sound, cpu, gpu, mesh, site

from topology import ConstraintError, Device, ModelSpec, Plan, Snapshot, TopologyError, partition

ROOMY = 2**30
THREE = {"a-b": 20.0, "b-c": 40.0, "a-c": 60.0}


def said(plan: object, *words: str) -> bool:
    return any(all(word in line for word in words) for line in plan.why)  # type: ignore[attr-defined]


def test_one_device_that_is_fastest_alone_is_used_alone_and_rivals_are_named_with_their_speeds() -> None:
    snapshot = mesh([site("fast", cpu("cpu", ROOMY, 60e9)), site("slow", cpu("cpu", ROOMY, 10e9))], {"fast-slow": 5})
    plan = partition(snapshot, SMOL)
    assert plan.strategy == "single"
    assert plan.ring == ("fast",)
    assert said(plan, "one device on 1 site", "ms a token predicted")
    assert said(plan, "the best with a pipeline would be", "fast/cpu", "slow/cpu", "times as long")


def test_prima_cpp_s_home_collapses_to_one_device() -> None:
    """Four home machines over Wi-Fi of 3 to 7 ms; an 8B model in 4 bit must land on one (arXiv:2504.08791, table 2).

    The 4-bit weights are stood in for by a bfloat16 model with a quarter of the width.
    """
    model = ModelSpec("8b-q4", 32, 2048, 32, 8, 64, 7168, 64128, False, "bfloat16", 8192)

    def machine(memory_gb: float, bandwidth: float) -> Device:
        return Device("d", "cpu", "x", int(memory_gb * 1e9), int(memory_gb * 1e9), {"bfloat16": 5e12}, bandwidth)

    sites = [
        site("d1", machine(2.4, 60e9)),
        site("d2", machine(8, 380e9)),
        site("d3", machine(11, 560e9)),
        site("d4", machine(1.9, 30e9)),
    ]
    pairs = {"d1-d2": 5, "d1-d3": 5, "d1-d4": 7, "d2-d3": 3, "d2-d4": 6, "d3-d4": 6}
    for strategy in ("auto", "tensor_parallelism", "pipeline"):
        plan = partition(mesh(sites, pairs, bandwidth=40e6), model, strategy=strategy)
        assert plan.strategy == "single"
        assert plan.ring == ("d3",)


def test_three_small_sites_make_a_ring_and_two_take_over_with_the_reserve() -> None:
    snapshot = mesh([site(name) for name in "abc"], THREE)
    plan = partition(snapshot, SMOL, strategy="tensor_parallelism")
    assert plan.strategy == "pipeline"
    assert sorted(plan.ring) == ["a", "b", "c"]
    assert not said(plan, "uses the reserve")
    assert said(plan, "no single device holds the model")
    assert said(plan, "the ring", "60 ms a turn", "the least of all orders")
    left = mesh([site(name) for name in "ab"], {"a-b": 20})
    again = partition(left, SMOL, strategy="tensor_parallelism", previous=plan)
    assert said(again, "uses the reserve: the loss of another site could not be absorbed")
    assert_sound(again, left, reserve=False)


def test_as_few_sites_as_fit_are_used() -> None:
    sites = [site(name, cpu(memory=480 * MIB)) for name in "abc"]
    assert len(partition(mesh(sites, THREE), SMOL).sites) == 2
    assert partition(mesh(sites, THREE), SMOL).sites == ("a", "b")


def test_tensor_parallelism_splits_a_site_with_two_devices_two_groups_to_one() -> None:
    snapshot = Snapshot((site("x", cpu("c0", ROOMY), cpu("c1", ROOMY)),), ())
    plan = partition(snapshot, SMOL, strategy="tensor_parallelism")
    assert plan.strategy == "tensor_parallelism"
    assert [shard.kv_heads for shard in plan.stages[0].shards] == [(0, 2), (2, 3)]
    assert said(plan, "x/c0 2 + x/c1 1", "measured speed", "pays below")
    assert said(plan, "the best with one device would be x/c0")


def test_tensor_parallelism_on_a_slow_local_network_uses_one_device_and_says_so() -> None:
    snapshot = Snapshot((site("x", cpu("c0", ROOMY), cpu("c1", ROOMY), local_rtt_s=5e-3),), ())
    plan = partition(snapshot, SMOL, strategy="tensor_parallelism")
    assert plan.strategy == "single"
    assert said(plan, "x has 2 devices, but x/c0 alone is predicted faster", "tensor parallelism there would take")


def test_tensor_parallelism_takes_all_devices_where_fewer_would_be_a_little_faster() -> None:
    """With 0.25 ms between devices two shards beat three, and three still beat one."""
    devices = [cpu(f"c{i}", ROOMY) for i in range(3)]
    snapshot = Snapshot((site("x", *devices, local_rtt_s=0.35e-3),), ())
    every = partition(snapshot, replace(SMOL, kv_heads=9), strategy="tensor_parallelism")
    assert len(every.stages[0].shards) == 3


def test_shares_follow_measured_speed_and_the_fastest_leads() -> None:
    snapshot = Snapshot((site("x", gpu("g0", speed=1e12), gpu("g1", speed=3e12)),), ())
    model = replace(LLAMA_70B, layers=20)
    plan = partition(snapshot, model, strategy="tensor_parallelism")
    lead, other = plan.stages[0].shards
    assert (lead.device, other.device) == ("g1", "g0")
    assert (lead.kv_heads, other.kv_heads) == ((0, 6), (6, 8))
    assert lead.columns == (0, 21504)
    assert lead.vocabulary == (0, 96192)


def test_a_device_too_slow_for_one_group_is_left_out() -> None:
    snapshot = Snapshot((site("x", cpu("c0", ROOMY), cpu("c1", ROOMY), cpu("old", ROOMY, 1e9)),), ())
    plan = partition(snapshot, SMOL, strategy="tensor_parallelism")
    assert [shard.device for shard in plan.stages[0].shards] == ["c0", "c1"]


def test_shares_follow_memory_where_shares_by_speed_do_not_fit() -> None:
    """The faster device is too small for its share by speed."""
    snapshot = Snapshot((site("x", cpu("big", 700 * MIB, 10e9), cpu("fast", 420 * MIB, 20e9)),), ())
    plan = partition(snapshot, SMOL, {"shards": 2})
    assert_sound(plan, snapshot)
    assert said(plan, "by memory, because shares by speed do not fit")


def test_tensor_parallelism_reaches_across_sites_where_it_pays() -> None:
    """Two racks 0.1 ms apart, 70B: below the 0.43 ms at which two devices of 2 TB/s break even."""
    racks = [site(name, gpu(memory=100 * 10**9)) for name in "ab"]
    near = partition(mesh(racks, {"a-b": 0.1}, bandwidth=10e9), LLAMA_70B)
    assert near.strategy == "tensor_parallelism"
    assert near.sites == ("a", "b")
    far = partition(mesh(racks, {"a-b": 2.0}, bandwidth=10e9), LLAMA_70B)
    assert far.strategy == "pipeline"


def test_a_pair_that_was_not_measured_is_flagged_in_the_reasons() -> None:
    plan = partition(mesh([site(name) for name in "abc"], {"a-b": 20, "b-c": 40}), SMOL)
    assert said(plan, "not measured, a pessimistic guess: a - c")


def test_an_unreachable_pair_is_avoided() -> None:
    sites = [site(name, cpu(memory=480 * MIB)) for name in "abc"]
    cut = mesh(sites, {"a-b": 5}, reachable=False)
    rest = mesh(sites, {"b-c": 40, "a-c": 60})
    plan = partition(Snapshot(tuple(sites), cut.links + rest.links), SMOL)
    assert plan.sites == ("b", "c")


def test_low_crosses_the_wide_area_for_faster_devices_and_medium_does_not() -> None:
    old = site("old", Device("cpu", "cpu", "x", 400 * 10**9, 400 * 10**9, {"float16": 3e12}, 100e9))
    sites = [old, *[site(name, gpu()) for name in "abc"]]
    pairs = {"old-a": 30, "old-b": 30, "old-c": 30, "a-b": 20, "b-c": 20, "a-c": 20}
    medium = partition(mesh(sites, pairs), LLAMA_70B)
    assert medium.sites == ("old",)
    low = partition(mesh(sites, pairs), LLAMA_70B, {"min_latency": "low"})
    assert low.sites == ("a", "b", "c")
    limited = partition(mesh(sites, pairs), LLAMA_70B, {"max_token_latency_ms": 300})
    assert limited.sites == ("a", "b", "c")


def test_high_takes_more_stages_for_throughput() -> None:
    sites = [site(name, cpu(memory=ROOMY)) for name in "abc"]
    high = partition(mesh(sites, THREE), SMOL, {"min_latency": "high"})
    medium = partition(mesh(sites, THREE), SMOL)
    assert medium.strategy == "single"
    assert high.predicted.saturated_tokens_per_s > 1.9 * medium.predicted.saturated_tokens_per_s


def test_pipeline_inside_a_site_that_no_device_of_it_can_serve_alone() -> None:
    snapshot = Snapshot((site("x", cpu("c0"), cpu("c1"), cpu("c2")),), ())
    plan = partition(snapshot, SMOL, strategy="pipeline")
    assert plan.strategy == "pipeline"
    assert said(plan, "x/c0 -> x/c1")


def test_a_model_with_one_kv_head_is_split_between_its_query_heads() -> None:
    model = replace(SMOL, kv_heads=1)
    snapshot = Snapshot((site("x", cpu("c0"), cpu("c1"), cpu("c2")),), ())
    plan = partition(snapshot, model, strategy="tensor_parallelism")
    assert plan.strategy == "tensor_parallelism"
    assert [shard.heads for shard in plan.shards] == [(0, 3), (3, 6), (6, 9)]
    assert [shard.kv_heads for shard in plan.shards] == [(0, 1)] * 3
    assert_sound(plan, snapshot)
    assert said(plan, "query heads by measured speed: x/c0 3 + x/c1 3 + x/c2 3")
    assert said(plan, "3 devices share 1 KV heads: with 2 copies of a KV head")


def test_more_devices_than_kv_heads_share_the_query_heads_with_the_fewest_copies() -> None:
    """Four of SmolLM2's nine query heads would be 3+2+2+2 with a KV head more to read on two of the devices."""
    snapshot = Snapshot((site("x", *(cpu(f"c{i}", ROOMY) for i in range(4))),), ())
    plan = partition(snapshot, SMOL, {"shards": 4})
    assert [shard.heads for shard in plan.shards] == [(0, 3), (3, 6), (6, 8), (8, 9)]
    assert [shard.kv_heads for shard in plan.shards] == [(0, 1), (1, 2), (2, 3), (2, 3)]
    assert_sound(plan, snapshot)
    assert Plan.from_dict(plan.to_dict()) == plan


def test_unequal_devices_cut_groups_where_that_is_faster() -> None:
    """Speeds of 4, 3 and 2 over two KV heads of four query heads each: the middle device reads both."""
    model = replace(SMOL, heads=8, kv_heads=2)
    snapshot = Snapshot((site("x", *(cpu(f"c{i}", ROOMY, speed * 1e9) for i, speed in enumerate((16, 12, 8)))),), ())
    plan = partition(snapshot, model, {"shards": 3, "context": 64})
    widths = [shard.heads[1] - shard.heads[0] for shard in plan.shards]
    assert widths == sorted(widths, reverse=True) and max(widths) <= 4
    assert_sound(plan, snapshot)


def test_a_plan_that_would_copy_kv_heads_for_nothing_takes_fewer_devices() -> None:
    """At a long context the KV cache is most of what is read: two KV heads are worth sharing, copies of one are not."""
    model = replace(SMOL, heads=2, kv_heads=1, head_dim=288, intermediate=64, context=200_000)
    devices = [cpu(f"c{i}", 2**36) for i in range(2)]
    snapshot = Snapshot((site("x", *devices, local_rtt_s=5e-3),), ())
    asked = {"objective": "latency", "context": 200_000}
    assert partition(snapshot, model, asked).strategy == "single"
    assert partition(snapshot, replace(model, kv_heads=2), asked).strategy == "tensor_parallelism"


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({"shards": 2}, [2]),
        ({"shards": 3}, [3]),
        ({"stages": 2, "shards": 1}, [1, 1]),
        ({"stages": 3}, [1, 1, 1]),
        ({"shards": [2, 1]}, [2, 1]),
        ({"shards": [1, 2]}, [1, 2]),
        ({"stages": 1, "shards": 1}, [1]),
    ],
)
def test_plans_can_be_forced_on_one_machine(asked: dict[str, object], shape: list[int]) -> None:
    snapshot = Snapshot((site("x", *[cpu(f"c{i}", ROOMY) for i in range(3)]),), ())
    plan = partition(snapshot, SMOL, asked)
    assert [len(stage.shards) for stage in plan.stages] == shape
    assert_sound(plan, snapshot)
    assert said(plan, "the shape was forced")


def test_a_forced_width_reaches_across_sites_though_it_does_not_pay() -> None:
    plan = partition(mesh([site(name) for name in "abc"], THREE), SMOL, {"shards": 3})
    assert plan.strategy == "tensor_parallelism"
    assert plan.sites == ("a", "b", "c")


def test_dtype_and_context_are_obeyed() -> None:
    snapshot = Snapshot((site("x", cpu(memory=ROOMY)),), ())
    plan = partition(snapshot, SMOL, {"dtype": "bfloat16", "context": 300})
    assert plan.model.dtype == "bfloat16"
    assert plan.context == 300
    assert partition(snapshot, SMOL).context == 2048
    assert partition(snapshot, replace(SMOL, context=100)).context == 100


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sites": ["berln"]}, "sites names 'berln', which is unknown: did you mean 'berlin'?"),
        ({"exclude_sites": "parris"}, "exclude_sites names 'parris', which is unknown: did you mean 'paris'?"),
        ({"regions": ["eu-wst"]}, "regions names 'eu-wst', which is unknown: did you mean 'eu-west'?"),
    ],
)
def test_an_unknown_place_is_refused_with_the_nearest_name(asked: dict[str, object], message: str) -> None:
    snapshot = mesh([site("berlin", region="eu-west"), site("paris", region="eu-west")], {"berlin-paris": 9})
    with pytest.raises(ConstraintError, match="unknown") as refusal:
        partition(snapshot, SMOL, asked)
    assert str(refusal.value) == message


def test_a_wrong_strategy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConstraintError, match="did you mean 'tensor_parallelism'"):
        partition(Snapshot((site("x"),), ()), SMOL, strategy="tensor_paralelism")
    with pytest.raises(ConstraintError, match="one shard a stage"):
        partition(Snapshot((site("x"),), ()), SMOL, {"shards": 2}, strategy="pipeline")


@pytest.mark.parametrize(
    "change",
    [{"layers": 0}, {"kv_heads": 4}, {"dtype": "int3"}, {"hidden": -1}, {"vocab": 2.5}, {"head_dim": math.nan}],
)
def test_an_impossible_model_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(TopologyError, match="model smol"):
        partition(Snapshot((site("x"),), ()), replace(SMOL, **change))
