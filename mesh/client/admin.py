"""What an operator asks of the peer that holds the cluster's authority. Every call waits for its answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from mesh.client.address import resolve
from mesh.client.channel import ASK_S, Connection
from mesh.client.credentials import for_user
from mesh.wire.v1 import identity_pb2 as pb
from mesh.wire.v1 import identity_pb2_grpc


class Admin:
    """The authority's peer at `address`; see `mesh.connect` for the address and the token. A context manager."""

    def __init__(self, address: str | None = None, *, token: str | None = None) -> None:
        where = resolve(address)
        self._connection = Connection(where, for_user(token, where))
        self._stub = identity_pb2_grpc.IdentityStub(self._connection.transport)

    def invite(self, site: str = "", ttl_s: float = 0.0, addresses: Sequence[str] = ()) -> str:
        """An invitation for one new site; `ttl_s` 0: an hour; `addresses`: where the new site can reach that peer."""
        request = pb.InviteRequest(site=site, ttl_s=ttl_s, addresses=addresses)
        return str(self._ask(self._stub.Invite, request, "invite").text)

    def create_token(self, name: str, role: str, ttl_s: float = 0.0) -> str:
        """An access token for a user of the API; `ttl_s` 0: thirty days."""
        request = pb.CreateTokenRequest(name=name, role=role, ttl_s=ttl_s)
        return str(self._ask(self._stub.CreateToken, request, "token").text)

    def revoke(self, *, site: str = "", token: str = "") -> pb.ClusterState:
        """Put a site out of the cluster, or withdraw a token by its id."""
        return self._decree(self._stub.Revoke, pb.RevokeRequest(site=site, token=token), "revoke")

    def rotate(self) -> pb.ClusterState:
        """Bring a new gossip key in."""
        return self._decree(self._stub.Rotate, pb.RotateRequest(), "rotate")

    def _decree(self, method: Any, request: Any, what: str) -> pb.ClusterState:
        state: pb.ClusterState = self._ask(method, request, what)
        return state

    def _ask(self, method: Any, request: Any, what: str) -> Any:
        return self._connection.call(method, request, what, ASK_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
