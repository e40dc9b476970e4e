"""`mesh up --invite`: a new site gets its certificate before it starts.

The invitation names the authority's peer and carries the authority's certificate, so the very first connection is TLS
to a known party. The private key is made here and stays here.
"""

from __future__ import annotations

import time
from pathlib import Path

import grpc

from mesh.client.errors import from_rpc
from mesh.errors import MeshError, PeerUnreachable
from mesh.identity.certificate import tls_name
from mesh.identity.invitation import Invitation
from mesh.identity.site import Joining, SiteIdentity
from mesh.wire.v1 import identity_pb2, identity_pb2_grpc

#: One answer: two signatures and a few files at the authority.
ENROL_S = 10.0


def enrol(data_dir: Path, site: str, token: str) -> tuple[SiteIdentity, tuple[str, ...]]:
    """Obtain and keep this site's identity. Gives it and the addresses to join through.

    Raises IdentityError where the invitation is refused, PeerUnreachable where none of its addresses answers, and
    ConfigError where this data directory has an identity already.
    """
    invitation = Invitation.parse(token)
    joining = Joining(data_dir, invitation, site)
    failure: MeshError = PeerUnreachable("the invitation names no address")
    for address in invitation.addresses:
        try:
            grant = _ask(address, invitation, joining.request)
        except PeerUnreachable as error:
            failure = error
            continue
        return joining.finish(grant, time.time()), invitation.addresses
    raise failure


def _ask(address: str, invitation: Invitation, request: bytes) -> bytes:
    credentials = grpc.ssl_channel_credentials(root_certificates=invitation.anchor.pem)
    options = [("grpc.ssl_target_name_override", tls_name(invitation.issuer)), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(address, credentials, options=options) as channel:
        stub = identity_pb2_grpc.IdentityStub(channel)
        try:
            return bytes(stub.Enrol(identity_pb2.Packet(data=request), timeout=ENROL_S).data)
        except grpc.RpcError as error:
            raise from_rpc(error, address, "enrol", ENROL_S) from None
