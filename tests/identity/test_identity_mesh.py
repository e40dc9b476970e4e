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
