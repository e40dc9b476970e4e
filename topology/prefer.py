"""Where weights already lie: of plans about as good as the best, the one that has least to load."""

from __future__ import annotations

from typing import Final

from topology.candidate import Candidate
from topology.cost import attention_bytes, mlp_bytes
from topology.errors import megabytes
from topology.heads import whole_groups
from topology.objective import value
from topology.search import Search
from topology.snapshot import Held, Snapshot

#: Plans are as good as the best within this: what calibration repeats to.
AS_GOOD: Final = 0.02


def already_there(snapshot: Snapshot, search: Search, best: Candidate) -> tuple[Candidate, tuple[str, ...]]:
    """The candidate with most of its weights in place, and a sentence where it is another than the best."""
    held = {f"{site.name}/{device.name}": device.held for site in snapshot.sites for device in site.devices}
    if not any(held.values()):
        return best, ()
    wish = search.constraints.wish
    most = value(best, wish) * (1 + AS_GOOD)
    limit = search.constraints.max_sites
    near = [best] + [
        candidate
        for candidate in search.assembler.archive.best
        if value(candidate, wish) <= most
        and (wish != "fewest_sites" or len(candidate.sites) <= len(best.sites))
        and (limit is None or len(candidate.sites) <= limit)
    ]
    chosen = max(near, key=lambda candidate: (_present(search, candidate, held), -near.index(candidate)))
    here, there = _present(search, chosen, held), _present(search, best, held)
    if here == there:
        return best, (f"{megabytes(there)} of the weights lie there already",) if there else ()
    worse = max(value(chosen, wish) / value(best, wish) - 1, 0.0)
    line = f"{megabytes(here)} of its weights lie there already, {megabytes(here - there)} more than of the best plan"
    return chosen, (f"{line}, which is {worse:.1%} better",)


def _present(search: Search, candidate: Candidate, held: dict[str, tuple[Held, ...]]) -> int:
    model, total, start = search.model, 0, 0
    for each, layers in zip(candidate.fits, candidate.counts, strict=True):
        for rank, node in enumerate(each.nodes):
            for entry in held.get(node.key, ()):
                if entry.model == model.name and entry.dtype in ("", node.dtype or model.dtype):
                    common = _overlap((start, start + layers), (entry.start, entry.end))
                    groups = _overlap(each.kv_heads[rank], entry.kv_heads)
                    columns = _overlap(each.columns[rank], entry.columns)
                    there = entry.heads or whole_groups(entry.kv_heads, model.heads // model.kv_heads)
                    heads = _overlap(each.heads[rank], there)
                    total += common * (attention_bytes(model, groups, heads) + mlp_bytes(model, columns))
        start += layers
    return total


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0)
