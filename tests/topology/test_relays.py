"""A pair goes through a third site where it must, or where that pays, and comes back when it does not."""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.constraints import Constraints
from topology.model import ModelSpec
from topology.picture import look
from topology.relays import GAIN, GAIN_S, RELAY_COST_S, relays
from topology.snapshot import Device, Link, Site, Snapshot

MODEL = ModelSpec("m", 4, 64, 4, 2, 16, 128, vocab=100, tied_embeddings=True, dtype="float32", context=512)


def mesh(rtts_ms, cut=(), unwilling=()):
    """Sites by the letters of the pairs; `cut` pairs do not reach each other in one direction."""
    names = sorted({name for pair in rtts_ms for name in pair})
    device = Device("cpu0", "cpu", "amd", 1 << 30, 1 << 30, {"float32": 1e9}, 1e9)
    sites = tuple(Site(name, "here", (device,), relays=name not in unwilling) for name in names)
    links = []
    for pair, rtt_ms in rtts_ms.items():
        for source, target in (pair, pair[::-1]):
            links.append(Link(source, target, rtt_ms / 1e3, reachable=(source + target) not in cut))
    return Snapshot(sites, tuple(links))


def routed(snapshot, before=None):
    found = relays(snapshot, before)
    links = (replace(link, via=found.get(tuple(sorted((link.source, link.target))), "")) for link in snapshot.links)
    return replace(snapshot, links=tuple(links))


def test_a_pair_that_reaches_each_other_one_way_only_goes_through_the_nearest_that_both_reach():
    snapshot = mesh({"ab": 10, "ac": 30, "bc": 30, "ad": 20, "bd": 20}, cut={"ba"})
    assert relays(snapshot) == {("a", "b"): "d"}
    assert relays(mesh({"ab": 10, "ac": 30, "bc": 30, "ad": 20, "bd": 20}, cut={"ba"}, unwilling="d")) == {
        ("a", "b"): "c"
    }
    assert relays(mesh({"ab": 10, "ac": 30, "bc": 30}, cut={"ba", "ac"})) == {}


def test_a_shorter_way_is_taken_when_it_pays_and_left_when_it_no_longer_does():
    def triangle(direct_ms):
        return mesh({"ab": direct_ms, "ac": 30, "bc": 30})

    assert relays(triangle(70)) == {}
    assert relays(triangle(100)) == {("a", "b"): "c"}
    assert relays(triangle(70), {("a", "b"): "c"}) == {("a", "b"): "c"}
    assert relays(triangle(60), {("a", "b"): "c"}) == {}


def test_a_relay_is_kept_until_another_is_clearly_better():
    def square(by_d_ms):
        return mesh({"ab": 10, "ac": 30, "bc": 30, "ad": by_d_ms, "bd": by_d_ms}, cut={"ab"})

    assert relays(square(28), {("a", "b"): "c"}) == {("a", "b"): "c"}
    assert relays(square(20), {("a", "b"): "c"}) == {("a", "b"): "d"}


@given(
    st.lists(st.floats(0.1, 300), min_size=10, max_size=10),
    st.sets(st.sampled_from([a + b for a in "abcde" for b in "abcde" if a != b]), max_size=6),
    st.dictionaries(st.sampled_from(list(combinations("abcde", 2))), st.sampled_from("abcdex"), max_size=5),
)
@settings(max_examples=50)
def test_every_relay_reaches_both_ends_and_pays(rtts_ms, cut, before):
    rtt_ms = {a + b: each for (a, b), each in zip(combinations("abcde", 2), rtts_ms, strict=True)}
    found = relays(mesh(rtt_ms, cut), before)

    def whole(a, b):
        return a + b not in cut and b + a not in cut

    def rtt_s(a, b):
        return rtt_ms[min(a, b) + max(a, b)] / 1e3

    for (a, b), via in found.items():
        assert via not in (a, b) and whole(a, via) and whole(via, b)
        detour_s = rtt_s(a, via) + rtt_s(via, b) + RELAY_COST_S
        if whole(a, b):
            least = 0.0 if (a, b) in before else max(GAIN_S, GAIN * rtt_s(a, b))
            assert rtt_s(a, b) - detour_s > least - 1e-9
    for a, b in combinations("abcde", 2):
        if not whole(a, b) and any(whole(a, c) and whole(c, b) for c in set("abcde") - {a, b}):
            assert (a, b) in found
    assert relays(mesh(rtt_ms, cut), found) == found


def test_a_relayed_pair_stays_so_until_the_direct_way_was_measured():
    snapshot = mesh({"ab": 10, "ac": 30, "bc": 30})
    unknown = replace(snapshot, links=tuple(link for link in snapshot.links if "c" in (link.source, link.target)))
    assert relays(unknown, {("a", "b"): "c"}) == {("a", "b"): "c"}
    assert relays(unknown) == {}
    assert relays(snapshot, {("a", "b"): "c"}) == {}


def test_the_planner_prices_a_relayed_pair_as_both_links_and_the_relay():
    picture = look(routed(mesh({"ab": 10, "ac": 30, "bc": 50}, cut={"ab"})), MODEL, Constraints())
    path = picture.path("a", "b")
    assert path.reachable
    assert path.rtt_s == pytest.approx(0.08 + RELAY_COST_S)
    assert path.one_way_s == pytest.approx(0.04 + RELAY_COST_S / 2)
    assert not look(mesh({"ab": 10, "ac": 30, "bc": 50}, cut={"ab"}), MODEL, Constraints()).path("a", "b").reachable


def test_a_relay_that_is_gone_helps_nobody():
    snapshot = routed(mesh({"ab": 10, "ac": 30, "bc": 50}, cut={"ab"})).without({"c"})
    assert not look(snapshot, MODEL, Constraints()).path("a", "b").reachable
