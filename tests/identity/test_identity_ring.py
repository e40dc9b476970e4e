"""The cluster document, the key ring and how both travel."""

import pytest

from mesh.identity.errors import Damaged, KeyRevoked
from mesh.identity.ring import DROP_S, SWITCH_S, KeyRing
from mesh.identity.site import SiteIdentity, make_handover


def rotate(cluster):
    cluster.authority.rotate(cluster.now)
    assert cluster.oslo.take(cluster.authority.handover(cluster.oslo.certificate.der, cluster.now), cluster.now)


def test_a_document_only_rises(cluster):
    old = cluster.authority.document_bytes
    cluster.authority.rotate(cluster.now)
    assert cluster.oslo.take_document(cluster.authority.document_bytes)
    assert not cluster.oslo.take_document(old)
    assert cluster.oslo.document.version == 2
    assert SiteIdentity.load(cluster.folder / "oslo", cluster.now).document.version == 2


def test_a_document_that_the_authority_did_not_sign_is_refused(cluster, stranger):
    with pytest.raises(Damaged):
        cluster.oslo.take_document(stranger.document_bytes)
    data = cluster.oslo.document_bytes
    for index in range(len(data)):
        with pytest.raises(Damaged):
            cluster.oslo.take_document(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])


def test_a_new_key_is_held_first_then_used_then_alone(cluster):
    lima = cluster.join("lima")
    (old,) = cluster.oslo.ring.keys
    rotate(cluster)
    lima.take_document(cluster.authority.document_bytes)
    assert lima.wants_ring and not cluster.oslo.wants_ring
    assert cluster.oslo.ring.active == old and len(cluster.oslo.ring.keys) == 2
    assert not cluster.oslo.turn_ring(cluster.now + 1, [2, 1])  # lima has it not yet
    assert lima.take(cluster.oslo.handover(lima.certificate.der, cluster.now), cluster.now)
    assert not lima.wants_ring
    assert cluster.oslo.turn_ring(cluster.now + 2, [2, 2])
    assert cluster.oslo.ring.active == cluster.oslo.ring.newest != old
    assert old in cluster.oslo.ring.keys and cluster.oslo.ring.active in lima.ring.keys
    assert not cluster.oslo.turn_ring(cluster.now + DROP_S, [2, 2])
    assert cluster.oslo.turn_ring(cluster.now + 2 + DROP_S, [2, 2])
    assert old not in cluster.oslo.ring.keys


def test_a_member_that_never_answers_delays_the_new_key_by_a_minute_only(cluster):
    rotate(cluster)
    assert not cluster.oslo.turn_ring(cluster.now + SWITCH_S - 1, [1])
    assert cluster.oslo.turn_ring(cluster.now + SWITCH_S, [1])


def test_a_clock_that_is_set_back_does_not_stop_the_ring(cluster):
    rotate(cluster)
    early = cluster.now - 86400
    assert not cluster.oslo.turn_ring(early, [1])
    assert cluster.oslo.turn_ring(early + SWITCH_S, [1])


def test_a_joiner_in_the_middle_of_a_rotation_can_speak_to_everybody(cluster):
    rotate(cluster)
    lima = cluster.join("lima", cluster.now + 1)
    assert lima.ring.active == cluster.oslo.ring.active
    cluster.oslo.turn_ring(cluster.now + SWITCH_S)
    cluster.oslo.turn_ring(cluster.now + SWITCH_S + DROP_S)
    rome = cluster.join("rome", cluster.now + SWITCH_S + DROP_S)
    assert list(rome.ring.keys) == list(cluster.oslo.ring.keys)


def test_many_rotations_in_a_row_are_refused_until_the_first_is_through(cluster):
    for _ in range(3):
        rotate(cluster)
    with pytest.raises(Exception, match="under way"):
        cluster.authority.rotate(cluster.now)
    cluster.now += SWITCH_S + DROP_S
    rotate(cluster)


def test_a_revoked_site_never_gets_the_new_ring(cluster):
    lima = cluster.join("lima")
    cluster.authority.revoke("lima", cluster.now)
    handover = cluster.authority.handover(cluster.oslo.certificate.der, cluster.now)
    assert cluster.oslo.take(handover, cluster.now)
    with pytest.raises(KeyRevoked):
        cluster.oslo.handover(lima.certificate.der, cluster.now)
    with pytest.raises(Damaged, match="not sealed to this site"):
        lima.take(handover, cluster.now)
    lima.take_document(cluster.authority.document_bytes)
    assert lima.revoked


def test_a_peer_cannot_hand_out_a_ring_of_its_own(cluster):
    lima = cluster.join("lima")
    cluster.authority.rotate(cluster.now)
    own = KeyRing.of(lima.anchor.cluster_id, 2, [bytes(32)], cluster.now)
    false = make_handover(cluster.authority.document_bytes, own, lima.certificate, bytes)
    with pytest.raises(Damaged, match="not the keys"):
        lima.take(false, cluster.now)


def test_an_old_handover_brings_nothing_back(cluster):
    lima = cluster.join("lima")
    old = cluster.oslo.handover(lima.certificate.der, cluster.now)
    rotate(cluster)
    lima.take(cluster.oslo.handover(lima.certificate.der, cluster.now), cluster.now)
    assert not lima.take(old, cluster.now)
    assert lima.ring.version == 2


def test_a_crash_between_the_ring_and_the_document_heals(cluster):
    document = cluster.authority.document_bytes
    cluster.authority.rotate(cluster.now)
    (cluster.authority.folder / "document").write_bytes(document)
    assert cluster.oslo.take(cluster.authority.handover(cluster.oslo.certificate.der, cluster.now), cluster.now)
    assert cluster.oslo.ring.version == cluster.oslo.document.ring_version == 2


def test_a_handover_brings_a_newer_document_also_where_the_ring_is_the_same(cluster):
    lima = cluster.join("lima")
    token = lima.verify_token(cluster.authority.create_token("ada", "submit", cluster.now), cluster.now)
    cluster.authority.revoke_token(token.id, cluster.now)
    assert not lima.take(cluster.authority.handover(lima.certificate.der, cluster.now), cluster.now)
    assert lima.document.revoked_tokens == (token.id,)
