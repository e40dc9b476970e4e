"""How long a plan takes on a large mesh, and planning again after the loss of a site.

    python -m benchmarks.planner [--sites 100] [--devices 10] [--seed 0] [--objective NAME]... [--needs N]... [--json]

Sites lie on a sphere, in regions; round trips are those of light in fibre along detours, plus a last mile. Devices are
of four kinds, of one kind a site. The models are as large as the memory of the median 1, 5 and 20 sites. After each
plan the first site of its ring is lost, and the job is planned again with what it holds given back.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from typing import Any, Final

from benchmarks.command import command
from topology import Constraints, Device, Link, ModelSpec, NoFeasiblePlan, Plan, Site, Snapshot, partition
from topology.constraints import OBJECTIVES

#: Memory in bytes, bfloat16 FLOP/s, bytes/s and price an hour of cards that are rented: 24, 40, 48 and 80 GB.
KINDS: Final = (
    (24e9, 70e12, 0.9e12, 0.4),
    (40e9, 300e12, 1.5e12, 1.1),
    (48e9, 150e12, 0.8e12, 0.7),
    (80e9, 900e12, 3e12, 2.5),
)
#: Light in glass, km/s; and how much longer a cable is than the way on the globe.
FIBRE_KM_S, DETOUR, EARTH_KM = 2.0e5, 1.6, 6371.0
#: Sites' memory that a model takes.
NEEDS: Final = (1, 5, 20)


def mesh(sites: int, devices: int, seed: int) -> Snapshot:
    """A mesh of so many sites with so many devices each."""
    rng = random.Random(seed)
    centres = [(math.asin(rng.uniform(-0.5, 0.9)), rng.uniform(-math.pi, math.pi)) for _ in range(max(sites // 8, 1))]
    places, made = [], []
    for index in range(sites):
        region = rng.randrange(len(centres))
        latitude, longitude = centres[region]
        places.append((latitude + rng.gauss(0, 0.06), longitude + rng.gauss(0, 0.06)))
        memory, flops, bandwidth, price = rng.choice(KINDS)
        held = tuple(
            Device(f"gpu{i}", "cuda", "any", int(memory), int(memory), {"bfloat16": flops}, bandwidth, 0.0, price)
            for i in range(devices)
        )
        made.append(Site(f"s{index:03}", f"r{region}", held, 20e-6, rng.choice([25e9, 200e9])))
    links = []
    for a, left in enumerate(places):
        for b, right in enumerate(places):
            if a != b:
                rtt_s = 2 * DETOUR * _distance_km(left, right) / FIBRE_KM_S + 0.4e-3
                links.append(
                    Link(made[a].name, made[b].name, rtt_s, 0.0, 0.0, 10 ** rng.uniform(7.5, 9.3), directed=True)
                )
    return Snapshot(tuple(made), tuple(links))


def _distance_km(a: tuple[float, float], b: tuple[float, float]) -> float:
    half = math.sin((a[0] - b[0]) / 2) ** 2 + math.cos(a[0]) * math.cos(b[0]) * math.sin((a[1] - b[1]) / 2) ** 2
    return 2 * EARTH_KM * math.asin(min(math.sqrt(half), 1.0))


def model(snapshot: Snapshot, needs: int) -> ModelSpec:
    """A Llama-like model of 120 layers, so wide that it takes nine tenths of `needs` sites of the median memory."""
    rooms = sorted(sum(device.memory_bytes for device in site.devices) for site in snapshot.sites)
    room, layers, step = 0.9 * needs * rooms[len(rooms) // 2], 120, 1024
    hidden = step
    while _shape(needs, layers, hidden + step).layer_bytes * layers < room:
        hidden += step
    return _shape(needs, layers, hidden)


def _shape(needs: int, layers: int, hidden: int) -> ModelSpec:
    heads = hidden // 128
    return ModelSpec(f"for-{needs}", layers, hidden, heads, 8, 128, hidden * 7 // 2, 128256, False, "bfloat16", 8192)


def measure(snapshot: Snapshot, needs: int, objective: str) -> dict[str, Any]:
    """Processor seconds of a plan and of a replan after a loss, for planning has one thread and waits for nothing."""
    spec = model(snapshot, needs)
    asked = Constraints(objective=objective, context=2048)
    row: dict[str, Any] = {
        "objective": objective,
        "needs_sites": needs,
        "gigabytes": round(spec.layers * spec.layer_bytes / 1e9),
    }
    began_s = time.process_time()
    try:
        plan = partition(snapshot, spec, asked)
    except NoFeasiblePlan as error:
        return row | {"plan_s": round(time.process_time() - began_s, 3), "error": str(error)}
    row |= {
        "plan_s": round(time.process_time() - began_s, 3),
        "sites": len(plan.sites),
        "stages": len(plan.stages),
        "rings": 1 + len(plan.replicas),
        "token_ms": plan.predicted.token_ms,
        "tokens_per_s": plan.predicted.saturated_tokens_per_s,
        "first_token_ms": plan.predicted.first_token_ms,
        "front": len(plan.pareto),
        "limits": [line for line in plan.why if "bound" in line or "no plan" in line or "budget" in line],
    }
    lost = plan.ring[0]
    left = _taken(snapshot.without({lost}), plan)
    began_s = time.process_time()
    try:
        again = partition(left, spec, asked, previous=plan)
    except NoFeasiblePlan as error:
        return row | {"replan_s": round(time.process_time() - began_s, 3), "replan_error": str(error)}
    row["replan_s"] = round(time.process_time() - began_s, 3)
    row["replanned_token_ms"] = again.predicted.token_ms
    row["kept"] = len({shard.key for shard in plan.shards} & {shard.key for shard in again.shards}) / max(
        len([shard for shard in plan.shards if shard.site != lost]), 1
    )
    return row


def _taken(snapshot: Snapshot, plan: Plan) -> Snapshot:
    """The snapshot with the memory of the plan's further rings taken: they recover by themselves."""
    held: dict[str, int] = {}
    for shard in (shard for ring in plan.replicas for stage in ring.stages for shard in stage.shards):
        held[shard.key] = held.get(shard.key, 0) + shard.memory_bytes
    return snapshot.with_freed({key: -size for key, size in held.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--devices", type=int, default=10, help="of each site")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objective", action="append", choices=OBJECTIVES, help="may be repeated; default: all")
    parser.add_argument("--needs", action="append", type=int, help="sites that a model takes; default: 1, 5 and 20")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    snapshot = mesh(options.sites, options.devices, options.seed)
    rows = []
    for needs in options.needs or NEEDS:
        for objective in options.objective or OBJECTIVES:
            rows.append(measure(snapshot, needs, objective))
            if not options.json:
                print(json.dumps(rows[-1]), flush=True)
    worst = {key: max((row[key] for row in rows if key in row), default=None) for key in ("plan_s", "replan_s")}
    document = {"sites": options.sites, "devices": options.sites * options.devices, "seed": options.seed, **worst}
    print(json.dumps({**document, "rows": rows} if options.json else document))
    return 0


if __name__ == "__main__":
    command(main)
