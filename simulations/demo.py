"""`mesh demo`: three sites, one real model over all three, one of them killed in mid-sentence.

Everything is real but the distance: three daemons on loopback, each with a device too small for the model, with the
round trips between three cloud regions added by the peers themselves. What comes out is compared with a run of the
whole model in one process, token by token; only equality is success.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import mesh
from mesh.cli.tables import say, show_plan, show_topology, table
from simulations.processes import Fleet, SiteSpec, ending_on_signals, wait_converged
from simulations.reference import reference_tokens
from simulations.regions import rtt_ms

MODEL = "SmolLM2-135M-Instruct"
REGIONS = ("frankfurt", "london", "virginia")
#: The peer that the demo talks to. It owns the job, so it is the one that must live.
OWNER = "frankfurt"
#: The model needs 651 MB of float32 weights and 94 MB of KV cache. Four fifths of three such devices hold that (the
#: rest is kept back for the loss of a site), four fifths of two do not, and the whole of two does.
DEVICE = "cpu,threads=1,memory=400MiB"
PROMPT = "Why is the sky blue? Answer in one sentence, then tell a short story about it."
#: Tokens before the kill: enough for a steady rate, few enough that most of the answer is still to come.
KILL_AFTER = 24
#: A wait of so many times the usual one is the recovery, and is shown.
STALLED = 2.5
CONVERGE_TIMEOUT_S = 90.0
READY_TIMEOUT_S = 180.0
IDLE_TIMEOUT_S = 90.0


def command(arguments: Sequence[str]) -> int:
    """Run the demo as `mesh demo ARGUMENTS`. Returns 0 only if the tokens equal the reference's."""
    options = _parser().parse_args(list(arguments))
    model = _model_folder(options.model)
    with ending_on_signals():
        outcome = _run(model, options)
    if options.json is not None:
        options.json.write_text(json.dumps(outcome.to_dict(), indent=2) + "\n")
    _summary(outcome)
    return 0 if outcome.success else 1


@dataclass
class Outcome:
    """What the demo saw. Times in seconds; `arrivals` holds the moment of each token at the client."""

    sites: list[dict[str, Any]]
    plan: mesh.Plan
    killed_site: str
    plan_after: mesh.Plan | None = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    killed_at: int = 0
    reference: list[int] = field(default_factory=list)
    ready_s: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether the site was killed with tokens still to come."""
        return 0 < self.killed_at < len(self.tokens)

    @property
    def stall_s(self) -> float:
        """The longest the client waited for a token from the kill on."""
        return max(self._gaps, default=0.0)

    @property
    def tokens_per_s(self) -> float:
        """Decode rate over the three sites, before the kill."""
        return _rate(self.arrivals[: self.killed_at])

    @property
    def tokens_per_s_after(self) -> float:
        """Decode rate over the sites that were left, from the longest wait on."""
        gaps = self._gaps
        return _rate(self.arrivals[len(self.arrivals) - len(gaps) + gaps.index(max(gaps)) :]) if gaps else 0.0

    @property
    def _gaps(self) -> list[float]:
        """The waits between one token and the next, from the last before the kill on."""
        moments = self.arrivals[max(0, self.killed_at - 1) :]
        return [later - earlier for earlier, later in pairwise(moments)]

    @property
    def matches_reference(self) -> bool:
        """Whether every token is the one that the whole model gives."""
        return bool(self.tokens) and self.tokens == self.reference

    @property
    def success(self) -> bool:
        """A site was lost in mid-stream, and the answer does not show it."""
        return self.killed and self.matches_reference

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` writes."""
        return {
            "sites": self.sites,
            "plan": self.plan.to_dict(),
            "plan_after": None if self.plan_after is None else self.plan_after.to_dict(),
            "text": self.text,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_after": self.tokens_per_s_after,
            "killed_site": self.killed_site,
            "killed_after_tokens": self.killed_at,
            "stall_s": self.stall_s,
            "submit_to_ready_s": self.ready_s,
            "reference_tokens": self.reference,
            "matches_reference": self.matches_reference,
        }


def _run(model: Path, options: argparse.Namespace) -> Outcome:
    sites = [SiteSpec(region, (DEVICE,), region) for region in REGIONS]
    pairs = {frozenset((a, b)): rtt_ms(a, b) for a in REGIONS for b in REGIONS if a < b}
    messages = [{"role": "user", "content": options.prompt}]
    _title(f"Three sites on this machine, as far apart as {', '.join(REGIONS)}")
    with Fleet(sites, rtts_ms=pairs, settings={"transport": options.transport}) as fleet:
        started = time.monotonic()
        snapshot = wait_converged(fleet, OWNER, CONVERGE_TIMEOUT_S)
        say(f"They found and measured each other {time.monotonic() - started:.1f} s after they were started.")
        show_topology(snapshot)
        with mesh.connect(fleet.address(OWNER)) as client:
            _title(f"{MODEL} over them, in float32")
            started = time.monotonic()
            job = client.submit(model, "auto", {"dtype": "float32"})
            try:
                job.wait(READY_TIMEOUT_S)
                plan = job.plan
                assert plan is not None, "a ready job has a plan"
                outcome = Outcome(_sites(snapshot), plan, _victim(plan), ready_s=time.monotonic() - started)
                show_plan(plan)
                say(f"Ready {outcome.ready_s:.1f} s after it was submitted.")
                _title(f"{options.prompt}")
                _stream(job, messages, options.max_tokens, fleet, outcome)
                outcome.plan_after = job.plan
            finally:
                job.cancel()
    _title("The whole model in one process, for comparison (transformers, float32, greedy)")
    request = {"prompt": messages, "max_tokens": options.max_tokens}
    (outcome.reference,) = reference_tokens(str(model), [request])
    return outcome


def _stream(job: mesh.Job, messages: list[dict[str, str]], max_tokens: int, fleet: Fleet, outcome: Outcome) -> None:
    """Print the answer as it comes, and kill a site in the middle of it."""
    # What comes between the kill and the recovery was under way already; then the stream stands still.
    stalled = False
    with job.stream(messages, max_tokens=max_tokens, idle_timeout_s=IDLE_TIMEOUT_S) as stream:
        for chunk in stream:
            now = time.monotonic()
            if outcome.killed_at and not stalled and now - outcome.arrivals[-1] > STALLED / outcome.tokens_per_s:
                stalled = True
                print(f"--- goes on {now - outcome.arrivals[-1]:.1f} s after the last token", flush=True)
            outcome.tokens += chunk.token_ids
            outcome.arrivals += [now] * len(chunk.token_ids)
            outcome.text += chunk.text
            print(chunk.text, end="", flush=True)
            if not outcome.killed_at and len(outcome.tokens) >= KILL_AFTER:
                fleet.kill(outcome.killed_site)
                outcome.killed_at = len(outcome.tokens)
                print(f"\n--- kill -9 {outcome.killed_site}, {len(outcome.tokens)} tokens in", flush=True)
    print(flush=True)


def _victim(plan: mesh.Plan) -> str:
    """The site to kill: the last of the ring but for the owner. It is the one that samples, where it can be."""
    others = [site for site in reversed(plan.ring) if site != OWNER]
    if not others:
        raise mesh.MeshError(f"the plan uses {OWNER} alone, so there is no site to lose: {'; '.join(plan.why)}")
    return others[0]


def _summary(outcome: Outcome) -> None:
    after = outcome.plan_after
    verdict = "equal" if outcome.matches_reference else "DIFFERENT"
    if not outcome.matches_reference:
        first = next(
            (i for i, pair in enumerate(zip(outcome.tokens, outcome.reference, strict=False)) if pair[0] != pair[1]),
            min(len(outcome.tokens), len(outcome.reference)),
        )
        verdict += f" from token {first} on ({len(outcome.tokens)} tokens, {len(outcome.reference)} expected)"
    rows = [
        ["ring before", " -> ".join(outcome.plan.ring)],
        ["ring after", " -> ".join(after.ring) if after else "-"],
        ["tokens", str(len(outcome.tokens))],
        ["tokens/s before", f"{outcome.tokens_per_s:.1f} (predicted {outcome.plan.predicted.tokens_per_s:.1f})"],
        ["tokens/s after", f"{outcome.tokens_per_s_after:.1f}"],
        [
            "killed",
            f"{outcome.killed_site} after {outcome.killed_at} tokens" if outcome.killed else "NOT IN MID-STREAM",
        ],
        ["stall", f"{outcome.stall_s:.1f} s"],
        ["tokens against the whole model", verdict],
    ]
    print()
    table(["summary", ""], rows)
    sys.stdout.flush()


def _sites(snapshot: mesh.Snapshot) -> list[dict[str, Any]]:
    """Each site with its devices and its measured round trips."""
    document = snapshot.to_dict()
    links = document["links"]
    return [
        {
            **site,
            "rtt_ms": {link["target"]: link["rtt_s"] * 1e3 for link in links if link["source"] == site["name"]},
        }
        for site in document["sites"]
    ]


def _rate(moments: Sequence[float]) -> float:
    span = moments[-1] - moments[0] if len(moments) > 1 else 0.0
    return (len(moments) - 1) / span if span > 0 else 0.0


def _model_folder(given: Path | None) -> Path:
    places = (
        [given]
        if given is not None
        else [Path.cwd() / ".models" / MODEL, Path(__file__).parents[1] / ".models" / MODEL]
    )
    for place in places:
        if place.exists():
            return place.resolve()
    raise mesh.ModelError(f"no model at {places[0]}: `make setup` puts {MODEL} there, --model names another place")


def _title(text: str) -> None:
    say(f"\n== {text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mesh demo", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen as JSON")
    parser.add_argument("--model", type=Path, metavar="PATH", help=f"folder or .gguf file [default: .models/{MODEL}]")
    parser.add_argument("--prompt", default=PROMPT, help="what to ask")
    parser.add_argument("--max-tokens", type=int, default=96, metavar="N", help="length of the answer [default: 96]")
    parser.add_argument("--transport", choices=("auto", "tcp", "ucx"), default="auto", help="how tensors travel")
    return parser
