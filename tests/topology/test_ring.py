"""The ring's order, against every order of small meshes."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.ring import EXACT, LISTED, ring_s, rings, turn_s


def cheapest(cost: list[list[float]]) -> float:
    return min(ring_s(cost, (0, *rest)) for rest in itertools.permutations(range(1, len(cost))))


matrices = st.integers(1, 7).flatmap(
    lambda count: st.lists(
        st.lists(st.one_of(st.floats(0.001, 0.4), st.just(math.inf)), min_size=count, max_size=count),
        min_size=count,
        max_size=count,
    )
)


@given(matrices)
@settings(max_examples=60)
def test_the_first_ring_is_the_cheapest_of_all_orders(cost: list[list[float]]) -> None:
    found = rings(cost)
    best = cheapest(cost)
    if math.isinf(best):
        assert found == []
        return
    assert sorted(found[0]) == list(range(len(cost)))
    assert found[0][0] == 0
    assert ring_s(cost, found[0]) == pytest.approx(best, rel=1e-9)


@given(matrices)
@settings(max_examples=30)
def test_few_stages_list_every_feasible_ring_in_order(cost: list[list[float]]) -> None:
    if len(cost) <= LISTED:
        totals = [ring_s(cost, order) for order in rings(cost)]
        feasible = [
            order for order in itertools.permutations(range(1, len(cost))) if math.isfinite(ring_s(cost, (0, *order)))
        ]
        assert len(totals) == len(feasible)
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(totals))


def test_many_stages_on_a_circle_are_visited_around_it() -> None:
    count = EXACT + 4
    angles = [2 * math.pi * i / count for i in range(count)]
    shuffled = random.Random(3).sample(angles, count)
    cost = [[math.dist((math.cos(a), math.sin(a)), (math.cos(b), math.sin(b))) for b in shuffled] for a in shuffled]
    around = count * 2 * math.sin(math.pi / count)
    assert ring_s(cost, rings(cost)[0]) <= 1.1 * around
    assert rings(cost) == rings(cost)


def test_many_stages_avoid_a_cut_pair() -> None:
    count = EXACT + 2
    cost = [[0.01 + 0.001 * abs(a - b) for b in range(count)] for a in range(count)]
    cost[0][1] = cost[1][0] = math.inf
    assert math.isfinite(ring_s(cost, rings(cost)[0]))


@given(matrices.filter(lambda cost: 1 < len(cost) <= LISTED))
@settings(max_examples=40)
def test_a_listed_ring_closes_where_that_saves_most(cost: list[list[float]]) -> None:
    home = [[each / 3 for each in row] for row in cost]
    orders = list(itertools.permutations(range(len(cost))))
    totals = [sum(cost[a][b] for a, b in itertools.pairwise(o)) + home[o[-1]][o[0]] for o in orders]
    found = rings(cost, home)
    if math.isinf(min(totals)):
        assert found == []
    else:
        assert turn_s(cost, home, found[0]) == pytest.approx(min(totals), rel=1e-9)
