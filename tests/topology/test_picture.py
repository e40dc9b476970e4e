"""Numbers from other peers: what is believed, what is left out, and that it is said."""

import math
from dataclasses import replace

import pytest
from meshes import SMOL, cpu, gpu, mesh, site

from topology import Constraints, Link, Snapshot, TopologyError
from topology.picture import UNMEASURED_RTT_S, look


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bandwidth": 0.0},
        {"memory_bandwidth": math.nan},
        {"memory_bandwidth": -1.0},
        {"memory_bandwidth": math.inf},
        {"flops": {}},
        {"flops": {"float32": 0.0}},
        {"flops": {"float32": math.nan}},
        {"free_bytes": -1},
        {"memory_bytes": 0},
        {"memory_bytes": 2**70},
        {"reserve": 1.5},
        {"reserve": math.nan},
    ],
)
def test_a_device_with_an_impossible_number_is_left_out_and_named(change: dict[str, object]) -> None:
    broken = replace(cpu("broken"), **change)
    picture = look(Snapshot((site("a", cpu("sound"), broken),), ()), SMOL, Constraints())
    assert [node.name for node in picture.nodes["a"]] == ["sound"]
    assert "a/broken left out" in picture.notes[0]


@pytest.mark.parametrize(
    "change",
    [{"rtt_s": math.nan}, {"rtt_s": -0.01}, {"rtt_s": 1e9}, {"bandwidth": 0.0}, {"jitter_s": -1.0}, {"loss": 1.0}],
)
def test_a_link_with_an_impossible_number_counts_as_not_measured(change: dict[str, float]) -> None:
    good = [Link("a", "c", 0.09), Link("b", "c", 0.04)]
    bad = replace(Link("a", "b", 0.01), **change)
    picture = look(Snapshot((site("a"), site("b"), site("c")), (*good, bad)), SMOL, Constraints())
    assert not picture.path("a", "b").measured
    assert picture.path("a", "b").rtt_s == 0.09
    assert any("a -> b has impossible figures" in note for note in picture.notes)


def test_a_pair_nobody_measured_is_taken_for_the_longest_known() -> None:
    picture = look(mesh([site("a"), site("b"), site("c")], {"a-b": 30, "b-c": 70}), SMOL, Constraints())
    assert picture.path("a", "c").rtt_s == 0.07
    assert not picture.path("a", "c").measured
    alone = look(Snapshot((site("a"), site("b")), ()), SMOL, Constraints())
    assert alone.path("a", "b").rtt_s == UNMEASURED_RTT_S


def test_no_end_can_draw_traffic_by_claiming_to_be_near() -> None:
    links = (Link("a", "b", 0.08), Link("b", "a", 0.001))
    picture = look(Snapshot((site("a"), site("b")), links), SMOL, Constraints())
    assert picture.path("a", "b").rtt_s == picture.path("b", "a").rtt_s == 0.08


def test_a_measurement_wins_over_an_estimate() -> None:
    links = (Link("a", "b", 0.02), Link("b", "a", 0.3, measured=False))
    picture = look(Snapshot((site("a"), site("b")), links), SMOL, Constraints())
    assert picture.path("b", "a").rtt_s == 0.02


def test_one_end_that_cannot_reach_the_other_cuts_the_pair() -> None:
    links = (Link("a", "b", 0.02), Link("b", "a", 0.02, reachable=False))
    picture = look(Snapshot((site("a"), site("b")), links), SMOL, Constraints())
    assert not picture.path("a", "b").reachable


def test_jitter_and_loss_make_a_path_longer() -> None:
    plain, rough = (
        look(mesh([site("a"), site("b")], {"a-b": 40}, **link), SMOL, Constraints()).path("a", "b").one_way_s
        for link in ({}, {"jitter_s": 0.01, "loss": 0.1})
    )
    assert plain == 0.02
    assert rough == pytest.approx(0.025 + 0.1 / 0.9 * 0.08)


def test_usable_memory_keeps_the_reserve() -> None:
    snapshot = Snapshot((site("a", cpu(memory=1000, free_bytes=600, reserve=0.2)),), ())
    for reserve, usable in ((True, 400), (False, 600)):
        assert look(snapshot, SMOL, Constraints(), reserve=reserve).nodes["a"][0].usable_bytes == usable


def test_a_dtype_that_was_not_measured_is_assumed_slow_and_said() -> None:
    device = cpu(flops={"float32": 2e9, "bfloat16": 8e9}, speed=1e12)
    picture = look(Snapshot((site("a", device),), ()), replace(SMOL, dtype="float16"), Constraints())
    assert picture.nodes["a"][0].speed == 2e9  # 2e9 FLOP/s, two operations a weight of two bytes
    assert "no measured float16 speed" in picture.notes[0]


def test_a_snapshot_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(TopologyError, match="site twice"):
        look(Snapshot((site("a"), site("a")), ()), SMOL, Constraints())
    with pytest.raises(TopologyError, match="device twice"):
        look(Snapshot((site("a", cpu("x"), cpu("x")),), ()), SMOL, Constraints())
    with pytest.raises(TopologyError, match="listed twice"):
        look(Snapshot((site("a"),), (Link("a", "b", 0.1), Link("a", "b", 0.2))), SMOL, Constraints())


def test_a_gpu_is_as_fast_in_either_dtype_of_sixteen_bits_and_slower_in_a_wider_one() -> None:
    device = gpu()
    pictures = {
        dtype: look(Snapshot((site("a", device),), ()), replace(SMOL, dtype=dtype), Constraints())
        for dtype in ("bfloat16", "float16")
    }
    assert pictures["bfloat16"].nodes["a"][0].flops == pictures["float16"].nodes["a"][0].flops == 600e12
    assert "that of float16 is assumed" in pictures["bfloat16"].notes[0]
    half = replace(device, flops={"float16": 600e12})
    wide = look(Snapshot((site("a", half),), ()), SMOL, Constraints())
    assert wide.nodes["a"][0].flops == 300e12


def test_a_device_that_others_load_is_as_much_slower() -> None:
    idle, busy = (look(Snapshot((site("a", cpu(load=load)),), ()), SMOL, Constraints()) for load in (0.0, 0.25))
    assert busy.nodes["a"][0].speed == 0.75 * idle.nodes["a"][0].speed
    assert "load is 1.0" in look(Snapshot((site("a", cpu(load=1.0)),), ()), SMOL, Constraints()).notes[0]


def test_a_directed_link_counts_for_its_own_direction_alone() -> None:
    there, back = Link("a", "b", 0.010, directed=True), Link("b", "a", 0.030, directed=True)
    picture = look(Snapshot((site("a"), site("b")), (there, back)), SMOL, Constraints())
    assert (picture.path("a", "b").one_way_s, picture.path("b", "a").one_way_s) == (0.005, 0.015)
    cut = replace(back, reachable=False)
    picture = look(Snapshot((site("a"), site("b")), (there, cut)), SMOL, Constraints())
    assert picture.path("a", "b").reachable and not picture.path("b", "a").reachable


def test_quantised_weights_take_fewer_bytes_than_activations() -> None:
    half, four = replace(SMOL, dtype="bfloat16"), replace(SMOL, dtype="bfloat16", bytes_per_parameter=0.5)
    assert four.layer_bytes * 4 == half.layer_bytes and four.embedding_bytes * 4 == half.embedding_bytes
    assert four.activation_bytes == half.activation_bytes
    assert four.kv_bytes_per_token(1) == half.kv_bytes_per_token(1)
    assert type(four).from_dict(four.to_dict()) == four
