"""Small meshes are planned as well as by trying everything, and shares are the best of all shares."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.exhaustive import OBJECTIVES, compare, compositions
from topology.sharing import Demand, fair, share

seconds = st.floats(0.1, 10.0)


@pytest.mark.parametrize("seed", range(9_000, 9_008))
def test_a_small_mesh_is_planned_as_well_as_by_exhaustive_search(seed: int) -> None:
    assert [row for row in compare(seed, OBJECTIVES) if not row["same"]] == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(seconds, st.integers(1, 8)), min_size=1, max_size=4), st.integers(1, 10))
def test_a_fair_cut_has_the_least_maximum_of_all_cuts(devices: list[tuple[float, int]], total: int) -> None:
    each, most = [s for s, _ in devices], [m for _, m in devices]
    found = fair(total, each, most)
    within = [
        cut
        for cut in (compositions(total, len(each)) if total >= len(each) else ())
        if all(n <= limit for n, limit in zip(cut, most, strict=True))
    ]
    if not within:
        assert found is None
        return
    assert found is not None and sum(found) == total and all(1 <= n <= m for n, m in zip(found, most, strict=True))

    def slowest(cut: tuple[int, ...]) -> float:
        return max(n * s for n, s in zip(cut, each, strict=True))

    assert slowest(tuple(found)) == min(map(slowest, within))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(seconds, st.floats(3.0, 40.0)), min_size=2, max_size=3),
    st.integers(1, 4),
    st.floats(0.5, 3.0),
    st.floats(0.5, 3.0),
)
def test_shares_under_a_shortage_of_memory_are_the_best_of_all(
    devices: list[tuple[float, float]], layers: int, group_bytes: float, column_bytes: float
) -> None:
    each, room = [s for s, _ in devices], [r for _, r in devices]
    demand = Demand(layers, 4, 6, 0, each, each, each, room, group_bytes, column_bytes, [0.0] * len(each))
    possible = [
        (g, c)
        for g, c in itertools.product(compositions(4, len(each)), compositions(6, len(each)))
        if all(free - group_bytes * a >= column_bytes * b for free, a, b in zip(room, g, c, strict=True))
    ]

    def took(g: tuple[int, ...], c: tuple[int, ...]) -> float:
        return sum(max(n * s for n, s in zip(cut, each, strict=True)) for cut in (g, c))

    found = share(demand)
    if found is None:
        assert not possible
        return
    assert took(tuple(found[0]), tuple(found[1])) == pytest.approx(min(took(*ways) for ways in possible))
