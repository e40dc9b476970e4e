"""The plans of the honesty benchmark can all be made, are all different, and are what their names say."""

from __future__ import annotations

from benchmarks.honesty import WORLDS, Case, World
from topology import Device, Link, ModelSpec, Plan, Site, Snapshot, partition

SMOL = ModelSpec("smol", 30, 576, 9, 3, 64, 1536, 49152, True, "float32", 8192)


def _plan(world: World, case: Case) -> Plan:
    sites = [
        Site(
            name,
            "",
            tuple(
                Device(
                    f"cpu{i}", "cpu", "amd", size * 2**20, size * 2**20, {"float32": 9e10, "bfloat16": 2e11}, 17e9, 0.0
                )
                for i, size in enumerate(sizes)
            ),
        )
        for name, sizes in world.memory.items()
    ]
    pairs = zip((("a", "b"), ("a", "c"), ("b", "c")), world.rtts_ms, strict=True)
    links = [Link(s, t, rtt / 1e3) for (a, b), rtt in pairs for s, t in ((a, b), (b, a))]
    constraints = {"context": 2 * case.prompt + 64, **case.constraints}
    dtype = str(constraints["dtype"])
    model = ModelSpec(**{**SMOL.to_dict(), "dtype": dtype})
    return partition(Snapshot(tuple(sites), tuple(links)), model, constraints, origin="a")


def test_every_case_has_a_plan_of_the_shape_it_names() -> None:
    plans = [_plan(world, case) for world in WORLDS for case in world.cases]
    asked = [case.constraints["shards"] for world in WORLDS for case in world.cases]
    assert [[len(stage.shards) for stage in plan.stages] for plan in plans] == asked
    assert len({(str(plan.stages), plan.model.dtype, plan.predicted.network_ms) for plan in plans}) >= 16
