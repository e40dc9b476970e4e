"""Authority, invitations and what a joiner ends up with."""

import stat
import threading
import warnings
from concurrent import futures

import pytest

from mesh.errors import ConfigError, IdentityError
from mesh.identity.authority import Authority
from mesh.identity.certificate import COMMON_NAME, MAX_CERTIFICATE_BYTES, make_csr, tls_name
from mesh.identity.errors import (
    Damaged,
    Expired,
    ForeignCluster,
    InvitationExpired,
    InvitationUnknown,
    InvitationUsed,
    KeyRevoked,
    NameTaken,
    NotYetValid,
)
from mesh.identity.invitation import Invitation
from mesh.identity.keys import fingerprint, new_key
from mesh.identity.site import Joining, SiteIdentity

DAY = 86400.0


def joining(cluster, site, token, folder=None):
    return Joining(cluster.folder / (folder or site), Invitation.parse(token), site)


def test_a_joiner_gets_a_certificate_the_document_and_the_ring(cluster):
    lima = cluster.join("lima")
    assert lima.site == "lima" and lima.cluster == cluster.oslo.cluster
    assert lima.ring.keys == cluster.oslo.ring.keys
    again = SiteIdentity.load(cluster.folder / "lima", cluster.now)
    assert again.certificate.fingerprint == lima.certificate.fingerprint
    assert again.document == lima.document


def test_private_files_are_readable_by_their_owner_only(cluster):
    cluster.join("lima")
    cluster.authority.invite(cluster.now, ["127.0.0.1:7700"])
    cluster.authority.create_token("me", "observe", cluster.now)
    for path in cluster.folder.rglob("*"):
        if path == cluster.folder / "oslo" or path == cluster.folder / "lima":
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_key_that_others_can_read_is_refused(cluster):
    (cluster.folder / "oslo" / "identity" / "key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        SiteIdentity.load(cluster.folder / "oslo", cluster.now)


def test_no_private_key_is_in_anything_that_travels(cluster):
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"])
    joiner = joining(cluster, "lima", token)
    grant = cluster.authority.redeem(joiner.request, cluster.now)
    secret = joiner._key.private_numbers().private_value.to_bytes(32)
    ring = next(iter(cluster.oslo.ring.keys.values()))
    assert secret not in joiner.request + grant
    assert ring not in grant
    assert Invitation.parse(token).secret not in joiner.request


def test_an_expired_invitation_is_refused(cluster):
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"], ttl_s=60)
    with pytest.raises(InvitationExpired):
        cluster.authority.redeem(joining(cluster, "lima", token).request, cluster.now + 61)


def test_a_used_invitation_is_refused(cluster):
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"])
    cluster.authority.redeem(joining(cluster, "lima", token).request, cluster.now)
    with pytest.raises(InvitationUsed):
        cluster.authority.redeem(joining(cluster, "rome", token).request, cluster.now)


def test_a_lost_answer_can_be_asked_for_again_with_the_same_key(cluster):
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"])
    cluster.authority.redeem(joining(cluster, "lima", token).request, cluster.now)
    again = joining(cluster, "lima", token)
    lima = again.finish(cluster.authority.redeem(again.request, cluster.now + 5), cluster.now + 5)
    assert lima.site == "lima"
    assert [issued.site for issued in cluster.authority.sites()] == ["lima", "oslo"]
    with pytest.raises(ConfigError, match="has an identity already"):
        joining(cluster, "lima", token)


def test_an_invitation_of_nobody_or_with_another_secret_is_unknown(cluster, stranger):
    elsewhere = Authority.load(cluster.folder / "stranger").invite(cluster.now, ["127.0.0.1:7700"])
    with pytest.raises(InvitationUnknown):
        cluster.authority.redeem(joining(cluster, "lima", elsewhere).request, cluster.now)
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"])
    invitation = Invitation.parse(token)
    guessed = Invitation(**{**vars(invitation), "secret": bytes(32)})
    with pytest.raises(InvitationUnknown):
        cluster.authority.redeem(guessed.request(make_csr(new_key(), "lima")), cluster.now)
    cluster.authority.redeem(joining(cluster, "lima", token, "other").request, cluster.now)  # and is still good


def test_a_request_is_of_no_use_to_who_relays_it(cluster):
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"])
    request = joining(cluster, "lima", token).request
    mac = request[-32:]
    thief = Invitation(**{**vars(Invitation.parse(token)), "secret": bytes(32)}).request(make_csr(new_key(), "lima"))
    with pytest.raises(InvitationUnknown):
        cluster.authority.redeem(thief[:-32] + mac, cluster.now)


def test_of_many_that_redeem_one_invitation_at_once_one_gets_in(cluster):
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"])
    requests = [joining(cluster, f"s{index}", token).request for index in range(8)]
    start = threading.Barrier(8)

    def redeem(request):
        start.wait()
        try:
            return Authority.load(cluster.folder / "oslo").redeem(request, cluster.now)
        except InvitationUsed as error:
            return error

    with futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(redeem, requests))
    assert sum(isinstance(answer, bytes) for answer in answers) == 1
    assert len(cluster.authority.sites()) == 2


def test_a_name_in_use_by_another_key_is_refused_and_does_not_spend_the_invitation(cluster):
    cluster.join("lima")
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"])
    with pytest.raises(NameTaken, match="lima"):
        cluster.authority.redeem(joining(cluster, "lima", token, "thief").request, cluster.now)
    cluster.authority.redeem(joining(cluster, "rome", token).request, cluster.now)


def test_an_invitation_for_one_site_is_good_for_no_other(cluster):
    token = cluster.authority.invite(cluster.now, ["127.0.0.1:7700"], site="lima")
    with pytest.raises(ConfigError, match="--site lima"):
        joining(cluster, "rome", token)
    invitation = Invitation.parse(token)
    with pytest.raises(NameTaken):
        cluster.authority.redeem(invitation.request(make_csr(new_key(), "rome")), cluster.now)


def test_a_revoked_key_gets_no_certificate_and_its_name_is_free(cluster):
    lima = cluster.join("lima")
    cluster.authority.revoke("lima", cluster.now + 5)
    with pytest.raises(KeyRevoked):
        cluster.authority.issue(make_csr(lima.key, "rome"), "rome", cluster.now + 6)
    with pytest.raises(KeyRevoked):
        cluster.authority.handover(lima.certificate.der, cluster.now + 6)
    der = cluster.authority.issue(make_csr(new_key(), "lima"), "lima", cluster.now)
    assert cluster.oslo.anchor.check(der, cluster.now).not_before_s > lima.certificate.not_before_s


def test_the_site_that_holds_the_authority_cannot_be_put_out(cluster):
    with pytest.raises(IdentityError, match="holds the authority"):
        cluster.authority.revoke("oslo", cluster.now)
    with pytest.raises(IdentityError, match="never had"):
        cluster.authority.revoke("atlantis", cluster.now)


def test_a_certificate_is_renewed_for_the_same_key_only(cluster):
    lima = cluster.join("lima")
    late = cluster.now + 300 * DAY
    assert lima.certificate.wants_renewal(late) and not lima.certificate.wants_renewal(cluster.now)
    mark = lima.certificate.fingerprint
    lima.renewed(cluster.authority.renew(lima.csr(), "lima", mark, late), late)
    assert lima.certificate.not_after_s > late + 300 * DAY
    with pytest.raises(Damaged):
        cluster.authority.renew(make_csr(new_key(), "lima"), "lima", mark, late)


def test_a_cluster_is_not_made_twice_in_one_folder(cluster):
    with pytest.raises(ConfigError, match="already"):
        Authority.create_cluster(cluster.folder / "oslo", "acme", "oslo", cluster.now)
    with pytest.raises(ConfigError, match="authority is not here"):
        Authority.load(cluster.folder / "nowhere")


@pytest.mark.parametrize("site", ["", "a b", "-x", "x" * 64, "x/y", "@cluster", "x\n"])
def test_names_that_no_site_can_have_are_refused(tmp_path, site):
    with pytest.raises(ConfigError):
        Authority.create_cluster(tmp_path / "a", "acme", site, 1_800_000_000.0)


def test_certificates_of_the_longest_names_stay_within_bounds(tmp_path):
    site = Authority.create_cluster(tmp_path, "c" * 32, "s" * 63, 1_800_000_000.0)
    assert max(len(site.certificate.der), len(site.anchor.der)) <= MAX_CERTIFICATE_BYTES
    assert Authority.load(tmp_path).invite(1_800_000_000.0, ["127.0.0.1:7700"]).count("\n") == 0


def test_a_certificate_counts_between_its_dates_and_in_its_cluster(cluster, stranger):
    anchor, der = cluster.oslo.anchor, cluster.oslo.certificate.der
    assert anchor.check(der, cluster.now - 3599).site == "oslo"
    with pytest.raises(NotYetValid):
        anchor.check(der, cluster.now - DAY)
    with pytest.raises(Expired):
        anchor.check(der, cluster.now + 366 * DAY)
    with pytest.raises(ForeignCluster):
        anchor.check(stranger.certificate.der, cluster.now)
    with pytest.raises((Damaged, ForeignCluster)):
        anchor.check(anchor.der, cluster.now)


def test_grpc_calls_a_site_by_its_name_and_no_other_site_answers_for_it(cluster):
    import time

    import grpc

    now = time.time()
    site = Authority.create_cluster(cluster.folder / "tls", "acme", "oslo", now)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "t.T", {"Echo": grpc.unary_unary_rpc_method_handler(lambda data, _: data, None, None)}
            )
        ]
    )
    credentials = grpc.ssl_server_credentials([(site.key_pem, site.certificate.pem)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:

        def call(name):
            options = [("grpc.ssl_target_name_override", name)]
            roots = grpc.ssl_channel_credentials(site.anchor.pem)
            with grpc.secure_channel(f"127.0.0.1:{port}", roots, options) as channel:
                return channel.unary_unary("/t.T/Echo")(b"x", timeout=10)

        assert call(COMMON_NAME) == call(tls_name("oslo")) == b"x"
        with pytest.raises(grpc.RpcError):
            call(tls_name("lima"))
    finally:
        server.stop(0)


def test_the_fingerprint_is_of_the_key_and_not_of_the_certificate(cluster):
    lima = cluster.join("lima")
    other = cluster.authority.issue(make_csr(lima.key, "lima"), "lima", cluster.now + 9)
    assert other != lima.certificate.der
    assert cluster.oslo.anchor.check(other, cluster.now).fingerprint == fingerprint(lima.key.public_key())
