"""Membership and state exchange between peers: who is there, how far away, and what each has to offer.

`open_gossip` runs a peer under trio; `GossipCore` is the same peer without I/O, for the simulator and for tests.
"""

from mesh.gossip.config import GossipConfig, Timing
from mesh.gossip.core import Event, GossipCore
from mesh.gossip.members import Member
from mesh.gossip.proof import Prover, Unproven
from mesh.gossip.rtt import Rtt
from mesh.gossip.sealing import Malformed, Opened, Sealer
from mesh.gossip.shell import Gossip, SiteNameTaken, open_gossip

__all__ = [
    "Event",
    "Gossip",
    "GossipConfig",
    "GossipCore",
    "Malformed",
    "Member",
    "Opened",
    "Prover",
    "Rtt",
    "Sealer",
    "SiteNameTaken",
    "Timing",
    "Unproven",
    "open_gossip",
]
