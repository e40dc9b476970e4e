"""One gRPC channel to one peer, its deadlines, and the unary call that turns every failure into a `MeshError`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import grpc

from mesh.client.errors import from_rpc
from mesh.errors import MeshError
from mesh.wire.v1 import mesh_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.client.credentials import Credentials

# A peer that stops makes gRPC's core write lines of its own to our user's stderr. Read when the first channel opens.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

#: A peer answers these from memory.
ASK_S = 10.0

#: Planning reads the model's configuration, in a process of its own, perhaps from a hub.
PLAN_S = 180.0

#: Cancelling waits until the workers have let go.
CANCEL_S = 30.0

#: Longest silence within a generation: a long prefill on a slow device, or a recovery, say nothing for a while.
IDLE_S = 300.0

#: How long `wait` waits for weights to load.
WAIT_S = 600.0

_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.enable_http_proxy", 0),  # a proxy from the environment must not stand between a client and its own peer
    ("grpc.use_local_subchannel_pool", 1),  # one client's back-off is not another's
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    # a peer that came back is planned on as soon as gossip says so; a longer back-off would call it lost again
    ("grpc.max_reconnect_backoff_ms", 300),
]


class Connection:
    """A channel to the peer at `address`. Opening does no I/O; the first call connects.

    Without `credentials` it is plain, as peers without an identity are, on loopback.
    """

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        self.address = address
        self._closed = False
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = credentials.channel(address, _CHANNEL_OPTIONS)
        self.stub = mesh_pb2_grpc.MeshStub(self._channel)

    @property
    def transport(self) -> grpc.Channel:
        """The gRPC channel, for other services' stubs."""
        return self._channel

    def close(self) -> None:
        """Close the channel; calls in progress end. May be called twice."""
        self._closed = True
        self._channel.close()

    def call(self, method: Any, request: Any, what: str, deadline_s: float) -> Any:
        """One unary call. Raises the peer's own error, PeerUnreachable or DeadlineExceeded."""
        try:
            return self.begin(method, request, timeout=deadline_s)
        except grpc.RpcError as error:
            raise self.error(error, what, deadline_s) from None

    def begin(self, start: Callable[..., Any], request: Any, timeout: float | None = None) -> Any:
        """Start a call of any kind. Raises MeshError where this connection was closed."""
        try:
            return start(request, timeout=timeout)
        except ValueError as error:  # what grpc raises on a closed channel
            raise self._closed_error() from error

    def error(self, error: grpc.RpcError, what: str, deadline_s: float, *, begun: bool = False) -> MeshError:
        """The `MeshError` for a failed call on this connection."""
        if self._closed and isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.CANCELLED:
            return self._closed_error()
        return from_rpc(error, self.address, what, deadline_s, begun=begun)

    def _closed_error(self) -> MeshError:
        return MeshError(f"the connection to the peer at {self.address} is closed: connect again")
