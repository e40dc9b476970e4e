"""The small parts: timers, round trips, suspicion, rumours, links, configuration."""

from __future__ import annotations

import itertools

import pytest

from mesh.address import join_address, split_address
from mesh.errors import ConfigError
from mesh.gossip.config import GossipConfig, valid_address
from mesh.gossip.members import Claim
from mesh.gossip.rtt import WINDOW, Rtt, RttWindow
from mesh.gossip.rumours import Rumours
from mesh.gossip.suspicion import Suspicion
from mesh.gossip.timers import Timers


def test_timers_fire_in_order_and_cancelled_ones_do_not():
    timers, fired = Timers(stall_s=9, grace_s=1), []
    timers.at(2.0, lambda now: fired.append("b"))
    timers.at(1.0, lambda now: fired.append("a"))
    timers.at(2.0, lambda now: fired.append("c"))
    timers.at(1.5, lambda now: fired.append("never")).cancel()
    timers.at(5.0, lambda now: fired.append("later"))
    timers.run(2.0)
    assert fired == ["a", "b", "c"]
    assert timers.next_s() == 5.0


def test_after_a_stall_condemning_timers_wait_once_more_and_only_once():
    timers, fired = Timers(stall_s=0.3, grace_s=0.5), []
    timers.at(1.0, lambda now: fired.append("verdict"), patient=True)
    timers.at(1.0, lambda now: fired.append("ping"))
    assert timers.run(9.0)
    assert fired == ["ping"]
    assert timers.run(20.0)
    assert fired == ["ping", "verdict"]


def test_a_window_gives_minimum_median_spread_and_loss():
    window = RttWindow()
    assert window.summary() is None
    for sample in (0.010, 0.012, 0.030, -1.0, 1e9):
        window.answered(sample)
    window.lost()
    assert window.summary() == Rtt(0.010, 0.012, pytest.approx(0.02 / 3), 3, 0.25)


def test_a_window_forgets_old_routes():
    window = RttWindow()
    for sample in [0.01] * WINDOW + [0.2] * WINDOW:
        window.answered(sample)
    assert window.summary() == Rtt(0.2, 0.2, 0.0, WINDOW, 0.0)


def test_the_wait_for_an_answer_follows_the_path_within_bounds():
    bounds = {"floor_s": 0.2, "default_s": 0.5, "ceiling_s": 2.0}
    window = RttWindow()
    assert window.timeout_s(**bounds) == 0.5
    for sample in (0.3, 0.3, 0.3):
        window.answered(sample)
    assert window.timeout_s(**bounds) == pytest.approx(0.35)
    for sample, expected_s in ((0.0001, 0.2), (30.0, 2.0)):
        window = RttWindow()
        for _ in range(3):
            window.answered(sample)
        assert window.timeout_s(**bounds) == expected_s


def test_suspicion_shortens_with_independent_accusers_only():
    suspicion = Suspicion(10.0, accuser="a", wanted=3, min_s=1.0, max_s=3.0, lone_s=2.0)
    deadlines = [suspicion.deadline_s]
    for accuser in ("a", "b", "b", "c", "d", "e"):
        suspicion.confirm(accuser)
        deadlines.append(suspicion.deadline_s)
    assert deadlines[0] == deadlines[1] == 13.0
    assert deadlines == sorted(deadlines, reverse=True)
    assert deadlines[-1] == 11.0


def test_with_three_sites_one_confirmation_is_all_there_can_be():
    suspicion = Suspicion(0.0, accuser="a", wanted=1, min_s=1.0, max_s=2.0, lone_s=1.5)
    assert suspicion.deadline_s == 2.0
    assert suspicion.confirm("b")
    assert suspicion.deadline_s == 1.0


def test_with_two_sites_nobody_can_confirm():
    suspicion = Suspicion(0.0, accuser="a", wanted=0, min_s=1.0, max_s=2.0, lone_s=1.5)
    assert not suspicion.confirm("b")
    assert suspicion.deadline_s == 1.5


def test_claims_are_ordered_by_incarnation_then_gravity():
    def claim(state, incarnation):
        return Claim("a", "a:1", state, incarnation)

    order = [claim(s, i) for i in (1, 2) for s in ("alive", "suspect", "dead", "left")]
    for low, high in itertools.pairwise(order):
        assert high.beats(low)
        assert not low.beats(high)
        assert not low.beats(low)


def test_a_rumour_rides_a_bounded_number_of_times():
    rumours = Rumours()
    rumours.add(Claim("a", "a:1", "alive", 1), b"alive", 3)
    assert [rumours.take(100) for _ in range(6)] == [[b"alive"]] * 4 + [[]] * 2


def test_a_newer_rumour_replaces_the_older_one_but_accusers_stand_side_by_side():
    rumours = Rumours()
    rumours.add(Claim("a", "a:1", "suspect", 1, "x"), b"by x", 3)
    rumours.add(Claim("a", "a:1", "suspect", 1, "y"), b"by y", 3)
    assert sorted(rumours.take(100)) == [b"by x", b"by y"]
    rumours.add(Claim("a", "a:1", "alive", 2), b"alive", 3)
    assert rumours.take(100) == [b"alive"]


def test_rumours_respect_the_room():
    rumours = Rumours()
    for site in "abc":
        rumours.add(Claim(site, "a:1", "alive", 1), site.encode() * 10, 3)
    assert len(rumours.take(25)) == 2
    assert rumours.take(5) == []


@pytest.mark.parametrize("address", ["10.0.0.1:7700", "[::1]:7700", "ams.example.org:1"])
def test_addresses_survive_taking_apart(address):
    assert join_address(*split_address(address)) == address
    assert valid_address(address)


@pytest.mark.parametrize("address", ["", "a", "a:", ":1", "a:b", "a:-1", "a:65536", "::1:7", "a:1 ", "a:٣", 7, None])
def test_what_is_not_an_address_is_refused(address):
    assert not valid_address(address)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"site": ""}, "site"),
        ({"site": "a b"}, "site"),
        ({"site": "x" * 65}, "site"),
        ({"incarnation": 0}, "incarnation"),
        ({"address": "nowhere"}, "nowhere"),
        ({"seeds": ["nowhere"]}, "seeds"),
        ({"delays": {"a:1": -1.0}}, "delays"),
        ({"advertise": "a:0"}, "advertise"),
    ],
)
def test_a_wrong_configuration_names_what_is_wrong(wrong, named):
    with pytest.raises(ConfigError, match=named):
        GossipConfig(**{"site": "a", **wrong})
