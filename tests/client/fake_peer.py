"""A peer that only plays one: real gRPC, scripted answers. A model's name picks the script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from mesh.errors import JobNotFound, ModelError, PlanError
from mesh.wire.errors import abort
from mesh.wire.v1 import mesh_pb2 as pb
from mesh.wire.v1 import mesh_pb2_grpc
from topology.model import ModelSpec
from topology.plan import Plan, Predicted, Shard, Stage
from topology.snapshot import Device, Link, Site, Snapshot

MODEL = ModelSpec(
    name="tiny", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=100,
    tied_embeddings=True, dtype="float32", context=256,
)  # fmt: skip
PLAN = Plan(
    model=MODEL,
    strategy="pipeline",
    context=256,
    stages=(
        Stage(0, 3, (Shard("berlin", "cpu:0", (0, 1), (0, 64), (0, 0), 2**20),
                     Shard("berlin", "cpu:1", (1, 2), (64, 128), (0, 0), 2**20))),
        Stage(3, 4, (Shard("oslo", "cpu:0", (0, 2), (0, 128), (0, 100), 3 * 2**20),)),
    ),
    predicted=Predicted(token_ms=12.5, compute_ms=2.5, network_ms=10.0, first_token_ms=20.0, tokens_per_s=80.0),
    why=("two sites, for one alone lacks 3.0 MiB", "berlin leads, for [its] link is short"),
)  # fmt: skip
DEVICE = Device("cpu:0", "cpu", "x", 2**30, 2**29, {"float32": 5e10}, 1e10)
SNAPSHOT = Snapshot(
    (Site("berlin", "eu", (DEVICE,)), Site("oslo", "eu", (DEVICE,)), Site("lima", "sa", (DEVICE,))),
    (
        Link("berlin", "oslo", 0.0251),
        Link("oslo", "berlin", 0.0253),
        Link("berlin", "lima", 0.181, measured=False),
        Link("lima", "berlin", 0.181, reachable=False),
    ),
)
WORDS = ["The", " sea", " is", " wide", " and", " old", "."]


class FakePeer(mesh_pb2_grpc.MeshServicer):
    """Answers at `address`. `submitted` and `generated` hold what arrived; `cancelled` is set by a dropped call."""

    def __init__(self) -> None:
        self.submitted: list[pb.JobSpec] = []
        self.generated: list[pb.GenerateRequest] = []
        self.cancelled = threading.Event()
        self.jobs: dict[str, pb.JobStatus] = {}
        self._server = grpc.server(ThreadPoolExecutor(8))
        mesh_pb2_grpc.add_MeshServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        """As a peer that dies: calls in progress break."""
        self._server.stop(None).wait(5)

    def Status(self, request: Any, context: Any) -> pb.Document:
        members = [{"site": "berlin", "address": self.address, "state": "alive", "incarnation": 1}]
        return pb.Document(json=json.dumps({"site": "berlin", "members": members, "devices": [], "jobs": []}))

    def Topology(self, request: Any, context: Any) -> pb.Document:
        return pb.Document(json=json.dumps(SNAPSHOT.to_dict()))

    def Plan(self, request: pb.JobSpec, context: Any) -> pb.Document:
        self.submitted.append(request)
        if request.model == "too/big":
            abort(
                context, PlanError("no feasible plan for too/big: memory: needs 9 GB,\n 1 GB available, 8 GB missing")
            )
        return pb.Document(json=json.dumps(PLAN.to_dict()))

    def Submit(self, request: pb.JobSpec, context: Any) -> pb.JobStatus:
        self.submitted.append(request)
        if request.model == "no/model":
            abort(context, ModelError("no model 'no/model': neither a folder nor known to the hub"))
        job = f"job-{len(self.jobs) + 1}"
        self.jobs[job] = self._status(job, request.model, "planning")
        return self.jobs[job]

    def Watch(self, request: pb.JobRef, context: grpc.ServicerContext) -> Iterator[pb.JobStatus]:
        status = self._known(request.job, context)
        yield status
        if status.state != "planning":
            return
        yield self._status(status.job, status.model, "loading", loaded=1)
        if status.model == "slow/load":
            context.add_callback(self.cancelled.set)
            self._until_dropped(context)
        elif status.model == "bad/worker":
            self.jobs[status.job] = self._status(
                status.job, status.model, "failed", "worker", "cpu:0 ran out of memory"
            )
            yield self.jobs[status.job]
        elif status.model != "cut/watch":
            self.jobs[status.job] = self._status(status.job, status.model, "ready", loaded=3)
            yield self.jobs[status.job]

    def Jobs(self, request: Any, context: Any) -> pb.JobsReply:
        return pb.JobsReply(jobs=self.jobs.values())

    def Cancel(self, request: pb.JobRef, context: Any) -> pb.JobStatus:
        status = self._known(request.job, context)
        self.jobs[request.job] = self._status(status.job, status.model, "cancelled")
        return self.jobs[request.job]

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        self.generated.append(request)
        model = self._known(request.job, context).model
        if model == "mute/after3":
            context.add_callback(self.cancelled.set)
        yield pb.GenerateEvent(prompt_tokens=5)
        for index, word in enumerate(WORDS[: request.max_tokens]):
            if index == 3 and model == "mute/after3":
                self._until_dropped(context)
                return
            if index == 3 and model == "cut/after3":
                return
            yield pb.GenerateEvent(text=word, token_ids=[index])
        yield pb.GenerateEvent(finish_reason="length", timings_json='{"decode_tokens_per_s": 50.0}')

    def _until_dropped(self, context: grpc.ServicerContext) -> None:
        dropped = threading.Event()
        if context.add_callback(dropped.set):
            dropped.wait(10)

    def _known(self, job: str, context: grpc.ServicerContext) -> pb.JobStatus:
        if job not in self.jobs:
            abort(context, JobNotFound(f"no job {job!r} here: `mesh jobs` lists what there is"))
        return self.jobs[job]

    def _status(
        self, job: str, model: str, state: str, code: str = "", error: str = "", *, loaded: int = 0
    ) -> pb.JobStatus:
        plan = "" if state == "planning" else json.dumps(PLAN.to_dict())
        return pb.JobStatus(
            job=job, model=model, state=state, owner="berlin", epoch=1, plan_json=plan, loaded_bytes=loaded * 2**20,
            total_bytes=3 * 2**20, error=error, error_code=code,
        )  # fmt: skip
