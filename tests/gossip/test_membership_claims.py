"""What others say of a site: forged deaths, poisoned incarnations, floods, graves, restarts, snapshots."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip.absent import Known
from mesh.gossip.codec import Codec, pack_message, pack_sender
from mesh.gossip.config import Timing
from mesh.gossip.members import Claim
from mesh.gossip.messages import Rumour, Sender
from mesh.gossip.proof import Prover
from mesh.gossip.snapshot_file import BadSnapshot, decode, encode
from simulations.network import VirtualNetwork

SHORT = Timing(dead_reap_s=20.0, left_reap_s=10.0, grave_s=120.0)


def mesh(count: int, seed: int = 1, **paths: object) -> VirtualNetwork:
    net = VirtualNetwork(seed=seed, **{"latency": 0.02, **paths})
    for number in range(count):
        net.spawn(f"s{number:02}", seeds=["s00"])
    net.run_until(net.agreed, 5.0)
    net.run_for(5.0)
    return net


def say(net: VirtualNetwork, to: str, *claims: Claim, speaker: str = "mallory") -> None:
    """Have a member with a voice of its own tell one site something."""
    head = pack_sender(Sender(speaker, f"{speaker}:9", 1, False, bytes(8)))
    for start in range(0, len(claims), 10):
        packed = [pack_message(Rumour(claim)) for claim in claims[start : start + 10]]
        node = net.nodes[to]
        node.core.receive(Codec("isthmus").join(head, packed), f"{speaker}:9", net.clock())
        net.settle(node)


def claim(net: VirtualNetwork, site: str, state: str, accuser: str = "mallory", ahead: int = 0) -> Claim:
    incarnation = next(m.incarnation for m in net.nodes[site].core.members() if m.site == site)
    return Claim(site, f"{site}:7700", state, incarnation + ahead, accuser)


def reported(net: VirtualNetwork, kind: str, site: str) -> list[str]:
    return [node.site for node in net.nodes.values() if node.when(kind, site) is not None]


@pytest.mark.parametrize("state", ["suspect", "dead"])
def test_one_member_cannot_kill_a_living_site_at_the_others(state):
    net = mesh(5)
    for _ in range(40):
        for site in ("s00", "s02", "s03", "s04"):
            say(net, site, *(claim(net, "s01", state, f"m{number}") for number in range(5)))
        net.run_for(0.25)
    net.run_for(10.0)
    assert not reported(net, "dead", "s01")
    assert all(node.states()["s01"] == "alive" for node in net.nodes.values())


def test_a_forged_death_is_an_accusation_that_the_site_hears_of_and_refutes():
    net = mesh(5)
    say(net, "s00", claim(net, "s01", "dead"))
    net.run_for(5.0)
    assert not reported(net, "dead", "s01")


def test_true_deaths_told_by_others_hasten_the_verdict():
    times = []
    for net, accusers in ((mesh(3), 0), (mesh(3), 1)):
        last = claim(net, "s01", "dead")
        net.crash("s01")
        net.pause("s02", 4.0)  # it cannot confirm
        net.run_until(lambda net=net: net.nodes["s00"].when("suspect", "s01") is not None, 5.0)
        start_s = net.clock()
        for number in range(accusers):
            say(net, "s00", last._replace(accuser=f"w{number}"))
        net.run_until(lambda net=net: net.nodes["s00"].when("dead", "s01") is not None, 10.0)
        times.append(net.clock() - start_s)
    assert times[1] < times[0]


def test_a_flood_of_accusations_does_not_make_a_site_flood_the_mesh():
    net = mesh(5)
    before = {m.incarnation for m in net.nodes["s01"].core.members() if m.site == "s01"}.pop()
    sent = net.datagrams
    for step in range(200):
        say(net, "s01", claim(net, "s01", "suspect", f"m{step}"))
        net.run_for(0.05)
    after = {m.incarnation for m in net.nodes["s01"].core.members() if m.site == "s01"}.pop()
    assert after - before <= 11  # one refutation a second
    assert (net.datagrams - sent) / 10 / 5 < 40


class _Honest(Prover):
    """Signs with a site's name; a real one signs with its key."""

    def __init__(self, site: str) -> None:
        self._site = site

    def sign(self, message: bytes) -> bytes:
        return self._site.encode()

    def verify(self, site: str, message: bytes, proof: bytes) -> bool:
        return proof == site.encode()

    def knows(self, site: str) -> bool:
        return True


def test_nobody_raises_the_incarnation_of_another_or_moves_it_or_says_its_farewell():
    from mesh.gossip.config import GossipConfig
    from mesh.gossip.core import GossipCore

    core = GossipCore(GossipConfig("a", address="a:1"), prover=_Honest("a"))
    core.start(0.0)
    codec = Codec("isthmus")
    own = pack_sender(Sender("b", "b:1", 3, False, bytes(8), b"b"))
    core.receive(codec.join(own, []), "b:1", 0.1)
    head = pack_sender(Sender("m", "m:1", 1, False, bytes(8), b"m"))
    for state in ("alive", "suspect", "dead", "left"):
        for address, incarnation in (("b:1", 2**40), ("m:1", 4), ("b:1", 4)):
            told = Rumour(Claim("b", address, state, incarnation, "m", b"m"))
            core.receive(codec.join(head, [pack_message(told)]), "m:1", 0.2)
    held = {member.site: member for member in core.members()}["b"]
    assert (held.address, held.incarnation, held.state) == ("b:1", 3, "alive")
    assert core.counters["forged"] == 12


def test_a_suspect_is_told_of_the_accusation_and_refutes_with_a_higher_incarnation():
    net = mesh(3)
    net.pause("s01", 1.5)
    net.run_for(6.0)
    if reported(net, "suspect", "s01"):
        assert {m.incarnation for m in net.nodes["s00"].core.members() if m.site == "s01"}.pop() > 1
    assert not reported(net, "dead", "s01")


def test_the_left_and_the_dead_do_not_come_back_by_hearsay():
    net = mesh(4, timing=SHORT)
    left, dead = claim(net, "s02", "alive", ""), claim(net, "s03", "alive", "")
    net.leave("s02")
    net.crash("s03")
    net.run_for(60.0)
    assert set(net.nodes["s00"].states()) == {"s00", "s01"}
    for _ in range(20):
        say(net, "s00", left, dead)
        net.run_for(0.5)
    assert not {"s02", "s03"} & set(net.nodes["s00"].states())
    assert not {"s02", "s03"} & set(net.nodes["s01"].states())


def test_who_really_comes_back_from_the_grave_is_let_in_even_with_a_lost_counter():
    net = mesh(4, timing=SHORT)
    net.leave("s02")
    net.crash("s03")
    net.run_for(60.0)
    net.spawn("s02", seeds=["s00"], incarnation=1)
    net.spawn("s03", incarnation=1)  # found because it is called for ever
    net.run_until(net.agreed, 20.0)


@pytest.mark.parametrize("count", [2, 6])
def test_halves_that_have_forgotten_each_other_find_together_without_seeds(count):
    net = VirtualNetwork(seed=2, latency=0.02, timing=SHORT)
    sites = [f"s{number:02}" for number in range(count)]
    for site in sites:
        net.spawn(site, seeds=["s00"])
    net.run_until(net.agreed, 5.0)
    net.run_for(5.0)
    net.partition(sites[: count // 2], sites[count // 2 :])
    net.run_for(600.0)
    assert set(net.nodes[sites[-1]].states()) == set(sites[count // 2 :])
    net.heal()
    assert net.run_until(net.agreed, 30.0) < 25.0


def test_the_absent_are_called_at_a_bounded_rate():
    net = VirtualNetwork(seed=1, latency=0.02, timing=Timing(dead_reap_s=5.0))
    node = net.spawn("s00")
    node.core.remember([Known(f"x{number:03}", f"x{number:03}:1", 1, "alive") for number in range(245)], net.clock())
    net.settle(node)
    net.run_for(60.0)
    before = net.datagrams
    net.run_for(300.0)
    assert 0.5 < (net.datagrams - before) / 300 < 2.1


def test_a_restart_from_a_snapshot_needs_no_seed_and_takes_its_name_back_at_once():
    for address in (None, "elsewhere:9"):
        net = mesh(5)
        kept = decode("isthmus", encode("isthmus", net.nodes["s01"].core.known()))
        assert [peer.site for peer in kept] == [f"s{number:02}" for number in range(5)]
        net.crash("s01")
        node = net.spawn("s01", incarnation=1, address=address)
        node.core.remember(kept, net.clock())
        net.settle(node)
        assert net.run_until(net.agreed, 6.0) < (1.0 if address is None else 6.0)
        seen = {m.site: m for m in net.nodes["s00"].core.members()}["s01"]
        assert seen.incarnation > 1
        assert seen.address == node.address


def test_a_snapshot_remembers_the_dead_and_the_forgotten():
    net = mesh(4, timing=SHORT)
    net.crash("s02")
    net.run_for(5.0)
    states = {peer.site: peer.state for peer in net.nodes["s00"].core.known()}
    assert states == {"s00": "alive", "s01": "alive", "s02": "dead", "s03": "alive"}
    net.run_for(60.0)
    assert {peer.site: peer.state for peer in net.nodes["s00"].core.known()} == states


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 7))
def test_damaged_snapshots_are_refused_whatever_the_damage(junk, place, bit):
    good = encode("c", [Known("a", "a:1", 3, "dead"), Known("b", "b:1", 2**40, "left")])
    assert [tuple(peer) for peer in decode("c", good)] == [("a", "a:1", 3, "dead"), ("b", "b:1", 2**40, "left")]
    broken = bytearray(good)
    broken[place % len(good)] ^= 1 << bit
    for data in (junk, bytes(broken), good[: place % len(good)], good + junk[:1] + b"x"):
        with pytest.raises(BadSnapshot):
            decode("c", data)
    with pytest.raises(BadSnapshot, match="cluster"):
        decode("d", good)
