"""The virtual network does what it says, the same way every time."""

from __future__ import annotations

import pytest

from simulations.clock import VirtualClock
from simulations.network import StillWrong, VirtualNetwork


def story(seed: int) -> VirtualNetwork:
    net = VirtualNetwork(seed=seed, latency=0.03, jitter=0.5, loss=0.1)
    for number in range(5):
        net.spawn(f"s{number}", seeds=["s0"])
        net.publish(f"s{number}", "load", {"free": number})
    net.run_for(3.0)
    net.partition(["s0", "s1", "s2"], ["s3", "s4"])
    net.run_for(8.0)
    net.heal()
    net.crash("s2")
    net.pause("s1", 1.0)
    net.run_for(8.0)
    net.leave("s4")
    net.run_for(3.0)
    return net


def test_two_runs_of_one_seed_are_the_same_run():
    first, second = story(7), story(7)
    assert first.trace() == second.trace()
    assert first.views() == second.views()
    assert first.datagrams > 100


def test_another_seed_is_another_run():
    assert story(7).trace() != story(8).trace()


def test_the_clock_jumps_and_keeps_the_order_of_asking():
    clock, happened = VirtualClock(5.0), []
    clock.at(7.0, lambda: happened.append(("b", clock())))
    clock.at(6.0, lambda: happened.append(("a", clock())))
    clock.at(7.0, lambda: happened.append(("c", clock())))
    clock.at(1.0, lambda: happened.append(("past", clock())))
    while clock.step(6.5):
        pass
    assert happened == [("past", 5.0), ("a", 6.0)]
    assert clock() == 6.5
    while clock.step(9.0):
        pass
    assert happened[2:] == [("b", 7.0), ("c", 7.0)]


def test_latency_is_what_was_asked_for():
    net = VirtualNetwork(seed=1, latency=0.25)
    net.spawn("a")
    net.spawn("b", seeds=["a"])
    net.run_for(5.0)
    assert net.nodes["b"].core.rtts()["a"].min_s == pytest.approx(0.5)


def test_a_partition_stops_everything_between_its_sides():
    net = VirtualNetwork(seed=1, latency=0.01)
    for site in "ab":
        net.spawn(site, seeds=["a"])
    net.partition(["a"], ["b"])
    net.run_for(5.0)
    assert net.views() == {"a": {"a": "alive"}, "b": {"b": "alive"}}


def test_what_does_not_come_true_in_time_is_said_with_its_seed():
    net = VirtualNetwork(seed=42)
    net.spawn("a")
    with pytest.raises(StillWrong, match="seed 42"):
        net.run_until(lambda: False, 3.0)
    assert net.clock() == 1003.0
