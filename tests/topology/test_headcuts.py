"""Query heads over more devices than KV heads: the least maximum of all cuts, with the fewest copies of KV heads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.exhaustive import compositions
from topology.headcuts import HeadCut, touched
from topology.heads import kv_span
from topology.sharing import Demand, share

seconds = st.floats(0.1, 10.0)


def kv_of(shares: tuple[int, ...], group: int) -> list[int]:
    spans, start = [], 0
    for n in shares:
        first, last = kv_span((start, start + n), group)
        spans.append(last - first)
        start += n
    return spans


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(seconds, min_size=2, max_size=4), st.integers(1, 3), st.integers(2, 4), seconds)
def test_the_fastest_cut_is_the_fastest_of_all_and_copies_least(
    each: list[float], kv_heads: int, group: int, kv_s: float
) -> None:
    heads = kv_heads * group
    cut = HeadCut(heads, group, ((each, [kv_s * s for s in each]),))
    every = {shares: cut.slowest(shares) for shares in compositions(heads, len(each))}
    found = cut.fastest()
    if not every:
        assert found is None
        return
    assert found is not None and every[tuple(found)] == min(every.values())
    as_fast = [shares for shares, took_s in every.items() if took_s == every[tuple(found)]]
    assert sum(kv_of(tuple(found), group)) == min(sum(kv_of(shares, group)) for shares in as_fast)
    kv = kv_of(tuple(found), group)
    took = [s * (n + kv_s * k) for s, n, k in zip(each, found, kv, strict=True)]
    assert cut.slowest(found) == pytest.approx(max(took))


def test_kv_heads_that_a_cut_leaves_on_both_sides_count_twice() -> None:
    assert touched(np.array([[3, 2, 2, 2], [3, 3, 2, 1]]), 3).tolist() == [[1, 1, 2, 1], [1, 1, 1, 1]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(seconds, st.floats(4.0, 40.0)), min_size=3, max_size=3), st.floats(0.5, 3.0))
def test_shares_of_query_heads_under_a_shortage_of_memory_are_the_best_of_all(
    devices: list[tuple[float, float]], column_bytes: float
) -> None:
    each, room = [s for s, _ in devices], [r for _, r in devices]
    cut = HeadCut(8, 4, ((each, each),), head_bytes=1.0, kv_bytes=2.0)
    demand = Demand(2, 0, 5, 0, [], each, each, room, 0.0, column_bytes, [0.0] * 3, cut)
    best = min(
        (
            2
            * (
                max((n + k) * s for n, k, s in zip(h, kv_of(h, 4), each, strict=True))
                + max(map(float.__mul__, each, map(float, c)))
            )
            for h in compositions(8, 3)
            for c in compositions(5, 3)
            if all(n + 2 * k + column_bytes * m <= free for n, k, m, free in zip(h, kv_of(h, 4), c, room, strict=True))
        ),
        default=None,
    )
    found = share(demand)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert 2 * (cut.slowest(found[0]) + max(n * s for n, s in zip(found[1], each, strict=True))) == pytest.approx(best)


def test_more_ways_than_can_be_listed_still_fit_where_memory_is_short() -> None:
    cut = HeadCut(64, 16, (([1.0] * 9, [1.0] * 9),), head_bytes=1.0, kv_bytes=4.0)
    assert not cut.listed()
    room = [30.0, *[14.0] * 8]
    ways = list(cut.between(room))
    assert ways and all(sum(shares) == 64 and min(shares) > 0 for shares in ways)
    assert all(taken <= free for shares in ways for taken, free in zip(cut.bytes(shares), room, strict=True))
