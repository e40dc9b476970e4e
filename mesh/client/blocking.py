"""The client for scripts and notebooks: every call waits for its answer, under a deadline."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc

from mesh.client.address import resolve
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
from mesh.client.watchdog import Watchdog
from mesh.errors import DeadlineExceeded
from mesh.wire.v1 import mesh_pb2 as pb

if TYPE_CHECKING:
    from topology.constraints import Constraints
    from topology.plan import Plan
    from topology.snapshot import Snapshot


def connect(address: str | None = None, *, token: str | None = None) -> Mesh:
    """A client of the peer at `address` (`HOST:PORT`; None: `$MESH_PEER`, else 127.0.0.1:7700).

    `token` is an access token or a file with one (None: `$MESH_TOKEN`, else what a peer of this account left on this
    machine). Asks the peer for a sign of life. Raises PeerUnreachable where nobody answers, ConfigError for a malformed
    address, IdentityError for a token that is none or that the peer does not take.
    """
    mesh = Mesh(address, token=token)
    try:
        mesh.status()
    except BaseException:
        mesh.close()
        raise
    return mesh


def submit(
    model: str | Path,
    strategy: str = "auto",
    constraints: Mapping[str, Any] | Constraints | None = None,
    *,
    peer: str | None = None,
    token: str | None = None,
) -> Job:
    """Submit `model` to the peer at `peer`: `connect(peer).submit(...)`. Use `Job.wait` to wait until it is loaded."""
    return Mesh(peer, token=token).submit(model, strategy, constraints)


class Mesh:
    """The mesh, as one of its peers sees it. Connects at the first call; a context manager that closes."""

    def __init__(self, address: str | None = None, *, token: str | None = None) -> None:
        """See `connect`."""
        where = resolve(address)
        self._connection = Connection(where, for_user(token, where))

    @property
    def address(self) -> str:
        """`HOST:PORT` of the peer."""
        return self._connection.address

    def status(self) -> dict[str, Any]:
        """The peer's own view: `{"site", "members": [...], "devices": [...], "jobs": [...]}`."""
        return document_from(self._ask("Status", pb.StatusRequest(), "status").json)

    def topology(self) -> Snapshot:
        """Sites, devices and measured links, as a plan made now would see them."""
        return snapshot_from(document_from(self._ask("Topology", pb.TopologyRequest(), "topology").json))

    def plan(
        self,
        model: str | Path,
        strategy: str = "auto",
        constraints: Mapping[str, Any] | Constraints | None = None,
    ) -> Plan:
        """The plan a submission would get, without running anything. Raises PlanError where none is feasible."""
        spec = job_spec(model, strategy, constraints)
        return plan_from(document_from(self._ask("Plan", spec, "plan", PLAN_S).json))

    def submit(
        self,
        model: str | Path,
        strategy: str = "auto",
        constraints: Mapping[str, Any] | Constraints | None = None,
    ) -> Job:
        """Start a job; returns as soon as it exists.

        `model` is a Hugging Face id, a folder or a `.gguf` file. `strategy` is "auto", "tensor_parallelism" or
        "pipeline". `constraints` has the keys of `mesh.Constraints`. Raises RequestError for what is malformed.
        """
        spec = job_spec(model, strategy, constraints)
        return Job(self, JobStatus.from_wire(self._ask("Submit", spec, "submit", PLAN_S)))

    def jobs(self) -> list[JobStatus]:
        """Every job this peer knows of, as it stands now."""
        return [JobStatus.from_wire(job) for job in self._ask("Jobs", pb.JobsRequest(), "jobs").jobs]

    def job(self, job: str) -> Job:
        """The job of that id. Raises JobNotFound."""
        return Job(self, self._look(job))

    def close(self) -> None:
        """Close the connection. Jobs live on in the mesh; streams of this client end."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Mesh at {self.address}>"

    def _ask(self, method: str, request: Any, what: str, deadline_s: float = ASK_S) -> Any:
        return self._connection.call(getattr(self._connection.stub, method), request, what, deadline_s)

    def _look(self, job: str) -> JobStatus:
        """The present state: the first message of a watch."""
        with closing(self._watch(job, ASK_S)) as states:
            for status in states:
                return status
        raise watch_ended(job, self.address)

    def _watch(self, job: str, deadline_s: float) -> Generator[JobStatus, None, None]:
        call = self._connection.begin(self._connection.stub.Watch, pb.JobRef(job=job), timeout=deadline_s)
        begun = False
        try:
            for message in call:
                begun = True
                yield JobStatus.from_wire(message)
        except grpc.RpcError as error:
            raise self._connection.error(error, f"the state of job {job}", deadline_s, begun=begun) from None
        finally:
            call.cancel()

    def _stream(self, request: pb.GenerateRequest, idle_timeout_s: float) -> Stream:
        return Stream(self._connection, request, idle_timeout_s)


class Job(Handle):
    """A model running somewhere in the mesh. Lives in the mesh: dropping this object does not end it, `cancel` does."""

    def __init__(self, mesh: Mesh, status: JobStatus) -> None:
        super().__init__(status)
        self.mesh = mesh

    @property
    def status(self) -> str:
        """The job's state now (asks the peer): planning, loading, ready, recovering, failed or cancelled."""
        return self.refresh().state

    @property
    def plan(self) -> Plan | None:
        """The plan now (asks the peer); None until there is one. A recovery changes it."""
        return self.refresh().plan

    def refresh(self) -> JobStatus:
        """The whole status now: state, epoch, bytes loaded, error."""
        self._last = self.mesh._look(self.id)
        return self._last

    def watch(self, timeout_s: float = WAIT_S) -> Iterator[JobStatus]:
        """Every change of the status, starting with the present one. Raises DeadlineExceeded after `timeout_s`."""
        with closing(self.mesh._watch(self.id, timeout_s)) as states:
            for status in states:
                self._last = status
                yield status

    def wait(self, timeout_s: float = WAIT_S) -> Self:
        """Wait until the job is ready. Raises the job's own error if it failed, DeadlineExceeded after `timeout_s`."""
        for _ in self.until_ready(timeout_s):
            pass
        return self

    def until_ready(self, timeout_s: float = WAIT_S) -> Iterator[JobStatus]:
        """`wait` that shows every status on the way, for a progress bar. The last one is ready."""
        try:
            with closing(self.mesh._watch(self.id, timeout_s)) as states:
                for status in states:
                    settled = self._settled(status)
                    yield status
                    if settled:
                        return
        except DeadlineExceeded as error:
            raise self._last.failure or self._unsettled(timeout_s) from error
        raise watch_ended(self.id, self.mesh.address)

    def generate(self, prompt: Prompt, *, idle_timeout_s: float = IDLE_S, **options: Unpack[Options]) -> Generation:
        """Continue `prompt` and return the whole. Options as in `mesh.client.options.Options`.

        Raises RequestError for a bad prompt or option, JobFailed and its kin where the job ends, DeadlineExceeded
        after `idle_timeout_s` without a token.
        """
        with self.stream(prompt, idle_timeout_s=idle_timeout_s, **options) as stream:
            return stream.result()

    def stream(self, prompt: Prompt, *, idle_timeout_s: float = IDLE_S, **options: Unpack[Options]) -> Stream:
        """Continue `prompt`, piece by piece. Closing the stream (or leaving its `with` block) cancels the request."""
        return self.mesh._stream(generate_request(self.id, prompt, options), idle_timeout_s)

    def cancel(self) -> None:
        """End the job and free its devices. Raises JobNotFound where it is gone already."""
        self._last = JobStatus.from_wire(self.mesh._ask("Cancel", pb.JobRef(job=self.id), "cancel", CANCEL_S))


class Stream(Iterator[Chunk]):
    """The pieces of one generation, as they come."""

    def __init__(self, connection: Connection, request: pb.GenerateRequest, idle_timeout_s: float) -> None:
        self._connection = connection
        self._job = request.job
        self._idle_s = idle_timeout_s
        self._collected = Collected(request.seed)
        self._open = True
        self._call = connection.begin(connection.stub.Generate, request)
        self._watchdog = Watchdog(self._call.cancel, idle_timeout_s)

    @property
    def generation(self) -> Generation:
        """What has been read so far; complete once the stream is exhausted."""
        return self._collected.generation()

    def result(self) -> Generation:
        """Read to the end and return the whole."""
        for _ in self:
            pass
        return self.generation

    def close(self) -> None:
        """Cancel the request if it still runs. May be called twice, and from another thread."""
        self._open = False
        self._watchdog.stop()
        self._call.cancel()

    def __next__(self) -> Chunk:
        while self._open:
            event = self._event()
            if event is None:
                self.close()
                checked_end(self._collected, self._job)
                break
            chunk = self._collected.add(event)
            if chunk is not None:
                return chunk
        raise StopIteration

    def _event(self) -> pb.GenerateEvent | None:
        """The next message, None at the end."""
        self._watchdog.wait_begins()
        try:
            event: pb.GenerateEvent | None = next(self._call, None)
        except grpc.RpcError as error:
            closed = not self._open
            self.close()
            if closed and error is self._call and error.code() is grpc.StatusCode.CANCELLED:
                raise StopIteration from None  # closed from another thread: an end, and no failure
            if self._watchdog.fired:
                raise silent(self._connection.address, "the next token", self._idle_s) from None
            begun = bool(self._collected.token_ids)
            raise self._connection.error(error, "the generation", self._idle_s, begun=begun) from None
        finally:
            self._watchdog.wait_ends()
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_watchdog"):  # else the call was never begun
            self.close()
