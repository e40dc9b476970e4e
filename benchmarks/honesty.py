"""Prediction against measurement: what plans say a token takes, and what it takes on this machine.

    python -m benchmarks.honesty [--json] [--model FOLDER] [--runs 3] [--tokens 64] [--only WORD]... [--details]

Three real daemons at a time, each calibrating its own devices (no speed is stated), with emulated round trips between
them. Plans of every shape are forced by constraints; each one's prediction is what its job was planned with. Measured
is the median of the runs, the tokens behind the first. Prompt and tokens are chosen so that the KV cache is filled to
half of the planned context in the mean, which is what a prediction is for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mesh
from benchmarks.command import command
from mesh.cli.tables import say, table
from mesh.errors import MeshError
from simulations.processes import Fleet, SiteSpec, ending_on_signals, wait_converged

DEFAULT_MODEL = Path(__file__).resolve().parents[1] / ".models" / "SmolLM2-135M-Instruct"
#: A plan counts as honestly predicted within this share of what was measured.
TOLERANCE = 0.15
TIMEOUT_S = 180.0
WARM_UP_TOKENS = 8
#: Links are judged by the probes of half a minute; those of the start waited for daemons that were loading.
SETTLE_S = 40.0
CPU = "cpu,threads=1,memory={}MiB"


@dataclass(frozen=True, slots=True)
class Case:
    """A plan to force: `constraints` as a user gives them; `prompt` tokens go before those that are measured."""

    name: str
    constraints: Mapping[str, Any]
    prompt: int = 32


@dataclass(frozen=True, slots=True)
class World:
    """Three sites: devices' memory in MiB by site, round trips in ms of a-b, a-c and b-c (0: as near as loopback is).

    The first site is where jobs are submitted.
    """

    name: str
    rtts_ms: tuple[float, float, float]
    cases: tuple[Case, ...]
    memory: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"a": (1500, 1500), "b": (1500, 1500), "c": (1500,)}
    )


_F, _B = {"dtype": "float32"}, {"dtype": "bfloat16"}
WORLDS = (
    World(
        "near",
        (0, 0, 0),
        (
            Case("one device", {**_F, "sites": ["c"], "shards": [1]}),
            Case("one device", {**_B, "sites": ["c"], "shards": [1]}),
            Case("one device, long context", {**_F, "sites": ["c"], "shards": [1]}, prompt=992),
            Case("two shards", {**_F, "sites": ["a"], "shards": [2]}),
            Case("two shards", {**_B, "sites": ["a"], "shards": [2]}),
            Case("two stages of one site", {**_F, "sites": ["a"], "shards": [1, 1]}),
            Case("three stages", {**_B, "shards": [1, 1, 1]}),
            Case("two shards, then two shards", {**_B, "sites": ["a", "b"], "shards": [2, 2]}),
        ),
    ),
    World(
        "even",
        (10, 10, 10),
        (
            Case("two stages", {**_F, "sites": ["b", "c"], "shards": [1, 1]}),
            Case("three stages", {**_F, "sites": ["a", "b", "c"], "shards": [1, 1, 1]}),
            Case("two shards, then one device", {**_F, "sites": ["a", "c"], "shards": [2, 1]}),
        ),
        # Small devices, so that plans of forced shapes spread over the sites that they name.
        {"a": (340, 340), "b": (500,), "c": (500,)},
    ),
    World(
        "uneven",
        (5, 40, 80),
        (
            Case("three stages, one small", {**_F, "sites": ["a", "b", "c"], "shards": [1, 1, 1]}),
            Case("three stages, one small", {**_B, "sites": ["a", "b", "c"], "shards": [1, 1, 1]}),
            Case("two stages", {**_B, "sites": ["b", "c"], "shards": [1, 1]}),
            Case("two stages", {**_F, "sites": ["a", "b"], "shards": [1, 1]}),
        ),
        {"a": (420,), "b": (420,), "c": (250,)},
    ),
    World(
        "far",
        (30, 80, 50),
        (
            Case("one device, then two shards", {**_F, "sites": ["a", "c"], "shards": [1, 2]}),
            Case("two shards, then one device", {**_B, "sites": ["a", "b"], "shards": [2, 1]}),
            Case("first and last stage at home", {**_F, "sites": ["a", "b"], "shards": [1, 1, 1], "private": True}),
        ),
        {"a": (340, 340), "b": (500,), "c": (500,)},
    ),
    World(
        "metro",
        (2, 20, 20),
        (
            Case("two shards across 2 ms", {**_F, "sites": ["a", "b"], "shards": [2]}),
            Case("two shards across 2 ms", {**_B, "sites": ["a", "b"], "shards": [2]}),
            Case("two shards across 2 ms, then one device", {**_B, "shards": [2, 1]}),
            Case("two stages", {**_F, "sites": ["a", "b"], "shards": [1, 1]}),
        ),
        {"a": (1000,), "b": (1000,), "c": (1000,)},
    ),
)


@dataclass(frozen=True, slots=True)
class Honesty:
    """One plan. Milliseconds a token: predicted in all and by part, measured in all and by part (means of the runs)."""

    plan: str
    world: str
    rtts_ms: tuple[float, float, float]
    dtype: str
    layout: str
    context: int
    predicted_ms: float
    predicted_compute_ms: float
    predicted_network_ms: float
    measured_ms: float
    measured_compute_ms: float
    measured_collectives_ms: float
    measured_waiting_ms: float
    runs_ms: tuple[float, ...]

    @property
    def error(self) -> float:
        """What the prediction is off by, as a share of what was measured."""
        return self.predicted_ms / self.measured_ms - 1

    @property
    def honest(self) -> bool:
        """Whether the error is within `TOLERANCE`."""
        return abs(self.error) <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return {**asdict(self), "error": self.error, "within": self.honest}


def measure(
    model: Path, *, runs: int, tokens: int, wanted: Sequence[str] = (), devices: dict[str, Any] | None = None
) -> Iterator[Honesty]:
    """Every case whose world or name has a word of `wanted` (all where that is empty), as it is measured.

    `devices` is filled with what the daemons measured of their devices, by world and `site/device`.
    """
    for world in WORLDS:
        cases = [
            case for case in world.cases if not wanted or any(word in f"{world.name} {case.name}" for word in wanted)
        ]
        if not cases:
            continue
        sites = [SiteSpec(name, tuple(CPU.format(size) for size in sizes)) for name, sizes in world.memory.items()]
        pairs = (("a", "b"), ("a", "c"), ("b", "c"))
        rtts = {frozenset(pair): rtt for pair, rtt in zip(pairs, world.rtts_ms, strict=True) if rtt}
        with Fleet(sites, rtts_ms=rtts, settings={"reserve": 0.0}) as fleet:
            wait_converged(fleet, "a", TIMEOUT_S)
            if rtts:
                time.sleep(SETTLE_S)
            snapshot = wait_converged(fleet, "a", TIMEOUT_S)
            if devices is not None:
                devices[world.name] = snapshot.to_dict()
            with mesh.connect(fleet.address("a")) as client:
                for case in cases:
                    yield _measured(client, model, world, case, runs=runs, tokens=tokens)


def _measured(client: mesh.Mesh, model: Path, world: World, case: Case, *, runs: int, tokens: int) -> Honesty:
    # Filled from `prompt` to prompt + tokens: in the mean half of this.
    context = 2 * case.prompt + tokens
    job = client.submit(model, "auto", {"context": context, **case.constraints})
    try:
        job.wait(TIMEOUT_S)
        prompt = [3 + place % 1000 for place in range(case.prompt)]
        job.generate(prompt, max_tokens=WARM_UP_TOKENS, ignore_eos=True)
        timings = [job.generate(prompt, max_tokens=tokens, ignore_eos=True).timings for _ in range(runs)]
        plan = job.plan
    finally:
        job.cancel()
    assert plan is not None, "a ready job has a plan"
    predicted = plan.predicted
    times_ms = [1e3 / each["decode_tokens_per_s"] for each in timings]
    part = {key: statistics.median(each[key] for each in timings) * 1e3 / tokens for key in _PARTS}
    return Honesty(
        plan=case.name,
        world=world.name,
        rtts_ms=world.rtts_ms,
        dtype=plan.model.dtype,
        layout=" | ".join(
            f"{' + '.join(shard.key for shard in stage.shards)} ({stage.end - stage.start})" for stage in plan.stages
        ),
        context=context,
        predicted_ms=predicted.token_ms,
        predicted_compute_ms=predicted.compute_ms,
        predicted_network_ms=predicted.network_ms,
        measured_ms=statistics.median(times_ms),
        measured_compute_ms=part["compute_s"],
        measured_collectives_ms=part["network_s"],
        measured_waiting_ms=part["waiting_s"],
        runs_ms=tuple(times_ms),
    )


_PARTS = ("compute_s", "network_s", "waiting_s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. An error of the mesh is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.honesty", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, metavar="FOLDER")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a run")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="cases with this word in their name"
    )
    parser.add_argument("--details", action="store_true", help="the parts of both figures, and every run")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    found: list[Honesty] = []
    devices: dict[str, Any] = {}
    try:
        with ending_on_signals():
            for each in measure(
                options.model, runs=options.runs, tokens=options.tokens, wanted=options.only, devices=devices
            ):
                found.append(each)
                print(f"{each.world}: {each.plan} {each.dtype}: {each.error:+.1%}", file=sys.stderr)
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    within = sum(each.honest for each in found)
    if options.json:
        document = {
            "load_before": load,
            "tolerance": TOLERANCE,
            "plans": [each.to_dict() for each in found],
            "within": within,
            "count": len(found),
            "share_within": within / len(found) if found else None,
            "devices": devices,
        }
        print(json.dumps(document))
        return 0
    table(_head(details=options.details), [_row(each, details=options.details) for each in found])
    say(f"{within} of {len(found)} plans within {TOLERANCE:.0%}; load of the machine before: {load:.2f}")
    return 0


def _head(*, details: bool) -> list[str]:
    columns = ["plan", "dtype", "round trips ms", "stages (layers)", "predicted ms", "measured ms", "error"]
    return [*columns, "compute ms", "network ms", "measured parts ms", "runs ms"] if details else columns


def _row(each: Honesty, *, details: bool) -> list[str]:
    row = [
        each.plan,
        each.dtype,
        " ".join(f"{rtt:g}" for rtt in each.rtts_ms),
        each.layout,
        f"{each.predicted_ms:.1f}",
        f"{each.measured_ms:.1f}",
        f"{each.error:+.1%}",
    ]
    if not details:
        return row
    parts = (each.measured_compute_ms, each.measured_collectives_ms, each.measured_waiting_ms)
    return [
        *row,
        f"{each.predicted_compute_ms:.1f}",
        f"{each.predicted_network_ms:.1f}",
        " ".join(f"{part:.1f}" for part in parts),
        " ".join(f"{run:.0f}" for run in each.runs_ms),
    ]


if __name__ == "__main__":
    command(main)
