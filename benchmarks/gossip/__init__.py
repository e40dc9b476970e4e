"""Gossip under faults on a virtual network, ours beside memberlist's constants: `python -m benchmarks.gossip`."""
