"""The gRPC side of identity: enrolment of new sites, and what an operator asks of the cluster's authority.

Only the peer with the authority's files can answer; any other says where to ask. The authority's methods lock its files
and may wait for the disk, so they run in gRPC's threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from mesh.errors import MeshError, NotAllowed
from mesh.identity.access import Access
from mesh.identity.authority import Authority
from mesh.peer.bridge import Bridge
from mesh.peer.cluster import Cluster, Gossip
from mesh.peer.guard import Guard
from mesh.wire.errors import abort
from mesh.wire.v1 import identity_pb2 as pb
from mesh.wire.v1 import identity_pb2_grpc

T = TypeVar("T")
#: What an operator gets who does not say how long: an hour for an invitation, thirty days for a token.
INVITATION_S, TOKEN_S = 3600.0, 30 * 86400.0


class IdentityServicer(identity_pb2_grpc.IdentityServicer):
    """What new sites and operators ask. `address` is where this peer can be reached."""

    def __init__(self, bridge: Bridge, cluster: Cluster, gossip: Gossip, guard: Guard, address: str) -> None:
        self._bridge = bridge
        self._cluster = cluster
        self._gossip = gossip
        self._guard = guard
        self._address = address

    def Enrol(self, request: pb.Packet, context: grpc.ServicerContext) -> pb.Packet:
        """A certificate for a new site that holds an invitation."""
        grant = self._ask(context, lambda authority: authority.redeem(request.data, self._cluster.wall()))
        return pb.Packet(data=grant)

    def Renew(self, request: pb.Packet, context: grpc.ServicerContext) -> pb.Packet:
        """A new certificate for a member's same key."""

        def renew(authority: Authority) -> bytes:
            caller = self._guard.caller(context.invocation_metadata())
            return authority.renew(request.data, caller.name, caller.id, self._cluster.wall())

        return pb.Packet(data=self._ask(context, renew))

    def Invite(self, request: pb.InviteRequest, context: grpc.ServicerContext) -> pb.Text:
        """An invitation for one new site."""
        addresses = list(request.addresses) or [self._address]

        def invite(authority: Authority) -> str:
            ttl_s = request.ttl_s or INVITATION_S
            return authority.invite(self._cluster.wall(), addresses, site=request.site or None, ttl_s=ttl_s)

        return pb.Text(text=self._ask(context, invite))

    def CreateToken(self, request: pb.CreateTokenRequest, context: grpc.ServicerContext) -> pb.Text:
        """An access token for a user of the API."""

        def create(authority: Authority) -> str:
            ttl_s = request.ttl_s or TOKEN_S
            token = authority.create_token(request.name, request.role, self._cluster.wall(), ttl_s)
            return Access(authority.anchor, token).text

        return pb.Text(text=self._ask(context, create))

    def Revoke(self, request: pb.RevokeRequest, context: grpc.ServicerContext) -> pb.ClusterState:
        """Put a site out, or withdraw a user's token."""

        def revoke(authority: Authority) -> None:
            if request.site:
                authority.revoke(request.site, self._cluster.wall())
            else:
                authority.revoke_token(_identifier(request.token), self._cluster.wall())

        return self._decree(context, revoke)

    def Rotate(self, request: pb.RotateRequest, context: grpc.ServicerContext) -> pb.ClusterState:
        """Bring a new gossip key in."""

        def rotate(authority: Authority) -> None:
            authority.rotate(self._cluster.wall())

        return self._decree(context, rotate)

    def _decree(self, context: grpc.ServicerContext, act: Callable[[Authority], None]) -> pb.ClusterState:
        """Act as the authority, then take it over here and tell the mesh."""
        self._ask(context, act)

        async def tell() -> pb.ClusterState:
            self._cluster.took_office(self._gossip)
            document = self._cluster.identity.document
            return pb.ClusterState(
                version=document.version,
                ring_version=document.ring_version,
                revoked_sites=sorted(document.revoked.values()),
            )

        return self._bridge.call(context, tell)

    def _ask(self, context: grpc.ServicerContext, act: Callable[[Authority], T]) -> T:
        authority = self._cluster.authority
        try:
            if authority is None:
                raise NotAllowed("the cluster's authority is not at this peer: ask the site that made the cluster")
            return act(authority)
        except MeshError as error:
            abort(context, error)


def _identifier(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise NotAllowed(f"token id {text!r}: write the hexadecimal id that `mesh token list` shows") from None
