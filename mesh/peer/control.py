"""The gRPC side of a peer: the services of `proto/`, each method a line or two over the parts that do the work.

A request about a job that another peer owns is passed on to that peer, so that a client may talk to any of them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
import trio

from mesh.address import join_address
from mesh.client.channel import CANCEL_S, Connection
from mesh.client.credentials import Credentials
from mesh.errors import AddressInUse, JobNotFound, ModelMissing, RequestError
from mesh.gossip import Gossip, Malformed
from mesh.jobs.ledger import Ledger
from mesh.peer.bridge import Bridge, each
from mesh.peer.cluster import Cluster
from mesh.peer.guard import Guard
from mesh.peer.measuring import Measuring
from mesh.peer.office import IdentityServicer
from mesh.peer.service import PeerService
from mesh.peer.view import MeshView
from mesh.peer.weights import Weights
from mesh.wire.errors import abort
from mesh.wire.v1 import identity_pb2, identity_pb2_grpc, mesh_pb2, mesh_pb2_grpc, peer_pb2, peer_pb2_grpc

#: Each open stream pins a thread: generations, watchers, and the owners that listen to this peer's workers.
THREADS = 256
#: A caller that neither reads nor answers is gone, also where no reset tells of it (a cable cut, a process stopped):
#: its requests end and its leases lapse. A call that waits in vain for 20 s bothers nobody who is only slow.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 10_000, 10_000
#: A prompt of a million characters fits many times; anything longer is a mistake.
MAX_MESSAGE_BYTES = 32 << 20

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # a second peer on the same port must fail, not share it
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # While the caller's kernel still acknowledges what its process does not read, this one decides (default: 60 s).
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
]


class Secured(NamedTuple):
    """What a peer with an identity serves beside the rest."""

    cluster: Cluster
    guard: Guard
    identity: IdentityServicer


class MeshServicer(mesh_pb2_grpc.MeshServicer):
    """What clients ask."""

    def __init__(
        self,
        bridge: Bridge,
        ledger: Ledger,
        view: MeshView,
        status: Callable[[], dict[str, Any]],
        elsewhere: Callable[[], Mapping[str, tuple[str, Mapping[str, Any]]]],
        *,
        credentials: Callable[[str], Credentials | None] = lambda site: None,
    ) -> None:
        """`credentials(site)` are those for a call that is passed on to that site."""
        self._bridge = bridge
        self._ledger = ledger
        self._view = view
        self._status = status
        self._elsewhere = elsewhere
        self._credentials = credentials

    def Status(self, request: mesh_pb2.StatusRequest, context: grpc.ServicerContext) -> mesh_pb2.Document:
        """This peer, its members, devices and jobs."""
        return self._document(context, self._status)

    def Topology(self, request: mesh_pb2.TopologyRequest, context: grpc.ServicerContext) -> mesh_pb2.Document:
        """The snapshot that a plan would be made from now."""
        return self._document(context, lambda: self._view.snapshot().to_dict())

    def Plan(self, request: mesh_pb2.JobSpec, context: grpc.ServicerContext) -> mesh_pb2.Document:
        """A plan, without running it."""

        async def work() -> mesh_pb2.Document:
            plan = await self._ledger.plan(request.model, request.strategy, _constraints(request))
            return mesh_pb2.Document(json=json.dumps(plan.to_dict()))

        return self._bridge.call(context, work)

    def Submit(self, request: mesh_pb2.JobSpec, context: grpc.ServicerContext) -> mesh_pb2.JobStatus:
        """Begin a job; this peer owns it."""

        async def work() -> mesh_pb2.JobStatus:
            return self._ledger.submit(request.model, request.strategy, _constraints(request)).status()

        return self._bridge.call(context, work)

    def Watch(self, request: mesh_pb2.JobRef, context: grpc.ServicerContext) -> Iterator[mesh_pb2.JobStatus]:
        """Every change of a job."""
        if (owner := self._owner(request.job, context)) is not None:
            yield from _passed_on(context, owner, lambda stub: stub.Watch(request))
            return

        def source() -> AsyncGenerator[mesh_pb2.JobStatus, None]:
            return self._ledger.get(request.job).job.watch()

        yield from self._bridge.stream(context, each(source))

    def Jobs(self, request: mesh_pb2.JobsRequest, context: grpc.ServicerContext) -> mesh_pb2.JobsReply:
        """The jobs this peer owns, whole, and those of others as gossip tells of them."""

        async def work() -> mesh_pb2.JobsReply:
            own = [coordinator.job.status() for coordinator in self._ledger]
            others = [_told(job, owner, entry) for job, (owner, entry) in self._elsewhere().items()]
            return mesh_pb2.JobsReply(jobs=own + others)

        return self._bridge.call(context, work)

    def Cancel(self, request: mesh_pb2.JobRef, context: grpc.ServicerContext) -> mesh_pb2.JobStatus:
        """End a job; returns when it has ended."""
        if (owner := self._owner(request.job, context)) is not None:
            passed_on: mesh_pb2.JobStatus = next(
                _passed_on(context, owner, lambda stub: iter([stub.Cancel(request, timeout=CANCEL_S)]))
            )
            return passed_on

        async def work() -> mesh_pb2.JobStatus:
            coordinator = self._ledger.get(request.job)
            coordinator.cancel()
            with trio.move_on_after(CANCEL_S):
                while not coordinator.job.ended:
                    await coordinator.job.changed()
            return coordinator.job.status()

        return self._bridge.call(context, work)

    def Generate(
        self, request: mesh_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[mesh_pb2.GenerateEvent]:
        """Serve one request; the end of the call is the end of the request."""
        if (owner := self._owner(request.job, context)) is not None:
            yield from _passed_on(context, owner, lambda stub: stub.Generate(request))
            return

        def source() -> AsyncGenerator[mesh_pb2.GenerateEvent, None]:
            return self._ledger.get(request.job).generate(request)

        yield from self._bridge.stream(context, each(source))

    def _document(self, context: grpc.ServicerContext, make: Callable[[], dict[str, Any]]) -> mesh_pb2.Document:
        async def work() -> mesh_pb2.Document:
            return mesh_pb2.Document(json=json.dumps(make()))

        return self._bridge.call(context, work)

    def _owner(self, job: str, context: grpc.ServicerContext) -> Connection | None:
        """A connection to the other peer that owns the job; None where this one does, or nobody is known to."""

        async def work() -> Connection | None:
            known = self._elsewhere().get(job)
            if known is None or job in self._ledger:
                return None
            return Connection(self._view.address(known[0]), self._credentials(known[0]))

        return self._bridge.call(context, work)


class PeerServicer(peer_pb2_grpc.PeerServicer):
    """What the owners of jobs ask."""

    def __init__(
        self,
        bridge: Bridge,
        service: PeerService,
        gossip: Gossip,
        measuring: Measuring,
        secured: Secured | None = None,
        *,
        weights: Weights | None = None,
    ) -> None:
        self._weights = weights
        self._bridge = bridge
        self._service = service
        self._measuring = measuring
        self._gossip = gossip
        self._secured = secured

    def Gossip(self, request: identity_pb2.Packet, context: grpc.ServicerContext) -> identity_pb2.Packet:
        """One request of gossip's reliable path."""
        caller = None if self._secured is None else self._secured.guard.caller(context.invocation_metadata()).name

        async def work() -> identity_pb2.Packet:
            try:
                return identity_pb2.Packet(data=self._gossip.serve_stream(request.data, context.peer(), caller))
            except Malformed as error:
                raise RequestError(f"not gossip of this mesh: {error}") from None

        return self._bridge.call(context, work)

    def Keys(self, request: peer_pb2.KeysRequest, context: grpc.ServicerContext) -> identity_pb2.Packet:
        """The cluster's document and gossip keys, sealed to the caller's key."""
        if self._secured is None:
            abort(context, RequestError("this peer has no identity, and so no gossip keys"))
        cluster = self._secured.cluster
        caller = self._secured.guard.caller(context.invocation_metadata())

        async def work() -> identity_pb2.Packet:
            known = cluster.identity.directory.site(caller.name)
            if known is None or known.fingerprint != caller.id:
                raise RequestError(f"the certificate of {caller.name} is not known here yet: ask again")
            return identity_pb2.Packet(data=cluster.identity.handover(known.der, cluster.wall()))

        return self._bridge.call(context, work)

    def Answer(self, request: peer_pb2.AnswerRequest, context: grpc.ServicerContext) -> peer_pb2.AnswerReply:
        """Begin to answer a measurement of the link to this peer."""

        async def work() -> peer_pb2.AnswerReply:
            return peer_pb2.AnswerReply(addresses=await self._measuring.answer(request.backends, request.key))

        return self._bridge.call(context, work)

    def Measure(self, request: peer_pb2.MeasureRequest, context: grpc.ServicerContext) -> peer_pb2.MeasureReply:
        """Which transport is best from here to another site."""

        async def work() -> peer_pb2.MeasureReply:
            return peer_pb2.MeasureReply(backend=await self._service.measure(request.site, request.backends))

        return self._bridge.call(context, work)

    def Relay(self, request: peer_pb2.RelayRequest, context: grpc.ServicerContext) -> peer_pb2.RelayReply:
        """Hand bytes on to another site."""
        return self._bridge.call(context, lambda: self._service.relay(request))

    def Prepare(
        self, request: peer_pb2.PrepareRequest, context: grpc.ServicerContext
    ) -> Iterator[peer_pb2.PrepareEvent]:
        """Load one shard."""

        async def produce(send: trio.MemorySendChannel[peer_pb2.PrepareEvent]) -> None:
            def progress(done: int, total: int) -> None:
                try:
                    send.send_nowait(peer_pb2.PrepareEvent(loaded_bytes=done, total_bytes=total))
                except trio.WouldBlock:
                    pass  # the owner is behind: a later report replaces this one

            try:
                addresses = await self._service.prepare(request, progress)
            except ModelMissing as missing:
                await send.send(peer_pb2.PrepareEvent(missing=str(missing)))
            else:
                await send.send(peer_pb2.PrepareEvent(addresses=addresses))

        yield from self._bridge.stream(context, produce)

    def Weights(self, request: peer_pb2.WeightsRequest, context: grpc.ServicerContext) -> peer_pb2.WeightsTicket:
        """The way to a model's blocks. Who asks is whoever proved so, where there are identities."""
        if self._secured is not None:
            request.site = self._secured.guard.caller(context.invocation_metadata()).name

        async def work() -> peer_pb2.WeightsTicket:
            if self._weights is None:
                raise RequestError("this peer gives no weights away")
            return await self._weights.ticket(request)

        return self._bridge.call(context, work)

    def Connect(self, request: peer_pb2.ConnectRequest, context: grpc.ServicerContext) -> peer_pb2.Done:
        """Open a shard's channels."""
        return self._done(context, lambda: self._service.connect(request))

    def Start(self, request: peer_pb2.StartRequest, context: grpc.ServicerContext) -> peer_pb2.Done:
        """Begin or resume a request."""
        return self._done(context, lambda: self._service.start(request))

    def Stop(self, request: peer_pb2.StopRequest, context: grpc.ServicerContext) -> peer_pb2.Done:
        """End a request early."""
        return self._done(context, lambda: self._service.stop(request))

    def Release(self, request: peer_pb2.ReleaseRequest, context: grpc.ServicerContext) -> peer_pb2.Done:
        """End the job's workers here."""
        return self._done(context, lambda: self._service.release(request))

    def Displace(self, request: peer_pb2.DisplaceRequest, context: grpc.ServicerContext) -> peer_pb2.Done:
        """End a job of ours for one of higher priority."""
        return self._done(context, lambda: self._service.displace(request))

    def Ping(self, request: peer_pb2.Done, context: grpc.ServicerContext) -> peer_pb2.Done:
        """Answer, from the trio loop: a peer whose loop is stuck does not answer."""
        return self._done(context, lambda: self._service.ping(0))

    def Events(self, request: peer_pb2.EventsRequest, context: grpc.ServicerContext) -> Iterator[peer_pb2.WorkerEvent]:
        """What the job's workers report; the call is the lease on them."""

        async def produce(send: trio.MemorySendChannel[peer_pb2.WorkerEvent]) -> None:
            async with self._service.events(request) as events:
                async for event in events:
                    await send.send(event)

        yield from self._bridge.stream(context, produce)

    def _done(self, context: grpc.ServicerContext, work: Callable[[], Any]) -> peer_pb2.Done:
        self._bridge.call(context, work)
        return peer_pb2.Done()


def serve(
    mesh: MeshServicer, peer: PeerServicer, host: str, port: int, *, secured: Secured | None = None
) -> grpc.Server:
    """Start the server on `host:port`: TLS and proven callers where there is an identity, else plain.

    Raises AddressInUse where the port is taken.
    """
    # Without the limit, a call beyond the threads would wait in a queue without a word.
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="grpc"),
        interceptors=[] if secured is None else [secured.guard],
        options=_OPTIONS,
        maximum_concurrent_rpcs=THREADS,
    )
    mesh_pb2_grpc.add_MeshServicer_to_server(mesh, server)
    peer_pb2_grpc.add_PeerServicer_to_server(peer, server)
    address = join_address(host, port)
    try:
        if secured is None:
            bound = server.add_insecure_port(address)
        else:
            identity_pb2_grpc.add_IdentityServicer_to_server(secured.identity, server)
            bound = server.add_secure_port(address, secured.cluster.server_credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise AddressInUse(f"listen={address}: the TCP port is taken; stop what listens there or give another --listen")
    server.start()
    return server


def _told(job: str, owner: str, entry: Mapping[str, Any]) -> mesh_pb2.JobStatus:
    """What gossip tells of a job that another peer owns."""
    epoch = entry.get("epoch")
    counter = epoch if isinstance(epoch, int) and 0 <= epoch < 2**63 else 0
    model, state = str(entry.get("model", "")), str(entry.get("state", ""))
    return mesh_pb2.JobStatus(job=job, owner=owner, model=model, state=state, epoch=counter)


def _constraints(request: mesh_pb2.JobSpec) -> dict[str, Any]:
    try:
        document = json.loads(request.constraints_json or "{}")
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise RequestError("constraints must be a JSON object")
    return document


def _passed_on(
    context: grpc.ServicerContext, connection: Connection, begin: Callable[[Any], Iterator[Any]]
) -> Iterator[Any]:
    """What the owner answers. Its error is passed on as it is; the end of our call ends the call to the owner."""
    context.add_callback(connection.close)
    try:
        yield from begin(connection.stub)
    except grpc.RpcError as error:
        abort(context, connection.error(error, "a job of another peer", CANCEL_S))
    except ValueError:
        abort(context, JobNotFound("the caller went away"))
    finally:
        connection.close()
