"""memberlist's constants on our code give the real memberlist's times; our own are much shorter."""

from __future__ import annotations

from statistics import median

import pytest

from mesh.gossip.profiles import PROFILES
from simulations.network import VirtualNetwork


def detection_s(profile: str, count: int, seed: int, wait_s: float) -> list[float]:
    """Seconds from the crash of one of `count` sites on a network without latency until each other reports it."""
    net = VirtualNetwork(seed=seed, latency=50e-6, timing=PROFILES[profile])
    for number in range(count):
        net.spawn(f"s{number:02}", seeds=["s00"])
    net.run_for(20.0 + 1.37 * seed)
    crash_s = net.clock()
    net.crash("s01")
    net.run_for(wait_s)
    return [(node.when("dead", "s01") or 1e9) - crash_s for node in net.nodes.values()]


@pytest.mark.parametrize(
    ("profile", "count", "real_s"),
    # memberlist 0.2.2, processes on loopback, one killed with SIGKILL: time until the others report it.
    [
        ("memberlist-lan", 3, 5.5),
        ("memberlist-lan", 11, 5.8),
        ("memberlist-wan", 3, 35.0),
        ("memberlist-wan", 11, 41.0),
    ],
)
def test_memberlists_constants_give_memberlists_times(profile, count, real_s):
    runs = [detection_s(profile, count, seed, 2.5 * real_s) for seed in range(12)]
    assert median(median(times) for times in runs) == pytest.approx(real_s, rel=0.2)
    assert max(max(times) - min(times) for times in runs) < 0.6


@pytest.mark.parametrize("count", [3, 11])
def test_our_own_times_are_a_fraction_of_either(count):
    times = [max(detection_s("isthmus", count, seed, 8.0)) for seed in range(12)]
    assert median(times) < 5.5 / 1.5
    assert median(times) < 35.0 / 10
    assert max(times) < 6.0


def test_every_profile_keeps_a_quiet_mesh_alive_at_two_percent_loss():
    for timing in PROFILES.values():
        net = VirtualNetwork(seed=1, latency=0.03, jitter=0.1, loss=0.02, timing=timing)
        for number in range(5):
            net.spawn(f"s{number:02}", seeds=["s00"])
        net.run_for(120.0)
        assert net.agreed()
        assert not any(event.kind == "dead" for node in net.nodes.values() for _, event in node.events)
