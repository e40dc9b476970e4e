"""Largest remainders: shares add up, keep to the weights, and leave nobody empty who must not be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meshes import assert_covers

from topology.shares import cut, largest_remainder, left_out

weights = st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=9)


@given(st.integers(0, 500), weights)
def test_shares_sum_to_the_total_and_stay_within_one_of_exact(total: int, parts: list[float]) -> None:
    shares = largest_remainder(total, parts)
    assert sum(shares) == total
    for share, part in zip(shares, parts, strict=True):
        assert abs(share - total * part / sum(parts)) < 1 + 1e-6


@given(st.integers(1, 500), weights, st.sampled_from([1, 8, 64]))
def test_a_cut_covers_everything_once_with_nobody_empty(total: int, parts: list[float], unit: int) -> None:
    if total < len(parts):
        with pytest.raises(ValueError, match="cannot cut"):
            cut(total, parts, unit=unit)
        return
    ranges = cut(total, parts, unit=unit)
    assert_covers(ranges, total)
    if -(-total // unit) >= len(parts):
        assert all(start % unit == 0 for start, _ in ranges)


def test_three_groups_over_two_equal_devices_are_two_and_one() -> None:
    assert cut(3, [1.0, 1.0]) == [(0, 2), (2, 3)]


def test_a_device_that_would_get_nothing_is_named() -> None:
    assert left_out(3, [10.0, 10.0, 1.0]) == [2]
    assert left_out(4, [1.0, 1.0]) == []


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        largest_remainder(4, [1.0, bad])
