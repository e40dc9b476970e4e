"""What a peer answers, as plain values: the state of a job, a piece of a stream, a finished generation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mesh.errors import BY_CODE, JobCancelled, JobFailed, MeshError
from mesh.wire.v1 import mesh_pb2 as pb

if TYPE_CHECKING:
    from topology.plan import Plan
    from topology.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job at one moment. `state`: planning, loading, ready, recovering, failed or cancelled.

    `loaded_bytes` of `total_bytes` of weights are in place. `epoch` rises with every recovery. `plan_document` is the
    plan's JSON document, None until there is one. `error` is one line and `error_code` its `MeshError.code`, both empty
    unless the job failed.
    """

    id: str
    model: str
    state: str
    owner: str
    epoch: int
    loaded_bytes: int
    total_bytes: int
    error: str
    error_code: str
    plan_document: dict[str, Any] | None = field(repr=False)

    @property
    def plan(self) -> Plan | None:
        """The plan, None until the job is planned."""
        return None if self.plan_document is None else plan_from(self.plan_document)

    @property
    def failure(self) -> MeshError | None:
        """What `wait` raises for this state: the error the job ended with, None while it lives."""
        if self.state == "failed":
            return BY_CODE.get(self.error_code, JobFailed)(self.error or f"job {self.id} failed")
        if self.state == "cancelled":
            return JobCancelled(f"job {self.id} was cancelled")
        return None

    def to_dict(self) -> dict[str, Any]:
        """A JSON document: what `mesh jobs --json` prints. The plan stands under `plan`."""
        document = asdict(self)
        document["plan"] = document.pop("plan_document")
        return document

    @classmethod
    def from_wire(cls, message: pb.JobStatus) -> JobStatus:
        """Raises MeshError where the plan is not JSON."""
        return cls(
            id=message.job,
            model=message.model,
            state=message.state,
            owner=message.owner,
            epoch=message.epoch,
            loaded_bytes=message.loaded_bytes,
            total_bytes=message.total_bytes,
            error=message.error,
            error_code=message.error_code,
            plan_document=document_from(message.plan_json) if message.plan_json else None,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream. `text` may be empty while a character is incomplete; `token_ids` may hold several."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation. `finish_reason` is "stop" or "length"; "" where the stream was not read to its end.

    `timings` is the account of the job's owner: first_token_s, total_s, decode_tokens_per_s, longest_gap_s (a recovery
    shows here), and compute_s, network_s, waiting_s summed over the workers. `seed` repeats the generation, on this and
    on any other plan.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: dict[str, Any]
    prompt_tokens: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON document: what `mesh generate --json` prints."""
        return asdict(self)


@dataclass(slots=True)
class Collected:
    """A generation in the making: fed with the events of one stream, in order."""

    seed: int
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    timings: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0

    def add(self, event: pb.GenerateEvent) -> Chunk | None:
        """The chunk in `event`; None where it brings neither text nor tokens."""
        self.prompt_tokens = event.prompt_tokens or self.prompt_tokens
        if event.timings_json:
            self.timings = document_from(event.timings_json)
        self.finish_reason = event.finish_reason or self.finish_reason
        ids = list(event.token_ids)
        if not ids and not event.text:
            return None
        self.token_ids += ids
        self.text.append(event.text)
        return Chunk(event.text, ids)

    def generation(self) -> Generation:
        """What has come so far."""
        return Generation(
            "".join(self.text), list(self.token_ids), self.finish_reason, self.timings, self.prompt_tokens, self.seed
        )


def document_from(text: str) -> dict[str, Any]:
    """A JSON object from a peer. Raises MeshError where it is not one."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise MeshError(f"the peer sent a document that is no JSON object: {text[:60]!r}")
    return document


def plan_from(document: dict[str, Any]) -> Plan:
    """The plan in a peer's document. Raises MeshError where it is not one (a peer of another version)."""
    from topology.plan import Plan

    try:
        return Plan.from_dict(document)
    except (KeyError, TypeError, IndexError) as error:
        raise MeshError(f"the peer sent a plan this version cannot read: {error!r}") from None


def snapshot_from(document: dict[str, Any]) -> Snapshot:
    """The snapshot in a peer's document. Raises MeshError where it is not one (a peer of another version)."""
    from topology.snapshot import Snapshot

    try:
        return Snapshot.from_dict(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise MeshError(f"the peer sent a topology this version cannot read: {error!r}") from None
