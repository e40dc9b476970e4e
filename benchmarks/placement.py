"""Placements of published cases, found anew: `python -m benchmarks.placement CASE.json --seconds S --json`.

CASE is one of Helix' cases (machines in regions, measured tokens/s by layers held). It prints the layout chosen, its
maximum flow, the mean network time of a token on the way that waits least, the front between the two, and a bound. Or
it is DT-FM's file of cases (devices that train over regions): it prints the stages, their cost and the published cost.
Or it is prima.cpp's home: it prints the plan of `topology.partition` for the 8B model.

`--seed` and `--iterations` fix the answer; `--seconds` ends the search early, wherever it then stands.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from benchmarks import placement_dtfm, placement_prima
from benchmarks.command import command
from benchmarks.placement_case import CaseError, parse_case, read_document
from mesh.cli.tables import say, table
from mesh.errors import MeshError
from topology.errors import TopologyError
from topology.flow import compute_bound_tokens_per_s
from topology.flow_search import ITERATIONS, Placement, place

#: Kept of `--seconds` for measuring the front with networkx.
CLOSING_SHARE = 0.1
#: A search longer than a day is a mistake in the option.
LONGEST_S = 86_400.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, search, print. What is wrong with the case is one line and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        document = read_document(options.case)
        answer = _solved(options, document)
    except MeshError as error:
        line = str(error) if str(error).startswith(str(options.case)) else f"{options.case}: {error}"
        print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        _show(answer)
    return 0


def _solved(options: argparse.Namespace, document: dict[str, Any]) -> dict[str, Any]:
    if "device_profiles" in document or "nodes" in document:
        return helix(document, seconds=options.seconds, seed=options.seed, iterations=options.iterations)
    if "cases" in document or "job" in document:
        return dtfm(document, seconds=options.seconds, seed=options.seed)
    if "devices" in document and "network" in document:
        return placement_prima.answer(document)
    raise CaseError(
        "$: not a known case: Helix' have nodes, links and device_profiles, DT-FM's job and cases,"
        " prima.cpp's devices and network"
    )


def helix(document: dict[str, Any], *, seconds: float, seed: int = 0, iterations: int = ITERATIONS) -> dict[str, Any]:
    """The answer for one of Helix' cases, as a document. Raises CaseError."""
    began = time.monotonic()
    case = parse_case(document)
    pool = case.pool()
    stop = partial(_past, began + seconds * (1 - CLOSING_SHARE))
    try:
        found = place(pool, rng=Random(seed), iterations=iterations, stop=stop)
    except TopologyError as error:
        raise CaseError(f"$.nodes: {error}") from None
    most = found.front[-1]
    answer: dict[str, Any] = {
        "case": case.case,
        "model": case.model.name,
        **_placement(found.chosen),
        "seconds": round(time.monotonic() - began, 3),
        "bound_tokens_per_s": found.bound_tokens_per_s,
        "compute_bound_tokens_per_s": compute_bound_tokens_per_s(pool),
        "front": [_placement(placement) for placement in found.front],
        "flows": [[a, b, rate] for (a, b), rate in sorted(found.chosen.gives.flows.items())],
        "why": _why(found.chosen, most),
        "seed": seed,
        "iterations": iterations,
        "layouts_measured": found.tried,
    }
    return answer


def dtfm(document: dict[str, Any], *, seconds: float, seed: int = 0) -> dict[str, Any]:
    """The answer for DT-FM's cases, as a document. Costs are seconds an iteration. Raises CaseError."""
    began = time.monotonic()
    parsed = placement_dtfm.parse(document)
    cases = []
    for number, world in enumerate(parsed.cases, start=1):
        stop = partial(_past, began + seconds * number / len(parsed.cases))
        found = placement_dtfm.search(world, parsed.job, rng=Random(seed), stop=stop)
        cases.append(
            {
                "name": world.name,
                "cost_s": found.total_s,
                "data_parallel_s": found.data_parallel_s,
                "pipeline_s": found.pipeline_s,
                "published_cost_s": placement_dtfm.published_s(world),
                "stages": placement_dtfm.devices(world, found),
            }
        )
    return {"case": parsed.case, "cases": cases, "seconds": round(time.monotonic() - began, 3), "seed": seed}


def _past(deadline: float) -> bool:
    return time.monotonic() >= deadline


def _placement(placement: Placement) -> dict[str, Any]:
    return {
        "layout": {name: list(layers) for name, layers in placement.layout.items()},
        "flow_tokens_per_s": placement.gives.tokens_per_s,
        "network_ms_per_token": placement.gives.network_ms,
        "crossing_tokens_per_s": placement.crossing_tokens_per_s,
    }


def _why(chosen: Placement, most: Placement) -> str:
    gives = f"{chosen.gives.tokens_per_s:.1f} tokens/s at {chosen.gives.network_ms:.1f} ms of network a token"
    if chosen.crossing_tokens_per_s > 0:
        return f"{gives}: the most flow found; staying within regions gives less flow for its network time, or none"
    if most is chosen:
        return f"{gives}: no flow between regions, and crossing them gave no more"
    extra = most.gives.tokens_per_s / chosen.gives.tokens_per_s - 1
    longer = most.gives.network_ms / chosen.gives.network_ms - 1
    return (
        f"{gives}, without flow between regions: crossing them would give {most.gives.tokens_per_s:.1f} tokens/s at"
        f" {most.gives.network_ms:.1f} ms, {extra:.0%} more flow for {longer:.0%} more network time"
    )


def _show(answer: dict[str, Any]) -> None:
    if "cases" in answer:
        say(f"{answer['case']}: searched {answer['seconds']:.1f} s; seconds of communication an iteration")
        keys = ("cost_s", "published_cost_s", "data_parallel_s", "pipeline_s")
        rows = [
            [case["name"], *("-" if case[k] is None else f"{case[k]:.3f}" for k in keys)] for case in answer["cases"]
        ]
        table(["case", "found", "published", "of it data parallel", "of it pipeline"], rows)
        return
    if "stages" in answer:
        say(f"{answer['case']}: {answer['model']}, {answer['token_ms']:.1f} ms a token predicted")
        rows = [
            [f"{stage['layers'][0]} to {stage['layers'][1] - 1}", f"{shard['site']}/{shard['device']}"]
            for stage in answer["stages"]
            for shard in stage["shards"]
        ]
        table(["layers", "device"], rows)
        for sentence in answer["why"]:
            say(sentence)
        return
    say(f"{answer['case']}: {answer['why']}")
    say(f"bound {answer['bound_tokens_per_s']:.1f} tokens/s; searched {answer['seconds']:.1f} s")
    table(
        ["tokens/s", "network ms a token", "between regions, tokens/s"],
        [
            [f"{entry[key]:.1f}" for key in ("flow_tokens_per_s", "network_ms_per_token", "crossing_tokens_per_s")]
            for entry in answer["front"]
        ],
    )
    table(["node", "layers"], [[name, f"{a} to {b - 1}"] for name, (a, b) in answer["layout"].items()])


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= LONGEST_S:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most {LONGEST_S:g}, not {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, not {text}")
    return value


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks.placement", description=__doc__.splitlines()[0])
    parser.add_argument("case", type=Path, metavar="CASE.json")
    parser.add_argument("--seconds", type=_seconds, default=60.0, metavar="S", help="end the search by then")
    parser.add_argument("--seed", type=_count, default=0, help="of the search's choices")
    parser.add_argument("--iterations", type=_count, default=ITERATIONS, metavar="N", help="proposals to try in all")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser


if __name__ == "__main__":
    command(main)
