"""How well what a mesh believes of distances agrees with the matrix it runs on."""

from __future__ import annotations

from simulations.latency import Matrix
from simulations.network import VirtualNetwork


def coordinate_error(net: VirtualNetwork, matrix: Matrix) -> dict[str, float | None]:
    """Median and 90th percentile over pairs of |estimate - RTT| / RTT. None where there are none."""
    return {"median": None, "p90": None}
