"""Ours beside memberlist's two profiles under every fault, and memberlist's profiles beside the real memberlist."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.gossip import scenario
from mesh.gossip.profiles import PROFILES
from simulations.faults import parse_fault
from simulations.latency import Matrix, uniform

OURS = "isthmus"
#: How many times faster ours shall detect than each of the others.
AIMS = {"memberlist-wan": 10.0, "memberlist-lan": 1.5}
#: Seconds from kill -9 of one process until the others report it: real memberlist 0.2.2 on loopback, by sites.
REAL_S = {
    ("memberlist-lan", 3): 5.5,
    ("memberlist-lan", 11): 5.8,
    ("memberlist-wan", 3): 35.0,
    ("memberlist-wan", 11): 41.0,
}
#: How far the virtual memberlist may be from the real one for the comparison to be fair.
FAIR = 0.2


def faults_for(sites: int) -> tuple[str, ...]:
    """Every fault, for a mesh of so many sites; what makes sites ill meets 1 % of them, as in Rapid's experiments."""
    few = math.ceil(sites / 100)
    return (
        "crash:1",
        f"slow:{few}:5",
        f"loss:{few}:0.8",
        f"flap-ingress:{few}:20:20",
        f"oneway:{few}",
        "partition:300",
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """One fault under one profile, over several seeds.

    `detect_p50_s` is the median over the seeds of each run's median; `detect_max_s` the largest of all. Null where a
    run has none. `ratio`: how many times ours was faster, by the medians.
    """

    fault: str
    profile: str
    detect_p50_s: float | None
    detect_max_s: float | None
    undetected: int
    false_positives: int
    rejoin_s: float | None
    bytes_per_site_s: float
    ratio: float | None = None
    enough: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return {name: getattr(self, name) for name in self.__slots__}


def compare(
    matrix: Matrix,
    *,
    sites: int,
    minutes: float,
    seeds: Sequence[int],
    faults: Sequence[str],
    loss: float,
    jitter: float,
) -> Iterator[Comparison]:
    """Run everything, ours first under each fault."""
    for fault in faults:
        ours: Comparison | None = None
        for profile in PROFILES:
            runs = [
                scenario.run(
                    scenario.Settings(
                        matrix=matrix.sites(sites, seed),
                        minutes=minutes,
                        seed=seed,
                        timing=PROFILES[profile],
                        fault=parse_fault(fault),
                        loss=loss,
                        jitter=jitter,
                    )
                )
                for seed in seeds
            ]
            found = _summed(fault, profile, runs, ours)
            ours = ours or found
            yield found


def calibrate(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The memberlist profiles on zero latency beside the real one: mean over seeds of the median detection."""
    for (profile, sites), real_s in REAL_S.items():
        times = []
        for seed in seeds:
            settings = scenario.Settings(
                matrix=uniform(sites, 0.0).sites(sites, seed),
                minutes=0.5,
                seed=seed,
                timing=PROFILES[profile],
                fault=parse_fault("crash:1"),
                jitter=0.0,
            )
            times.append(float(scenario.run(settings)["detect_s"]["p50"]))
        mean_s = fmean(times)
        yield {
            "profile": profile,
            "sites": sites,
            "seeds": len(times),
            "detect_s": round(mean_s, 2),
            "from_s": round(min(times), 2),
            "to_s": round(max(times), 2),
            "real_s": real_s,
            "off": round(mean_s / real_s - 1.0, 3),
            "fair": abs(mean_s / real_s - 1.0) <= FAIR,
        }


def _summed(fault: str, profile: str, runs: list[dict[str, Any]], ours: Comparison | None) -> Comparison:
    p50 = _all([run["detect_s"]["p50"] for run in runs])
    largest = _all([run["detect_s"]["max"] for run in runs])
    rejoin = _all([run["rejoin_s"] for run in runs])
    p50_s = median(p50) if p50 else None
    ratio = p50_s / ours.detect_p50_s if ours is not None and p50_s is not None and ours.detect_p50_s else None
    wrong = sum(run["false_positives"] for run in runs)
    enough = None
    if ours is not None:
        slower = ours.detect_p50_s is not None and (ratio is None or ratio >= AIMS[profile])
        enough = slower and ours.false_positives <= wrong
    return Comparison(
        fault,
        profile,
        p50_s,
        max(largest) if largest else None,
        sum(run["undetected"] for run in runs),
        wrong,
        median(rejoin) if rejoin else None,
        round(fmean(run["bytes_per_site_s"]["mean"] for run in runs), 1),
        None if ratio is None else round(ratio, 2),
        enough,
    )


def _all(values: list[float | None]) -> list[float]:
    """The values, or none of them where one is missing: a figure over some of the runs would flatter."""
    there = [value for value in values if value is not None]
    return there if len(there) == len(values) else []
