"""Faults do to a virtual network what their names say."""

from __future__ import annotations

import random

import pytest

from mesh.errors import ConfigError
from simulations.faults import Fault, parse_fault, strike
from simulations.latency import uniform
from simulations.network import SOCKET_BYTES, VirtualNetwork


def mesh(count: int = 4, **options: object) -> VirtualNetwork:
    matrix = uniform(count, 20.0)
    net = VirtualNetwork(seed=3, latency=matrix, **options)
    for name in matrix.names:
        net.spawn(name, seeds=["s0"])
    net.run_for(5.0)
    assert net.agreed()
    return net


def struck(net: VirtualNetwork, spec: str):
    return strike(net, parse_fault(spec), sorted(net.nodes), random.Random(1))


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("none", Fault("none")),
        ("crash:2", Fault("crash", 2)),
        ("slow:1:0.5", Fault("slow", 1, 0.5)),
        ("loss:3:0.8", Fault("loss", 3, fraction=0.8)),
        ("flap-ingress:1:10:20", Fault("flap-ingress", 1, 10.0, 20.0)),
        ("partition:3600", Fault("partition", first_s=3600.0)),
        ("oneway:2", Fault("oneway", 2)),
    ],
)
def test_a_fault_is_read_from_its_spelling(spec, fault):
    assert parse_fault(spec) == fault


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fire", "unknown fault 'fire'"),
        ("", "unknown fault"),
        ("crash", "expected crash:K"),
        ("crash:1:2", "expected crash:K"),
        ("crash:0", "K is '0'"),
        ("crash:-1", "K is '-1'"),
        ("crash:1.5", "K is '1.5'"),
        ("slow:1:-2", "SECONDS is '-2'"),
        ("slow:1:nan", "SECONDS is 'nan'"),
        ("loss:1:1.1", "FRACTION is '1.1'"),
        ("flap-ingress:1:0:5", "ON is '0'"),
        ("partition:inf", "SECONDS is 'inf'"),
    ],
)
def test_a_wrong_spelling_is_refused_with_its_place(spec, says):
    with pytest.raises(ConfigError, match=says):
        parse_fault(spec)


@pytest.mark.parametrize(
    ("spec", "sites"), [("crash:3", 3), ("crash:9", 3), ("slow:4:1", 3), ("oneway:4", 3), ("partition:5", 1)]
)
def test_a_fault_that_the_mesh_is_too_small_for_is_refused(spec, sites):
    with pytest.raises(ConfigError, match="--fault"):
        parse_fault(spec).fits(sites)


def test_the_largest_faults_fit():
    for spec in ("crash:2", "slow:3:1", "loss:3:1", "oneway:3", "partition:1"):
        parse_fault(spec).fits(3)


def test_a_crash_takes_sites_away():
    net = mesh()
    hit = struck(net, "crash:2")
    assert len(hit.crashed) == 2
    assert set(net.nodes).isdisjoint(hit.crashed)


def test_a_slow_site_does_nothing_while_it_is_paused_and_hears_afterwards_what_its_socket_kept():
    net = mesh()
    hit = struck(net, "slow:1:2")
    node = net.nodes[hit.bad[0]]
    net.run_for(2.0)
    assert node.backlog
    sent, waiting = node.sent_datagrams, len(node.backlog)
    net.run_for(0.1)
    assert node.sent_datagrams == sent
    hit.stop()
    net.run_for(6.0)
    assert node.backlog is None
    assert node.sent_datagrams > sent + waiting // 2
    assert net.agreed()


def test_the_socket_of_a_paused_site_is_bounded():
    net = mesh(2)
    net.pause("s1", 5.0)
    sender, target = net.nodes["s0"], net.nodes["s1"]
    for _ in range(400):
        net._send(sender, target.address, bytes(1000), net.clock())
    net.run_for(1.0)
    assert len(target.backlog) * 1000 < SOCKET_BYTES
    assert len(target.backlog) > 100


def test_a_lossy_site_loses_its_share_both_ways():
    net = mesh(2)
    struck(net, "loss:1:0.5")
    for pair in (("s0", "s1"), ("s1", "s0")):
        source, target = (net.nodes[site] for site in pair)
        assert net.loss_between(source, target) == pytest.approx(0.5)
    hit = struck(net, "loss:2:1")
    assert net.loss_between(source, target) == 1.0
    hit.stop()
    assert net.loss_between(source, target) == 0.0


def test_a_flapping_site_hears_nothing_for_a_while_and_then_everything():
    net = mesh(2)
    node = net.nodes[struck(net, "flap-ingress:1:3:2").bad[0]]
    seen = []
    for _ in range(200):
        net.run_for(0.1)
        seen.append(node.deaf)
    first = seen.index(True)
    assert sum(seen[first : first + 50]) == pytest.approx(20, abs=2)
    assert seen[first : first + 50] == seen[first + 50 : first + 100]


def test_a_one_way_pair_carries_one_direction_only():
    net = mesh(3)
    (source, target), *others = struck(net, "oneway:1").pairs
    assert not others
    assert net.blocked(net.nodes[source], net.nodes[target])
    assert not net.blocked(net.nodes[target], net.nodes[source])


def test_one_way_pairs_are_different_pairs():
    net = mesh(6)
    pairs = struck(net, "oneway:15").pairs
    assert len({frozenset(pair) for pair in pairs}) == 15


def test_a_partition_makes_two_halves_until_it_is_stopped():
    net = mesh(5)
    hit = struck(net, "partition:5")
    assert sorted(map(len, hit.halves)) == [2, 3]
    one, other = (net.nodes[half[0]] for half in hit.halves)
    assert net.blocked(one, other)
    hit.stop()
    assert not net.blocked(one, other)


class Asking:
    """A core that asks one thing over a stream."""

    def __init__(self, core, address):
        self._core, self._asks, self.answers = core, [address], []

    def __getattr__(self, name):
        return getattr(self._core, name)

    def streams(self):
        asks, self._asks = self._asks, []
        return [type("Request", (), {"address": place, "site": "", "data": b"hello", "token": 7}) for place in asks]

    def serve_stream(self, data, source, now):
        return data.upper()

    def stream_answered(self, token, data, now):
        self.answers.append((token, data, now))


def asked(net: VirtualNetwork, source: str, target: str) -> Asking:
    for site in (source, target):
        net.nodes[site].core = Asking(net.nodes[site].core, "nowhere:1")
        net.nodes[site].core._asks = []
    core = net.nodes[source].core
    core._asks = [net.address(target)]
    net.settle(net.nodes[source])
    return core


def test_a_stream_takes_two_round_trips():
    net = mesh(2)
    start = net.clock()
    core = asked(net, "s0", "s1")
    net.run_for(6.0)
    assert core.answers == [(7, b"HELLO", pytest.approx(start + 0.04))]


def test_a_stream_survives_loss_and_pays_in_time():
    net = mesh(2)
    net.impair("s1", loss=0.5)
    times = []
    for _ in range(20):
        start = net.clock()
        core = asked(net, "s0", "s1")
        net.run_for(6.0)
        times += [now - start for _, data, now in core.answers if data]
    assert len(times) > 8
    assert max(times) > 0.5


def test_a_stream_fails_where_one_direction_is_cut():
    net = mesh(2)
    net.cut_one_way("s1", "s0")
    core = asked(net, "s0", "s1")
    net.run_for(6.0)
    assert [data for _, data, _ in core.answers] == [None]


def test_a_stream_to_a_crashed_site_fails():
    net = mesh(2)
    target = net.nodes["s1"]
    core = asked(net, "s0", "s1")
    net.crash("s1")
    net.run_for(6.0)
    assert not target.running
    assert [data for _, data, _ in core.answers] == [None]
