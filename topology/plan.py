"""A plan: which device holds which slice of which layers, in which order the token travels, and why.

A plan is a value. It is made by `topology.partition`, carried as JSON between peers, and obeyed by the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from topology.heads import whole_groups
from topology.model import ModelSpec

#: Stands between a device's name and the number of a second shard of one job on it.
SLOT = "#"


def device_of(slot: str) -> str:
    """The device that a shard's `device` means: "cpu0" for "cpu0" and for "cpu0#1"."""
    return slot.partition(SLOT)[0]


@dataclass(frozen=True, slots=True)
class Shard:
    """One device's part of a stage. Ranges are half open; all shards of a stage together cover each range once.

    `kv_heads` is the range of KV heads, `columns` that of MLP columns, `vocabulary` that of the head rows this shard
    computes (empty unless the stage is the last). `heads` is the range of query heads; None: all that use the KV heads.
    Where it cuts a group, the KV head lies on both sides of the cut: then `heads` and not `kv_heads` cover once.
    `dtype` is what this shard's weights are held in where that is not the model's own. A device that holds two
    shards of one job, in different stages, is named "cpu0" in one and "cpu0#1" in the other.
    """

    site: str
    device: str
    kv_heads: tuple[int, int]
    columns: tuple[int, int]
    vocabulary: tuple[int, int]
    memory_bytes: int
    dtype: str = ""
    heads: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """`site/device`: unique within a plan."""
        return f"{self.site}/{self.device}"

    def query_heads(self, model: ModelSpec) -> tuple[int, int]:
        """The range of query heads, whether or not it is written out."""
        return whole_groups(self.kv_heads, model.heads // model.kv_heads) if self.heads is None else self.heads


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of consecutive layers `[start, end)` held by one island. `shards[0]` leads: it talks to the ring.

    `code` is the lossy code of the hidden states it sends on, empty where they travel as they are.
    """

    start: int
    end: int
    shards: tuple[Shard, ...]
    code: str = ""

    @property
    def lead(self) -> Shard:
        """The shard that receives from the stage before and sends to the stage after."""
        return self.shards[0]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the cost model expects, for a batch of one. Milliseconds, tokens a second, bytes.

    `saturated_tokens_per_s` is the rate over many requests at once, with every stage busy: one over the slowest stage,
    less where the plan's `concurrency` is too small for that, and the sum over all rings where there are replicas.
    `price_per_hour` is that of all devices and sites, standbys and replicas included.
    """

    token_ms: float
    compute_ms: float
    network_ms: float
    first_token_ms: float
    tokens_per_s: float
    saturated_tokens_per_s: float = 0.0
    price_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Standby:
    """A device that holds the weights of shard `rank` of stage `stage` without serving them, and what they take."""

    site: str
    device: str
    stage: int
    rank: int
    memory_bytes: int

    @property
    def key(self) -> str:
        """`site/device`."""
        return f"{self.site}/{self.device}"


@dataclass(frozen=True, slots=True)
class Replica:
    """A further ring of the same model. `share` is the part of the requests it takes; the rates are its own."""

    stages: tuple[Stage, ...]
    share: float
    token_ms: float
    tokens_per_s: float

    @property
    def ring(self) -> tuple[str, ...]:
        """The sites of the stage leads, in the order the token visits them."""
        return tuple(stage.lead.site for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Choice:
    """One plan among those that were weighed, in figures: `tokens_per_s` is the rate over many requests.

    `layout` names the devices, "+" within a stage and "|" between stages; `counts` are the layers of each stage.
    `costs` says what taking it instead of the chosen plan would cost, where that is asked.
    """

    layout: str
    counts: tuple[int, ...]
    token_ms: float
    tokens_per_s: float
    first_token_ms: float
    price_per_hour: float = 0.0
    chosen: bool = False
    costs: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in ring order (the last samples and hands the token to the first), predictions and reasons.

    `context` is the longest sequence the KV caches were sized for, `concurrency` how many of them each ring holds.
    `why` holds one sentence per choice, with numbers. `strategy` is what the plan does: "single",
    "tensor_parallelism", "pipeline" or "hybrid". `objective` is what it was chosen for: one of
    `constraints.OBJECTIVES`, or "fewest_sites".

    `in_flight` is the number of micro-batches under way that keep every stage busy. `share` is the part of the requests
    that these stages take, the rest goes to `replicas`. `pareto` is the front of (token_ms, tokens_per_s), fastest
    token first; `alternatives` are the next best plans. `displaces` names the jobs that must give way.
    """

    model: ModelSpec
    strategy: str
    context: int
    stages: tuple[Stage, ...]
    predicted: Predicted
    why: tuple[str, ...]
    objective: str = "fewest_sites"
    concurrency: int = 1
    in_flight: int = 1
    share: float = 1.0
    standbys: tuple[Standby, ...] = ()
    replicas: tuple[Replica, ...] = ()
    pareto: tuple[Choice, ...] = ()
    alternatives: tuple[Choice, ...] = ()
    displaces: tuple[str, ...] = ()

    @property
    def ring(self) -> tuple[str, ...]:
        """The sites of the stage leads, in the order the token visits them."""
        return tuple(stage.lead.site for stage in self.stages)

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that takes part, sorted. Standbys and replicas do not count."""
        return tuple(sorted({shard.site for stage in self.stages for shard in stage.shards}))

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Every shard of every stage, in ring order. Standbys and replicas do not count."""
        return tuple(shard for stage in self.stages for shard in stage.shards)

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes by `site/device`, standbys and replicas included; of a device with two shards, their sum."""
        rings = [self.stages, *(replica.stages for replica in self.replicas)]
        shards = [shard for stages in rings for stage in stages for shard in stage.shards]
        total: dict[str, int] = {}
        parts = [(s.site, s.device, s.memory_bytes) for s in shards]
        for site, device, size in parts + [(s.site, s.device, s.memory_bytes) for s in self.standbys]:
            key = f"{site}/{device_of(device)}"
            total[key] = total.get(key, 0) + size
        return total

    def to_dict(self) -> dict[str, Any]:
        """A JSON document, the inverse of `from_dict`. Adds `ring` and `sites` for readers."""
        document = asdict(self)
        document["ring"] = list(self.ring)
        document["sites"] = list(self.sites)
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Plan:
        """Rebuild a plan from its document. Raises KeyError or TypeError where the document is not one.

        Fields that came later than the document take their defaults; fields this version does not know are ignored.
        """
        plain = ("objective", "concurrency", "in_flight", "share")
        return cls(
            model=ModelSpec.from_dict(document["model"]),
            strategy=document["strategy"],
            context=document["context"],
            stages=tuple(_stage(stage) for stage in document["stages"]),
            predicted=Predicted(**_known(Predicted, document["predicted"])),
            why=tuple(document["why"]),
            **{name: document[name] for name in plain if name in document},
            standbys=tuple(Standby(**_known(Standby, each)) for each in document.get("standbys", ())),
            replicas=tuple(_replica(each) for each in document.get("replicas", ())),
            pareto=tuple(_choice(each) for each in document.get("pareto", ())),
            alternatives=tuple(_choice(each) for each in document.get("alternatives", ())),
            displaces=tuple(document.get("displaces", ())),
        )


def _known(kind: type, document: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in document.items() if name in names}


def _stage(document: dict[str, Any]) -> Stage:
    shards = tuple(_shard(shard) for shard in document["shards"])
    return Stage(document["start"], document["end"], shards, document.get("code", ""))


def _shard(document: dict[str, Any]) -> Shard:
    ranges = {key: (document[key][0], document[key][1]) for key in ("kv_heads", "columns", "vocabulary")}
    memory_bytes, dtype, heads = document["memory_bytes"], document.get("dtype", ""), document.get("heads")
    return Shard(
        document["site"],
        document["device"],
        **ranges,
        memory_bytes=memory_bytes,
        dtype=dtype,
        heads=None if heads is None else (heads[0], heads[1]),
    )


def _replica(document: dict[str, Any]) -> Replica:
    stages = tuple(_stage(stage) for stage in document["stages"])
    return Replica(**{**_known(Replica, document), "stages": stages})


def _choice(document: dict[str, Any]) -> Choice:
    return Choice(**{**_known(Choice, document), "counts": tuple(document["counts"])})
