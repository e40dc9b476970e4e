"""A mesh that has been there for a while is the mesh it would have become."""

from __future__ import annotations

from simulations.acquaint import acquaint
from simulations.latency import uniform
from simulations.network import VirtualNetwork


def test_acquainted_sites_see_each_other_hold_each_others_entries_and_have_nothing_to_tell():
    matrix = uniform(12, 20.0)
    net = VirtualNetwork(seed=1, latency=matrix)
    for name in matrix.names:
        net.spawn(name)
        net.publish(name, "load", {"free": len(name)})
    acquaint(net)
    assert net.agreed()
    assert net.same_entries("load")
    assert len(net.nodes["s0"].core.entries("load")) == 12
    prints = {node.core._entries.print() for node in net.nodes.values()}
    assert len(prints) == 1
    net.crash("s3")
    net.run_for(10.0)
    assert net.agreed(gone=["s3"])
    assert net.bytes / 12 / 10.0 < 2000
