"""Another site's peer, over gRPC: the remote half of `mesh.jobs.peers.PeerCalls`."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc

from mesh.client.bridge import Messages, unary
from mesh.client.channel import Connection
from mesh.client.credentials import Credentials
from mesh.errors import ModelMissing, PeerUnreachable
from mesh.jobs.deploy import (
    CONNECT_DEADLINE_S,
    DISPLACE_DEADLINE_S,
    MEASURE_DEADLINE_S,
    PREPARE_DEADLINE_S,
    RELAY_DEADLINE_S,
)
from mesh.jobs.peers import Progress
from mesh.wire.v1 import identity_pb2, identity_pb2_grpc, peer_pb2, peer_pb2_grpc

M = TypeVar("M")

#: Starting, stopping and releasing are answered from memory or after a worker let go.
CALL_DEADLINE_S = 10.0


class RemotePeer(Connection):
    """The calls of the peer at `address`. Raises PeerUnreachable when nobody answers there."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        super().__init__(address, credentials)
        self._peer = peer_pb2_grpc.PeerStub(self._channel)
        self._identity = identity_pb2_grpc.IdentityStub(self._channel)
        self._calls = 0
        self._counting = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether calls are in progress: they would end with the connection."""
        return self._calls > 0

    def begin(self, start: Callable[..., Any], request: Any, timeout: float | None = None) -> Any:
        """As `Connection.begin`, counted while it is in progress."""
        call = super().begin(start, request, timeout)
        self._count(1)
        call.add_done_callback(lambda _: self._count(-1))  # in a thread of gRPC's
        return call

    def _count(self, change: int) -> None:
        with self._counting:
            self._calls += change

    async def prepare(self, request: peer_pb2.PrepareRequest, progress: Progress) -> dict[str, bytes]:
        """See `PeerCalls.prepare`."""
        call = self.begin(self._peer.Prepare, request, timeout=PREPARE_DEADLINE_S)
        events: Messages[peer_pb2.PrepareEvent] = Messages(call)
        try:
            while (event := await self._receive(events, "prepare")) is not None:
                if event.missing:
                    raise ModelMissing(event.missing)
                progress(event.loaded_bytes, event.total_bytes)
                if event.addresses:
                    return dict(event.addresses)
        finally:
            events.close()
        raise PeerUnreachable(f"the peer at {self.address} ended the loading without a word")

    async def connect(self, request: peer_pb2.ConnectRequest) -> None:
        """See `PeerCalls.connect`."""
        await unary(self, self._peer.Connect, request, "connect", CONNECT_DEADLINE_S)

    async def start(self, request: peer_pb2.StartRequest) -> None:
        """See `PeerCalls.start`."""
        await unary(self, self._peer.Start, request, "start", CALL_DEADLINE_S)

    async def stop(self, request: peer_pb2.StopRequest) -> None:
        """See `PeerCalls.stop`."""
        await unary(self, self._peer.Stop, request, "stop", CALL_DEADLINE_S)

    async def release(self, request: peer_pb2.ReleaseRequest) -> None:
        """See `PeerCalls.release`."""
        await unary(self, self._peer.Release, request, "release", CALL_DEADLINE_S)

    async def displace(self, request: peer_pb2.DisplaceRequest) -> None:
        """See `PeerCalls.displace`."""
        await unary(self, self._peer.Displace, request, "displace", DISPLACE_DEADLINE_S)

    async def ping(self, timeout_s: float) -> None:
        """See `PeerCalls.ping`."""
        await unary(self, self._peer.Ping, peer_pb2.Done(), "ping", timeout_s)

    async def answer(self, backends: Sequence[str], key: bytes) -> dict[str, bytes]:
        """Begin to answer a measurement there; the addresses. See `mesh.peer.measuring`."""
        request = peer_pb2.AnswerRequest(backends=backends, key=key)
        reply = await unary(self, self._peer.Answer, request, "answer", MEASURE_DEADLINE_S)
        return dict(reply.addresses)

    async def measure(self, site: str, backends: Sequence[str]) -> str:
        """See `PeerCalls.measure`."""
        request = peer_pb2.MeasureRequest(site=site, backends=backends)
        reply = await unary(self, self._peer.Measure, request, "measure", MEASURE_DEADLINE_S)
        return str(reply.backend)

    async def relay(self, request: peer_pb2.RelayRequest) -> peer_pb2.RelayReply:
        """See `PeerCalls.relay`."""
        reply: peer_pb2.RelayReply = await unary(self, self._peer.Relay, request, "relay", RELAY_DEADLINE_S)
        return reply

    async def gossip(self, data: bytes, timeout_s: float) -> bytes:
        """One request of gossip's reliable path, and its answer."""
        answer = await unary(self, self._peer.Gossip, identity_pb2.Packet(data=data), "gossip", timeout_s)
        return bytes(answer.data)

    async def keys(self, version: int) -> bytes:
        """A handover of the cluster's document and of its gossip keys of at least `version`, for our site."""
        answer = await unary(self, self._peer.Keys, peer_pb2.KeysRequest(version=version), "keys", CALL_DEADLINE_S)
        return bytes(answer.data)

    async def weights(self, request: peer_pb2.WeightsRequest, timeout_s: float) -> peer_pb2.WeightsTicket:
        """A ticket for a model's blocks."""
        ticket: peer_pb2.WeightsTicket = await unary(self, self._peer.Weights, request, "weights", timeout_s)
        return ticket

    async def renew(self, csr: bytes) -> bytes:
        """A new certificate of the same key, from the authority's peer."""
        answer = await unary(self, self._identity.Renew, identity_pb2.Packet(data=csr), "renew", CALL_DEADLINE_S)
        return bytes(answer.data)

    @asynccontextmanager
    async def events(self, request: peer_pb2.EventsRequest) -> AsyncIterator[AsyncIterator[peer_pb2.WorkerEvent]]:
        """See `PeerCalls.events`."""
        messages: Messages[peer_pb2.WorkerEvent] = Messages(self.begin(self._peer.Events, request))

        async def iterate() -> AsyncIterator[peer_pb2.WorkerEvent]:
            while (event := await self._receive(messages, "events")) is not None:
                yield event

        try:
            yield iterate()
        finally:
            messages.close()

    async def _receive(self, messages: Messages[M], what: str) -> M | None:
        try:
            return await messages.receive()
        except grpc.RpcError as error:
            raise self.error(error, what, PREPARE_DEADLINE_S, begun=True) from None
