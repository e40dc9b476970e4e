"""Signatures of entries and claims, held to certificates."""

import pytest

from mesh.gossip.proof import CLUSTER, Statement, claim_message, entry_message
from mesh.gossip.values import pack_value


@pytest.fixture
def provers(cluster):
    """Oslo's and Lima's provers; they do not know each other's certificates yet."""
    return cluster.oslo.prover(lambda: cluster.now), cluster.join("lima").prover(lambda: cluster.now)


def identity_entry(cluster, prover, site, **changes):
    value = pack_value({**prover._identity.entry(), **changes})
    message = entry_message(cluster.oslo.cluster, Statement(site, 1, "identity", 1, value))
    return message, prover.sign(message)


def test_a_third_party_checks_a_site_that_it_never_talked_to(cluster, provers):
    oslo, lima = provers
    message = claim_message(cluster.oslo.cluster, "lima", "lima:1", 3, False)
    proof = lima.sign(message)
    assert not oslo.knows("lima") and not oslo.verify("lima", message, proof)
    assert oslo.verify("lima", *identity_entry(cluster, lima, "lima"))
    assert oslo.knows("lima") and oslo.verify("lima", message, proof)
    assert oslo.verify("lima", message, proof)


def test_an_entry_signed_by_anothers_key_is_refused(cluster, provers):
    oslo, lima = provers
    rome = cluster.join("rome").prover(lambda: cluster.now)
    for prover in (lima, rome):
        assert oslo.admit(prover._identity.site, prover._identity.certificate.der)
    message = entry_message(cluster.oslo.cluster, Statement("lima", 1, "load", 1, pack_value({"x": 1})))
    assert oslo.verify("lima", message, lima.sign(message))
    assert not oslo.verify("lima", message, rome.sign(message))
    assert not oslo.verify("lima", message + b"x", lima.sign(message))
    assert not oslo.verify("lima", message, b"")
    assert not oslo.verify("lima", message, bytes(64))


def test_a_certificate_of_another_site_or_cluster_is_not_admitted(cluster, provers, stranger):
    oslo, lima = provers
    rome = cluster.join("rome")
    assert not oslo.admit("lima", rome.certificate.der)
    assert not oslo.admit("oslo", stranger.certificate.der)
    assert not oslo.admit("lima", b"noise")
    message, proof = identity_entry(cluster, lima, "lima", certificate=cluster.join("york").certificate.der)
    assert not oslo.verify("lima", message, proof)


def test_a_revoked_sites_words_are_refused(cluster, provers):
    oslo, lima = provers
    entry = identity_entry(cluster, lima, "lima")
    assert oslo.verify("lima", *entry)
    cluster.authority.revoke("lima", cluster.now)
    cluster.oslo.take_document(cluster.authority.document_bytes)
    assert not oslo.verify("lima", *entry)
    assert not oslo.admit("lima", lima._identity.certificate.der)


def test_only_the_authoritys_document_stands_under_its_name(cluster, provers, stranger):
    oslo, _ = provers

    def message(identity, generation=1, version=None, key=None):
        name, value, of, proof = identity.document_entry
        statement = Statement(CLUSTER, generation, key or name, version or of, pack_value(value))
        return entry_message(cluster.oslo.cluster, statement), proof

    assert oslo.verify(CLUSTER, *message(cluster.oslo))
    assert not oslo.verify(CLUSTER, *message(stranger))
    assert not oslo.verify(CLUSTER, *message(cluster.oslo, generation=2))
    assert not oslo.verify(CLUSTER, *message(cluster.oslo, version=7))
    assert not oslo.verify(CLUSTER, *message(cluster.oslo, key="other"))
    assert not oslo.verify(CLUSTER, message(cluster.oslo)[0], b"")
