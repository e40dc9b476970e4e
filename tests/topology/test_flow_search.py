"""The search for layouts: as good as trying everything where that can be done, and what its answers promise."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from flow_pools import machine, pool, random_pool

from topology.errors import TopologyError
from topology.flow import SINK, SOURCE, Pool, bound_tokens_per_s, measure, tokens_per_s
from topology.flow_chains import regions
from topology.flow_fast import Evaluator
from topology.flow_search import place
from topology.flow_untangle import untangled


def best_of_all(found: Pool) -> float:
    """The most flow of any layout, by trying every one."""
    evaluator = Evaluator(found)
    ranges = [
        [(a, a + held) for held in range(1, len(m.tokens_per_s) + 1) for a in range(found.layers - held + 1)]
        for m in found.machines
    ]
    best = 0.0
    for layout in itertools.product(*ranges):
        start, end = [a for a, _ in layout], [b for _, b in layout]
        if min(evaluator.coverage(start, end)) > best:
            best = max(best, evaluator.flow(start, end)[0])
    return best


@pytest.mark.parametrize("seed", range(12))
def test_a_small_pool_gets_the_best_flow_there_is(seed: int) -> None:
    rng = Random(seed)
    found = random_pool(rng, rng.randint(2, 4), rng.randint(3, 5))
    best = best_of_all(found)
    if best == 0:
        with pytest.raises(TopologyError):
            place(found, rng=Random(0), iterations=3_000)
        return
    answer = place(found, rng=Random(0), iterations=3_000)
    assert answer.front[-1].gives.tokens_per_s == pytest.approx(best, rel=1e-6)
    assert best <= answer.bound_tokens_per_s + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_six_machines_get_the_best_flow_there_is(seed: int) -> None:
    rng = Random(100 + seed)
    machines = [machine(f"m{i}", rng.choice([300, 700]), 2) for i in range(6)]
    found = pool(3, [machines[:3], machines[3:]], across=rng.uniform(50, 400))
    answer = place(found, rng=Random(0), iterations=6_000)
    assert answer.front[-1].gives.tokens_per_s == pytest.approx(best_of_all(found), rel=1e-6)


def test_equal_questions_have_equal_answers() -> None:
    found = random_pool(Random(5), 8, 9)
    one, two = (place(found, rng=Random(3), iterations=2_000) for _ in range(2))
    assert one == two


def test_no_point_of_the_front_beats_another_and_each_is_what_it_says() -> None:
    found = random_pool(Random(11), 9, 8)
    answer = place(found, rng=Random(0), iterations=4_000)
    for low, high in itertools.pairwise(answer.front):
        assert low.gives.tokens_per_s < high.gives.tokens_per_s
        assert low.gives.network_ms < high.gives.network_ms
    assert answer.chosen in answer.front
    for placement in answer.front:
        assert placement.gives == measure(found, placement.layout)
        assert placement.gives.tokens_per_s == pytest.approx(tokens_per_s(found, placement.layout))
        assert placement.gives.tokens_per_s <= bound_tokens_per_s(found) + 1e-6


def test_regions_that_can_hold_the_model_keep_their_tokens() -> None:
    both = pool(6, [[machine(f"a{i}", 600, 3) for i in range(3)], [machine(f"b{i}", 500, 3) for i in range(4)]])
    chosen = place(both, rng=Random(0), iterations=4_000).chosen
    assert chosen.crossing_tokens_per_s == 0
    region = {m.name: m.name[0] for m in both.machines}
    ends = (SOURCE, SINK)
    assert all(region[a] == region[b] for a, b in chosen.gives.flows if a not in ends and b not in ends)


def test_regions_too_small_for_the_model_work_together() -> None:
    small = pool(6, [[machine("a0", 600, 3), machine("a1", 600, 1)], [machine("b0", 600, 3)]], across=1e4)
    answer = place(small, rng=Random(0), iterations=2_000)
    assert answer.chosen.crossing_tokens_per_s > 0
    assert answer.chosen.gives.tokens_per_s == pytest.approx(200)


def test_a_pool_without_room_or_without_wires_is_refused() -> None:
    with pytest.raises(TopologyError, match="hold 2 layers together, and the model has 3"):
        place(pool(3, [[machine("a", 100, 1), machine("b", 100, 1)]]), rng=Random(0), iterations=10)
    alone = Pool(2, (machine("a", 100, 1), machine("b", 100, 1)), ())
    with pytest.raises(TopologyError, match="no layout found"):
        place(alone, rng=Random(0), iterations=10)


def test_a_search_that_is_stopped_at_once_still_answers() -> None:
    found = pool(6, [[machine(f"a{i}", 600, 3) for i in range(3)]])
    assert place(found, rng=Random(0), iterations=10**9, stop=lambda: True).chosen.gives.tokens_per_s > 0


def test_regions_are_what_short_wires_join() -> None:
    found = pool(4, [[machine("a", 1, 4), machine("c", 1, 4)], [machine("b", 1, 4)]])
    assert regions(found) == [[0, 1], [2]]
    assert regions(pool(4, [[machine("a", 1, 4)], [machine("b", 1, 4)]], ms=1.0)) == [[0, 1]]


def test_untangled_regions_share_no_boundary_and_keep_their_stages() -> None:
    ranges = {0: (0, 2), 1: (2, 5), 2: (5, 9), 3: (0, 3), 4: (3, 5), 5: (5, 9), 6: (3, 5)}
    found = untangled(ranges, [[0, 1, 2], [3, 4, 5, 6]], 9, Random(0))
    assert {i: b - a for i, (a, b) in found.items()} == {i: b - a for i, (a, b) in ranges.items()}
    assert found[4] == found[6]
    inner = [{cut for i in members for cut in found[i] if 0 < cut < 9} for members in ([0, 1, 2], [3, 4, 5, 6])]
    assert not inner[0] & inner[1]
