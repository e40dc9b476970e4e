"""Planning again without moving more than needed: candidates that leave what is loaded where it is.

A job that loses a site should not shuffle weights between those that remain for a few per cent of speed: every moved
layer is read again while the user waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from topology.candidate import Candidate, Island
from topology.cost import POLICIES, attention_bytes, mlp_bytes, width
from topology.fold import halves
from topology.model import ModelSpec
from topology.objective import value
from topology.picture import UNMEASURED_BANDWIDTH, Node
from topology.plan import Plan, device_of
from topology.search import Search

#: A plan that keeps more may be this much worse than the best: what calibration repeats to, twice over.
TOLERANCE: Final = 0.10
#: The same for a plan that keeps everything which is still there: a drift of 10 % up of what it uses and of 10 % down
#: of what it does not (1.1 / 0.9) moves nothing.
STAY: Final = 0.25
#: What a better plan gains is counted over this long, and weighed against the time that moving weights takes.
HORIZON_S: Final = 600.0
#: Places for a boundary between two surviving stages that are tried, where several spans were lost at once.
_SPLITS: Final = 3
#: Stages of all candidates that are tried together, of either kind; and candidates at least. A user waits.
_STAGES: Final = 600
_LEAST: Final = 8


def kept_bytes(candidate: Candidate, previous: Plan) -> int:
    """Layer weight bytes that are already where the candidate wants them."""
    return sum(kept_by_device(candidate, previous).values())


def kept_by_device(candidate: Candidate, previous: Plan) -> dict[str, int]:
    """The same by `site/device`."""
    model = previous.model
    held = {
        shard.key: (stage.start, stage.end, shard.kv_heads, shard.columns)
        for stage in previous.stages
        for shard in stage.shards
    }
    for standby in previous.standbys:
        stage = previous.stages[standby.stage]
        shard = stage.shards[standby.rank]
        held[standby.key] = (stage.start, stage.end, shard.kv_heads, shard.columns)
    total: dict[str, int] = {}
    start = 0
    for each, layers in zip(candidate.fits, candidate.counts, strict=True):
        for rank, node in enumerate(each.nodes):
            if node.key in held:
                old_start, old_end, kv_heads, columns = held[node.key]
                common = _overlap((start, start + layers), (old_start, old_end))
                groups = _overlap(each.kv_heads[rank], kv_heads)
                total[node.key] = common * (
                    attention_bytes(model, groups) + mlp_bytes(model, _overlap(each.columns[rank], columns))
                )
        start += layers
    return total


def kept(search: Search, previous: Plan, best: Candidate) -> list[Candidate]:
    """Candidates in the previous ring's order: survivors alone, or with unused sites' islands in the lost places."""
    if not _same_shape(previous.model, search.model):
        return []
    islands = [_surviving(search, stage.shards, previous) for stage in previous.stages]
    spans = [stage.end - stage.start for stage in previous.stages]
    found: list[Candidate | None] = []
    helped = _helped(search, previous)
    if all(helped):
        found += _all(search, [island for island in helped if island], spans)
    if all(islands):
        found += _all(search, [island for island in islands if island], spans)
    elif any(islands):
        most = max(_STAGES // len(islands), _LEAST)
        for counts in itertools.islice(_stretched(islands, spans), most):
            found += _all(search, [island for island in islands if island], counts)
        filled = itertools.islice(_filled(search, islands, best), most)
        found += [c for choice in filled for c in _all(search, choice, spans)]
    limit = search.constraints.max_sites
    good = [c for c in found if c is not None and search.meets(c) and (limit is None or len(c.sites) <= limit)]
    return sorted(good, key=lambda candidate: candidate.cost(search.constraints.wish))


def steadiest(
    search: Search, best: Candidate, candidates: Sequence[Candidate], previous: Plan
) -> tuple[Candidate, tuple[str, ...]]:
    """The candidate that keeps most in place among those within the tolerance of the best, and a sentence on it.

    What the best plan would move beyond what another moves adds to that other's tolerance: its seconds over
    `HORIZON_S`. A plan that keeps everything that is still there has the larger tolerance `STAY`: leaving it loses
    the KV caches as well.
    """
    wish = search.constraints.wish
    whole = search.model.layers * (
        attention_bytes(search.model, search.model.kv_heads) + mlp_bytes(search.model, search.model.intermediate)
    )
    present = set(_nodes(search, previous))
    left = sum(size for key, size in _held_bytes(previous).items() if key in present)
    moving_s = _moving_s(search, best, previous)

    def near(candidate: Candidate) -> bool:
        everything = kept_bytes(candidate, previous) >= left and previous.objective == wish
        tolerance = STAY if everything else TOLERANCE
        tolerance += max(moving_s - _moving_s(search, candidate, previous), 0.0) / HORIZON_S
        return value(candidate, wish) <= value(best, wish) * (1 + tolerance)

    close = [best, *filter(near, candidates)]
    chosen = max(close, key=lambda c: (kept_bytes(c, previous), -close.index(c)))
    line = f"{kept_bytes(chosen, previous) / whole:.0%} of the layer weights stay where they are"
    if chosen is not best:
        worse = max(value(chosen, wish) / value(best, wish) - 1, 0.0)
        line += (
            f": the best plan is {worse:.1%} better but keeps {kept_bytes(best, previous) / whole:.0%}, "
            f"it would have to move weights for {moving_s:.3g} s"
        )
    return chosen, (line,)


def _moving_s(search: Search, candidate: Candidate, previous: Plan) -> float:
    """Seconds until every device has the layer weights that it lacks, one after the other over the widest paths."""
    held = kept_by_device(candidate, previous)
    sources = [name for name in previous.sites if name in search.picture.nodes] or list(search.picture.sites)
    took = 0.0
    widest: dict[str, float] = {}
    for each, layers in zip(candidate.fits, candidate.counts, strict=True):
        for rank, node in enumerate(each.nodes):
            groups, columns = width(each.kv_heads[rank]), width(each.columns[rank])
            size = layers * (attention_bytes(search.model, groups) + mlp_bytes(search.model, columns))
            if node.site not in widest:
                paths = [search.picture.path(name, node.site) for name in sources]
                reachable = (path.bandwidth for path in paths if path.reachable)
                widest[node.site] = max(reachable, default=UNMEASURED_BANDWIDTH)
            took += (size - held.get(node.key, 0)) / widest[node.site]
    return took


def _held_bytes(previous: Plan) -> dict[str, int]:
    """Layer weight bytes by the `site/device` that serves them."""
    model = previous.model
    return {
        shard.key: (stage.end - stage.start)
        * (attention_bytes(model, width(shard.kv_heads)) + mlp_bytes(model, width(shard.columns)))
        for stage in previous.stages
        for shard in stage.shards
    }


def _surviving(search: Search, shards: Sequence[object], previous: Plan) -> Island | None:
    """The devices of a stage that are still usable, or None."""
    nodes = _nodes(search, previous)
    keys = [getattr(shard, "key", "") for shard in shards]
    return tuple(sorted((nodes[key] for key in keys if key in nodes), key=lambda node: node.rank)) or None


def _helped(search: Search, previous: Plan) -> list[Island | None]:
    """The devices of every stage that are still usable, standbys in the places of those that are not."""
    present = set(_nodes(search, previous))
    instead = {(standby.stage, standby.rank): standby for standby in previous.standbys if standby.key in present}
    return [
        _surviving(
            search,
            [
                shard if shard.key in present else instead.get((index, rank), shard)
                for rank, shard in enumerate(stage.shards)
            ],
            previous,
        )
        for index, stage in enumerate(previous.stages)
    ]


def _nodes(search: Search, previous: Plan) -> dict[str, Node]:
    """Usable devices by `site/device`; those that the previous plan uses twice as two halves."""
    nodes = {node.key: node for name in search.picture.sites for node in search.picture.nodes[name]}
    for shard in previous.shards:
        whole = nodes.get(f"{shard.site}/{device_of(shard.device)}")
        if whole is not None and shard.device != whole.name:
            for (half,) in halves((whole,)):
                nodes[half.key] = half
    return nodes


def _same_shape(old: ModelSpec, new: ModelSpec) -> bool:
    return (old.layers, old.hidden, old.heads, old.kv_heads, old.intermediate, old.dtype) == (
        new.layers,
        new.hidden,
        new.heads,
        new.kv_heads,
        new.intermediate,
        new.dtype,
    )


def _all(search: Search, islands: Sequence[Island], counts: Sequence[int]) -> list[Candidate | None]:
    return [search.assembler.ordered(islands, policy, counts=counts) for policy in POLICIES]


def _stretched(islands: Sequence[Island | None], spans: Sequence[int]) -> Iterator[list[int]]:
    """Layers of the survivors when their neighbours in the ring's order take over what was lost."""
    survivors = [index for index, island in enumerate(islands) if island]
    gaps = []  # (index among survivors of the stage before, lost layers, choices for what that stage takes)
    base = [spans[index] for index in survivors]
    base[0] += sum(spans[: survivors[0]])
    base[-1] += sum(spans[survivors[-1] + 1 :])
    for place, (left, right) in enumerate(itertools.pairwise(survivors)):
        lost = sum(spans[left + 1 : right])
        if lost:
            gaps.append((place, lost))
    every = len(gaps) <= 1
    choices = [
        range(lost + 1) if every else sorted({lost * i // (_SPLITS - 1) for i in range(_SPLITS)}) for _, lost in gaps
    ]
    for taken in itertools.islice(itertools.product(*choices), 1024):
        counts = list(base)
        for (place, lost), left in zip(gaps, taken, strict=True):
            counts[place] += left
            counts[place + 1] += lost - left
        yield counts


def _filled(search: Search, islands: Sequence[Island | None], best: Candidate) -> Iterator[list[Island]]:
    """Each lost stage replaced by one island of a site not in use, best plan's islands first."""
    used = {node.site for island in islands if island for node in island}
    spare: list[Island] = [each.nodes for each in best.fits if not used & {node.site for node in each.nodes}]
    for name in search.picture.sites:
        if name not in used:
            nodes = search.picture.nodes[name]
            spare += [nodes[:1], nodes[: search.model.kv_heads]]
    spare = list(dict.fromkeys(tuple(sorted(island, key=lambda node: node.rank)) for island in spare))
    lost = [index for index, island in enumerate(islands) if not island]
    for choice in itertools.islice(itertools.permutations(spare, len(lost)), 256):
        nodes_of = [node.key for island in choice for node in island]
        if len(set(nodes_of)) == len(nodes_of):
            replacement = dict(zip(lost, choice, strict=True))
            yield [island or replacement[index] for index, island in enumerate(islands)]


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0)
