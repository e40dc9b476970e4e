"""The planner against exhaustive search on random small meshes.

    python -m benchmarks.exhaustive [--meshes 300] [--seed 0] [--objective latency]... [--json]

Every way to form stages of any of the devices is tried, with every lead, every split of the layers, and every cut of
KV-head groups (of query heads where there are more devices than KV heads), columns and vocabulary in the units that the
planner cuts in, in the order of the shards. Only the cost model is shared with the
planner (`topology.cost`, `topology.picture`); nothing of its search is. Partial plans that are no better than the best
whole one are cut off, which loses nothing: every part of a plan takes time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import operator
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.command import command
from topology import Constraints, Device, Link, ModelSpec, NoFeasiblePlan, Plan, Site, Snapshot, partition
from topology import cost as model_cost
from topology.model import LOGIT_BYTES
from topology.picture import Node, Picture, look
from topology.shares import cut_unit

OBJECTIVES: Final = ("latency", "throughput", "first_token")
#: A plan is as good as the best if its figure is within this: rounding in sums of different orders.
SAME: Final = 1e-9
CONTEXT: Final = 64

Array = npt.NDArray[np.float64]


def mesh(seed: int) -> tuple[Snapshot, ModelSpec]:
    """A mesh of 1 to 4 sites with up to 6 devices in all, and a model that fits on some of it or on none."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3, 4])
    model = ModelSpec(
        name=f"random-{seed}",
        layers=rng.randint(2, 12),
        hidden=rng.choice([64, 128]),
        heads=kv_heads * rng.choice([1, 2, 4]),
        kv_heads=kv_heads,
        head_dim=rng.choice([8, 16]),
        intermediate=rng.choice([32, 48, 64]),
        vocab=rng.choice([40, 64]),
        tied_embeddings=rng.random() < 0.5,
        dtype=rng.choice(["float32", "bfloat16"]),
        context=CONTEXT,
    )
    whole = model_cost.needed_bytes(model, CONTEXT, 1)
    # Speeds at which reading the model once takes 5 to 500 ms, so that links of any length may matter.
    base = whole / 10 ** rng.uniform(-2.3, -0.3)
    counts = [1] * rng.randint(1, 4)
    while sum(counts) < 6 and rng.random() < 0.7:
        counts[rng.randrange(len(counts))] += 1
    room = 10 ** rng.uniform(-0.6, 0.4)
    sites = []
    for name, count in zip("abcd", counts, strict=False):
        devices: list[Device] = []
        for index in range(count):
            memory = int(whole * room * rng.uniform(0.3, 1.2))
            speed = base * 2 ** rng.uniform(-2, 2)
            flops = {model.dtype: speed * 10 ** rng.uniform(0.5, 2.5)}
            if index and rng.random() < 0.4:
                devices.append(Device(**{**_fields(devices[-1]), "name": f"d{index}"}))
            else:
                devices.append(Device(f"d{index}", "cuda", "x", memory, memory, flops, speed, 0.0))
        rtt_s, bandwidth = 10 ** rng.uniform(-5.0, -3.0), 10 ** rng.uniform(8, 11)
        sites.append(Site(name, "", tuple(devices), rtt_s, bandwidth))
    links = []
    for a, b in itertools.permutations([site.name for site in sites], 2):
        figures = (10 ** rng.uniform(-4, -0.7), 0.0, 0.0, 10 ** rng.uniform(6, 10))
        links.append(Link(a, b, *figures, reachable=rng.random() > 0.05, directed=True))
    return Snapshot(tuple(sites), tuple(links)), model


def _fields(device: Device) -> dict[str, Any]:
    return {name: getattr(device, name) for name in Device.__dataclass_fields__}


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut `total` into so many positive whole parts, in order."""
    for bars in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *bars, total)))


@dataclass(frozen=True)
class Stage:
    """An island with its lead's site: seconds of the stage by layers, decoding and in prefill."""

    mask: int
    site: str
    token_s: Array
    first_s: Array


class Exhaustive:
    """All plans of one model on one picture."""

    def __init__(self, picture: Picture, model: ModelSpec) -> None:
        self.picture, self.model = picture, model
        self.nodes = [node for name in picture.sites for node in picture.nodes[name]]
        self.stages = {place: self._stages(*place) for place in itertools.product((True, False), repeat=2)}

    def _stages(self, first: bool, last: bool) -> list[Stage]:
        found: dict[tuple[int, str], Stage] = {}
        for mask in range(1, 1 << len(self.nodes)):
            island = [node for i, node in enumerate(self.nodes) if mask >> i & 1]
            worst = model_cost.slowest_path(self.picture, tuple(island))
            if len(island) > self.model.heads or not worst.reachable:
                continue
            island.sort(key=lambda node: node.rank)
            for lead in island:
                nodes = (lead, *(node for node in island if node is not lead))
                token_s, first_s = self._times(nodes, first, last)
                known = found.get((mask, lead.site))
                if known is not None:
                    token_s, first_s = np.minimum(token_s, known.token_s), np.minimum(first_s, known.first_s)
                found[mask, lead.site] = Stage(mask, lead.site, token_s, first_s)
        return [stage for stage in found.values() if np.isfinite(stage.token_s).any()]

    def _times(self, nodes: tuple[Node, ...], first: bool, last: bool) -> tuple[Array, Array]:
        """Least seconds of 1..L layers over every cut of groups, columns and rows; infinite where none fits."""
        model, count = self.model, len(nodes)
        unit = cut_unit(model.intermediate, count)
        row_unit = cut_unit(model.vocab, count)
        group = model.heads // model.kv_heads
        unit_heads, units = (group, model.kv_heads) if count <= model.kv_heads else (1, model.heads)
        heads = np.array(list(compositions(units, count))).reshape(-1, count) * unit_heads
        stops = heads.cumsum(axis=1)
        groups = -(-stops // group) - (stops - heads) // group
        rest = [
            list(compositions(-(-model.intermediate // unit), count)),
            list(compositions(-(-model.vocab // row_unit), count)) if last else [(0,) * count],
        ]
        others = np.array([(*c, *v) for c, v in itertools.product(*rest)]).reshape(-1, 2, count)
        columns, rows = others[:, 0] * unit, others[:, 1] * row_unit
        worst = model_cost.slowest_path(self.picture, nodes)
        tokens = min(model_cost.PREFILL_TOKENS, CONTEXT)
        speed = np.array([node.speed for node in nodes])
        flops = np.array([node.flops for node in nodes])
        attention = heads * model_cost.attention_bytes(model, 0, 1) + groups * model_cost.attention_bytes(model, 1, 0)
        mlp = columns * model_cost.mlp_bytes(model, 1)
        cache = groups * model_cost.kv_bytes(model, 1, CONTEXT)
        # Working memory is linear in query heads, KV heads and columns.
        zero = model_cost.activation_bytes(model, 0, 0, CONTEXT)
        held = heads * (model_cost.activation_bytes(model, 0, 0, CONTEXT, 1) - zero)
        held += groups * (model_cost.activation_bytes(model, 1, 0, CONTEXT, 0) - zero)
        fixed = zero + columns * (model_cost.activation_bytes(model, 0, 1, CONTEXT) - zero)
        for rank in range(count):
            ends = [model_cost.ends_bytes(model, rank, n, first=first, last=last) for n in (0, 1)]
            fixed[:, rank] += ends[0] + rows[:, rank] * (ends[1] - ends[0])
        usable = np.array([node.usable_bytes for node in nodes])
        reduces = 0.0 if count == 1 else 2 * worst.transfer_s((count - 1) * model.activation_bytes)
        attention_s = ((attention + cache / 2) / speed).max(axis=1)
        layer_s = (mlp / speed).max(axis=1) + model_cost.LAYER_OVERHEAD_S + reduces
        head_s = (rows * model.row_bytes / speed).max(axis=1)
        if last and count > 1:
            head_s = head_s + worst.transfer_s(model.vocab * LOGIT_BYTES)
        many = 0.0 if count == 1 else 2 * worst.transfer_s((count - 1) * tokens * model.activation_bytes)
        scores = 2 * tokens**2 * heads * model.head_dim
        attention_ops = 2 * attention / model.weight_bytes * tokens + scores
        prefill_attention_s = np.maximum(attention_ops / flops, attention / speed).max(axis=1)
        prefill_s = (
            np.maximum(2 * mlp / model.weight_bytes * tokens / flops, mlp / speed).max(axis=1)
            + model_cost.LAYER_OVERHEAD_S
            + many
        )
        layers = np.arange(1, model.layers + 1)
        token_s, first_s = (np.full(model.layers + 1, math.inf) for _ in range(2))
        bounds = [(layers[:, None] * each + head_s).min(axis=1) for each in (layer_s, prefill_s)]
        order = np.argsort(attention_s, kind="stable")
        later_s = np.minimum.accumulate(prefill_attention_s[order][::-1])[::-1]
        for place, cut in enumerate(order):
            # No cut from here on is faster in attention than this.
            if (token_s[1:] <= bounds[0] + layers * attention_s[cut]).all() and (
                first_s[1:] <= bounds[1] + layers * later_s[place]
            ).all():
                break
            each = (usable - fixed - held[cut]) // (attention[cut] + mlp + 2 * model.row_bytes + cache[cut])
            capacity = each.min(axis=1)
            for count_layers in layers[: max(int(capacity.max()), 0)]:
                fits = capacity >= count_layers
                taken_s = count_layers * (layer_s + attention_s[cut]) + head_s
                token_s[count_layers] = min(token_s[count_layers], taken_s[fits].min())
                taken_s = count_layers * (prefill_s + prefill_attention_s[cut]) + head_s
                first_s[count_layers] = min(first_s[count_layers], taken_s[fits].min())
        return token_s, first_s

    def best(self, objective: str) -> float:
        """The least seconds a token, until the first token, or of the slowest stage or hop; infinite: no plan."""
        layers = self.model.layers
        combine: Callable[[float, float], float] = max if objective == "throughput" else operator.add

        def take(stage: Stage) -> Array:
            return stage.first_s if objective == "first_token" else stage.token_s

        self._best = min((float(take(stage)[layers]) for stage in self.stages[True, True]), default=math.inf)
        middle = [(s.mask, s.site, take(s)) for s in self.stages[False, False]]
        last = [(s.mask, s.site, take(s)) for s in self.stages[False, True]]
        # However a layer is placed, it takes no less than this: cuts off what cannot get better.
        rest = [(t[1:] / np.arange(1, layers + 1)).min() for _, _, t in middle + last]
        least = 0.0 if objective == "throughput" or not rest else float(min(rest)) * (1 - 1e-9)

        def hop(a: str, b: str, closing: bool) -> float:
            path = self.picture.path(a, b)
            if not path.reachable:
                return math.inf
            size = model_cost.TOKEN_BYTES if closing else self.model.activation_bytes
            if objective == "throughput":
                return size / path.bandwidth
            if objective == "first_token":
                tokens = min(model_cost.PREFILL_TOKENS, CONTEXT)
                return 0.0 if closing else path.transfer_s(tokens * self.model.activation_bytes)
            return path.transfer_s(size)

        hops = {(a, b): hop(a, b, False) for a in self.picture.sites for b in self.picture.sites}
        home = {(a, b): hop(a, b, True) for a in self.picture.sites for b in self.picture.sites}
        # What was reached before at no more: a state is devices used, first and present site, layers placed.
        seen: dict[tuple[int, str, str, int], float] = {}

        def extend(used: int, start: str, here: str, left: int, spent: float) -> None:
            key = (used, start, here, left)
            if seen.get(key, math.inf) <= spent:
                return
            seen[key] = spent
            for mask, site, seconds in last:
                if not used & mask:
                    total = combine(combine(combine(spent, hops[here, site]), float(seconds[left])), home[site, start])
                    self._best = min(self._best, total)
            for mask, site, seconds in middle:
                if used & mask:
                    continue
                arrived = combine(spent, hops[here, site])
                for count in range(1, left):
                    total = combine(arrived, float(seconds[count]))
                    if total + (left - count) * least < self._best:
                        extend(used | mask, start, site, left - count, total)

        for stage in self.stages[True, False]:
            for count in range(1, layers):
                spent = float(take(stage)[count])
                if spent + (layers - count) * least < self._best:
                    extend(stage.mask, stage.site, stage.site, layers - count, spent)
        return self._best


def figure(plan: Plan, objective: str) -> float:
    """What the objective makes least, in seconds."""
    if objective == "throughput":
        return 1 / plan.predicted.saturated_tokens_per_s
    return (plan.predicted.first_token_ms if objective == "first_token" else plan.predicted.token_ms) / 1e3


def compare(seed: int, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Both answers for each objective, in seconds; None where there is no plan."""
    snapshot, model = mesh(seed)
    every = Exhaustive(look(snapshot, model, Constraints()), model)
    rows = []
    for objective in objectives:
        best = every.best(objective)
        began_s = time.perf_counter()
        try:
            plan = partition(snapshot, model, Constraints(objective=objective, context=CONTEXT))
            planned = figure(plan, objective)
        except NoFeasiblePlan:
            planned = math.inf
        seconds = time.perf_counter() - began_s
        same = planned == best or abs(planned / best - 1) <= SAME if math.isfinite(best) else planned == best
        rows.append(
            {
                "mesh": seed,
                "objective": objective,
                "sites": len(snapshot.sites),
                "devices": len(every.nodes),
                "layers": model.layers,
                "best_s": best if math.isfinite(best) else None,
                "planned_s": planned if math.isfinite(planned) else None,
                "same": same,
                "seconds": round(seconds, 4),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print agreements; exit code 1 where any plan is not the best."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exhaustive", description=__doc__.splitlines()[0])
    parser.add_argument("--meshes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first mesh; the others follow")
    parser.add_argument("--objective", action="append", choices=OBJECTIVES, help="may be repeated; default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    objectives = options.objective or list(OBJECTIVES)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seed, options.seed + options.meshes):
        fresh = compare(seed, objectives)
        rows += fresh
        for row in fresh:
            if not row["same"] and not options.json:
                print(f"mesh {seed}: {row}", file=sys.stderr)
    summary = {
        objective: {
            "meshes": len(mine := [row for row in rows if row["objective"] == objective]),
            "optimal": sum(row["same"] for row in mine),
            "without_a_plan": sum(row["best_s"] is None for row in mine),
            "slowest_plan_s": max((row["seconds"] for row in mine), default=0.0),
        }
        for objective in objectives
    }
    if options.json:
        print(json.dumps({"seed": options.seed, "summary": summary, "rows": rows}))
    else:
        for objective, line in summary.items():
            print(
                f"{objective}: {line['optimal']} of {line['meshes']} optimal, {line['without_a_plan']} without a plan"
            )
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    command(main)
