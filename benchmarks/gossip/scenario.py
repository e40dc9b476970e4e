"""One run of a virtual mesh: start, warm up, be quiet, change entries, suffer a fault; and the figures of each part.

The timeline, in virtual time, of `--minutes M`:

1. start: all sites begin within a second, each with three others as seeds; until every site sees every other alive.
   More than `JOIN_MOST` know each other from the start, see `simulations.acquaint`;
2. warm-up, `WARM_S` and `WARM_EACH_S` for each site: paths are measured, coordinates settle. Start and warm-up are not
   part of M;
3. quiet, a quarter of M, at most a minute: the bytes of `bytes_per_site_s` are those sent now;
4. changes, a quarter of M, at most half a minute: an entry changes at a random site once a second; a third waits;
5. the fault, the rest of M. Beside every fault but `none`, `crash` and `partition` one healthy site crashes half way
   through, so that detection under that fault has a figure. A run is longer than M where a partition lasts longer, and
   goes on until what was crashed is reported and what was apart has met, at most `PATIENCE_S`.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import networkx as nx

from benchmarks.gossip.measures import coordinate_error
from benchmarks.gossip.watch import Report, Watch, first_reports, percentile, spread
from mesh.errors import DeadlineExceeded
from mesh.gossip.config import Timing
from simulations.acquaint import acquaint
from simulations.faults import Fault, Struck, strike
from simulations.latency import Matrix
from simulations.network import VirtualNetwork

#: Everything of a fleet that is switched on starts within so long.
START_S = 1.0
SEEDS = 3
JOIN_MOST = 100
#: The slowest of the profiles exchanges full states once a minute.
CONVERGED_WITHIN_S = 600.0
WARM_S, WARM_EACH_S = 30.0, 0.05
QUIET_S, CHANGES_S = 60.0, 30.0
PATIENCE_S = 900.0
#: Thresholds of the garbage collector: a mesh is millions of objects that stay, and the usual ones look at them often.
RARELY = (100_000, 50, 50)
#: How often it is looked whether a part is over.
LOOK_S = 0.05

DETECTION = {"p50": 0.5, "p99": 0.99, "max": 1.0}
CONVERGENCE = {"p50": 0.5, "p99": 0.99}

#: The entry that is changed, and the one that stands beside it: about what a site with one device says of itself.
KEY, ABOUT = "load", "capabilities"
CAPABILITIES: dict[str, object] = {
    "devices": [{"name": "cuda0", "vendor": "nvidia", "memory_bytes": 85_899_345_920, "flops": {"bfloat16": 8.0e14}}],
    "version": "0.1.0",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run. `matrix` has a row per site; `loss` and `jitter` are the background of every path, as shares."""

    matrix: Matrix
    minutes: float
    seed: int
    timing: Timing
    fault: Fault
    loss: float = 0.0
    jitter: float = 0.1


@dataclass(slots=True)
class Moments:
    """When what began, and whom it met."""

    fault_s: float = 0.0
    crash_s: float = 0.0
    healed_s: float | None = None
    rejoined_s: float | None = None
    struck: Struck = field(default_factory=Struck)
    crashed: tuple[str, ...] = ()


def run(settings: Settings) -> dict[str, Any]:
    """Run it and give the figures, JSON-ready; see `benchmarks.gossip.__main__` for what each means.

    Raises DeadlineExceeded if the mesh does not come together at all.
    """
    return _Run(settings).figures()


class _Run:
    def __init__(self, settings: Settings) -> None:
        self._set = settings
        self._sites = settings.matrix.names
        self._chance = random.Random(f"{settings.seed}/scenario")
        self._watch = Watch(self._sites, KEY)
        self._net = VirtualNetwork(
            seed=settings.seed,
            latency=settings.matrix,
            jitter=settings.jitter,
            loss=settings.loss,
            timing=settings.timing,
            record=False,
            on_event=self._watch.event,
        )
        self._at = Moments()
        self._grouped: dict[bool, dict[str, int]] = {}

    def figures(self) -> dict[str, Any]:
        thresholds = gc.get_threshold()
        gc.set_threshold(*RARELY)
        try:
            return self._measured(self._start())
        finally:
            gc.set_threshold(*thresholds)
            gc.enable()
            gc.unfreeze()

    def _measured(self, joined_s: float | None) -> dict[str, Any]:
        events, kinds = self._watch.member_events, self._watch.kinds.copy()
        self._watch.deaths.clear()
        self._watch.suspicions.clear()
        total_s = self._set.minutes * 60.0
        end_s = self._net.clock() + total_s
        rates = self._quiet(min(QUIET_S, total_s / 4))
        coordinates = coordinate_error(self._net, self._set.matrix)
        self._change(min(CHANGES_S, total_s / 4))
        self._suffer(end_s)
        happened = self._watch.kinds - kinds
        happened.pop("updated", None)
        return {
            **self._detection(),
            **self._convergence(),
            "rejoin_s": _rounded(self._at.rejoined_s),
            "bytes_per_site_s": {"mean": round(sum(rates) / len(rates), 1), "max": round(max(rates), 1)},
            "coordinate_error": coordinates,
            "events": self._watch.member_events - events,
            "events_by_kind": dict(sorted(happened.items())),
            "join_s": _rounded(joined_s),
            "virtual_s": _rounded(self._net.clock() - 1000.0),
            "datagrams": self._net.datagrams,
            "trace_sha256": self._net.trace(),
        }

    # ---------------------------------------------------------------- the parts of a run

    def _start(self) -> float | None:
        """Switch everybody on, wait until all see all, warm up. Seconds until then; None if they knew each other."""
        net, names = self._net, self._sites
        first_s = net.clock()
        crowd = len(names) > JOIN_MOST
        gc.disable()
        for number, name in enumerate(names):
            seeds = [] if crowd else self._seeds(number)
            net.clock.at(first_s + START_S * number / len(names), self._spawn, name, seeds)
        if crowd:
            net.run_for(START_S)
            acquaint(net)
            self._watch.acquainted()
        elif not self._wait(self._all_alive, CONVERGED_WITHIN_S):
            seen, pairs = self._watch.alive_pairs(), len(names) * (len(names) - 1)
            raise DeadlineExceeded(
                f"seed {self._set.seed}: {CONVERGED_WITHIN_S:g} virtual seconds after the start "
                f"{seen} of {pairs} pairs see each other"
            )
        # What is there now stays to the end: a thousand cores are gigabytes that need not be searched for garbage.
        gc.freeze()
        gc.enable()
        joined_s = None if crowd else net.clock() - first_s
        net.run_for(WARM_S + WARM_EACH_S * len(names))
        return joined_s

    def _seeds(self, number: int) -> list[str]:
        """A tree, so that the seeds alone connect everybody, and two more."""
        name, near = self._sites[number], self._sites[(number - 1) // 2]
        others = self._chance.sample(self._sites, min(len(self._sites), SEEDS + 1))
        return ([near] if number else []) + [other for other in others if other not in (name, near)][: SEEDS - 1]

    def _spawn(self, name: str, seeds: list[str]) -> None:
        self._net.spawn(name, seeds=seeds)
        self._net.publish(name, ABOUT, CAPABILITIES)
        self._net.publish(name, KEY, _load(0))

    def _quiet(self, duration_s: float) -> list[float]:
        before = {site: node.sent_bytes for site, node in self._net.nodes.items()}
        self._net.run_for(duration_s)
        return [(node.sent_bytes - before[site]) / duration_s for site, node in self._net.nodes.items()]

    def _change(self, duration_s: float) -> None:
        count = max(1, int(duration_s * 2 / 3))
        for number in range(1, count + 1):
            owner = self._chance.choice(self._sites)
            self._watch.changed(owner, self._net.clock())
            self._net.publish(owner, KEY, _load(number))
            self._net.run_for(duration_s * 2 / 3 / count)
        self._net.run_for(duration_s / 3)

    def _suffer(self, end_s: float) -> None:
        at, net, fault = self._at, self._net, self._set.fault
        at.fault_s = at.crash_s = net.clock()
        at.struck = strike(net, fault, self._sites, self._chance)
        at.crashed = at.struck.crashed
        if fault.kind == "partition":
            net.run_for(fault.first_s)
            at.struck.stop()
            at.healed_s = net.clock()
            if self._wait(self._all_alive, PATIENCE_S):
                at.rejoined_s = net.clock() - at.healed_s
        elif fault.kind not in ("none", "crash"):
            net.run_for((end_s - at.fault_s) / 2)
            well = [site for site in self._sites if site not in at.struck.bad]
            if len(well) > 1:
                at.crash_s = net.clock()
                at.crashed = (self._chance.choice(well),)
                net.crash(at.crashed[0])
        net.run_for(max(0.0, end_s - net.clock()))
        self._wait(lambda: all(self._watch.sees_gone(*pair) for pair in self._detectable()), PATIENCE_S)

    def _wait(self, done: Callable[[], bool], within_s: float) -> bool:
        """Let time pass until `done()`. The moment is known to `LOOK_S`."""
        until_s = self._net.clock() + within_s
        while not done():
            if self._net.clock() >= until_s:
                return False
            self._net.run_for(LOOK_S)
        return True

    def _all_alive(self) -> bool:
        return self._watch.alive_pairs() == len(self._sites) * (len(self._sites) - 1)

    # ---------------------------------------------------------------- the figures

    def _healthy(self) -> list[str]:
        bad = {*self._at.struck.bad, *self._at.crashed}
        return [site for site in self._sites if site not in bad]

    def _detectable(self) -> list[tuple[str, str]]:
        """Pairs (observer, subject) of which the observer ought to report the subject dead, and will."""
        groups = self._groups(crashed=False) if self._at.struck.pairs else {}
        pairs = product(self._healthy(), self._at.crashed)
        return [pair for pair in pairs if groups.get(pair[0]) == groups.get(pair[1])]

    def _detection(self) -> dict[str, Any]:
        bad = set(self._at.struck.bad)
        pairs, since_s = self._detectable(), self._at.crash_s
        if self._at.struck.halves:
            one, other = self._at.struck.halves
            pairs, since_s = [*product(one, other), *product(other, one)], self._at.fault_s
        times, missing = first_reports(self._apart(), pairs, since_s)
        detect = {name: _rounded(percentile(times, share, missing)) for name, share in DETECTION.items()}
        return {
            "detect_s": detect,
            "undetected": missing,
            "false_positives": sum(map(self._is_wrong, self._watch.deaths)),
            "false_suspicions": sum(map(self._is_wrong, self._watch.suspicions)),
            "bad_sites_declared_dead": sum(r.subject in bad and r.observer not in bad for r in self._watch.deaths),
            "declared_dead_by_bad_sites": sum(r.observer in bad for r in self._watch.deaths),
        }

    def _is_wrong(self, report: Report) -> bool:
        """Whether a healthy site speaks ill of a healthy one that it could have reached, if only through others."""
        at = self._at
        if {report.observer, report.subject} & {*at.struck.bad}:
            return False
        crashed = report.when_s >= at.crash_s
        if crashed and report.subject in at.crashed:
            return False
        if at.struck.pairs and report.when_s >= at.fault_s:
            groups = self._groups(crashed=crashed)
            return groups[report.observer] == groups[report.subject]
        apart = at.healed_s is not None and at.fault_s <= report.when_s < at.healed_s
        return not (apart and (report.observer in at.struck.halves[0]) != (report.subject in at.struck.halves[0]))

    def _groups(self, *, crashed: bool) -> dict[str, int]:
        """Site -> number of the group whose members reach each other there and back, if only through others."""
        if crashed not in self._grouped:
            gone = self._at.crashed if crashed else ()
            paths = nx.complete_graph([site for site in self._sites if site not in gone], create_using=nx.DiGraph)
            paths.remove_edges_from(self._at.struck.pairs)
            groups = enumerate(nx.strongly_connected_components(paths))
            self._grouped[crashed] = {site: number for number, group in groups for site in group}
        return self._grouped[crashed]

    def _apart(self) -> list[Report]:
        healed_s = self._at.healed_s
        return [report for report in self._watch.deaths if healed_s is None or report.when_s < healed_s]

    def _convergence(self) -> dict[str, Any]:
        times, missing = spread(self._watch.changes, self._sites)
        figures = {name: _rounded(percentile(times, share, missing)) for name, share in CONVERGENCE.items()}
        return {"converge_s": figures, "unconverged": missing}


def _load(number: int) -> dict[str, object]:
    return {"jobs": number, "free_memory_bytes": 85_899_345_920 - number * 1_000_003, "busy": round(number / 7 % 1, 3)}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
