"""Ranges of query heads, and the KV heads that they need: the arithmetic of grouped-query attention.

`group` query heads, one after the other, share a KV head (Ainslie et al., arXiv:2305.13245). A shard has a range of
query heads and every KV head that these use; a KV head whose group is cut lies on two shards or more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

Span = tuple[int, int]


def kv_span(heads: Span, group: int) -> Span:
    """The KV heads that a half-open range of query heads needs; of an empty range an empty one."""
    first = heads[0] // group
    return (first, max(-(-heads[1] // group), first) if heads[0] < heads[1] else first)


def whole_groups(kv_heads: Span, group: int) -> Span:
    """All query heads of a range of KV heads."""
    return (kv_heads[0] * group, kv_heads[1] * group)


def belong(heads: Span, kv_heads: Span, group: int) -> bool:
    """Whether a shard's query heads are ones that use its KV heads, each of which is used."""
    return 0 <= heads[0] <= heads[1] and (heads[0] == heads[1] or kv_span(heads, group) == kv_heads)


@dataclass(frozen=True, slots=True)
class Block:
    """A run of a shard's KV heads that equally many of its query heads use. Ranges count from the shard's first."""

    heads: Span
    kv_heads: Span

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return (self.heads[1] - self.heads[0]) // (self.kv_heads[1] - self.kv_heads[0])


def blocks(heads: Span, group: int) -> tuple[Block, ...]:
    """A range of query heads as at most three blocks: what is left of a cut group, whole groups, the start of one."""
    start, stop = heads
    inner = range(start // group * group + group, stop, group)
    ends = [start, *inner, stop] if start < stop else [start]
    found: list[Block] = []
    for index, (size, run) in enumerate(_runs([b - a for a, b in itertools.pairwise(ends)])):
        before = found[index - 1] if index else Block((0, 0), (0, 0))
        head, kv = before.heads[1], before.kv_heads[1]
        found.append(Block((head, head + size * run), (kv, kv + run)))
    return tuple(found)


def _runs(sizes: list[int]) -> list[tuple[int, int]]:
    """Equal neighbours together: (value, how often)."""
    return [(size, len(list(same))) for size, same in itertools.groupby(sizes)]
