"""How well what a mesh believes of distances agrees with the matrix it runs on."""

from __future__ import annotations

from benchmarks.coordinates import coordinates_error
from simulations.latency import Matrix
from simulations.network import VirtualNetwork


def coordinate_error(net: VirtualNetwork, matrix: Matrix) -> dict[str, float | None]:
    """Median and 90th percentile over pairs of |estimate - RTT| / RTT, from the coordinates of the cores themselves.

    RTT is what the virtual network gives the pair: the mean of both cells of the matrix.
    """
    found = coordinates_error([net.nodes[name].core.coordinate() for name in matrix.names], matrix.pair_ms())
    return {name: round(value, 4) for name, value in found.items()}
