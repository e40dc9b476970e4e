"""Planning again: what is loaded stays where it is unless that costs more than a tenth."""

from __future__ import annotations

from meshes import MIB, SMOL, assert_sound, cpu, mesh, site

from topology import Plan, Snapshot, partition

ROOMY = 2**30
FOUR = {"a-b": 20.0, "b-c": 20.0, "c-d": 20.0, "a-d": 20.0, "a-c": 20.0, "b-d": 20.0}


def spans(plan: Plan) -> list[tuple[str, int, int]]:
    return [(stage.lead.key, stage.start, stage.end) for stage in plan.stages]


def without(snapshot: Snapshot, name: str) -> Snapshot:
    return Snapshot(
        tuple(each for each in snapshot.sites if each.name != name),
        tuple(link for link in snapshot.links if name not in (link.source, link.target)),
    )


def test_a_plan_is_its_own_successor_on_an_unchanged_mesh() -> None:
    snapshot = mesh([site(name) for name in "abcd"], FOUR)
    plan = partition(snapshot, SMOL)
    assert partition(snapshot, SMOL, previous=plan).stages == plan.stages


def test_a_slightly_better_plan_does_not_move_anything() -> None:
    before = mesh([site(name) for name in "abc"], {"a-b": 20, "b-c": 20, "a-c": 20})
    plan = partition(before, SMOL)
    after = mesh([site("a", cpu(speed=16e9)), site("b"), site("c")], {"a-b": 20, "b-c": 20, "a-c": 20})
    again = partition(after, SMOL, previous=plan)
    assert again.stages == plan.stages
    assert any("100% of the layer weights stay" in line for line in again.why)


def test_a_much_better_plan_is_taken() -> None:
    before = mesh([site(name) for name in "abc"], {"a-b": 20, "b-c": 20, "a-c": 20})
    plan = partition(before, SMOL)
    after = mesh([site("a", cpu(memory=ROOMY)), site("b"), site("c")], {"a-b": 20, "b-c": 20, "a-c": 20})
    assert partition(after, SMOL, previous=plan).ring == ("a",)


def test_a_spare_site_takes_the_lost_span_and_nothing_else_moves() -> None:
    snapshot = mesh([site(name) for name in "abcd"], FOUR)
    plan = partition(snapshot, SMOL)
    lost = plan.ring[1]
    again = partition(without(snapshot, lost), SMOL, previous=plan)
    spare = ({"a", "b", "c", "d"} - set(plan.ring)).pop()
    expected = [(f"{spare}/cpu" if key == f"{lost}/cpu" else key, start, end) for key, start, end in spans(plan)]
    assert spans(again) == expected


def test_neighbours_stretch_over_a_lost_span_where_no_site_is_spare() -> None:
    snapshot = mesh([site(name) for name in "abc"], {"a-b": 20, "b-c": 20, "a-c": 20})
    plan = partition(snapshot, SMOL)
    again = partition(without(snapshot, plan.ring[1]), SMOL, previous=plan)
    held = {key: (start, end) for key, start, end in spans(plan)}
    for key, start, end in spans(again):
        old_start, old_end = held[key]
        assert start <= old_start
        assert old_end <= end


def test_what_the_job_gives_back_can_hold_it_again() -> None:
    snapshot = mesh([site(name, cpu(memory=430 * MIB)) for name in "abc"], {"a-b": 20, "b-c": 20, "a-c": 20})
    plan = partition(snapshot, SMOL)
    held = {shard.key: shard.memory_bytes for stage in plan.stages for shard in stage.shards}
    running = mesh(
        [site(n, cpu(memory=430 * MIB, free_bytes=430 * MIB - held[f"{n}/cpu"])) for n in "abc"],
        {"a-b": 20, "b-c": 20, "a-c": 20},
    )
    assert partition(running.with_freed(held), SMOL, previous=plan).stages == plan.stages


def test_a_named_site_that_is_gone_is_a_loss_and_not_a_misspelling() -> None:
    snapshot = mesh([site(name) for name in "abc"], {"a-b": 20, "b-c": 20, "a-c": 20})
    asked = {"sites": ["a", "b", "c"]}
    plan = partition(snapshot, SMOL, asked)
    assert partition(without(snapshot, "c"), SMOL, asked, previous=plan).sites == ("a", "b")


def test_a_forced_shape_that_a_loss_made_impossible_is_dropped_and_said() -> None:
    snapshot = mesh([site(name, cpu(memory=ROOMY)) for name in "abc"], {"a-b": 20, "b-c": 20, "a-c": 20})
    plan = partition(snapshot, SMOL, {"stages": 3})
    again = partition(without(snapshot, "b"), SMOL, {"stages": 3}, previous=plan)
    assert len(again.stages) < 3
    assert any("stages=3" in line and "no longer possible" in line for line in again.why)


def test_a_shard_lost_from_an_island_leaves_its_span_with_the_rest() -> None:
    devices = [cpu(f"c{i}", ROOMY) for i in range(3)]
    plan = partition(Snapshot((site("x", *devices),), ()), SMOL, strategy="tensor_parallelism")
    assert len(plan.stages[0].shards) == 3
    left = Snapshot((site("x", *devices[1:]),), ())
    again = partition(left, SMOL, strategy="tensor_parallelism", previous=plan)
    assert [shard.device for shard in again.stages[0].shards] == ["c1", "c2"]
    assert_sound(again, left)
