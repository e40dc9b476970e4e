"""What one worker must load and be: the part of a plan that concerns one shard. Plain data, safe to send."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from mesh.errors import ModelError
from topology.heads import belong, kv_span, whole_groups

if TYPE_CHECKING:
    from topology.plan import Plan


@dataclass(frozen=True, slots=True)
class Assignment:
    """One shard of one stage. Ranges are half open, as in `topology.plan.Shard`.

    `model` is the path of the model on this site (a folder or a .gguf file). `device` is torch's name for it ("cpu",
    "cuda:0"); `threads` bounds torch's threads. `rank` of `size` is the shard's place in its stage; rank 0 leads.
    `heads` are the query heads, None: all that use the KV heads. `requests` sequences of `context` tokens fit at once.
    What shards and stages exchange travels in `wire_dtype` (empty: in `dtype`); `code` is the lossy code of the hidden
    states that the stage sends on, `code_in` that of those it is sent; empty for none. `onward_bytes_per_s` is what the
    link to the next stage carries, 0 within a site and where it is not known.
    """

    job: str
    epoch: tuple[int, str]
    model: str
    dtype: str
    device: str
    threads: int
    memory_bytes: int
    context: int
    stage: int
    stages: int
    start: int
    end: int
    rank: int
    size: int
    kv_heads: tuple[int, int]
    columns: tuple[int, int]
    vocabulary: tuple[int, int]
    requests: int = 1
    wire_dtype: str = ""
    code: str = ""
    code_in: str = ""
    heads: tuple[int, int] | None = None
    onward_bytes_per_s: float = 0.0

    def query_heads(self, group: int) -> tuple[int, int]:
        """The range of query heads, given how many share a KV head. Raises ModelError where the ranges disagree."""
        if self.heads is None:
            return whole_groups(self.kv_heads, group)
        if not belong(self.heads, self.kv_heads, group):
            raise ModelError(
                f"query heads {self.heads} need KV heads {kv_span(self.heads, group)}, not {self.kv_heads}: plan again"
            )
        return self.heads

    @property
    def first(self) -> bool:
        """Whether this stage embeds token ids."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this stage computes logits and samples."""
        return self.stage == self.stages - 1

    @property
    def leads(self) -> bool:
        """Whether this shard talks to the ring."""
        return self.rank == 0

    def to_dict(self) -> dict[str, Any]:
        """A msgpack-able document, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Assignment:
        """Rebuild an assignment; lists become tuples again. Raises TypeError where one is missing."""
        values: dict[str, Any] = {f.name: document[f.name] for f in fields(cls) if f.name in document}
        values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**values)


def assignments(plan: Plan, *, job: str, epoch: tuple[int, str], model: str) -> dict[str, Assignment]:
    """Every shard's assignment by its `site/device` key. Device and threads are the shard's peer's to fill in."""
    result = {}
    for index, stage in enumerate(plan.stages):
        for rank, shard in enumerate(stage.shards):
            result[shard.key] = Assignment(
                job=job,
                epoch=epoch,
                model=model,
                dtype=shard.dtype or plan.model.dtype,
                device=shard.device,
                threads=0,
                memory_bytes=shard.memory_bytes,
                context=plan.context,
                stage=index,
                stages=len(plan.stages),
                start=stage.start,
                end=stage.end,
                rank=rank,
                size=len(stage.shards),
                kv_heads=shard.kv_heads,
                columns=shard.columns,
                vocabulary=shard.vocabulary,
                heads=shard.heads,
                requests=plan.concurrency,
                wire_dtype=plan.model.dtype,
                code=stage.code if index + 1 < len(plan.stages) else "",
                code_in=plan.stages[index - 1].code if index else "",
            )
    return result
