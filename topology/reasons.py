"""Sentences of a plan's reasons that compare figures: the bottleneck, the bound, the front, the next best, the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from topology.archive import alternatives, figures
from topology.bounds import bounds
from topology.candidate import Candidate, coded_bytes
from topology.cost import TOKEN_BYTES
from topology.errors import megabytes, ms
from topology.model import ModelSpec
from topology.picture import Picture
from topology.plan import SLOT

if TYPE_CHECKING:
    from topology.solve import Solution

#: How much more several rings might give before it is worth a sentence.
SEVERAL: Final = 1.25


def bottleneck(chosen: Candidate, picture: Picture, model: ModelSpec) -> str:
    """Which stage or hop takes most of a token, which one limits the rate, and by how much more than the next."""
    stages, hops, carried = [], [], []
    for each, layers in zip(chosen.fits, chosen.counts, strict=True):
        name = " + ".join(node.key for node in each.nodes)
        network_s = layers * each.layer_network_s + each.head_network_s
        stages.append((layers * each.layer_s + each.head_s + network_s, name))
    leads = [each.nodes[0].site for each in chosen.fits]
    if len(leads) > 1:
        codes = chosen.codes or ("",) * len(leads)
        sizes = [*(coded_bytes(model, code) for code in codes[:-1]), TOKEN_BYTES]
        for a, b, size in zip(leads, [*leads[1:], leads[0]], sizes, strict=True):
            hops.append((picture.path(a, b).transfer_s(size), f"the hop {a} -> {b}"))
            carried.append((size / picture.path(a, b).bandwidth, f"the bandwidth {a} -> {b}"))
    if len(stages) == 1:
        what = "its own speed" if len(chosen.fits[0].nodes) == 1 else "its slowest device and its all-reduces"
        return f"the bottleneck is {stages[0][1]} by {what}: all {ms(chosen.token_s)} of a token are spent there"
    longest = max(stages + hops, key=lambda part: (part[0], part[1]))
    line = f"the bottleneck of a token is {longest[1]}: {ms(longest[0])} of {ms(chosen.token_s)}"
    slowest, following = sorted(stages + carried, key=lambda part: (-part[0], part[1]))[:2]
    return (
        f"{line}; of the rate it is {slowest[1]}: {ms(slowest[0])} between tokens, "
        f"{slowest[0] / following[0] - 1:.0%} more than {following[1]}"
    )


def weighed(solution: Solution) -> list[str]:
    """The bound on any plan, the front and where the chosen plan is on it, and the next best plan."""
    search, chosen = solution.search, solution.chosen
    wishes = search.constraints
    best = bounds(search.picture, search.model, search.assembler.context, wishes.requests)
    most, of = (best.rate, "with any number of rings ") if solution.fleet is not None else (best.ring_rate, "")
    lines = [
        f"no plan on these devices takes less than {ms(best.token_s)} a token or {of}gives more than {most:.3g} "
        f"tokens/s: this one takes {max(chosen.token_s / best.token_s - 1, 0.0):.0%} more and gives "
        f"{solution.rate:.3g} tokens/s, {min(solution.rate / most, 1.0):.0%} of that"
    ]
    if wishes.wish == "throughput" and solution.fleet is None and best.rate > most * SEVERAL and wishes.replicas == 1:
        lines.append(
            f"that holds for one ring, which cannot keep more devices busy: with any number of rings at most "
            f"{best.rate:.3g} tokens/s (replicas)"
        )
    front = solution.archive.front
    if len(front) > 1:
        quick, rich = front[0], front[-1]
        ends = (
            f"of {len(front)} plans that none beats in both, the quickest takes {ms(quick.token_s)} a token "
            f"({quick.rate:.3g} tokens/s over many requests) and the one of most throughput {ms(rich.token_s)} "
            f"({rich.rate:.3g} tokens/s)"
        )
        if figures(chosen) not in {figures(each) for each in front} and solution.fleet is None:
            ends += "; the chosen one is beaten in both, but not in what was asked"
        lines.append(ends)
    following = alternatives(solution.archive.best, chosen)[:1]
    lines += [f"the next best plan is {each.layout}: {each.costs}" for each in following]
    return lines


def besides(solution: Solution, displaces: tuple[str, ...]) -> list[str]:
    """Micro-batches, further rings, standbys, price, and who has to give way."""
    chosen, lines = solution.chosen, []
    for stage, code in zip(chosen.stages, chosen.codes, strict=False):
        if code:
            lines.append(
                f"hidden states leave {stage.lead.key} as {code}: bandwidth is the limit there, and codes allow it"
            )
    twice = sorted({node.key for each in chosen.fits for node in each.nodes if SLOT in node.name})
    if twice:
        lines.append(f"the first and the last stage share devices, half of the memory each: {', '.join(twice)}")
    if chosen.in_flight > 1:
        lines.append(f"{chosen.in_flight} requests in flight keep the slowest stage busy")
    if solution.fleet is not None:
        parts = [
            f"{ring.layout} {share:.0%} ({rate:.3g} tokens/s)"
            for ring, share, rate in zip(solution.fleet.rings, solution.fleet.shares, solution.fleet.rates, strict=True)
        ]
        lines.append(f"{len(parts)} rings share the requests: {'; '.join(parts)}")
    for standby in solution.standbys:
        covered = chosen.stages[standby.stage].shards[standby.rank]
        lines.append(f"{standby.key} stands by for {covered.key} with {megabytes(standby.memory_bytes)}")
    if solution.price_per_hour:
        per_million = solution.price_per_hour / 3600 / solution.rate * 1e6
        lines.append(
            f"it costs {solution.price_per_hour:.3g} an hour, {per_million:.3g} for a million tokens at its rate"
        )
    if displaces:
        lines.append(f"nothing fits beside what runs: {', '.join(displaces)} of lower priority must give way")
    return lines
