"""Entries reach every peer, whole and in their last version, over paths that lose, reorder and break."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip.config import GossipConfig
from mesh.gossip.core import GossipCore
from simulations.network import VirtualNetwork


def capabilities(number: int) -> dict[str, object]:
    devices = [
        {"name": f"cuda:{index}", "flops": {"bfloat16": 1e14 + number}, "note": "x" * 250} for index in range(10)
    ]
    return {"devices": devices}


@pytest.mark.parametrize("count", [3, 11])
def test_large_values_reach_everybody_within_a_second(count):
    net = VirtualNetwork(seed=1, latency=0.03, jitter=0.5)
    for number in range(count):
        net.spawn(f"s{number:02}", seeds=["s00"])
        net.publish(f"s{number:02}", "capabilities", capabilities(number))
    net.run_until(lambda: all(len(node.core.entries("capabilities")) == count for node in net.nodes.values()), 1.0)
    assert net.same_entries("capabilities")
    assert net.nodes["s00"].core.entry("s02", "capabilities") == capabilities(2)


def test_an_update_reaches_the_others_in_about_one_latency():
    net = VirtualNetwork(seed=1, latency=0.05)
    for site in "abc":
        net.spawn(site, seeds=["a"])
    net.run_for(5.0)
    net.publish("b", "load", {"free": 7})
    assert net.run_until(lambda: net.same_entries("load") and net.nodes["a"].core.entries("load"), 1.0) < 0.06
    assert net.nodes["a"].events[-1][1] == ("updated", "b", "load")


@pytest.mark.parametrize("seed", range(3))
def test_entries_converge_under_loss(seed):
    net = VirtualNetwork(seed=seed, latency=0.04, jitter=0.9, loss=0.25)
    chance = random.Random(seed)
    for number in range(5):
        net.spawn(f"s{number}", seeds=["s0", "s1"])
    last: dict[str, dict[str, object]] = {"load": {}, "jobs": {}, "capabilities": {}}
    for step in range(60):
        site, key = f"s{chance.randrange(5)}", chance.choice(sorted(last))
        last[key][site] = capabilities(step)
        net.publish(site, key, capabilities(step))
        net.run_for(0.2)
    everybody = list(net.nodes.values())
    net.run_until(lambda: all(node.core.entries(key) == last[key] for key in last for node in everybody), 20.0)


def test_what_was_published_during_a_partition_meets_afterwards():
    net = VirtualNetwork(seed=1, latency=0.04)
    for number in range(5):
        net.spawn(f"s{number}", seeds=["s0"])
    net.run_for(3.0)
    net.partition(["s0", "s1"], ["s2", "s3", "s4"])
    for number in range(5):
        net.publish(f"s{number}", "load", {"free": number})
    net.run_for(60.0)
    assert set(net.nodes["s0"].core.entries("load")) == {"s0", "s1"}
    net.heal()
    net.run_until(lambda: all(len(node.core.entries("load")) == 5 for node in net.nodes.values()), 30.0)


def test_entries_of_the_dead_do_not_count_but_can_be_looked_up():
    net = VirtualNetwork(seed=1)
    for site in "abc":
        net.spawn(site, seeds=["a"])
        net.publish(site, "load", {"of": site})
    net.run_for(2.0)
    net.crash("c")
    net.run_until(lambda: net.agreed(gone=["c"]), 6.0)
    assert set(net.nodes["a"].core.entries("load")) == {"a", "b"}
    assert net.nodes["a"].core.entry("c", "load") == {"of": "c"}


def test_entries_of_an_earlier_start_disappear():
    net = VirtualNetwork(seed=1)
    for site in "abc":
        net.spawn(site, seeds=["a"])
    net.publish("c", "jobs", {"old": 1})
    net.publish("c", "load", {"old": 1})
    net.run_for(2.0)
    net.crash("c")
    net.spawn("c", seeds=["a"])
    net.publish("c", "load", {"new": 1})
    net.run_for(3.0)
    assert net.nodes["a"].core.entry("c", "load") == {"new": 1}
    assert net.nodes["a"].core.entry("c", "jobs") is None


def test_callers_cannot_change_what_is_stored():
    core = GossipCore(GossipConfig("a", "a:1", rng=random.Random(1)))
    core.start(0.0)
    value = {"list": [1]}
    core.publish("k", value, 0.0)
    value["list"].append(2)
    core.entry("a", "k")["list"].append(3)
    assert core.entries("k") == {"a": {"list": [1]}}


def test_a_mesh_in_agreement_exchanges_no_digests():
    net = VirtualNetwork(seed=1, latency=0.04)
    for site in "abc":
        net.spawn(site, seeds=["a"])
        net.publish(site, "load", {"of": site})
    net.run_for(10.0)
    before = [node.core.counters["syncs"] for node in net.nodes.values()]
    net.run_for(60.0)
    assert [node.core.counters["syncs"] for node in net.nodes.values()] == before


actions = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(0, 3), st.integers(0, 9)),
        st.tuples(st.just("crash"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("start"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("partition"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 40), st.just(0)),
    ),
    max_size=20,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), actions, st.sampled_from([0.0, 0.1, 0.3]))
def test_whatever_happens_a_healed_mesh_agrees(seed, script, loss):
    """A safety phase of faults, then a healed phase in which everything must come good within a bound."""
    net = VirtualNetwork(seed=seed, latency=0.03, jitter=0.5, loss=loss)
    for number in range(4):
        net.spawn(f"s{number}", seeds=["s0"])
    for action, number, value in script:
        site = f"s{number}"
        if action == "wait":
            net.run_for(number / 4)
        elif action == "partition":
            net.partition([f"s{other}" for other in range(4) if other != number], [site])
        elif action == "start" and site not in net.nodes:
            net.spawn(site, seeds=["s0"])
        elif action == "crash" and site in net.nodes:
            net.crash(site)
        elif action == "publish" and site in net.nodes:
            net.publish(site, "load", {"value": value})
    net.heal()
    net.loss = 0.0
    gone = [f"s{number}" for number in range(4) if f"s{number}" not in net.nodes]
    net.run_until(lambda: net.agreed(gone=gone) and net.same_entries("load"), 45.0)
    net.run_for(20.0)
    assert net.agreed(gone=gone)
