"""Layers by stage, against every possible split of small cases."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topology.balance import balance

cases = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 20).map(float), min_size=count, max_size=count),
        st.lists(st.integers(0, 30).map(float), min_size=count, max_size=count),
        st.lists(st.integers(1, 9), min_size=count, max_size=count),
        st.integers(1, 12),
        st.sampled_from([0.0, 0.05, 0.5, math.inf]),
    )
)


@given(cases)
def test_the_split_is_as_good_as_the_best_of_all_splits(
    case: tuple[list[float], list[float], list[int], int, float],
) -> None:
    layer_s, extra_s, capacity, layers, slack = case
    every = [
        counts for counts in itertools.product(*[range(1, most + 1) for most in capacity]) if sum(counts) == layers
    ]
    found = balance(layer_s, extra_s, capacity, layers, slack=slack)
    if not every:
        assert found is None
        return
    assert found is not None

    def total(counts: tuple[int, ...] | list[int]) -> float:
        return sum(n * each for n, each in zip(counts, layer_s, strict=True))

    def slowest(counts: tuple[int, ...] | list[int]) -> float:
        return max(n * each + more for n, each, more in zip(counts, layer_s, extra_s, strict=True))

    assert tuple(found) in every
    allowed = min(map(total, every)) * (1 + slack) * (1 + 1e-9)
    assert total(found) <= allowed
    assert slowest(found) == min(slowest(counts) for counts in every if total(counts) <= allowed)


def test_equal_stages_come_out_even() -> None:
    assert sorted(balance([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [30, 30, 30], 30) or []) == [10, 10, 10]


def test_the_head_counts_as_work_of_its_stage() -> None:
    assert balance([1.0, 1.0], [0.0, 8.0], [30, 30], 30) == [19, 11]


@pytest.mark.parametrize("capacity", [[10, 10], [0, 40]])
def test_what_does_not_fit_is_none(capacity: list[int]) -> None:
    assert balance([1.0, 1.0], [0.0, 0.0], capacity, 30) is None
