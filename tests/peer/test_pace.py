"""The pace of a device: measured steps against calibrated ones, told only where that is more than noise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.peer.pace import FORGET_S, LEAST_TOLD, MOST_PACE, STEP, Pace
from mesh.runtime.work import Decoded
from topology.snapshot import Decoding

FIGURES = Decoding(layer_s=1e-3, row_s=1e-6, bandwidth=1e9, together=1.5)
#: Takes a second by those figures: 400 layers, 200,000 rows, 400 MB.
SECOND = Decoded(100, 1.0, 400, 200_000, 4e8)


def pace():
    return Pace({"cpu0": {"float32": FIGURES}})


def took(seconds):
    return SECOND._replace(seconds=seconds)


@pytest.mark.parametrize(("seconds", "told"), [(1.4, {}), (0.5, {}), (1.8, {"cpu0": 1.8}), (1.01, {})])
def test_what_takes_longer_than_calibrated_is_told_and_noise_is_not(seconds, told):
    p = pace()
    for now in range(5):
        p.observe("cpu0", "float32", took(seconds), now)
    assert p.told(5.0) == pytest.approx(told)


def test_the_first_steps_alone_say_nothing():
    p = pace()
    p.observe("cpu0", "float32", Decoded(2, 0.5, 8, 4_000, 8e6), 0.0)
    assert p.told(0.0) == {}


def test_what_was_told_does_not_move_for_a_little():
    p = pace()
    p.observe("cpu0", "float32", took(1.8), 0.0)
    assert p.told(0.0) == pytest.approx({"cpu0": 1.8})
    p.observe("cpu0", "float32", took(1.85), 1.0)
    assert p.told(1.0) == pytest.approx({"cpu0": 1.8})


def test_a_load_that_ends_is_forgotten_as_work_goes_on():
    p = pace()
    p.observe("cpu0", "float32", took(3.0), 0.0)
    assert p.told(0.0) == pytest.approx({"cpu0": 3.0})
    for now in range(100):
        p.observe("cpu0", "float32", took(1.0), now)
    assert p.told(100.0) == {}


def test_where_nothing_is_decoded_calibration_holds_again():
    p = pace()
    p.observe("cpu0", "float32", took(3.0), 0.0)
    assert p.told(FORGET_S) == {}


def test_shards_that_compute_side_by_side_are_held_against_what_that_was_measured_to_take():
    p = pace()
    for now in range(5):
        p.observe("cpu0", "float32", took(1.5), now, together=True)
    assert p.told(5.0) == {}


def test_a_device_or_dtype_without_figures_has_no_pace():
    p = pace()
    p.observe("cpu0", "bfloat16", took(9.0), 0.0)
    p.observe("gpu0", "float32", took(9.0), 0.0)
    assert p.told(0.0) == {}


@given(
    st.lists(st.tuples(st.floats(0, 1e300), st.floats(0, 1e300), st.floats(0, 1e300), st.floats(0, 1e300)), max_size=9)
)
def test_whatever_a_worker_reports_the_pace_stays_within_bounds(reports):
    p = pace()
    for now, report in enumerate(reports):
        p.observe("cpu0", "float32", Decoded(1, *report), now)
        assert all(LEAST_TOLD - STEP <= told <= MOST_PACE for told in p.told(now).values())
