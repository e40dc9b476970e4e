"""Real gossip cores with real identities on the virtual network."""

from __future__ import annotations

import pytest

from mesh.identity.site import SiteIdentity
from simulations.network import VirtualNetwork


class Mesh:
    """Cores with identities on a virtual network whose clocks show the time of the cluster."""

    def __init__(self, cluster, seed=1):
        self.cluster = cluster
        self.net = VirtualNetwork(seed=seed, latency=0.03)
        self.parts = {}

    def start(self, identity: SiteIdentity, *seeds: str, ahead_s: float = 0.0, address: str | None = None):
        def wall():
            return self.cluster.now + self.net.clock.now_s + ahead_s

        sealer, prover = identity.sealer(wall), identity.prover(wall)
        self.parts[identity.site] = (identity, sealer, prover)
        node = self.net.spawn(
            identity.site, seeds=seeds, address=address, cluster=identity.cluster, sealer=sealer, prover=prover
        )
        node.core.publish("identity", identity.entry(), self.net.clock.now_s)
        self.net.settle(node)
        return node

    def refusals(self):
        kinds = ("malformed", "foreign", "forged", "replayed", "revoked", "skewed", "stale")
        return {
            site: {kind: n for kind in kinds if (n := node.core.counters[kind])}
            for site, node in self.net.nodes.items()
        }


@pytest.fixture
def mesh(cluster):
    return Mesh(cluster)


def test_sites_that_know_one_seed_find_each_other_and_refuse_nothing(mesh, cluster):
    mesh.start(cluster.oslo)
    for number in range(6):
        mesh.start(cluster.join(f"s{number}"), "oslo")
    took_s = mesh.net.run_until(mesh.net.agreed, 10.0)
    mesh.net.run_for(5.0)
    assert took_s < 3.0
    assert not any(mesh.refusals().values())
    for node in mesh.net.nodes.values():
        assert len(node.core.entries("identity")) == 7


def test_a_restarted_site_greets_its_seed_and_nobody_else(mesh, cluster):
    lima = cluster.join("lima")
    mesh.start(cluster.oslo)
    mesh.start(lima, "oslo")
    mesh.start(cluster.join("rome"), "oslo")
    mesh.net.run_until(mesh.net.agreed, 10.0)
    mesh.net.run_for(2.0)
    lima.save_directory()
    mesh.net.crash("lima")
    mesh.net.run_for(8.0)
    again = SiteIdentity.load(cluster.folder / "lima", cluster.now)
    mesh.start(again, "oslo")
    mesh.net.run_until(mesh.net.agreed, 5.0)
    assert mesh.parts["lima"][1].counters["hellos_sent"] == 1  # to the seed, whose name it is not told


def test_a_site_whose_clock_is_wrong_by_a_day_stays_outside_and_is_counted(mesh, cluster):
    mesh.start(cluster.oslo)
    mesh.start(cluster.join("rome"), "oslo")
    mesh.net.run_until(mesh.net.agreed, 10.0)
    mesh.start(cluster.join("lima"), "oslo", ahead_s=86400.0)
    mesh.net.run_for(5.0)
    assert mesh.net.nodes["oslo"].core.counters["skewed"] > 0
    assert "lima" not in [member.site for member in mesh.net.nodes["oslo"].core.members()]
    assert mesh.parts["oslo"][1].skewed["lima"] == pytest.approx(86400, abs=2)


def test_a_revoked_site_is_dead_to_all_and_hears_nothing_new(mesh, cluster):
    lima = cluster.join("lima")
    mesh.start(cluster.oslo)
    mesh.start(cluster.join("rome"), "oslo")
    mesh.start(lima, "oslo")
    mesh.net.run_until(mesh.net.agreed, 10.0)
    cluster.authority.revoke("lima", cluster.now)
    cluster.oslo.take(cluster.authority.handover(cluster.oslo.certificate.der, cluster.now), cluster.now)
    oslo = mesh.net.nodes["oslo"]
    assert oslo.core.publish_cluster(*cluster.oslo.document_entry, mesh.net.clock.now_s)
    mesh.net.settle(oslo)
    mesh.net.run_for(0.5)
    rome = mesh.parts["rome"][0]
    value = mesh.net.nodes["rome"].core.entry("@cluster", "document")
    assert rome.take_document(value["document"]) and rome.wants_ring
    rome.take(cluster.oslo.handover(rome.certificate.der, cluster.now), cluster.now)
    mesh.net.run_for(12.0)
    for site in ("oslo", "rome"):
        core = mesh.net.nodes[site].core
        assert {member.site: member.state for member in core.members()}["lima"] == "dead"
        assert core.counters["revoked"] > 0
    oslo.core.publish("secret", {"x": 1}, mesh.net.clock.now_s)
    mesh.net.settle(oslo)
    mesh.net.run_for(5.0)
    assert mesh.net.nodes["rome"].core.entry("oslo", "secret") == {"x": 1}
    assert mesh.net.nodes["lima"].core.entry("oslo", "secret") is None


def test_a_site_that_slept_through_a_rotation_learns_that_it_is_behind(mesh, cluster):
    lima = cluster.join("lima")
    mesh.start(cluster.oslo)
    mesh.start(lima, "oslo")
    mesh.net.run_until(mesh.net.agreed, 10.0)
    mesh.net.crash("lima")
    cluster.authority.rotate(cluster.now)
    cluster.oslo.take(cluster.authority.handover(cluster.oslo.certificate.der, cluster.now), cluster.now)
    while cluster.oslo.turn_ring(cluster.now + 500):
        cluster.now += 500
    mesh.net.run_for(5.0)
    mesh.start(lima, "oslo")
    mesh.net.run_for(20.0)
    sealer = mesh.parts["lima"][1]
    assert sealer.behind == mesh.net.nodes["oslo"].address
    lima.take(cluster.oslo.handover(lima.certificate.der, cluster.now), cluster.now)
    mesh.net.run_until(mesh.net.agreed, 30.0)
