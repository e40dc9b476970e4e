"""What dtype each device holds weights in where the user leaves a choice: what pays, never less than was allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from meshes import MIB, SMOL, assert_sound, cpu, mesh, site

from topology import ConstraintError, Constraints, NoFeasiblePlan, Plan, Snapshot, partition
from topology.dtypes import allowed

BF16 = replace(SMOL, dtype="bfloat16")
ROOMY = 2**31
#: A CPU without units for bfloat16, and one with them.
OLD = {"float32": 60e9, "bfloat16": 2e9}
NEW = {"float32": 60e9, "bfloat16": 90e9}


def told(plan: Plan, *words: str) -> bool:
    return any(all(word in line for word in words) for line in plan.why)


def held(plan: Plan) -> list[str]:
    return [shard.dtype or plan.model.dtype for shard in plan.shards]


def test_auto_is_the_checkpoint_s_dtype_and_the_one_that_holds_the_same_numbers() -> None:
    assert allowed("auto", "bfloat16") == ("bfloat16", "float32")
    assert allowed("auto", "float16") == ("float16", "float32")
    assert allowed("auto", "float32") == ("float32",)
    assert allowed(None, "float16") == ("float16",)
    assert allowed("bfloat16", "float32") == ("bfloat16",)
    assert allowed(("bfloat16", "float32"), "bfloat16") == ("bfloat16", "float32")
    assert allowed(("bfloat16", "float32"), "float16") == ("float32", "bfloat16")


def test_a_device_without_units_for_the_checkpoint_s_dtype_holds_a_wider_one_where_it_has_room() -> None:
    snapshot = Snapshot((site("x", cpu(memory=ROOMY, flops=OLD)),), ())
    plan = partition(snapshot, BF16, {"dtype": "auto"})
    assert held(plan) == ["float32"]
    assert plan.model.dtype == "bfloat16"
    assert told(plan, "x/cpu holds its weights in float32", "it would be", "in bfloat16")
    fixed = partition(snapshot, BF16)
    assert held(fixed) == ["bfloat16"]
    assert fixed.predicted.token_ms > 3 * plan.predicted.token_ms
    exact = partition(snapshot, SMOL)
    assert plan.predicted.compute_ms == pytest.approx(exact.predicted.compute_ms, rel=0.02)
    assert exact.shards[0].memory_bytes <= plan.shards[0].memory_bytes <= exact.shards[0].memory_bytes * 1.02


def test_without_room_for_the_wider_dtype_the_device_keeps_the_checkpoint_s() -> None:
    snapshot = Snapshot((site("x", cpu(memory=500 * MIB, flops=OLD)),), ())
    assert held(partition(snapshot, BF16, {"dtype": "auto", "context": 256})) == ["bfloat16"]


def test_a_device_that_is_fast_in_the_checkpoint_s_dtype_holds_that() -> None:
    plan = partition(Snapshot((site("x", cpu(memory=ROOMY, flops=NEW)),), ()), BF16, {"dtype": "auto"})
    assert held(plan) == ["bfloat16"] and plan.shards[0].dtype == ""


def test_stages_on_unlike_devices_hold_unlike_dtypes() -> None:
    """Two sites, each too small alone: the old one reads float32 faster, the new one bfloat16."""
    sites = [site("old", cpu(memory=480 * MIB, flops=OLD)), site("new", cpu(memory=200 * MIB, flops=NEW))]
    asked = {"dtype": "auto", "objective": "latency", "context": 512, "stages": 2}
    plan = partition(mesh(sites, {"old-new": 1.0}), BF16, asked)
    by_site = {shard.site: shard.dtype or plan.model.dtype for shard in plan.shards}
    assert by_site == {"old": "float32", "new": "bfloat16"}
    assert_sound(plan, mesh(sites, {"old-new": 1.0}), reserve=False)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert partition(mesh(sites[::-1], {"old-new": 1.0}), BF16, asked) == plan


def test_a_list_may_lower_the_precision_and_only_where_it_pays() -> None:
    small = Snapshot((site("x", cpu(memory=480 * MIB, flops=NEW)),), ())
    with pytest.raises(NoFeasiblePlan):
        partition(small, SMOL, {"context": 512})
    assert held(partition(small, SMOL, {"context": 512, "dtype": ["float32", "bfloat16"]})) == ["bfloat16"]
    old = Snapshot((site("x", cpu(memory=ROOMY, flops=OLD)),), ())
    assert held(partition(old, SMOL, {"dtype": ["float32", "bfloat16"]})) == ["float32"]
    with pytest.raises(NoFeasiblePlan):
        partition(small, SMOL, {"context": 512, "dtype": "auto"})


def test_a_dtype_that_nobody_measured_is_not_chosen() -> None:
    snapshot = Snapshot((site("x", cpu(memory=ROOMY, flops={"bfloat16": 2e9})),), ())
    assert held(partition(snapshot, BF16, {"dtype": "auto"})) == ["bfloat16"]


def test_more_devices_than_can_be_tried_in_every_way_still_get_what_pays() -> None:
    devices = [cpu(f"c{i}", 460 * MIB, flops=OLD) for i in range(5)]
    snapshot = Snapshot((site("x", *devices, local_rtt_s=1e-5),), ())
    plan = partition(snapshot, BF16, {"dtype": "auto", "objective": "latency", "context": 256})
    assert set(held(plan)) == {"float32"}
    assert plan == partition(snapshot, BF16, {"dtype": "auto", "objective": "latency", "context": 256})


def test_a_running_plan_s_devices_keep_their_dtypes() -> None:
    before = Snapshot((site("x", cpu(memory=ROOMY, flops=OLD)), site("y", cpu(memory=ROOMY, flops=OLD))), ())
    plan = partition(before, BF16, {"dtype": "auto"})
    faster = {"float32": 60e9, "bfloat16": 30e9}
    after = Snapshot((site("x", cpu(memory=ROOMY, flops=faster)), site("y", cpu(memory=ROOMY, flops=OLD))), ())
    assert held(partition(after, BF16, {"dtype": "auto"}, previous=plan)) == ["float32"]


def test_replicas_choose_as_well() -> None:
    sites = [site(name, cpu(memory=ROOMY, flops=OLD)) for name in "ab"]
    plan = partition(mesh(sites, {"a-b": 5.0}), BF16, {"dtype": "auto", "replicas": 2})
    rings = [plan.stages, *(replica.stages for replica in plan.replicas)]
    assert {shard.dtype for stages in rings for stage in stages for shard in stage.shards} == {"float32"}


@pytest.mark.parametrize("bad", ["int8", [], ["float32", "int8"], 4, ["auto"]])
def test_a_wrong_dtype_is_refused(bad: object) -> None:
    with pytest.raises(ConstraintError, match="dtype must be one of"):
        Constraints.parse({"dtype": bad})


def test_a_list_of_one_is_that_one_and_documents_round_trip() -> None:
    assert Constraints.parse({"dtype": ["bfloat16"]}).dtype == "bfloat16"
    several = Constraints.parse({"dtype": ["float32", "bfloat16", "float32"]})
    assert several.dtype == ("bfloat16", "float32")
    assert Constraints.parse(several.to_dict()) == several
