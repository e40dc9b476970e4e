"""A device that holds two stages of one job, the first and the last, so that token ids stay with the submitting site.

Each stage gets half of the device's memory: the embedding and the head are equally large. The second half is named
with a slot (`topology.plan.SLOT`); it costs nothing again and is as fast, for one token is never in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from topology.candidate import Island
from topology.islands import Layout, tensor_island
from topology.model import ModelSpec
from topology.picture import Node
from topology.plan import SLOT


def halves(island: Sequence[Node]) -> tuple[Island, Island]:
    """The island as two, in the first and in the second slot of the same devices."""
    first = tuple(replace(node, usable_bytes=node.usable_bytes // 2) for node in island)
    return first, tuple(replace(node, name=f"{node.name}{SLOT}1", price_per_hour=0.0) for node in first)


def folded_layouts(nodes: Sequence[Node], model: ModelSpec, strategy: str) -> list[Layout]:
    """Layouts of the submitting site whose devices serve both ends of the ring."""
    islands: list[Island] = [(node,) for node in nodes]
    if strategy != "pipeline" and len(nodes) > 1:
        islands.append(tensor_island(nodes, model))
    return [Layout(halves(island)) for island in dict.fromkeys(islands)]
