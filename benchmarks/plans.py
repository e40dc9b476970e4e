"""What a job costs on each kind of plan: speed, where the time goes, what crosses the links, and memory.

All devices are one thread of this machine's CPU. A single stream keeps one stage busy at a time, so three stages share
two cores without loss; the shards of one stage do compute at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import mesh
from benchmarks import sockets
from simulations.processes import Fleet, SiteSpec, wait_converged

#: Stated, so that nothing is calibrated: the plans are forced anyway.
DEVICE = "cpu,threads=1,memory=1500MiB,flops=50e9,bandwidth=10e9"
SITES = (SiteSpec("a", (DEVICE, DEVICE)), *(SiteSpec(name, (DEVICE,)) for name in ("b", "c", "d")))
#: Emulated round trip between any two sites, in milliseconds.
RTT_MS = 10.0
PLANS: Mapping[str, Mapping[str, Any]] = {
    "one device": {"sites": ["b"], "shards": [1]},
    "two shards": {"sites": ["a"], "shards": [2]},
    "three stages": {"sites": ["b", "c", "d"], "shards": [1, 1, 1]},
}
RUNS = 3
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class PlanFigures:
    """One plan. Milliseconds are of one token: computing, in collectives, and the rest, the way between stages.

    `bytes_per_token` is by "sender -> receiver"; memory is by site.

    `workers` lists (resident bytes, bytes of the plan for the shard) by device.
    """

    plan: str
    ready_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    compute_ms: float
    network_ms: float
    waiting_ms: float
    bytes_per_token: dict[str, float]
    workers: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return asdict(self)


def measure(model: Path, *, transport: str, prompt_tokens: int, new_tokens: int) -> Iterator[PlanFigures]:
    """The figures of each plan, as they are found."""
    rtts_ms = {frozenset((a.name, b.name)): RTT_MS for a in SITES for b in SITES if a.name < b.name}
    with Fleet(SITES, rtts_ms=rtts_ms, settings={"transport": transport}) as fleet:
        wait_converged(fleet, "a", TIMEOUT_S)
        with mesh.connect(fleet.address("a")) as client:
            for name, constraints in PLANS.items():
                started = time.perf_counter()
                job = client.submit(model, "auto", {"dtype": "float32", **constraints})
                try:
                    job.wait(TIMEOUT_S)
                    ready_s = time.perf_counter() - started
                    numbers = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
                    yield _measured(fleet, job, name=name, ready_s=ready_s, **numbers)
                finally:
                    job.cancel()


def _measured(
    fleet: Fleet, job: mesh.Job, *, name: str, ready_s: float, prompt_tokens: int, new_tokens: int
) -> PlanFigures:
    plan = job.plan
    assert plan is not None, "a ready job has a plan"
    workers = {site: _workers(fleet.pid(site)) for site in plan.sites}
    pids = {site: [worker.pid for worker in found] for site, found in workers.items()}
    prefill_s, decode = [], []
    job.generate(list(range(3, 19)), max_tokens=4, ignore_eos=True)
    before = _traffic(pids)
    for _ in range(RUNS):
        result = job.generate(list(range(3, 19)), max_tokens=new_tokens, ignore_eos=True)
        decode.append(result.timings)
    after = _traffic(pids)
    for _ in range(RUNS):
        timings = job.generate(list(range(3, 3 + prompt_tokens)), max_tokens=1, ignore_eos=True).timings
        prefill_s.append(timings["first_token_s"])
    best = max(decode, key=lambda timings: float(timings["decode_tokens_per_s"]))
    per_token_ms = 1e3 / new_tokens
    shards = [shard for stage in plan.stages for shard in stage.shards]
    resident = {site: sorted(worker.memory_info().rss for worker in found) for site, found in workers.items()}
    return PlanFigures(
        plan=name,
        ready_s=ready_s,
        prefill_tokens_per_s=prompt_tokens / min(prefill_s),
        decode_tokens_per_s=float(best["decode_tokens_per_s"]),
        compute_ms=best["compute_s"] * per_token_ms,
        network_ms=best["network_s"] * per_token_ms,
        waiting_ms=best["waiting_s"] * per_token_ms,
        bytes_per_token={link: (after[link] - before.get(link, 0)) / (RUNS * new_tokens) for link in sorted(after)},
        # Shards of a site and its workers are paired by size: the process does not say which device it serves.
        workers={
            shard.key: (resident[site].pop(0), shard.memory_bytes)
            for site in plan.sites
            for shard in sorted((s for s in shards if s.site == site), key=lambda s: s.memory_bytes)
        },
    )


def _traffic(workers: Mapping[str, list[int]]) -> dict[str, int]:
    """Bytes so far by "sender -> receiver"; connections between two sites are added up. Empty where nobody counts."""
    try:
        sent = sockets.sent_bytes()
    except (OSError, AttributeError):
        return {}
    total: dict[str, int] = {}
    for ports, (source, target) in sockets.links(dict(workers)).items():
        link = f"{source} -> {target}"
        total[link] = total.get(link, 0) + sent.get(ports, 0)
    return total


def _workers(pid: int) -> list[psutil.Process]:
    below = psutil.Process(pid).children(recursive=True)
    return [process for process in below if any("mesh.runtime.worker" in part for part in process.cmdline())]
