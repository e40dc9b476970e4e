"""Every call proves itself, and may do what its role allows; a refusal is an error of its own in the caller."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from mesh.client.channel import Connection
from mesh.client.credentials import Credentials, for_user
from mesh.errors import ConfigError, IdentityError, NotAllowed
from mesh.identity.access import Access
from mesh.identity.authority import Authority
from mesh.peer.cluster import Cluster
from mesh.peer.guard import NEEDED, OPEN, Guard
from mesh.wire.v1 import identity_pb2, mesh_pb2, mesh_pb2_grpc, peer_pb2, peer_pb2_grpc

#: TLS checks certificates against the real clock.
NOW = time.time()


class AnyMesh(mesh_pb2_grpc.MeshServicer):
    def Status(self, request, context):
        return mesh_pb2.Document(json="{}")

    def Submit(self, request, context):
        return mesh_pb2.JobStatus(job="j")

    def Watch(self, request, context):
        yield mesh_pb2.JobStatus(job="j")


class AnyPeer(peer_pb2_grpc.PeerServicer):
    def Ping(self, request, context):
        return peer_pb2.Done()


for missing in ("Prepare", "Connect", "Start", "Stop", "Displace", "Release", "Events", "Gossip", "Keys"):
    setattr(AnyPeer, missing, lambda self, request, context: peer_pb2.Done())
for missing in ("Topology", "Plan", "Jobs", "Cancel", "Generate"):
    setattr(AnyMesh, missing, lambda self, request, context: mesh_pb2.Document())
AnyPeer.__abstractmethods__ = AnyMesh.__abstractmethods__ = frozenset()


@pytest.fixture(name="world")
def _world(tmp_path):
    """A cluster of two sites; `ams` serves."""
    wall = [NOW]
    identity = Authority.create_cluster(tmp_path / "ams", "demo", "ams", NOW)
    authority = Authority.load(tmp_path / "ams")
    ams = Cluster(identity, authority, wall=lambda: wall[0])
    guard = Guard(ams.authenticate)
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[guard])
    mesh_pb2_grpc.add_MeshServicer_to_server(AnyMesh(), server)
    peer_pb2_grpc.add_PeerServicer_to_server(AnyPeer(), server)
    port = server.add_secure_port("127.0.0.1:0", ams.server_credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}", ams, guard, wall
    finally:
        server.stop(0).wait(5)


def ask(address, credentials, service="Mesh", method="Status", request=None):
    connection = Connection(address, credentials)
    try:
        stub = {"Mesh": mesh_pb2_grpc.MeshStub, "Peer": peer_pb2_grpc.PeerStub}[service](connection.transport)
        return connection.call(getattr(stub, method), request or mesh_pb2.StatusRequest(), method, 5.0)
    finally:
        connection.close()


def user(ams, role, ttl_s=60.0):
    return for_user(Access(ams.identity.anchor, ams.authority.create_token("bob", role, NOW, ttl_s)).text, "x")


def test_a_user_with_a_token_is_served_up_to_the_role(world):
    address, ams, guard, _ = world
    assert ask(address, user(ams, "observe")).json == "{}"
    assert ask(address, user(ams, "submit"), method="Submit", request=mesh_pb2.JobSpec()).job == "j"
    with pytest.raises(NotAllowed, match="observe"):
        ask(address, user(ams, "observe"), method="Submit", request=mesh_pb2.JobSpec())
    assert guard.refused == {"not-allowed": 1}


def test_what_peers_ask_of_each_other_is_not_for_users_whatever_their_role(world):
    address, ams, _, _ = world
    with pytest.raises(NotAllowed, match="peers ask of each other"):
        ask(address, user(ams, "administer"), "Peer", "Ping", peer_pb2.Done())


def test_a_call_without_a_proof_is_refused(world):
    address, ams, guard, _ = world
    nobody = Credentials(ams.identity.anchor.pem, lambda: "")
    with pytest.raises(IdentityError):
        ask(address, nobody)
    assert guard.refused == {"identity": 1}


def test_an_expired_and_a_withdrawn_token_are_refused(world):
    address, ams, _, wall = world
    credentials = user(ams, "observe", ttl_s=60)
    wall[0] += 61
    with pytest.raises(IdentityError, match="expired"):
        ask(address, credentials)
    wall[0] = NOW
    credentials = user(ams, "observe")
    ams.identity.take_document(_withdrawn(ams))
    with pytest.raises(IdentityError, match="withdrawn"):
        ask(address, credentials)


def _withdrawn(ams):
    newest = ams.authority.tokens()[-1]
    ams.authority.revoke_token(bytes.fromhex(newest["id"]), NOW)
    return ams.authority.document_bytes


def test_a_member_may_call_what_peers_call_and_a_revoked_one_nothing(world, tmp_path):
    address, ams, guard, _ = world
    fra = member(tmp_path, ams)
    assert ask(address, fra.credentials("ams"), "Peer", "Ping", peer_pb2.Done()) == peer_pb2.Done()
    ams.authority.revoke("fra", NOW)
    ams.identity.take_document(ams.authority.document_bytes)
    with pytest.raises(IdentityError, match="put out"):
        ask(address, fra.credentials("ams"), "Peer", "Ping", peer_pb2.Done())
    assert guard.refused == {"identity": 1}


def member(tmp_path, ams):
    from mesh.identity.invitation import Invitation
    from mesh.identity.site import Joining

    invitation = Invitation.parse(ams.authority.invite(NOW, ["127.0.0.1:1"]))
    joining = Joining(tmp_path / "fra", invitation, "fra")
    identity = joining.finish(ams.authority.redeem(joining.request, NOW), NOW)
    cluster = Cluster(identity, None, wall=lambda: NOW)
    identity.directory.learn(ams.identity.certificate.der, NOW)
    return cluster


def test_a_member_of_another_cluster_and_a_client_of_another_authority_are_strangers(world, tmp_path):
    address, ams, _, _ = world
    other = Authority.create_cluster(tmp_path / "evil", "demo", "evil", NOW)
    stranger = Cluster(other, None, wall=lambda: NOW)
    proof = Credentials(ams.identity.anchor.pem, lambda: stranger_proof(stranger, ams))
    with pytest.raises(IdentityError):
        ask(address, proof, "Peer", "Ping", peer_pb2.Done())
    with pytest.raises(Exception, match="nobody answers"):
        ask(address, Credentials(other.anchor.pem, lambda: "x"))


def stranger_proof(stranger, ams):
    from mesh.identity.access import peer_proof

    return peer_proof(stranger.identity.assertion(ams.identity.certificate.fingerprint, NOW))


def test_the_local_token_opens_this_peer_and_lies_where_only_its_owner_reads(world):
    address, ams, _, _ = world
    ams.leave_token(address)
    path = ams.identity.folder / "local.token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask(address, for_user(str(path), address)).json == "{}"
    ams.remove_token()
    assert not path.exists()
    with pytest.raises(ConfigError, match="neither an access token nor a file"):
        for_user(str(path), address)


def test_every_method_of_every_service_has_a_role_or_is_for_peers():
    users = {service.full_name: service for service in (mesh_pb2.DESCRIPTOR.services_by_name["Mesh"],)}
    identity = identity_pb2.DESCRIPTOR.services_by_name["Identity"]
    for service in (*users.values(), identity):
        for method in service.methods:
            name = f"/{service.full_name}/{method.name}"
            assert name in NEEDED or name in OPEN or method.name == "Renew", name
