"""Where wires are missing, a first layout passes tokens all the same; machines change places for more flow."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

import pytest
from flow_pools import machine, pool

from topology.flow import SINK, SOURCE, Machine, Pool, tokens_per_s
from topology.flow_fast import Evaluator
from topology.flow_search import place
from topology.flow_thread import rejoined, threaded


def sparse(found: Pool, kept: set[tuple[str, str]]) -> Pool:
    """Only these wires between machines."""
    return replace(
        found,
        wires=tuple(w for w in found.wires if w.source == SOURCE or w.target == SINK or (w.source, w.target) in kept),
    )


def test_machines_that_are_joined_in_one_line_only_are_threaded_along_it() -> None:
    machines = [machine(f"m{i}", 600, 2) for i in range(5)]
    line = ["m3", "m0", "m4", "m1", "m2"]
    found = sparse(pool(10, [machines]), set(itertools.pairwise(line)))
    layout = threaded(Evaluator(found))
    assert layout is not None
    assert [layout[0][int(name[1])] for name in line] == [0, 2, 4, 6, 8]
    assert place(found, rng=Random(0), iterations=200).chosen.gives.tokens_per_s == pytest.approx(300)


def test_a_machine_beside_the_path_stands_in_where_it_is_joined() -> None:
    machines = [machine(f"m{i}", 600, 2) for i in range(4)]
    found = sparse(pool(6, [machines]), {("m0", "m1"), ("m1", "m2"), ("m0", "m3"), ("m3", "m2")})
    layout = threaded(Evaluator(found))
    assert layout is not None
    assert (layout[0][3], layout[1][3]) == (layout[0][1], layout[1][1]) == (2, 4)


def test_where_no_path_holds_all_layers_there_is_no_thread() -> None:
    machines = [machine(f"m{i}", 600, 2) for i in range(4)]
    assert threaded(Evaluator(sparse(pool(8, [machines]), {("m0", "m1"), ("m2", "m3")}))) is None


def test_machines_change_places_until_those_that_follow_are_joined() -> None:
    machines = [machine(f"m{i}", 600, 2) for i in range(4)]
    found = sparse(pool(4, [machines]), {("m0", "m3"), ("m2", "m1")})
    evaluator = Evaluator(found)
    apart = ([0, 2, 2, 0], [2, 4, 4, 2])
    assert evaluator.flow(*apart)[0] == 0
    start, end = rejoined(evaluator, *apart)
    layout = {f"m{i}": (start[i], end[i]) for i in range(4)}
    assert tokens_per_s(found, layout) == pytest.approx(600)


def test_a_machine_that_holds_nothing_is_left_out() -> None:
    found = pool(4, [[machine("a", 600, 2), machine("b", 600, 2), Machine("none", ())]])
    assert set(place(found, rng=Random(0), iterations=100).chosen.layout) == {"a", "b"}


def test_half_the_flow_is_too_much_to_give_up_for_staying_in_a_region() -> None:
    """Two regions that hold the model as well as a chain of all: the front says both, the chosen one crosses."""
    home = [machine(f"a{i}", 600, 4) for i in range(2)]
    away = [machine(f"b{i}", 600, 4) for i in range(8)]
    found = place(pool(8, [home, away], across=1e4, ms=2.0, ends_ms=0.1), rng=Random(0), iterations=3_000)
    staying = [p for p in found.front if p.crossing_tokens_per_s == 0]
    assert found.chosen.gives.tokens_per_s >= 2 / 3 * found.front[-1].gives.tokens_per_s
    assert not staying or staying[-1].gives.tokens_per_s <= found.front[-1].gives.tokens_per_s
