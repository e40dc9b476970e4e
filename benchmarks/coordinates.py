"""Coordinates against a matrix of round trips: the error over all pairs after so many probes of random others.

    python -m benchmarks.coordinates --rtt FILE --cycles 100 --seed 1 [--algorithm serf] --json

Every cycle each site probes one other, drawn at random, and hears that site's coordinate with the answer, as in the
experiment serf's figures come from. The error of a pair is |estimate - rtt| / rtt; pairs nobody measured do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.command import command
from benchmarks.serf_coordinates import SerfCoordinates
from mesh.errors import MeshError
from mesh.gossip.coordinates import Coordinate, Coordinates, estimate_s
from simulations.latency import load_rtt


class Positioned(Protocol):
    """What an algorithm is to this benchmark."""

    def own(self) -> Any: ...
    def observe(self, peer: str, coordinate: Any, rtt_s: float, now: float) -> bool: ...


ALGORITHMS: dict[str, Callable[[random.Random], Positioned]] = {"isthmus": Coordinates, "serf": SerfCoordinates}


def pair_errors(estimates_s: npt.NDArray[np.float64], rtt_ms: npt.NDArray[np.float64]) -> dict[str, float]:
    """{"median", "p90"} of the relative error over all ordered pairs that `rtt_ms` knows (above 0, off the diagonal).

    Both are n x n. An estimate that is not a number counts as an error of 1. Of no pair at all: zeros.
    """
    known = np.isfinite(rtt_ms) & (rtt_ms > 0) & ~np.eye(len(rtt_ms), dtype=bool)
    if not known.any():
        return {"median": 0.0, "p90": 0.0}
    rtts_s = rtt_ms[known] / 1000.0
    errors = np.nan_to_num(np.abs(estimates_s[known] - rtts_s) / rtts_s, nan=1.0)
    return {"median": float(np.median(errors)), "p90": float(np.percentile(errors, 90))}


def coordinates_error(coordinates: Sequence[Coordinate], rtt_ms: npt.NDArray[np.float64]) -> dict[str, float]:
    """The error of these coordinates, one a row of `rtt_ms`: {"median", "p90"}."""
    places = np.array([coordinate.place for coordinate in coordinates])
    heights = np.array([coordinate.height_s for coordinate in coordinates])
    apart = places[:, None] - places[None]
    return pair_errors(np.sqrt((apart * apart).sum(-1)) + heights[:, None] + heights[None], rtt_ms)


def coordinate_error(
    rtt_ms: npt.NDArray[np.float64], cycles: int, seed: int, algorithm: str = "isthmus"
) -> dict[str, float]:
    """Run `cycles` cycles on an n x n matrix in ms: {"median", "p90", "probe_us"}, the last CPU a probe."""
    size = len(rtt_ms)
    rng = random.Random(f"{seed}/probes")
    sites = [ALGORITHMS[algorithm](random.Random(f"{seed}/{number}")) for number in range(size)]
    spent_s, probes = 0.0, 0
    for cycle in range(cycles if size > 1 else 0):
        for number in rng.sample(range(size), size):
            other = rng.randrange(size - 1)
            other += other >= number
            rtt_s = float(rtt_ms[number, other]) / 1000.0
            if math.isfinite(rtt_s) and rtt_s > 0:
                began = time.process_time()
                sites[number].observe(str(other), sites[other].own(), rtt_s, float(cycle))
                spent_s += time.process_time() - began
                probes += 1
    owns = [site.own() for site in sites]
    estimates = np.array([[_estimate(one, other) for other in owns] for one in owns])
    return {**pair_errors(estimates, rtt_ms), "probe_us": 1e6 * spent_s / max(probes, 1)}


def _estimate(one: Any, other: Any) -> float:
    return estimate_s(one, other) if isinstance(one, Coordinate) else float(one.estimate_s(other))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coordinates", description=__doc__.splitlines()[0])
    parser.add_argument("--rtt", type=Path, required=True, help="a .csv with names, or a raw .tsv or .tsv.gz, in ms")
    parser.add_argument("--cycles", type=int, default=100, help="probes each site makes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="isthmus")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.cycles < 0:
        parser.error("--cycles: a number from 0 up")
    try:
        matrix = load_rtt(options.rtt)
    except (MeshError, OSError) as error:
        parser.error(str(error))
    found = coordinate_error(matrix.rtt_ms, options.cycles, options.seed, options.algorithm)
    document = {"algorithm": options.algorithm, "sites": len(matrix), "cycles": options.cycles, "seed": options.seed}
    if options.json:
        print(json.dumps({**document, "coordinate_error": found}))
    else:
        print(
            f"{options.algorithm}, {len(matrix)} sites, {options.cycles} cycles: median error {found['median']:.3f}, "
            f"90th percentile {found['p90']:.3f}, {found['probe_us']:.0f} us a probe"
        )


if __name__ == "__main__":
    command(main)
