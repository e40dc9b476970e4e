"""What peers cost before any job: the time until three of them see each other, and what one takes while it idles."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import psutil

from simulations.processes import Fleet, SiteSpec, wait_converged

SITES = ("a", "b", "c")
CONVERGE_TIMEOUT_S = 120.0
#: How long a daemon is watched doing nothing, after it had time to settle.
SETTLE_S, WATCH_S = 3.0, 15.0


@dataclass(frozen=True, slots=True)
class PeerFigures:
    """Seconds from `mesh up` to a converged view, and of the first peer: share of a core and resident bytes."""

    converged_s: float
    converged_again_s: float
    idle_core_share: float
    memory_bytes: int

    def to_dict(self) -> dict[str, float]:
        """A JSON document."""
        return asdict(self)


def measure() -> PeerFigures:
    """Start three peers twice (without and with calibrated devices on disk), then watch one of them idle."""
    with Fleet([SiteSpec(name) for name in SITES]) as fleet:
        cold_s = _converged_s(fleet, time.perf_counter())
        for name in SITES:
            fleet.leave(name)
        started = time.perf_counter()
        for name in SITES:
            fleet.start(name)
        warm_s = _converged_s(fleet, started)
        time.sleep(SETTLE_S)
        process = psutil.Process(fleet.pid(SITES[0]))
        before = process.cpu_times()
        time.sleep(WATCH_S)
        after = process.cpu_times()
        busy_s = after.user + after.system - before.user - before.system
        return PeerFigures(cold_s, warm_s, busy_s / WATCH_S, process.memory_info().rss)


def _converged_s(fleet: Fleet, started: float) -> float:
    wait_converged(fleet, SITES[0], CONVERGE_TIMEOUT_S)
    return time.perf_counter() - started
