"""A virtual mesh that has been there for a while, without the hours it took.

That n sites join at once is news of n sites to n sites, some ten times each, as with every epidemic: for a thousand,
minutes of processor time before the first second that is of interest. Here every core is told directly what the others
say of themselves and have published. It is the one place that reaches into the cores: what it writes is what the last
of many claims and pages would have written, and nothing is left to be passed on.
"""

from __future__ import annotations

from mesh.gossip.members import ALIVE, Peer
from simulations.network import VirtualNetwork


def acquaint(net: VirtualNetwork) -> None:
    """Every running peer knows every other, alive, with its entries. No events are reported for it."""
    cores = [node.core for _, node in sorted(net.nodes.items())]
    claims = {core.site: core._swim.own_claim() for core in cores}
    published = {core.site: core._state.owner(core.site) for core in cores}
    for core in cores:
        own = core._swim._own
        for site, claim in claims.items():
            if site != core.site and own.roster.get(site) is None:
                peer = Peer(site, claim.address, ALIVE, claim.incarnation, claim.proof)
                own.roster.add(peer)  # the next round of probes finds it there
                core._touched(site)
                for key, entry in published[site].entries.items():
                    core._state.merge(site, published[site].generation, key, entry)
        core.events()
    for node in net.nodes.values():
        net.settle(node)
