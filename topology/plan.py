"""A plan: which device holds which slice of which layers, in which order the token travels, and why.

A plan is a value. It is made by `topology.partition`, carried as JSON between peers, and obeyed by the runtime.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from topology.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """One device's part of a stage. Ranges are half open; all shards of a stage together cover each range once.

    `kv_heads` is the range of KV-head groups (q heads follow: heads // kv_heads of them per group), `columns` the range
    of MLP columns, `vocabulary` the range of head rows this shard computes (empty unless the stage is the last).
    """

    site: str
    device: str
    kv_heads: tuple[int, int]
    columns: tuple[int, int]
    vocabulary: tuple[int, int]
    memory_bytes: int

    @property
    def key(self) -> str:
        """`site/device`: unique within a plan."""
        return f"{self.site}/{self.device}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of consecutive layers `[start, end)` held by one island. `shards[0]` leads: it talks to the ring."""

    start: int
    end: int
    shards: tuple[Shard, ...]

    @property
    def lead(self) -> Shard:
        """The shard that receives from the stage before and sends to the stage after."""
        return self.shards[0]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the cost model expects, for a batch of one. Milliseconds, tokens a second, bytes.

    `saturated_tokens_per_s` is the rate over many requests at once, with every stage busy: one over the slowest stage.
    """

    token_ms: float
    compute_ms: float
    network_ms: float
    first_token_ms: float
    tokens_per_s: float
    saturated_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in ring order (the last samples and hands the token to the first), predictions and reasons.

    `context` is the longest sequence the KV caches were sized for. `why` holds one sentence per choice, with numbers.
    `strategy` is what the plan does: "single", "tensor_parallelism", "pipeline" or "hybrid".
    """

    model: ModelSpec
    strategy: str
    context: int
    stages: tuple[Stage, ...]
    predicted: Predicted
    why: tuple[str, ...]

    @property
    def ring(self) -> tuple[str, ...]:
        """The sites of the stage leads, in the order the token visits them."""
        return tuple(stage.lead.site for stage in self.stages)

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that takes part, sorted."""
        return tuple(sorted({shard.site for stage in self.stages for shard in stage.shards}))

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Every shard of every stage, in ring order."""
        return tuple(shard for stage in self.stages for shard in stage.shards)

    def to_dict(self) -> dict[str, Any]:
        """A JSON document, the inverse of `from_dict`. Adds `ring` and `sites` for readers."""
        document = asdict(self)
        document["ring"] = list(self.ring)
        document["sites"] = list(self.sites)
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Plan:
        """Rebuild a plan from its document. Raises KeyError or TypeError where the document is not one."""
        return cls(
            model=ModelSpec.from_dict(document["model"]),
            strategy=document["strategy"],
            context=document["context"],
            stages=tuple(_stage(stage) for stage in document["stages"]),
            predicted=Predicted(**document["predicted"]),
            why=tuple(document["why"]),
        )


def _stage(document: dict[str, Any]) -> Stage:
    return Stage(document["start"], document["end"], tuple(_shard(shard) for shard in document["shards"]))


def _shard(document: dict[str, Any]) -> Shard:
    ranges = {key: (document[key][0], document[key][1]) for key in ("kv_heads", "columns", "vocabulary")}
    return Shard(document["site"], document["device"], **ranges, memory_bytes=document["memory_bytes"])
