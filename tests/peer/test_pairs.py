"""Links of a snapshot need the word of both ends, or a coordinate that proved right; a liar gains nothing."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.gossip.coordinates import DIMENSIONS, Coordinate
from mesh.gossip.links import LinkReport
from mesh.peer.pairs import EVERY_PAIR, links_between
from topology.picture import UNMEASURED_BANDWIDTH, UNMEASURED_RTT_S


def said(rtt_s=0.1, **others):
    return LinkReport(rtt_s, rtt_s, **others)


def at(x, height=0.0):
    return Coordinate((x,) + (0.0,) * (DIMENSIONS - 1), height, 0.1)


def look(sites, reports, coordinates=None, own="me"):
    links = links_between(sites, own, reports, coordinates or {})
    found = {(link.source, link.target): link for link in links}
    assert len(found) == len(links)
    return found


def test_two_ends_that_agree_make_a_measured_link_both_ways():
    found = look("ab", {"a": {"b": said(0.1, jitter_s=0.01)}, "b": {"a": said(0.11, loss=0.2)}})
    assert found.keys() == {("a", "b"), ("b", "a")}
    for link in found.values():
        assert (link.rtt_s, link.jitter_s, link.loss, link.measured, link.reachable) == (0.11, 0.01, 0.2, True, True)


def test_two_ends_that_disagree_are_taken_at_the_larger_and_as_an_estimate():
    found = look("ab", {"a": {"b": said(0.0)}, "b": {"a": said(0.2)}})
    assert found["a", "b"].rtt_s == found["b", "a"].rtt_s == 0.2
    assert not found["a", "b"].measured


def test_our_own_measurement_needs_no_other():
    found = look(["me", "a"], {"me": {"a": said(0.05)}})
    assert found["a", "me"].rtt_s == 0.05
    assert found["a", "me"].measured


def test_one_end_alone_does_not_make_a_link_fast():
    assert look("ab", {"a": {"b": said(0.0)}})["a", "b"].rtt_s == UNMEASURED_RTT_S
    found = look("ab", {"a": {"b": said(0.0, bandwidth=1e12)}}, {"a": at(0.0), "b": at(0.15)})["a", "b"]
    assert found.rtt_s >= 0.15
    assert not found.measured
    assert found.bandwidth <= UNMEASURED_BANDWIDTH


@pytest.mark.parametrize("reports", [{"a": {"b": said(out=False)}, "b": {"a": said()}}, {"b": {"a": said(into=False)}}])
def test_a_cut_marks_its_direction(reports):
    found = look("ab", reports)
    assert not found["a", "b"].reachable
    assert found["b", "a"].reachable


def test_bandwidth_is_the_senders_word_and_loss_stays_possible():
    found = look("ab", {"a": {"b": said(bandwidth=5e6, loss=1.0)}, "b": {"a": said()}})
    assert found["a", "b"].bandwidth == 5e6
    assert found["b", "a"].bandwidth == 125e6
    assert found["a", "b"].loss == 0.99


def triangle(x):
    """Honest sites 100 ms apart on a line, all measured."""
    return {a: {b: said(0.1 * abs(i - j)) for j, b in enumerate(x) if a != b} for i, a in enumerate(x)}


def test_pairs_nobody_measured_are_estimated():
    reports = {site: dict(found) for site, found in triangle("abcd").items()}
    del reports["a"]["d"], reports["d"]["a"]
    found = look("abcd", reports, {site: at(0.1 * n) for n, site in enumerate("abcd")})
    assert found["a", "d"].rtt_s == pytest.approx(0.3)
    assert not found["a", "d"].measured


def test_a_site_that_nobody_measured_is_not_near_because_its_coordinate_says_so():
    coordinates = {site: at(0.1 * n) for n, site in enumerate("abcd")}
    found = look("abcdx", triangle("abcd"), coordinates | {"x": at(0.1)})
    assert found["b", "x"].rtt_s >= 0.15  # the median of the measured


def test_a_site_that_claims_to_be_next_to_everybody_is_nowhere_nearer_than_it_is():
    honest = [f"s{n}" for n in range(8)]
    reports = {site: {**found, "liar": said(0.25)} for site, found in triangle(honest).items()}
    for site in honest[4:]:
        del reports[site]["liar"]  # half of them have not measured it
    reports["liar"] = {site: said(0.0, bandwidth=1e13) for site in honest}
    coordinates = {site: at(0.1 * n) for n, site in enumerate(honest)} | {"liar": at(0.35)}
    found = look([*honest, "liar"], reports, coordinates, own="s0")
    for site in honest:
        assert found[site, "liar"].rtt_s >= 0.25
        assert not found[site, "liar"].measured
        assert found[site, "liar"].bandwidth <= UNMEASURED_BANDWIDTH


def test_what_is_said_of_absent_sites_is_left_out():
    assert look("ab", {"a": {"z": said()}, "z": {"a": said()}}, {"z": at(0.0)}) == {}


def test_a_large_mesh_has_a_bounded_number_of_links():
    names = [f"s{n:03}" for n in range(490)]
    coordinates = {name: at(0.001 * n) for n, name in enumerate(names)}
    reports = {name: {other: said(0.05) for other in names[:24] if other != name} for name in names}
    began = time.process_time()
    found = look(names, reports, coordinates)
    assert time.process_time() - began < 60.0
    assert len(found) <= 2 * EVERY_PAIR * EVERY_PAIR + 2 * 24 * 490
    assert ("s200", "s201") in found


rtts = st.floats(0, 60)
reports = st.dictionaries(
    st.sampled_from("abcd"),
    st.dictionaries(
        st.sampled_from("abcdz"),
        st.builds(LinkReport, st.none() | rtts, st.none() | rtts, rtts, st.floats(0, 1), st.none() | st.booleans()),
    ),
)


@given(reports, st.dictionaries(st.sampled_from("abcdz"), st.floats(-8, 8).map(at)))
def test_whatever_is_said_no_link_is_faster_than_the_word_of_its_other_end(reports, coordinates):
    for (source, target), link in look("abcd", reports, coordinates).items():
        assert 0 <= link.rtt_s <= 1000
        word = reports.get(target, {}).get(source)
        if word is not None and word.min_s is not None:
            assert link.rtt_s >= word.min_s
