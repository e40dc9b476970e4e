"""Planning again without moving more than needed: candidates that leave what is loaded where it is.

A job that loses a site should not shuffle weights between those that remain for a few per cent of speed: every moved
layer is read again while the user waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from topology.candidate import Candidate, Island
from topology.cost import POLICIES, attention_bytes, mlp_bytes
from topology.model import ModelSpec
from topology.objective import value
from topology.plan import Plan
from topology.search import Search

#: A steadier plan may cost this much more than the best.
TOLERANCE: Final = 0.10
#: Places for a boundary between two surviving stages that are tried, where several spans were lost at once.
_SPLITS: Final = 3


def kept_bytes(candidate: Candidate, previous: Plan) -> int:
    """Layer weight bytes that are already where the candidate wants them."""
    model = previous.model
    held = {
        shard.key: (stage.start, stage.end, shard.kv_heads, shard.columns)
        for stage in previous.stages
        for shard in stage.shards
    }
    total, start = 0, 0
    for each, layers in zip(candidate.fits, candidate.counts, strict=True):
        for rank, node in enumerate(each.nodes):
            if node.key in held:
                old_start, old_end, kv_heads, columns = held[node.key]
                common = _overlap((start, start + layers), (old_start, old_end))
                groups = _overlap(each.kv_heads[rank], kv_heads)
                total += common * (
                    attention_bytes(model, groups) + mlp_bytes(model, _overlap(each.columns[rank], columns))
                )
        start += layers
    return total


def kept(search: Search, previous: Plan, best: Candidate) -> list[Candidate]:
    """Candidates in the previous ring's order: survivors alone, or with unused sites' islands in the lost places."""
    if not _same_shape(previous.model, search.model):
        return []
    islands = [_surviving(search, stage.shards) for stage in previous.stages]
    spans = [stage.end - stage.start for stage in previous.stages]
    found: list[Candidate | None] = []
    if all(islands):
        found += _all(search, [island for island in islands if island], spans)
    elif any(islands):
        for counts in _stretched(islands, spans):
            found += _all(search, [island for island in islands if island], counts)
        found += [c for filled in _filled(search, islands, best) for c in _all(search, filled, spans)]
    limit = search.constraints.max_sites
    good = [c for c in found if c is not None and search.meets(c) and (limit is None or len(c.sites) <= limit)]
    return sorted(good, key=lambda candidate: candidate.cost(search.constraints.wish))


def steadiest(
    search: Search, best: Candidate, candidates: Sequence[Candidate], previous: Plan
) -> tuple[Candidate, tuple[str, ...]]:
    """The candidate that keeps most in place among those within the tolerance of the best, and a sentence on it."""
    wish = search.constraints.wish
    most = value(best, wish) * (1 + TOLERANCE)
    near = [best, *(candidate for candidate in candidates if value(candidate, wish) <= most)]
    chosen = max(near, key=lambda c: (kept_bytes(c, previous), -near.index(c)))
    whole = search.model.layers * (
        attention_bytes(search.model, search.model.kv_heads) + mlp_bytes(search.model, search.model.intermediate)
    )
    share = kept_bytes(chosen, previous) / whole
    line = f"{share:.0%} of the layer weights stay where they are"
    if chosen is not best:
        slower = max(chosen.token_s / best.token_s - 1, 0.0)
        line += (
            f", for {slower:.1%} more latency than the best plan, which keeps {kept_bytes(best, previous) / whole:.0%}"
        )
    return chosen, (line,)


def _surviving(search: Search, shards: Sequence[object]) -> Island | None:
    """The devices of a stage that are still usable, or None."""
    nodes = {node.key: node for name in search.picture.sites for node in search.picture.nodes[name]}
    keys = [getattr(shard, "key", "") for shard in shards]
    return tuple(sorted((nodes[key] for key in keys if key in nodes), key=lambda node: node.rank)) or None


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
