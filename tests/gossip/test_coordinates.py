"""Coordinates predict round trips nobody measured, stay within bounds, and do not believe what cannot be."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip.coordinates import (
    DIMENSIONS,
    MAX_ERROR,
    MAX_HEIGHT_S,
    MAX_PLACE_S,
    MAX_RTT_S,
    MEMORY,
    PACKED_BYTES,
    Coordinate,
    Coordinates,
    estimate_s,
)


def plane(count, seed=1):
    """Round trips in seconds of sites in a plane, each with a height."""
    rng = np.random.default_rng(seed)
    places, heights = rng.uniform(0, 0.2, (count, 2)), rng.uniform(0.001, 0.02, count)
    return np.hypot(*(places[:, None] - places[None]).T) + heights[:, None] + heights[None]


def settle(rtts, cycles, liar=None, lie=None):
    rng = random.Random(1)
    sites = [Coordinates(random.Random(number)) for number in range(len(rtts))]
    for cycle in range(cycles):
        for number, site in enumerate(sites):
            other = rng.choice([n for n in range(len(rtts)) if n != number])
            said = lie(rng) if other == liar else sites[other].own()
            site.observe(str(other), said, float(rtts[number, other]), float(cycle))
    return sites


def errors(sites, rtts, skip=()):
    return sorted(
        abs(estimate_s(one.own(), other.own()) - rtts[i, j]) / rtts[i, j]
        for i, one in enumerate(sites)
        for j, other in enumerate(sites)
        if i != j and i not in skip and j not in skip
    )


def test_sites_in_a_plane_are_found():
    rtts = plane(24)
    found = errors(settle(rtts, 60), rtts)
    assert found[len(found) // 2] < 0.05
    assert found[len(found) * 9 // 10] < 0.15


@pytest.mark.parametrize("count", [2, 3, 12])
def test_sites_in_one_building_find_each_other_from_wherever_they_start(count):
    rtts = np.full((count, count), 1e-4)
    found = errors(settle(rtts, 40), rtts)
    assert found[len(found) * 9 // 10] < 0.3


def test_the_same_chance_gives_the_same_coordinates():
    rtts = plane(8)
    assert [s.own() for s in settle(rtts, 20)] == [s.own() for s in settle(rtts, 20)]


def test_a_site_that_says_anything_moves_the_others_little():
    rtts = plane(24)

    def lie(rng):
        return Coordinate(tuple(rng.uniform(-8, 8) for _ in range(DIMENSIONS)), rng.uniform(0, 8), 0.0)

    found = errors(settle(rtts, 60, liar=3, lie=lie), rtts, skip={3})
    assert found[len(found) // 2] < 0.1
    assert found[len(found) * 9 // 10] < 0.3


def test_a_near_site_that_lies_does_not_outweigh_the_rest():
    rtts = plane(24)
    rtts[3, :] = rtts[:, 3] = 1e-6
    far = Coordinate((5.0,) * DIMENSIONS, 0.0, 0.0)
    found = errors(settle(rtts, 60, liar=3, lie=lambda _: far), rtts, skip={3})
    assert found[len(found) // 2] < 0.15


@pytest.mark.parametrize("rtt_s", [0.0, -1.0, math.nan, math.inf, MAX_RTT_S * 2])
def test_impossible_round_trips_are_left_out(rtt_s):
    site = Coordinates(random.Random(1))
    before = site.own()
    assert not site.observe("b", before, rtt_s, 0.0)
    assert site.own() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"place": (0.0,) * (DIMENSIONS - 1)},
        {"place": (math.nan,) * DIMENSIONS},
        {"place": (MAX_PLACE_S * 2,) + (0.0,) * (DIMENSIONS - 1)},
        {"height_s": -1.0},
        {"height_s": math.inf},
        {"height_s": MAX_HEIGHT_S * 2},
        {"error": math.nan},
        {"error": MAX_ERROR * 2},
    ],
)
def test_impossible_coordinates_are_left_out(changes):
    site = Coordinates(random.Random(1))
    before = site.own()
    assert not site.observe("b", before._replace(**changes), 0.1, 0.0)
    assert site.own() == before


def test_a_round_trip_in_a_queue_does_not_raise_what_is_known():
    site, peer = Coordinates(random.Random(1)), Coordinates(random.Random(2)).own()
    for probe in range(60):
        site.observe("b", peer, 0.5 if probe % 4 == 3 else 0.1, float(probe))
    assert estimate_s(site.own(), peer) < 0.25


def test_memory_is_bounded_and_the_longest_unheard_goes_first():
    site, peer = Coordinates(random.Random(1)), Coordinates(random.Random(2)).own()
    for number in range(MEMORY + 10):
        site.observe(str(number), peer, 0.1, 0.0)
    assert len(site.known()) == MEMORY
    assert "9" not in site.known()
    assert "10" in site.known()


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=30))
def test_what_is_forgotten_counts_no_more_and_the_rest_stays(script):
    site, peer = Coordinates(random.Random(1)), Coordinates(random.Random(2)).own()
    known = {}
    for number, (name, forget) in enumerate(script):
        if forget:
            site.forget(name)
            known.pop(name, None)
        else:
            known[name] = min(0.01 * (number + 1), known.get(name, math.inf))
            site.forget(name)
            known[name] = 0.01 * (number + 1)
            site.observe(name, peer, known[name], 0.0)
    assert site.known() == pytest.approx(known)


floats = st.floats(allow_nan=True, allow_infinity=True)
coordinates = st.builds(
    Coordinate,
    st.tuples(*[st.floats(-MAX_PLACE_S, MAX_PLACE_S)] * DIMENSIONS) | st.tuples(*[floats] * DIMENSIONS),
    st.floats(0, MAX_HEIGHT_S) | floats,
    st.floats(0, MAX_ERROR) | floats,
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), coordinates, st.floats(1e-9, MAX_RTT_S) | floats), max_size=40))
def test_whatever_is_heard_the_own_coordinate_is_sound(heard):
    site = Coordinates(random.Random(1))
    for peer, coordinate, rtt_s in heard:
        site.observe(peer, coordinate, rtt_s, 0.0)
        site.heard(peer, coordinate)
        own = site.own()
        assert own.sound()
        assert 0.0 <= estimate_s(own, coordinate) <= MAX_RTT_S


@given(st.binary(min_size=PACKED_BYTES, max_size=PACKED_BYTES) | st.binary(max_size=60))
def test_bytes_are_a_sound_coordinate_or_refused(data):
    try:
        coordinate = Coordinate.unpack(data)
    except ValueError:
        return
    assert coordinate.sound()


def test_a_coordinate_survives_the_wire():
    own = settle(plane(4), 10)[0].own()
    back = Coordinate.unpack(own.pack())
    assert back.place == pytest.approx(own.place, rel=1e-6)
    assert len(own.pack()) == PACKED_BYTES
