"""What the owner of a job asks of the peers that serve it: the same calls for itself and for others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from mesh.errors import ModelMissing
from mesh.wire.v1 import peer_pb2
from topology.displace import RunningJob
from topology.snapshot import Snapshot

#: (loaded_bytes, total_bytes) of one shard.
Progress = Callable[[int, int], None]


class PeerCalls(Protocol):
    """One peer. Every call raises PeerUnreachable when nobody answers, else the error the peer gave."""

    async def prepare(self, request: peer_pb2.PrepareRequest, progress: Progress) -> dict[str, bytes]:
        """Load one shard; the worker's addresses by transport backend.

        Raises ModelMissing where the site lacks the model and the request offers no weights.
        """
        ...

    async def connect(self, request: peer_pb2.ConnectRequest) -> None:
        """Open the channels to the neighbours; returns when all are open."""
        ...

    async def start(self, request: peer_pb2.StartRequest) -> None:
        """Begin or resume a request."""
        ...

    async def stop(self, request: peer_pb2.StopRequest) -> None:
        """End a request early."""
        ...

    async def release(self, request: peer_pb2.ReleaseRequest) -> None:
        """End the job's workers there."""
        ...

    async def displace(self, request: peer_pb2.DisplaceRequest) -> None:
        """End a job that the peer owns, for one of higher priority; returns when its workers are gone."""
        ...

    async def ping(self, timeout_s: float) -> None:
        """Raise PeerUnreachable or DeadlineExceeded unless the peer answers in time."""
        ...

    async def measure(self, site: str, backends: Sequence[str]) -> str:
        """Which of `backends` is best from the peer to `site`, measured now or not long ago."""
        ...

    async def relay(self, request: peer_pb2.RelayRequest) -> peer_pb2.RelayReply:
        """Have the peer hand bytes on to `request.site`; where to send them."""
        ...

    def events(
        self, request: peer_pb2.EventsRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[peer_pb2.WorkerEvent]]:
        """What the job's workers there report, until the peer is gone (PeerUnreachable)."""
        ...


class View(Protocol):
    """The picture of the mesh that a coordinator plans from."""

    def snapshot(self) -> Snapshot:
        """Every site that is alive, as gossip has it now."""
        ...

    def recent(self) -> Snapshot:
        """As `snapshot`, but some seconds old: for those who look again and again."""
        ...

    def running(self) -> Mapping[str, tuple[str, RunningJob]]:
        """The jobs that peers tell of: owner and what it says of the job, by job id."""
        ...

    def alive(self, site: str) -> bool:
        """Whether gossip holds the site for alive (a suspect still is)."""
        ...

    async def offer(self, model: str) -> bytes:
        """What a site that lacks this model must know to fetch it (`PrepareRequest.weights`). Raises ModelError."""
        ...

    def via(self, one: str, other: str) -> str:
        """The site through which a pair of sites meets; empty where directly."""
        ...

    def reaches(self, one: str, other: str) -> bool:
        """Whether two sites can exchange traffic directly, as far as is known."""
        ...

    def peer(self, site: str) -> PeerCalls:
        """The calls of a site's peer. Raises PeerUnreachable where its address is unknown."""
        ...


async def load_shard(
    view: View, site: str, request: peer_pb2.PrepareRequest, model: str, progress: Progress
) -> dict[str, bytes]:
    """Have a site load one shard, from its own files or else from those of sites that have them.

    Raises what the site meets, and ModelError where nobody has the model.
    """
    peer = view.peer(site)
    try:
        return await peer.prepare(request, progress)
    except ModelMissing:
        request.weights = await view.offer(model)
    return await peer.prepare(request, progress)
