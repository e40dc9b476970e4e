"""The flow of a layout, by hand and against what Helix published for its own layouts."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from flow_pools import machine, pool, random_pool

from topology.errors import TopologyError
from topology.flow import (
    SINK,
    SOURCE,
    Machine,
    Pool,
    Wire,
    bound_tokens_per_s,
    compute_bound_tokens_per_s,
    measure,
    tokens_per_s,
)
from topology.flow_fast import Evaluator

PUBLISHED = Path(__file__).parents[2] / ".." / "shared" / "data" / "placement"


def published(name: str) -> dict[str, Any]:
    path = PUBLISHED / name
    if not path.exists():
        pytest.skip("needs ../shared/data, figures of others that are not part of the project")
    return json.loads(path.read_text())


def helix_pool(case: dict[str, Any]) -> Pool:
    model = case["model"]
    machines = []
    for node in case["nodes"]:
        profile = case["device_profiles"][node["type"]]
        rates = profile["tokens_per_s_by_layer_count"]
        machines.append(Machine(str(node["id"]), tuple(rates[str(k)] for k in range(1, profile["max_layers"] + 1))))
    wires = []
    for a, b, bandwidth, ms in case["links"]:
        size = model["token_bytes"] if a == SOURCE or b == SINK else model["activation_bytes_per_token"]
        wires.append(Wire(str(a), str(b), bandwidth / size, ms + 1e3 * size / bandwidth))
        if a != SOURCE and b != SINK:
            wires.append(Wire(str(b), str(a), bandwidth / size, ms + 1e3 * size / bandwidth))
    return Pool(model["layers"], tuple(machines), tuple(wires))


def test_a_chain_passes_what_its_narrowest_part_passes_and_waits_for_every_wire() -> None:
    two = pool(4, [[machine("a", 400, 4)], [machine("b", 600, 4)]], across=120.0, ms=50.0, ends_ms=10.0)
    found = measure(two, {"a": (0, 2), "b": (2, 4)})
    assert found.tokens_per_s == 120
    assert found.network_ms == pytest.approx(70)
    assert found.flows == {(SOURCE, "a"): 120, ("a", "b"): 120, ("b", SINK): 120}


def test_tokens_go_the_way_that_waits_least() -> None:
    wires = [Wire(SOURCE, name, 1e6, 1.0) for name in "ab"] + [Wire(name, SINK, 1e6, 1.0) for name in "cd"]
    wires += [Wire("a", "c", 100, 5), Wire("a", "d", 100, 50), Wire("b", "c", 100, 50), Wire("b", "d", 100, 5)]
    crossed = Pool(2, tuple(machine(name, 80, 1) for name in "abcd"), tuple(wires))
    found = measure(crossed, {"a": (0, 1), "b": (0, 1), "c": (1, 2), "d": (1, 2)})
    assert found.tokens_per_s == 160
    assert found.network_ms == pytest.approx(7)


def test_a_token_enters_in_the_middle_of_a_machine_only_under_the_partial_rule() -> None:
    two = pool(4, [[machine("a", 400, 4), machine("b", 600, 4)]])
    layout = {"a": (0, 3), "b": (2, 4)}
    assert measure(two, layout).tokens_per_s == 0
    assert measure(two, layout, partial=True).tokens_per_s == pytest.approx(400 / 3)


@pytest.mark.parametrize("layout", [{"x": (0, 1)}, {"a": (0, 5)}, {"a": (2, 2)}, {"a": (-1, 1)}, {"b": (0, 3)}])
def test_a_layout_that_cannot_be_is_refused(layout: dict[str, tuple[int, int]]) -> None:
    two = pool(4, [[machine("a", 400, 4), machine("b", 600, 2)]])
    with pytest.raises(TopologyError, match=r"layout|hold"):
        measure(two, layout)


def test_a_pool_that_contradicts_itself_is_refused() -> None:
    a = machine("a", 1, 1)
    with pytest.raises(TopologyError, match="name of its own"):
        Pool(1, (a, a), ())
    with pytest.raises(TopologyError, match="ends at no machine"):
        Pool(1, (a,), (Wire("a", "b", 1, 1),))
    with pytest.raises(TopologyError, match="given twice"):
        Pool(1, (a,), (Wire("a", SINK, 1, 1), Wire("a", SINK, 1, 1)))
    with pytest.raises(TopologyError, match="finite"):
        Pool(1, (a,), (Wire("a", SINK, float("nan"), 1),))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_fast_flow_is_the_maximum_flow(seed: int, partial: bool) -> None:
    rng = Random(seed)
    found = random_pool(rng, 8, 10)
    evaluator = Evaluator(found, partial=partial)
    for _ in range(10):
        start, end = [], []
        for m in found.machines:
            held = rng.randint(1, len(m.tokens_per_s))
            start.append(rng.randint(0, found.layers - held))
            end.append(start[-1] + held)
        layout = {m.name: (a, b) for m, a, b in zip(found.machines, start, end, strict=True)}
        flow, weighted = evaluator.flow(start, end)
        assert flow == pytest.approx(tokens_per_s(found, layout, partial=partial), abs=1e-3)
        assert flow <= min(evaluator.coverage(start, end)) + 1e-6
        if flow > 0:
            assert weighted / flow >= measure(found, layout, partial=partial).network_ms - 1e-2


def test_no_layout_beats_the_bound() -> None:
    one = pool(3, [[machine("a", 300, 3)]])
    assert bound_tokens_per_s(one) == pytest.approx(100)
    # A machine that holds one layer passes at most the whole flow: its bound alone would let it do more.
    fast = pool(2, [[machine("a", 1000, 1), machine("b", 100, 1)]])
    assert compute_bound_tokens_per_s(fast) == pytest.approx(550)
    assert bound_tokens_per_s(fast) == pytest.approx(100)


@pytest.mark.parametrize("name", ["helix_geo3_24node_llama70b.json", "helix_geo3_24node_llama30b.json"])
def test_helix_own_layouts_give_the_flows_it_published(name: str) -> None:
    case = published(name)
    cluster = helix_pool(case)
    assert compute_bound_tokens_per_s(cluster) == pytest.approx(case["compute_only_upper_bound_tokens_per_s"], abs=1e-3)
    for layout in case["layouts"].values():
        ranges = {k: (a, b) for k, (a, b) in layout["layer_ranges_by_node_half_open"].items()}
        expected = layout["derived_maxflow_tokens_per_s_all_links_partial_inference"]
        assert tokens_per_s(cluster, ranges, partial=True) == pytest.approx(expected, abs=1e-3)


def test_helix_integer_program_passes_1212_tokens_and_waits_about_290_ms() -> None:
    case = published("helix_geo3_24node_llama70b.json")
    layout = case["layouts"]["helix_milp"]["layer_ranges_by_node_half_open"]
    found = measure(helix_pool(case), {k: (a, b) for k, (a, b) in layout.items()})
    assert found.tokens_per_s == pytest.approx(1212.177, abs=1e-3)
    # Published: 290 ms, of one maximum flow; this is the maximum flow that waits least.
    assert 280 < found.network_ms <= 290
