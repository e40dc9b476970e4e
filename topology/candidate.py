"""From islands to a whole plan: their ring, which comes first, how many layers each holds, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from topology.archive import Archive
from topology.balance import balance
from topology.constraints import CODES, Constraints
from topology.cost import (
    POLICIES,
    PREFILL_TOKENS,
    TOKEN_BYTES,
    Fit,
    all_reduces_s,
    fit,
    kv_bytes,
    least_bytes,
    overhead_s,
)
from topology.model import ModelSpec
from topology.objective import LIMITED_SLACKS, SLACKS, Key, excess, key
from topology.picture import Node, Path, Picture
from topology.plan import Choice, Plan, Predicted, Shard, Stage, device_of
from topology.ring import EXACT, LISTED, rings

Island = tuple[Node, ...]

#: Places where a ring may begin that are tried, at most; and stages of all that are tried, of long rings.
ROTATIONS: Final = 12
ROTATED: Final = 192


@dataclass(frozen=True)
class Candidate:
    """A complete assignment: fits in ring order, layers of each, and its predicted figures in seconds."""

    fits: tuple[Fit, ...]
    counts: tuple[int, ...]
    compute_s: float
    network_s: float
    first_token_s: float
    slowest_s: float
    price_per_hour: float = 0.0
    requests: int | None = None
    excess: float = 0.0
    codes: tuple[str, ...] = ()

    @property
    def token_s(self) -> float:
        """Predicted seconds a token, batch of one."""
        return self.compute_s + self.network_s

    @cached_property
    def sites(self) -> frozenset[str]:
        """Names of the sites that take part."""
        return frozenset(node.site for each in self.fits for node in each.nodes)

    @cached_property
    def identity(self) -> tuple[object, ...]:
        """Which devices hold which layers, to settle ties the same way everywhere."""
        return tuple((tuple(node.key for node in f.nodes), n) for f, n in zip(self.fits, self.counts, strict=True))

    @property
    def rate(self) -> float:
        """Predicted tokens/s over many requests; over `requests` of them where that is known."""
        saturated = 1 / self.slowest_s
        return saturated if self.requests is None else min(saturated, self.requests / self.token_s)

    @property
    def price_per_token(self) -> float:
        """Price of one token at that rate."""
        return self.price_per_hour / 3600 / self.rate

    def cost(self, wish: str) -> Key:
        """Sorts the better plan first, by what is wished: see `topology.objective`."""
        return key(self, wish)

    @property
    def layout(self) -> str:
        """The devices in a few words: "a/gpu0 + a/gpu1 | b/gpu0"."""
        return " | ".join(" + ".join(node.key for node in each.nodes) for each in self.fits)

    @property
    def in_flight(self) -> int:
        """Micro-batches under way that keep the slowest stage busy, by Little's law."""
        return max(math.ceil(self.token_s / self.slowest_s * (1 - 1e-9)), 1)

    def choice(self, *, chosen: bool = False, costs: str = "") -> Choice:
        """Its figures, for a list of plans that were weighed."""
        return Choice(
            layout=self.layout,
            counts=self.counts,
            token_ms=self.token_s * 1e3,
            tokens_per_s=self.rate,
            first_token_ms=self.first_token_s * 1e3,
            price_per_hour=self.price_per_hour,
            chosen=chosen,
            costs=costs,
        )

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages as peers exchange them."""
        stages: list[Stage] = []
        start = 0
        for each, layers in zip(self.fits, self.counts, strict=True):
            shards = tuple(
                Shard(
                    site=node.site,
                    device=node.name,
                    kv_heads=each.kv_heads[rank],
                    columns=each.columns[rank],
                    vocabulary=each.vocabulary[rank],
                    memory_bytes=node.real_bytes(each.fixed_bytes[rank] + layers * each.layer_bytes[rank]),
                    dtype=node.dtype,
                    heads=each.heads[rank],
                )
                for rank, node in enumerate(each.nodes)
            )
            code = self.codes[len(stages)] if self.codes else ""
            stages.append(Stage(start, start + layers, shards, code))
            start += layers
        return tuple(stages)

    def plan(self, model: ModelSpec, context: int, why: tuple[str, ...], objective: str = "fewest_sites") -> Plan:
        """The value that peers exchange, as yet without standbys, replicas and what was not chosen."""
        predicted = Predicted(
            token_ms=self.token_s * 1e3,
            compute_ms=self.compute_s * 1e3,
            network_ms=self.network_s * 1e3,
            first_token_ms=self.first_token_s * 1e3,
            tokens_per_s=1 / self.token_s,
            saturated_tokens_per_s=self.rate,
            price_per_hour=self.price_per_hour,
        )
        return Plan(
            model,
            self.strategy,
            context,
            self.stages,
            predicted,
            why,
            objective=objective,
            concurrency=self.requests or 1,
            in_flight=self.in_flight,
        )

    @property
    def strategy(self) -> str:
        """What the plan does: "single", "tensor_parallelism", "pipeline" or "hybrid"."""
        widths = [len(each.nodes) for each in self.fits]
        if len(widths) == 1:
            return "single" if widths[0] == 1 else "tensor_parallelism"
        return "pipeline" if max(widths) == 1 else "hybrid"


class Assembler:
    """Builds candidates for one picture, model and set of constraints, and remembers what it worked out.

    `work` counts what was spent, in units of about 0.1 ms, so that a search can stop without looking at a clock.
    """

    def __init__(self, picture: Picture, model: ModelSpec, context: int, constraints: Constraints) -> None:
        self.picture, self.model, self.context, self.constraints = picture, model, context, constraints
        self.least_bytes = least_bytes(model, context, constraints.requests)
        self.archive = Archive(constraints.wish)
        self.work = 0.0
        self._fits: dict[tuple[Island, str, bool, bool, int], Fit | None] = {}
        self._like: dict[tuple[object, ...], Fit | None] = {}
        self._alike: dict[tuple[object, Path], Fit | None] = {}
        self._ladders: dict[tuple[Island, str, bool, bool], tuple[Fit, ...]] = {}
        self._rings: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        self._hops: dict[tuple[str, str, float], float] = {}

    def best(self, islands: Sequence[Island]) -> Candidate | None:
        """The best candidate that uses exactly these islands, or None where they cannot hold the model together."""
        if len(islands) > self.model.layers or self._too_small(islands):
            return None
        islands = sorted(islands, key=lambda island: [node.rank for node in island])
        policies = [policy for policy in POLICIES if self._could_hold(islands, policy)]
        for ring in self.rings(islands) if policies else []:
            for policy in policies:
                # Where a ring begins decides little but who holds the embedding and the head.
                begins = range(0, len(ring), max(-(-len(ring) // ROTATIONS), len(ring) ** 2 // ROTATED))
                rotations = [ring[i:] + ring[:i] for i in begins]
                found = [self.ordered([islands[i] for i in order], policy) for order in rotations]
                good = [candidate for candidate in found if candidate is not None]
                if good:
                    return min(good, key=lambda candidate: candidate.cost(self.constraints.wish))
        return None

    def rings(self, islands: Sequence[Island]) -> list[tuple[int, ...]]:
        """Orders of the islands with the least latency first."""
        leads = tuple(island[0].site for island in islands)
        if leads not in self._rings:
            size = self.model.activation_bytes
            cost = [[self.hop_s(a, b, size) for b in leads] for a in leads]
            home = [[self.hop_s(a, b, TOKEN_BYTES) for b in leads] for a in leads] if len(leads) <= LISTED else None
            self._rings[leads] = rings(cost, home)
            self.work += len(leads) ** 2 * (2 ** len(leads) / 256 if len(leads) <= EXACT else 0.08)
        return self._rings[leads]

    def hop_s(self, source: str, target: str, size_bytes: float) -> float:
        """Seconds for `size_bytes` from the lead at one site to the lead at another, which has waited for them."""
        key = (source, target, size_bytes)
        if key not in self._hops:
            self._hops[key] = self.picture.path(source, target).transfer_s(size_bytes) + self.picture.waking_s(target)
        return self._hops[key]

    def ordered(
        self, islands: Sequence[Island], policy: str, *, counts: Sequence[int] | None = None
    ) -> Candidate | None:
        """The candidate with the islands in this very order, and this many layers each where `counts` says so."""
        last = len(islands) - 1
        self.work += 0.1 * len(islands)
        fits = [self._fit(island, policy, index == 0, index == last) for index, island in enumerate(islands)]
        if counts is not None and policy == "speed":  # shares that are not the fastest may hold what is asked for
            places = zip(fits, islands, counts, range(len(islands)), strict=True)
            fits = [
                each if each is not None and each.capacity >= n else self._fit(island, policy, i == 0, i == last, n)
                for each, island, n, i in places
            ]
        good = [each for each in fits if each is not None]
        if len(good) != len(fits) or not self._shape_is_wanted(good):
            return None
        capacity = [each.capacity for each in good]
        if counts is None:
            return self._shared_out(tuple(good), capacity)
        if any(not 1 <= n <= most for n, most in zip(counts, capacity, strict=True)):
            return None
        return self.priced(tuple(good), tuple(counts))

    def _shared_out(self, fits: tuple[Fit, ...], capacity: Sequence[int]) -> Candidate | None:
        """The candidate with the best split of the layers that is tried for the objective, and for limits it misses."""
        wish = self.constraints.wish
        # An all-reduce holds a stage up just as computing does.
        layer_s = [each.layer_s + each.layer_network_s for each in fits]
        extra_s = [each.head_s + each.head_network_s for each in fits]
        if wish == "first_token":
            layer_s = [each.prefill_layer_s + each.prefill_layer_network_s for each in fits]
        tried: set[tuple[int, ...]] = set()
        best: Candidate | None = None
        for slacks in (SLACKS[wish], LIMITED_SLACKS):
            for slack in slacks:
                self.work += 0.3
                counts = balance(layer_s, extra_s, capacity, self.model.layers, slack=slack)
                if counts is None:
                    return None
                if tuple(counts) not in tried:
                    tried.add(tuple(counts))
                    candidate = self.priced(fits, tuple(counts))
                    if candidate is None:
                        return None  # a neighbour out of reach, however the layers are shared out
                    best = candidate if best is None or candidate.cost(wish) < best.cost(wish) else best
            if best is not None and best.excess == 0:
                return best
        return best

    def _fit(self, island: Island, policy: str, first: bool, last: bool, layers: int = 0) -> Fit | None:
        key = (island, policy, first, last, layers)
        if key not in self._fits:
            like = self._likeness(island) if policy != "roomy" else None  # "roomy" orders devices by their names too
            if like is not None and (like, *key[1:]) in self._like:
                known = self._like[like, *key[1:]]
                self._fits[key] = known and replace(known, nodes=island)
                return self._fits[key]
            self._fits[key] = fit(
                self.picture,
                self.model,
                self.context,
                island,
                policy,
                first=first,
                last=last,
                requests=self.constraints.requests,
                layers=layers,
            )
            if like is not None:
                self._like[like, *key[1:]] = self._fits[key]
        return self._fits[key]

    def _likeness(self, island: Island) -> object:
        """What the shares of an island within one site depend on; None of an island across sites."""
        site = island[0].site
        if any(node.site != site for node in island):
            return None
        figures = tuple((n.speed, n.flops, n.usable_bytes, n.pace) for n in island)
        return figures, self.picture.path(site, site) if len(island) > 1 else None

    def middle(self, island: Island) -> Fit | None:
        """The island in the middle of a ring, by speed or else so that it holds most; devices alike share an answer."""
        away = island[0].site
        key = tuple((node.site != away, node.speed, node.flops, node.usable_bytes, node.pace) for node in island)
        path = self.picture.path(island[0].site, island[0].site)
        if len({node.site for node in island}) > 1:
            return self._fit(island, "speed", False, False) or self._fit(island, "memory", False, False)
        if (key, path) not in self._alike:
            fits = [self._fit(island, policy, False, False) for policy in ("speed", "memory")]
            self._alike[key, path] = max((f for f in fits if f), key=lambda f: f.capacity, default=None)
        return self._alike[key, path]

    def roughly(self, island: Island) -> tuple[int, float]:
        """Layers that an island holds, and seconds of one, if it could be shared out in any parts: soon told."""
        network_s = all_reduces_s(self.picture, self.model, island)
        if not math.isfinite(network_s):
            return 0, math.inf
        weights_s = self.model.layer_bytes / math.fsum(node.speed for node in island)
        return self._most_layers(island), weights_s + overhead_s(island) + network_s

    def ladder(self, island: Island, policy: str, first: bool, last: bool) -> tuple[Fit, ...]:
        """Ways to share an island out, the fastest first, each slower than the one before and for more layers.

        `policy` is "speed" or "prefill". The lead is the island's first device.
        """
        key = (island, policy, first, last)
        if key not in self._ladders:
            steps: list[Fit] = []
            layers, most = 0, self._most_layers(island)
            while layers <= most:
                self.work += 1
                each = self._fit(island, policy, first, last, layers)
                if each is not None:
                    steps.append(each)
                    layers = each.capacity + 1
                elif layers:
                    break
                else:
                    layers = 1  # the shares that are fastest do not hold a single layer
            self._ladders[key] = tuple(steps)
        return self._ladders[key]

    def _most_layers(self, island: Island) -> int:
        """No more layers than these fit, however an island is shared out."""
        model = self.model
        layer = model.layer_bytes + kv_bytes(model, model.kv_heads, self.context * self.constraints.requests)
        return min(sum(node.usable_bytes for node in island) // layer, model.layers)

    def _could_hold(self, islands: Sequence[Island], policy: str) -> bool:
        """Whether all layers would fit without an embedding or a head: rules most impossible combinations out."""
        self.work += 0.1 * len(islands)
        fits = [self._fit(island, policy, False, False) for island in islands]
        return all(fits) and sum(each.capacity for each in fits if each is not None) >= self.model.layers

    def _too_small(self, islands: Sequence[Island]) -> bool:
        return sum(node.usable_bytes for island in islands for node in island) < self.least_bytes

    def _shape_is_wanted(self, fits: Sequence[Fit]) -> bool:
        asked, origin = self.constraints, self.picture.origin
        if asked.private and any(node.site != origin for each in (fits[0], fits[-1]) for node in each.nodes):
            return False
        if asked.stages is not None and len(fits) != asked.stages:
            return False
        return all(asked.width(i) in (None, len(each.nodes)) for i, each in enumerate(fits))

    def priced(self, fits: tuple[Fit, ...], counts: tuple[int, ...]) -> Candidate | None:
        """The candidate of these fits in this order, with so many layers each; None where neighbours cannot speak."""
        model = self.model
        self.work += 1
        pairs = list(zip(fits, counts, strict=True))
        leads = [each.nodes[0].site for each in fits]
        around = list(zip(leads, [*leads[1:], leads[0]], strict=True)) if len(leads) > 1 else []
        codes = tuple(self._code(a, b) for a, b in around[:-1]) + ("",) * min(len(around), 1)
        # What goes back to the first stage is a token's id; between stages go hidden states.
        sizes = [coded_bytes(model, code) for code in codes[:-1]] + [float(TOKEN_BYTES)] * min(len(codes), 1)
        hops_s = [self.hop_s(a, b, size) for (a, b), size in zip(around, sizes, strict=True)]
        if not all(map(math.isfinite, hops_s)):
            return None  # a lead other than the one the ring was made for cannot reach its neighbour
        tokens = min(PREFILL_TOKENS, self.context)
        prefill_hops_s = [self.hop_s(a, b, tokens * size) for (a, b), size in zip(around[:-1], sizes[:-1], strict=True)]
        waking_s = [self.picture.waking_s(target) for _, target in around]
        head_s = math.fsum(each.head_s + each.head_network_s for each in fits)
        carried_s = [size / self.picture.path(a, b).bandwidth for (a, b), size in zip(around, sizes, strict=True)]
        stage_s: dict[str, float] = {}
        for each, n in pairs:  # a device that holds the first and the last stage works for both
            lead = each.nodes[0]
            key = f"{lead.site}/{device_of(lead.name)}"
            spent_s = n * (each.layer_s + each.layer_network_s) + each.head_s + each.head_network_s
            stage_s[key] = stage_s.get(key, 0.0) + spent_s
        candidate = Candidate(
            fits=fits,
            counts=counts,
            compute_s=math.fsum([n * each.layer_s + each.head_s for each, n in pairs] + waking_s),
            network_s=math.fsum(
                [n * each.layer_network_s + each.head_network_s for each, n in pairs]
                + [hop_s - more_s for hop_s, more_s in zip(hops_s, waking_s, strict=True)]
            ),
            first_token_s=math.fsum(
                [n * (each.prefill_layer_s + each.prefill_layer_network_s) for each, n in pairs] + prefill_hops_s
            )
            + head_s,
            slowest_s=max([*stage_s.values(), *carried_s]),
            price_per_hour=self.picture.price_per_hour(node for each in fits for node in each.nodes),
            requests=self.constraints.concurrency,
            codes=codes if any(codes) else (),
        )
        missed = excess(candidate, self.constraints)
        if missed:
            return replace(candidate, excess=missed)
        self.archive.add(candidate)
        return candidate

    def _code(self, source: str, target: str) -> str:
        """The smallest of the allowed codes where a prompt spends longer on the wire than on the way, else none."""
        if not self.constraints.codes or source == target:
            return ""
        path, plain = self.picture.path(source, target), self.model.activation_bytes
        smaller = [code for code in CODES if code in self.constraints.codes and coded_bytes(self.model, code) < plain]
        bound_by_latency = min(PREFILL_TOKENS, self.context) * plain / path.bandwidth <= path.one_way_s
        return "" if bound_by_latency or not smaller else min(smaller, key=lambda code: coded_bytes(self.model, code))

    def share(self, other: Assembler) -> None:
        """Use what another assembler of the same picture, model, context and number of requests has worked out."""
        self._fits, self._rings, self._hops = other._fits, other._rings, other._hops
        self._ladders, self._alike, self._like = other._ladders, other._alike, other._like


def coded_bytes(model: ModelSpec, code: str) -> float:
    """Bytes of one token's hidden state in a code; as it is where `code` is empty."""
    return model.hidden * CODES[code] if code else float(model.activation_bytes)
