"""The snapshot takes what honest peers publish and leaves out what no honest peer would."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import PeerUnreachable
from mesh.gossip.coordinates import DIMENSIONS, Coordinate
from mesh.peer.view import MeshView
from topology.model import ModelSpec
from topology.partition import partition

DEVICE = {
    "name": "cpu0", "kind": "cpu", "vendor": "amd", "memory_bytes": 1000, "free_bytes": 1000,
    "flops": {"float32": 1e9}, "memory_bandwidth": 1e9, "reserve": 0.2,
}  # fmt: skip


class FakeGossip:
    def __init__(self, entries=None, states=None):
        self._entries = entries or {}
        self._states = states or {"a": "alive", "b": "alive"}

    def members(self):
        return [SimpleNamespace(site=s, state=state, address=f"127.0.0.1:{i}") for i, (s, state) in
                enumerate(self._states.items(), 1)]  # fmt: skip

    def entries(self, key):
        return self._entries.get(key, {})

    def links(self):
        return {}


def view(entries=None, states=None):
    return MeshView("a", FakeGossip(entries, states), local=object())


def capabilities(**changes):
    return {"region": "here", "devices": [{**DEVICE, **changes}]}


def test_present_sites_with_their_load_and_links_make_the_snapshot():
    snapshot = view(
        {
            "capabilities": {"a": capabilities(), "b": capabilities()},
            "load": {"b": {"free": {"cpu0": 250}, "pace": {"cpu0": 1.5}}},
            "links": {"a": {"b": [20_000, 21_000, 1_000, 0, True, True, None, 2, None]}},
        }
    ).snapshot()
    assert [site.name for site in snapshot.sites] == ["a", "b"]
    assert snapshot.sites[1].devices[0].free_bytes == 250
    assert [site.devices[0].pace for site in snapshot.sites] == [1.0, 1.5]
    assert snapshot.links[0].rtt_s == 0.02


def test_what_another_said_ages_until_it_says_something_new():
    now = 100.0
    gossip = FakeGossip(
        {
            "capabilities": {"a": capabilities(), "b": capabilities(), "c": capabilities()},
            "links": {
                "b": {"c": [20_000, 21_000, 0, 0, True, True, 5e6, 2, "tcp"]},
                "c": {"b": [20_000, 21_000, 0, 0, True, True, None, 7, None]},
            },
        },
        dict.fromkeys("abc", "alive"),
    )
    seen = MeshView("a", gossip, local=object(), clock=lambda: now)

    def link():
        return {(each.source, each.target): each for each in seen.snapshot().links}["b", "c"]

    assert (link().age_s, link().bandwidth, link().bandwidth_measured, link().transport) == (2.0, 5e6, True, "tcp")
    now = 160.0
    assert link().age_s == 62.0
    seen.told("c")
    assert link().age_s == 7.0


@pytest.mark.parametrize("state", ["dead", "left"])
def test_sites_that_are_gone_are_not_planned_on(state):
    entries = {"capabilities": {"a": capabilities(), "b": capabilities()}}
    snapshot = view(entries, {"a": "alive", "b": state}).snapshot()
    assert [site.name for site in snapshot.sites] == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bytes": -1},
        {"memory_bytes": float("nan")},
        {"memory_bytes": 1e30},
        {"memory_bandwidth": float("inf")},
        {"flops": {"float32": "fast"}},
        {"flops": None},
        {"reserve": 2.0},
        {"decoding": {"float32": {"layer_s": -1.0, "row_s": 0.0, "bandwidth": 1e9}}},
        {"decoding": {"float32": {"layer_s": 0.0, "row_s": 0.0}}},
        {"decoding": 5},
    ],
)
def test_a_device_that_cannot_be_leaves_its_site_out(change):
    snapshot = view({"capabilities": {"a": capabilities(), "b": capabilities(**change)}}).snapshot()
    assert [site.name for site in snapshot.sites] == ["a"]


def test_what_a_site_measured_of_its_layers_and_of_its_own_link_is_in_the_snapshot():
    figures = {"layer_s": 1e-4, "row_s": 5e-8, "bandwidth": 2e10}
    entry = {**capabilities(decoding={"float32": figures}), "local_rtt_s": 1e-4}
    (site,) = view({"capabilities": {"a": entry}}, {"a": "alive"}).snapshot().sites
    assert site.local_rtt_s == 1e-4
    assert site.devices[0].decoding["float32"].bandwidth == 2e10


json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(json, json, json)
def test_whatever_a_peer_publishes_makes_a_snapshot(caps, load, links):
    entries = {"capabilities": {"a": capabilities(), "b": caps}, "load": {"b": load}, "links": {"b": links}}
    assert view(entries).snapshot().sites[0].name == "a"


def test_a_site_that_nobody_knows_has_no_peer():
    with pytest.raises(PeerUnreachable, match="atlantis"):
        view().peer("atlantis")


def row(rtt_s):
    return [round(1e6 * rtt_s), round(1e6 * rtt_s), 0, 0, True, True, None, 2, None]


def test_a_site_that_claims_to_be_next_to_everybody_attracts_no_job():
    honest = "abcd"
    words = {a: {b: row(0.05) for b in honest if b != a} | {"liar": row(0.2)} for a in honest}
    words["liar"] = {a: row(0.0) for a in honest}
    del words["c"]["liar"], words["d"]["liar"]  # two have not measured it yet: its word stands alone
    centre = {"at": Coordinate((0.0,) * DIMENSIONS, 0.0, 0.0).pack()}
    places = {a: {"at": Coordinate((0.0,) * DIMENSIONS, 0.025, 0.1).pack()} for a in honest} | {"liar": centre}
    states = dict.fromkeys([*honest, "liar"], "alive")
    size = {"memory_bytes": 400_000_000, "free_bytes": 400_000_000, "memory_bandwidth": 1e10}
    claims = {"capabilities": {site: capabilities(**size) for site in states}}
    model = ModelSpec("m", 12, 1024, 16, 8, 64, 4096, 1000, True, "float32", 256)
    lied_to = view({**claims, "links": words, "coordinates": places}, states).snapshot()
    plan = partition(lied_to, model)
    used = {shard.site for stage in plan.stages for shard in stage.shards}
    assert len(used) > 1
    assert "liar" not in used


class FakeConnection:
    def __init__(self, address):
        self.address = address
        self.busy = False
        self.closed = False

    def close(self):
        self.closed = True


def test_what_is_under_way_over_a_detour_goes_on_when_the_direct_way_is_back():
    mesh = MeshView("a", FakeGossip(), object(), lambda site, address: FakeConnection(address))
    mesh.detour("b", "127.0.0.1:99")
    around = mesh.remote("b")
    around.busy = True
    mesh.detour("b", "")
    direct = mesh.remote("b")
    assert (around.address, direct.address) == ("127.0.0.1:99", "127.0.0.1:2")
    assert not around.closed
    around.busy = False
    assert mesh.remote("b") is direct
    assert around.closed
    mesh.close()
    assert direct.closed


def test_those_who_look_again_and_again_share_a_picture_that_costs_little():
    now, costs = [0.0], 0.5

    class SlowGossip(FakeGossip):
        def members(self):
            now[0] += costs
            return super().members()

    mesh = MeshView("a", SlowGossip({"capabilities": {"a": capabilities()}}), local=object(), clock=lambda: now[0])
    first = mesh.recent()
    now[0] = 9.9
    assert mesh.recent() is first
    now[0] = 10.1
    assert mesh.recent() is not first
