"""The sentences of a plan: why these devices, with the predicted speeds of what was not chosen."""

from __future__ import annotations

from typing import Final

from topology.candidate import Candidate
from topology.constraints import Constraints
from topology.cost import TOKEN_BYTES, attention_bytes, decode_s, kv_bytes, slowest_path, width
from topology.errors import megabytes, ms
from topology.islands import tensor_parallel_rtt_s
from topology.model import ModelSpec
from topology.picture import Picture
from topology.reasons import besides, bottleneck, weighed
from topology.ring import EXACT, turn_s
from topology.search import Search
from topology.solve import Request, Solution

#: Predictions closer than this are called the same.
SAME: Final = 0.01
#: Sets of sites looked at for rivals, at most.
MAX_RIVAL_SETS: Final = 64
#: The same where the chosen plan has many sites, and each set takes long.
FEW_RIVAL_SETS: Final = 12

#: Stages of a ring whose order is not looked for again, to be compared with.
LONG: Final = 32

#: What each objective asks, in words.
WISHES = {
    "latency": "the least predicted latency at any number of sites",
    "fewest_sites": "as few sites as fit, then the least predicted latency",
    "throughput": "throughput over many requests, latency tolerated",
    "first_token": "the least time to the first token",
    "cost": "the least price a token",
    "balanced": "latency and throughput, halving one being worth doubling the other",
}


def why(request: Request, solution: Solution, displaces: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All reasons, the most telling first."""
    search, chosen = solution.search, solution.chosen
    constraints, picture, model = search.constraints, search.picture, search.model
    lines = [_headline(chosen, request.constraints), *_rivals(search, chosen)]
    if search.strategy == "tensor_parallelism":
        lines += _tensor_parallelism(search, chosen)
    lines += _islands(chosen, picture, model, request.context * constraints.requests)
    if len(chosen.fits) > 1:
        lines.append(_ring(search, chosen))
    lines.append(bottleneck(chosen, picture, model))
    lines += weighed(solution)
    lines.append(_memory(chosen, request.context))
    lines += besides(solution, displaces)
    if not solution.reserve:
        lines.append("it uses the reserve: the loss of another site could not be absorbed")
    if constraints.forced:
        lines.append(f"the shape was forced by stages={constraints.stages}, shards={constraints.shards}")
    lines += solution.extra
    if chosen.identity == search.proved:
        lines.append("it is the best of all plans for what was asked: every one was weighed")
    elif not solution.cut_short and not constraints.forced:
        lines.append("it was found by a search that cannot prove it the best; the bound above holds for every plan")
    if solution.cut_short:
        lines.append("the search was cut short by its budget: a better plan may exist")
    return (*lines, *picture.notes)


def describe(candidate: Candidate) -> str:
    """A candidate in a few words: "a/gpu0 + a/gpu1 | b/gpu0 (3.21 ms)"."""
    return f"{candidate.layout} ({ms(candidate.token_s)})"


def _headline(chosen: Candidate, constraints: Constraints) -> str:
    what = {
        "single": "one device",
        "tensor_parallelism": f"tensor parallelism over {len(chosen.fits[0].nodes)} devices",
        "pipeline": f"a pipeline of {len(chosen.fits)} stages",
        "hybrid": f"a pipeline of {len(chosen.fits)} stages with tensor parallelism inside",
    }[chosen.strategy]
    sites = f"{len(chosen.sites)} site" + ("" if len(chosen.sites) == 1 else "s")
    wish = WISHES[constraints.wish]
    return (
        f"{what} on {sites}: {ms(chosen.token_s)} a token predicted, {1 / chosen.token_s:.3g} tokens/s "
        f"({ms(chosen.compute_s)} computing, {ms(chosen.network_s)} network); wanted: {wish}"
    )


def _rivals(search: Search, chosen: Candidate) -> list[str]:
    """The best of each other kind, near at hand: on single sites, on the chosen ones, on these with one more."""
    sites = search.picture.sites
    own = [chosen.sites] if len(chosen.sites) <= FEW_RIVAL_SETS else []  # a long ring in other shapes takes too long
    sets = own + [frozenset([name]) for name in sites]
    if len(chosen.sites) == 1:
        sets += [chosen.sites | {name} for name in sites if name not in chosen.sites]
    del sets[MAX_RIVAL_SETS if len(chosen.sites) <= FEW_RIVAL_SETS else FEW_RIVAL_SETS :]
    kinds = ["single"] if search.strategy == "pipeline" else ["single", "tensor_parallelism"]
    lines = []
    for kind in [*kinds, "pipeline"]:
        if kind == chosen.strategy or search.constraints.forced:
            continue
        found = [search.family(names, kind) for names in sets if kind != "single" or len(names) == 1]
        rivals = [rival for rival in found if rival is not None and rival.strategy in (kind, "hybrid")]
        best = min(rivals, key=lambda rival: rival.cost("latency"), default=None)
        name = {"single": "one device", "tensor_parallelism": "tensor parallelism", "pipeline": "a pipeline"}[kind]
        if best is None:
            if kind == "single":
                lines.append(_no_single(search))
        elif best.identity != chosen.identity:
            if abs(best.token_s / chosen.token_s - 1) < SAME:
                reason = "as fast to within 1 %"
            elif best.token_s < chosen.token_s:
                reason = "faster, but not what was asked for"
            else:
                reason = f"{best.token_s / chosen.token_s:.3g} times as long"
            lines.append(f"the best with {name} would be {describe(best)}, {reason}")
    return lines


def _no_single(search: Search) -> str:
    nodes = [node for name in search.picture.sites for node in search.picture.nodes[name]]
    roomiest = min(nodes, key=lambda node: (-node.usable_bytes, node.key))
    need = search.assembler.least_bytes
    fastest = min(nodes, key=lambda node: node.rank)
    return (
        f"no single device holds the model: it needs {megabytes(need)} and {roomiest.key}, the roomiest, has "
        f"{megabytes(roomiest.usable_bytes)} (one that did, at the speed of {fastest.key}, would read its weights in "
        f"{ms(decode_s(search.model, fastest.speed))})"
    )


def _tensor_parallelism(search: Search, chosen: Candidate) -> list[str]:
    lines: list[str] = []
    only = sorted(name for name in chosen.sites if len(search.picture.nodes[name]) == 1)
    if only:
        lines.append(f"one device, so nothing to split inside: {', '.join(only)}")
    for each in chosen.fits:
        site = each.nodes[0].site
        usable = search.picture.nodes[site]
        if len(each.nodes) == 1 and len(usable) > 1 and not search.constraints.forced:
            wide = search.family(frozenset([site]), "tensor_parallelism")
            rival = f": tensor parallelism there would take {ms(wide.token_s)}" if wide is not None else ""
            lines.append(f"{site} has {len(usable)} devices, but {each.nodes[0].key} alone is predicted faster{rival}")
    return lines


def _islands(chosen: Candidate, picture: Picture, model: ModelSpec, context: int) -> list[str]:
    lines = []
    for each, layers in zip(chosen.fits, chosen.counts, strict=True):
        if len(each.nodes) < 2:
            continue
        copies = sum(width(span) for span in each.kv_heads) - model.kv_heads
        cut = each.kv_heads if len(each.nodes) <= model.kv_heads else each.heads
        groups = " + ".join(f"{node.key} {width(span)}" for node, span in zip(each.nodes, cut, strict=True))
        basis = "measured speed" if each.policy == "speed" else "memory, because shares by speed do not fit"
        worst = slowest_path(picture, each.nodes)
        pays_s = tensor_parallel_rtt_s(model, each.nodes[0].speed, len(each.nodes))
        lines.append(
            f"{'KV-head groups' if cut is each.kv_heads else 'query heads'} by {basis}: {groups}; the round trip "
            f"inside is {ms(worst.rtt_s)}, tensor parallelism pays below {ms(pays_s)}"
        )
        if copies > 0:
            size = layers * copies * (attention_bytes(model, 1, 0) + kv_bytes(model, 1, context))
            lines.append(
                f"{len(each.nodes)} devices share {model.kv_heads} KV heads: with {copies} copies "
                f"of a KV head, {megabytes(size)} of weights and KV cache"
            )
    return lines


def _ring(search: Search, chosen: Candidate) -> str:
    picture, size = search.picture, search.model.activation_bytes
    leads = [each.nodes[0].site for each in chosen.fits]
    pairs = list(zip(leads, [*leads[1:], leads[0]], strict=True))
    total_s = sum(picture.path(a, b).one_way_s for a, b in pairs)
    layers = ", ".join(f"{each.nodes[0].key} {n}" for each, n in zip(chosen.fits, chosen.counts, strict=True))
    guessed = sorted({f"{min(a, b)} - {max(a, b)}" for a, b in pairs if not picture.path(a, b).measured})
    suffix = f"; not measured, a pessimistic guess: {', '.join(guessed)}" if guessed else ""
    stops = leads if len(set(leads)) == len(leads) else [each.nodes[0].key for each in chosen.fits]
    hops = " -> ".join([*stops, stops[0]])
    islands = sorted((each.nodes for each in chosen.fits), key=lambda nodes: [node.rank for node in nodes])
    hop_s = search.assembler.hop_s
    cost, home = (
        [[hop_s(a[0].site, b[0].site, carried) for b in islands] for a in islands] for carried in (size, TOKEN_BYTES)
    )
    orders = search.assembler.rings(islands) if len(islands) <= LONG else []
    least_s = min((turn_s(cost, home, order) for order in orders), default=0.0)
    taken_s = sum(hop_s(a, b, size) for a, b in pairs[:-1]) + hop_s(*pairs[-1], TOKEN_BYTES)
    among = "the least found" if len(islands) > EXACT else "the least of all orders"
    praise = f", {among}" if taken_s <= least_s * (1 + 1e-9) else ""
    return f"the ring {hops} takes {ms(total_s)} a turn{praise}; layers: {layers}{suffix}"


def _memory(chosen: Candidate, context: int) -> str:
    shares = []
    for each, layers in zip(chosen.fits, chosen.counts, strict=True):
        for node, fixed, layer in zip(each.nodes, each.fixed_bytes, each.layer_bytes, strict=True):
            taken, room = (node.real_bytes(size) for size in (fixed + layers * layer, node.usable_bytes))
            shares.append(f"{node.key} {megabytes(taken)} of {megabytes(room)}")
    return f"memory with a KV cache of {context} tokens: {', '.join(shares)}"
