"""Planning again without moving more than needed: candidates that leave what is loaded where it is.

A job that loses a site should not shuffle weights between those that remain for a few per cent of speed: every moved
layer is read again while the user waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from topology.candidate import Candidate, Island
from topology.cost import POLICIES
from topology.fold import halves
from topology.loaded import Loaded
from topology.model import ModelSpec
from topology.objective import value
from topology.picture import Node
from topology.plan import Plan, Shard, Standby, device_of
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
#: Stages of a ring that is shared out in one way only.
LONG: Final = 32


def kept(search: Search, previous: Plan, best: Candidate) -> list[Candidate]:
    """Candidates in the previous ring's order: survivors alone, or with unused sites' islands in the lost places."""
    if not _same_shape(previous.model, search.model):
        return []
    nodes = _nodes(search, previous)
    islands = [_surviving(nodes, stage.shards) for stage in previous.stages]
    spans = [stage.end - stage.start for stage in previous.stages]
    found: list[Candidate | None] = []
    helped = _helped(nodes, previous)
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
    loaded = Loaded(search, previous)
    present = set(_nodes(search, previous))
    left = sum(size for key, size in loaded.bytes_by_device.items() if key in present)
    moving_s = loaded.moving_s(best)

    def near(candidate: Candidate) -> bool:
        if value(candidate, wish) > value(best, wish) * (1 + STAY + moving_s / HORIZON_S):
            return False  # whatever it keeps
        everything = loaded.kept_bytes(candidate) >= left * (1 - 1e-9) and previous.objective == wish
        tolerance = STAY if everything else TOLERANCE
        tolerance += max(moving_s - loaded.moving_s(candidate), 0.0) / HORIZON_S
        return value(candidate, wish) <= value(best, wish) * (1 + tolerance)

    close = [best, *filter(near, candidates)]
    chosen = max(close, key=lambda c: (round(loaded.kept_bytes(c)), -close.index(c)))
    line = f"{loaded.kept_bytes(chosen) / loaded.whole_bytes:.0%} of the layer weights stay where they are"
    if chosen is not best:
        worse = max(value(chosen, wish) / value(best, wish) - 1, 0.0)
        line += (
            f": the best plan is {worse:.1%} better but keeps {loaded.kept_bytes(best) / loaded.whole_bytes:.0%}, "
            f"it would have to move weights for {moving_s:.3g} s"
        )
    return chosen, (line,)


def _surviving(nodes: Mapping[str, Node], shards: Sequence[Shard | Standby]) -> Island | None:
    """The devices of a stage that are still usable, or None."""
    keys = [shard.key for shard in shards]
    return tuple(sorted((nodes[key] for key in keys if key in nodes), key=lambda node: node.rank)) or None


def _helped(nodes: Mapping[str, Node], previous: Plan) -> list[Island | None]:
    """The devices of every stage that are still usable, standbys in the places of those that are not."""
    instead = {(standby.stage, standby.rank): standby for standby in previous.standbys if standby.key in nodes}
    return [
        _surviving(
            nodes,
            [
                shard if shard.key in nodes else instead.get((index, rank), shard)
                for rank, shard in enumerate(stage.shards)
            ],
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
    """The candidate by every policy; of a long ring by the first that does, for a user waits."""
    found = []
    for policy in POLICIES:
        found.append(search.assembler.ordered(islands, policy, counts=counts))
        if len(islands) > LONG and found[-1] is not None:
            break
    return found


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
            spare += [nodes[:1], nodes[: search.model.heads]]
    spare = list(dict.fromkeys(tuple(sorted(island, key=lambda node: node.rank)) for island in spare))
    lost = [index for index, island in enumerate(islands) if not island]
    for choice in itertools.islice(itertools.permutations(spare, len(lost)), 256):
        nodes_of = [node.key for island in choice for node in island]
        if len(set(nodes_of)) == len(nodes_of):
            replacement = dict(zip(lost, choice, strict=True))
            yield [island or replacement[index] for index, island in enumerate(islands)]
