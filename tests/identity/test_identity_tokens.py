"""API tokens and the assertions of peers."""

import pytest

from mesh.errors import ConfigError, IdentityError, NotAllowed
from mesh.identity.errors import Damaged, Expired, ForeignCluster, KeyRevoked, NotYetValid, TokenRevoked

DAY = 86400.0


def test_a_token_names_its_holder_and_role_at_every_site(cluster):
    text = cluster.authority.create_token("ada", "submit", cluster.now)
    principal = cluster.join("lima").verify_token(f" {text}\n", cluster.now)
    assert (principal.kind, principal.name, principal.role) == ("user", "ada", "submit")
    principal.require("observe")
    principal.require("submit")
    with pytest.raises(NotAllowed, match="administer"):
        principal.require("administer")


def test_a_token_ends_with_its_time_or_its_withdrawal(cluster):
    text = cluster.authority.create_token("ada", "submit", cluster.now, ttl_s=DAY)
    with pytest.raises(Expired):
        cluster.oslo.verify_token(text, cluster.now + DAY + 2)
    identifier = cluster.oslo.verify_token(text, cluster.now).id
    cluster.authority.revoke_token(identifier, cluster.now)
    assert cluster.oslo.take_document(cluster.authority.document_bytes)
    with pytest.raises(TokenRevoked):
        cluster.oslo.verify_token(text, cluster.now)
    with pytest.raises(IdentityError, match="there is none"):
        cluster.authority.revoke_token(bytes(8), cluster.now)


def test_a_changed_token_and_one_of_another_cluster_are_refused(cluster, stranger):
    text = cluster.authority.create_token("ada", "observe", cluster.now)
    with pytest.raises(ForeignCluster):
        stranger.verify_token(text, cluster.now)
    for index in range(len(text)):
        changed = text[:index] + ("A" if text[index] != "A" else "B") + text[index + 1 :]
        with pytest.raises(Damaged):
            cluster.oslo.verify_token(changed, cluster.now)


@pytest.mark.parametrize(("name", "role"), [("", "submit"), ("a b", "submit"), ("ada", "root")])
def test_tokens_with_odd_names_or_roles_are_not_made(cluster, name, role):
    with pytest.raises(ConfigError):
        cluster.authority.create_token(name, role, cluster.now)


def test_an_assertion_names_the_calling_site(cluster):
    lima = cluster.join("lima")
    word = lima.assertion(cluster.oslo.certificate.fingerprint, cluster.now)
    assert word == lima.assertion(cluster.oslo.certificate.fingerprint, cluster.now + 60)
    for _ in range(2):
        principal = cluster.oslo.verify_assertion(word, cluster.now)
        assert (principal.kind, principal.name, principal.id) == ("peer", "lima", lima.certificate.fingerprint)


def test_an_assertion_for_one_site_is_good_at_no_other(cluster):
    lima, rome = cluster.join("lima"), cluster.join("rome")
    with pytest.raises(Damaged, match="another site"):
        rome.verify_assertion(lima.assertion(cluster.oslo.certificate.fingerprint, cluster.now), cluster.now)


def test_an_assertion_of_a_revoked_site_is_refused_also_where_it_is_remembered(cluster):
    lima = cluster.join("lima")
    word = lima.assertion(cluster.oslo.certificate.fingerprint, cluster.now)
    cluster.oslo.verify_assertion(word, cluster.now)
    cluster.authority.revoke("lima", cluster.now)
    cluster.oslo.take_document(cluster.authority.document_bytes)
    with pytest.raises(KeyRevoked):
        cluster.oslo.verify_assertion(word, cluster.now)


def test_an_assertion_of_another_day_or_cluster_is_refused(cluster, stranger):
    lima, audience = cluster.join("lima"), cluster.oslo.certificate.fingerprint
    with pytest.raises(Expired):
        cluster.oslo.verify_assertion(lima.assertion(audience, cluster.now), cluster.now + DAY)
    with pytest.raises(NotYetValid):
        cluster.oslo.verify_assertion(lima.assertion(audience, cluster.now + DAY), cluster.now)
    with pytest.raises(ForeignCluster):
        cluster.oslo.verify_assertion(stranger.assertion(audience, cluster.now), cluster.now)


def test_a_changed_assertion_is_refused(cluster):
    word = cluster.join("lima").assertion(cluster.oslo.certificate.fingerprint, cluster.now)
    for index in range(0, len(word), 7):
        changed = word[:index] + bytes([word[index] ^ 1]) + word[index + 1 :]
        with pytest.raises(IdentityError):
            cluster.oslo.verify_assertion(changed, cluster.now)
