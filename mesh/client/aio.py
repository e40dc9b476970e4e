"""The client for services under trio: the same names as the blocking client, awaited.

    async with await aio.connect() as mesh:
        job = await mesh.submit("HuggingFaceTB/SmolLM2-135M-Instruct")
        await job.wait()
        async with job.stream("The sea is") as stream:
            async for chunk in stream:
                print(chunk.text, end="")

gRPC's own asyncio flavour does not run under trio, so this drives the threaded one: futures that call back into trio
for unary calls, one thread per open stream (`mesh.client.bridge`). Cancelling the awaiting task cancels the RPC.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc

from mesh.client.address import resolve
from mesh.client.bridge import Messages, unary
from mesh.client.channel import ASK_S, CANCEL_S, IDLE_S, PLAN_S, WAIT_S, Connection
from mesh.client.credentials import for_user
from mesh.client.errors import silent
from mesh.client.handle import Handle, checked_end, watch_ended
from mesh.client.options import Options, Prompt, generate_request
from mesh.client.spec import job_spec
from mesh.client.values import (
    Chunk,
    Collected,
    Generation,
    JobStatus,
    document_from,
    plan_from,
    snapshot_from,
)
from mesh.errors import DeadlineExceeded
from mesh.wire.v1 import mesh_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from topology.constraints import Constraints
    from topology.plan import Plan
    from topology.snapshot import Snapshot


async def connect(address: str | None = None, *, token: str | None = None) -> Mesh:
    """A client of the peer at `address` (`HOST:PORT`; None: `$MESH_PEER`, else 127.0.0.1:7700).

    `token` is an access token or a file with one (None: `$MESH_TOKEN`, else what a peer of this account left on this
    machine). Asks the peer for a sign of life. Raises PeerUnreachable where nobody answers, ConfigError for a malformed
    address, IdentityError for a token that is none or that the peer does not take.
    """
    mesh = Mesh(address, token=token)
    try:
        await mesh.status()
    except BaseException:
        mesh.close()
        raise
    return mesh


async def submit(
    model: str | Path,
    strategy: str = "auto",
    constraints: Mapping[str, Any] | Constraints | None = None,
    *,
    peer: str | None = None,
    token: str | None = None,
) -> Job:
    """Submit `model` to the peer at `peer`: `(await connect(peer)).submit(...)`."""
    return await Mesh(peer, token=token).submit(model, strategy, constraints)


class Mesh:
    """The mesh, as one of its peers sees it. Connects at the first call; an async context manager that closes."""

    def __init__(self, address: str | None = None, *, token: str | None = None) -> None:
        """See `connect`."""
        where = resolve(address)
        self._connection = Connection(where, for_user(token, where))

    @property
    def address(self) -> str:
        """`HOST:PORT` of the peer."""
        return self._connection.address

    async def status(self) -> dict[str, Any]:
        """The peer's own view: `{"site", "members": [...], "devices": [...], "jobs": [...]}`."""
        return document_from((await self._ask("Status", pb.StatusRequest(), "status")).json)

    async def topology(self) -> Snapshot:
        """Sites, devices and measured links, as a plan made now would see them."""
        return snapshot_from(document_from((await self._ask("Topology", pb.TopologyRequest(), "topology")).json))

    async def plan(
        self,
        model: str | Path,
        strategy: str = "auto",
        constraints: Mapping[str, Any] | Constraints | None = None,
    ) -> Plan:
        """The plan a submission would get, without running anything. Raises PlanError where none is feasible."""
        spec = job_spec(model, strategy, constraints)
        return plan_from(document_from((await self._ask("Plan", spec, "plan", PLAN_S)).json))

    async def submit(
        self,
        model: str | Path,
        strategy: str = "auto",
        constraints: Mapping[str, Any] | Constraints | None = None,
    ) -> Job:
        """Start a job; returns as soon as it exists. Arguments as in the blocking client."""
        spec = job_spec(model, strategy, constraints)
        return Job(self, JobStatus.from_wire(await self._ask("Submit", spec, "submit", PLAN_S)))

    async def jobs(self) -> list[JobStatus]:
        """Every job this peer knows of, as it stands now."""
        return [JobStatus.from_wire(job) for job in (await self._ask("Jobs", pb.JobsRequest(), "jobs")).jobs]

    async def job(self, job: str) -> Job:
        """The job of that id. Raises JobNotFound."""
        return Job(self, await self._look(job))

    def close(self) -> None:
        """Close the connection. Jobs live on in the mesh; streams of this client end."""
        self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Mesh at {self.address}>"

    async def _ask(self, method: str, request: Any, what: str, deadline_s: float = ASK_S) -> Any:
        return await unary(self._connection, getattr(self._connection.stub, method), request, what, deadline_s)

    async def _look(self, job: str) -> JobStatus:
        async with aclosing(self._watch(job, ASK_S)) as states:
            async for status in states:
                return status
        raise watch_ended(job, self.address)

    async def _watch(self, job: str, deadline_s: float) -> AsyncGenerator[JobStatus, None]:
        messages: Messages[pb.JobStatus] = Messages(
            self._connection.begin(self._connection.stub.Watch, pb.JobRef(job=job), timeout=deadline_s)
        )
        begun = False
        try:
            while (message := await messages.receive()) is not None:
                begun = True
                yield JobStatus.from_wire(message)
        except grpc.RpcError as error:
            raise self._connection.error(error, f"the state of job {job}", deadline_s, begun=begun) from None
        finally:
            messages.close()

    def _stream(self, request: pb.GenerateRequest, idle_timeout_s: float) -> Stream:
        return Stream(self._connection, request, idle_timeout_s)


class Job(Handle):
    """A model running somewhere in the mesh. `status` and `plan` are as last heard; `refresh` asks."""

    def __init__(self, mesh: Mesh, status: JobStatus) -> None:
        super().__init__(status)
        self.mesh = mesh

    @property
    def status(self) -> str:
        """The job's state as last heard: planning, loading, ready, recovering, failed or cancelled."""
        return self._last.state

    @property
    def plan(self) -> Plan | None:
        """The plan as last heard; None until there is one. A recovery changes it."""
        return self._last.plan

    async def refresh(self) -> JobStatus:
        """The whole status now: state, epoch, bytes loaded, error."""
        self._last = await self.mesh._look(self.id)
        return self._last

    async def watch(self, timeout_s: float = WAIT_S) -> AsyncIterator[JobStatus]:
        """Every change of the status, starting with the present one. Raises DeadlineExceeded after `timeout_s`."""
        async with aclosing(self.mesh._watch(self.id, timeout_s)) as states:
            async for status in states:
                self._last = status
                yield status

    async def wait(self, timeout_s: float = WAIT_S) -> Self:
        """Wait until the job is ready. Raises the job's own error if it failed, DeadlineExceeded after `timeout_s`."""
        try:
            async with aclosing(self.mesh._watch(self.id, timeout_s)) as states:
                async for status in states:
                    if self._settled(status):
                        return self
        except DeadlineExceeded as error:
            raise self._last.failure or self._unsettled(timeout_s) from error
        raise watch_ended(self.id, self.mesh.address)

    async def generate(
        self, prompt: Prompt, *, idle_timeout_s: float = IDLE_S, **options: Unpack[Options]
    ) -> Generation:
        """Continue `prompt` and return the whole. Options as in `mesh.client.options.Options`."""
        async with self.stream(prompt, idle_timeout_s=idle_timeout_s, **options) as stream:
            return await stream.result()

    def stream(self, prompt: Prompt, *, idle_timeout_s: float = IDLE_S, **options: Unpack[Options]) -> Stream:
        """Continue `prompt`, piece by piece; the request starts at the first wait. Use it in an `async with` block."""
        return self.mesh._stream(generate_request(self.id, prompt, options), idle_timeout_s)

    async def cancel(self) -> None:
        """End the job and free its devices. Raises JobNotFound where it is gone already."""
        self._last = JobStatus.from_wire(await self.mesh._ask("Cancel", pb.JobRef(job=self.id), "cancel", CANCEL_S))


class Stream(AsyncIterator[Chunk]):
    """The pieces of one generation, as they come. Leaving its `async with` block cancels the request."""

    def __init__(self, connection: Connection, request: pb.GenerateRequest, idle_timeout_s: float) -> None:
        self._connection = connection
        self._request = request
        self._idle_s = idle_timeout_s
        self._collected = Collected(request.seed)
        self._messages: Messages[pb.GenerateEvent] | None = None
        self._open = True

    @property
    def generation(self) -> Generation:
        """What has been read so far; complete once the stream is exhausted."""
        return self._collected.generation()

    async def result(self) -> Generation:
        """Read to the end and return the whole."""
        async for _ in self:
            pass
        return self.generation

    def close(self) -> None:
        """Cancel the request if it still runs. May be called twice."""
        self._open = False
        if self._messages is not None:
            self._messages.close()

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        self.close()

    async def __anext__(self) -> Chunk:
        while self._open:
            event = await self._event()
            if event is None:
                if self._open:
                    self.close()
                    checked_end(self._collected, self._request.job)
                break
            chunk = self._collected.add(event)
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def _event(self) -> pb.GenerateEvent | None:
        if self._messages is None:
            self._messages = Messages(self._connection.begin(self._connection.stub.Generate, self._request))
        try:
            return await self._messages.receive(self._idle_s)
        except TimeoutError:
            self.close()
            raise silent(self._connection.address, "the next token", self._idle_s) from None
        except grpc.RpcError as error:
            self.close()
            begun = bool(self._collected.token_ids)
            raise self._connection.error(error, "the generation", self._idle_s, begun=begun) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
