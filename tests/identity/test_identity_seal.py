"""Sealed datagrams: what is refused, and how two sites get to know each other."""

from __future__ import annotations

import pytest

from mesh.gossip.codec import MAGIC
from mesh.gossip.config import MAX_DATAGRAM_BYTES
from mesh.gossip.sealing import Forged, Malformed, Opened, Replayed, Revoked, Skewed, Stale
from mesh.identity.certificate import make_csr
from mesh.identity.keys import new_key
from mesh.identity.replay import MAX_BOOTS, WINDOW, Once, ReplayGuard
from mesh.identity.seal import HELLO_BYTES, OVERHEAD_BYTES, WHO_BYTES
from mesh.identity.site import SiteIdentity

DAY = 86400.0


class End:
    """One site's sealer, with a clock of its own and an address."""

    def __init__(self, identity, now):
        self.identity, self.now = identity, now
        self.address = f"{identity.site}:7700"
        self.sealer = identity.sealer(lambda: self.now)

    def seal(self, body, to, *, named=True):
        return self.sealer.seal(body, address=to.address, site=to.identity.site if named else "", now=0.0)

    def open(self, data, frm):
        return self.sealer.open(data, source=frm.address, now=0.0)


@pytest.fixture
def ends(cluster):
    """Oslo and Lima, who know each other's certificates, and Rome, who knows nobody."""
    oslo, lima, rome = (
        End(identity, cluster.now) for identity in (cluster.oslo, cluster.join("lima"), cluster.join("rome"))
    )
    oslo.identity.directory.learn(lima.identity.certificate.der, cluster.now)
    lima.identity.directory.learn(oslo.identity.certificate.der, cluster.now)
    return oslo, lima, rome


def test_a_datagram_arrives_once_and_from_whom_it_says(ends):
    oslo, lima, _ = ends
    data = oslo.seal(b"body", lima)
    assert len(data) == 4 + OVERHEAD_BYTES
    assert b"body" not in data and b"oslo" not in data
    assert lima.open(data, oslo) == Opened(b"body", "oslo", None)


def test_a_replay_is_refused(ends):
    oslo, lima, _ = ends
    data = oslo.seal(b"body", lima)
    lima.open(data, oslo)
    with pytest.raises(Replayed):
        lima.open(data, oslo)
    with pytest.raises(Replayed):  # its own, sent back to it
        oslo.open(data, lima)


def test_a_replay_is_refused_after_any_number_of_later_datagrams(ends):
    oslo, lima, _ = ends
    first, *others = [oslo.seal(b"body", lima) for _ in range(WINDOW + 2)]
    lima.open(first, oslo)
    lima.open(others[-1], oslo)
    for data in (first, others[0], others[-1]):
        with pytest.raises(Replayed):
            lima.open(data, oslo)
    assert lima.open(others[-2], oslo).body  # late, and seen for the first time


def test_a_replay_from_before_a_restart_of_the_sender_is_refused(ends):
    oslo, lima, _ = ends
    old = oslo.seal(b"body", lima)
    lima.open(old, oslo)
    for _ in range(MAX_BOOTS + 1):
        oslo.now += 2
        lima.now += 2
        oslo.sealer = oslo.identity.sealer(lambda: oslo.now)
        lima.open(oslo.seal(b"body", lima), oslo)
    with pytest.raises(Replayed):
        lima.open(old, oslo)


def test_a_changed_datagram_is_refused(ends):
    oslo, lima, _ = ends
    data = oslo.seal(b"body", lima)
    for index in range(len(data)):
        changed = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
        try:
            assert not lima.open(changed, oslo).body
        except Malformed:
            pass
    assert lima.open(data, oslo).body


def test_no_member_can_speak_as_another(ends):
    oslo, lima, rome = ends
    for end in (oslo, lima):
        rome.identity.directory.learn(end.identity.certificate.der, rome.now)
    data = rome.seal(b"body", lima)
    as_oslo = data[:5] + oslo.identity.certificate.key_id + data[13:]
    with pytest.raises(Forged):
        lima.open(as_oslo, oslo)


def test_a_datagram_for_one_site_cannot_be_opened_by_another_which_asks_who_was_meant(ends):
    oslo, lima, rome = ends
    rome.identity.directory.learn(oslo.identity.certificate.der, rome.now)
    with pytest.raises(Forged) as refused:
        rome.open(oslo.seal(b"body", lima), oslo)
    assert len(refused.value.reply) == WHO_BYTES
    lima.address, rome.address = "gone:7700", lima.address  # rome lives where lima was
    hello = oslo.open(refused.value.reply, rome).reply
    answer = rome.open(hello, oslo)
    assert answer.site == "oslo"
    oslo.open(answer.reply, rome)
    named_lima = oslo.sealer.seal(b"body", address=rome.address, site="lima", now=0.0)
    assert rome.open(named_lima, oslo) == Opened(b"body", "oslo")


def test_a_stranger_without_the_ring_is_refused(ends, stranger):
    oslo, lima, _ = ends
    other = End(stranger, oslo.now)
    for data in (other.seal(b"body", oslo), other.seal(b"body", lima, named=False)):
        with pytest.raises(Forged):
            lima.open(data, oslo)
    assert lima.sealer.counters["rings_unknown"] == 2
    assert lima.sealer.behind == oslo.address


def test_a_revoked_site_is_refused_in_every_form(ends, cluster):
    oslo, lima, rome = ends
    sealed, hello = lima.seal(b"body", oslo), lima.seal(b"body", rome)
    cluster.authority.revoke("lima", cluster.now)
    for end in (oslo, rome):
        end.identity.take_document(cluster.authority.document_bytes)
    with pytest.raises(Revoked):
        oslo.open(sealed, lima)
    for end in (oslo, rome):
        with pytest.raises(Revoked):
            end.open(hello, lima)
    assert oslo.seal(b"secret", lima)[0] == 2  # nothing is sealed for it any more


def test_a_new_certificate_for_a_revoked_key_changes_nothing(ends, cluster):
    """Nebula CVE-2026-25793: a certificate encoded or issued anew does not get past the list."""
    oslo, lima, _ = ends
    lima.identity.renewed(
        cluster.authority.renew(lima.identity.csr(), "lima", lima.identity.certificate.fingerprint, cluster.now),
        cluster.now,
    )
    cluster.authority.revoke("lima", cluster.now)
    oslo.identity.take_document(cluster.authority.document_bytes)
    with pytest.raises(Revoked):
        oslo.open(lima.seal(b"body", oslo), lima)
    with pytest.raises(Revoked):
        oslo.open(lima.sealer._hello(b"", oslo.address, lima.now), lima)


@pytest.mark.parametrize("off_s", [DAY, -DAY, 301, -302])
def test_a_clock_that_is_wrong_is_refused_and_named(ends, off_s):
    oslo, lima, _ = ends
    lima.now += off_s
    with pytest.raises(Skewed):
        oslo.open(lima.seal(b"body", oslo), lima)
    assert oslo.sealer.skewed["lima"] == pytest.approx(off_s, abs=1)
    lima.now = oslo.now - 299
    assert oslo.open(lima.seal(b"body", oslo), lima).body
    assert not oslo.sealer.skewed


def test_a_greeting_under_a_wrong_clock_is_refused(ends):
    oslo, _, rome = ends
    for off_s in (DAY, -DAY):
        rome.now = oslo.now + off_s
        with pytest.raises(Skewed):
            oslo.open(rome.seal(b"", oslo), rome)


@pytest.mark.parametrize("wall", [-1e9, 0.0, 5e9, 1e15])
def test_a_clock_that_is_wrong_by_an_age_breaks_nothing(ends, wall):
    oslo, lima, rome = ends
    lima.now = rome.now = wall
    for end in (lima, rome):
        with pytest.raises(Malformed):
            oslo.open(end.seal(b"body", oslo), end)


def test_an_expired_certificate_is_refused(ends):
    oslo, lima, rome = ends
    for end in ends:
        end.now += 366 * DAY
    with pytest.raises(Stale):
        oslo.open(lima.seal(b"body", oslo), lima)
    with pytest.raises(Stale):
        oslo.open(rome.seal(b"body", oslo), rome)


def test_two_that_do_not_know_each_other_greet_and_then_talk(ends):
    oslo, _, rome = ends
    hello = rome.seal(b"lost", oslo, named=False)
    answer = oslo.open(hello, rome)
    assert (answer.body, answer.site) == (b"", "rome")
    assert len(answer.reply) == len(hello) == HELLO_BYTES <= MAX_DATAGRAM_BYTES - len(MAGIC) - 9
    assert rome.open(answer.reply, oslo) == Opened(b"", "oslo")
    assert oslo.open(rome.seal(b"body", oslo, named=False), rome) == Opened(b"body", "rome")
    assert rome.open(oslo.seal(b"body", rome), oslo) == Opened(b"body", "oslo")


def test_an_unknown_sender_is_asked_who_it_is_in_fewer_bytes_than_it_sent(ends):
    oslo, _, rome = ends
    rome.identity.directory.learn(oslo.identity.certificate.der, rome.now)
    data = rome.seal(b"x", oslo)
    who = oslo.open(data, rome)
    assert (who.body, who.site) == (b"", None)
    assert len(who.reply) <= len(data)
    hello = rome.open(who.reply, oslo).reply
    assert oslo.open(hello, rome).site == "rome"
    assert oslo.open(rome.sealer.seal(b"body", address="elsewhere:1", site="oslo", now=0.0), rome).site == "rome"
    with pytest.raises(Replayed):
        rome.open(who.reply, oslo)


def test_who_is_answered_only_for_what_was_sent(ends):
    oslo, lima, rome = ends
    rome.identity.directory.learn(oslo.identity.certificate.der, rome.now)
    who = oslo.open(rome.seal(b"x", oslo), rome).reply
    with pytest.raises(Replayed):
        lima.open(who, oslo)
    for index in range(5, len(who)):
        with pytest.raises((Forged, Replayed)):
            rome.open(who[:index] + bytes([who[index] ^ 1]) + who[index + 1 :], oslo)


def test_a_replayed_greeting_is_refused_and_answers_that_nobody_asked_for_too(ends):
    oslo, lima, rome = ends
    hello = rome.seal(b"", oslo, named=False)
    answer = oslo.open(hello, rome).reply
    with pytest.raises(Replayed):
        oslo.open(hello, lima)
    with pytest.raises(Replayed):
        lima.open(answer, oslo)
    rome.open(answer, oslo)
    with pytest.raises(Replayed):
        rome.open(answer, oslo)
    with pytest.raises(Replayed):
        rome.open(hello, oslo)


def test_a_changed_greeting_is_refused(ends):
    oslo, _, rome = ends
    hello = rome.seal(b"", oslo)
    for index in range(0, len(hello), 3):
        with pytest.raises(Malformed):
            oslo.open(hello[:index] + bytes([hello[index] ^ 1]) + hello[index + 1 :], rome)
    assert oslo.open(hello, rome).site == "rome"


def test_a_greeting_with_anothers_certificate_is_refused(ends):
    oslo, lima, rome = ends
    rome.identity.directory.own = lima.identity.certificate  # rome's key, lima's certificate
    with pytest.raises(Forged):
        oslo.open(rome.sealer._hello(b"", oslo.address, rome.now), rome)


def test_greetings_are_answered_at_a_bounded_rate(ends):
    oslo, _, rome = ends
    answers = [oslo.open(rome.sealer._hello(b"", oslo.address, rome.now), rome).reply for _ in range(50)]
    assert 0 < sum(answer is not None for answer in answers) < 10
    oslo.now += 10
    assert oslo.open(rome.sealer._hello(b"", oslo.address, rome.now), rome).reply


def test_noise_from_one_address_does_not_keep_its_owner_from_being_answered(ends):
    oslo, _, rome = ends
    refused = 0
    for index in range(100):
        try:
            oslo.open(b"\x01" + oslo.identity.ring.active + index.to_bytes(80), rome)
        except Forged:
            refused += 1
    assert refused > 90
    assert oslo.open(rome.seal(b"", oslo), rome).reply


def test_a_rotation_loses_no_datagram(ends, cluster):
    oslo, lima, _ = ends

    def exchange():
        assert lima.open(oslo.seal(b"a", lima), oslo).body == b"a"
        assert oslo.open(lima.seal(b"b", oslo), lima).body == b"b"

    exchange()
    cluster.authority.rotate(cluster.now)
    oslo.identity.take(cluster.authority.handover(oslo.identity.certificate.der, cluster.now), cluster.now)
    exchange()
    lima.identity.take(oslo.identity.handover(lima.identity.certificate.der, cluster.now), cluster.now)
    exchange()
    old = lima.seal(b"old", oslo)
    oslo.identity.turn_ring(cluster.now + 1, [2, 2])
    exchange()
    lima.identity.turn_ring(cluster.now + 1, [2, 2])
    exchange()
    oslo.identity.turn_ring(cluster.now + 62)
    exchange()
    with pytest.raises(Stale):
        oslo.open(old, lima)


def test_no_nonce_is_used_twice_under_a_key(ends, monkeypatch, cluster):
    import mesh.identity.seal as module

    used, kept = set(), module.AESGCM

    class Watched:
        def __init__(self, key):
            self.key, self.cipher = key, kept(key)

        def encrypt(self, nonce, data, clear):
            assert len(nonce) == 12 and (self.key, nonce) not in used
            used.add((self.key, nonce))
            return self.cipher.encrypt(nonce, data, clear)

    monkeypatch.setattr(module, "AESGCM", Watched)
    oslo, lima, rome = ends
    rome.identity.directory.learn(oslo.identity.certificate.der, rome.now)
    for _ in range(3):
        for end in ends:
            end.sealer = end.identity.sealer(lambda end=end: end.now)  # a restart within the same second
            for other in ends:
                for _ in range(20):
                    end.seal(b"body", other)
    assert len(used) == 3 * 3 * 3 * 20
    lima.sealer._counter = 2**48 - 2
    boot = lima.sealer._boot
    for _ in range(4):
        lima.seal(b"body", oslo)
    assert lima.sealer._boot != boot and lima.sealer._counter == 3


def test_a_name_that_changed_hands_belongs_to_the_later_certificate(ends, cluster):
    _, lima, rome = ends
    old = lima.identity.certificate
    cluster.authority.revoke("lima", cluster.now)
    key = new_key()
    later = cluster.authority.issue(make_csr(key, "lima"), "lima", cluster.now)
    directory = rome.identity.directory  # has not heard of the revocation yet
    directory.learn(old.der, cluster.now)
    assert directory.learn(later, cluster.now).fingerprint != old.fingerprint
    with pytest.raises(Exception, match="later certificate"):
        directory.learn(old.der, cluster.now)
    assert directory.by_key_id(old.key_id) is None


def test_the_directory_survives_a_restart_and_a_damaged_file(ends, cluster):
    oslo, _, _ = ends
    oslo.identity.save_directory()
    again = SiteIdentity.load(cluster.folder / "oslo", cluster.now)
    assert again.directory.site("lima").der == oslo.identity.directory.site("lima").der
    (cluster.folder / "oslo" / "identity" / "directory").write_bytes(b"noise")
    assert len(SiteIdentity.load(cluster.folder / "oslo", cluster.now).directory) == 0


def test_windows_are_bounded_and_what_a_forgotten_one_saw_stays_refused():
    guard = ReplayGuard(max_senders=2)
    for sender in (b"a", b"b", b"c"):
        assert guard.take(sender, b"boot", 1, 100)
    assert not guard.take(b"a", b"boot", 1, 100)
    assert guard.take(b"a", b"boot", 2, 101)
    once = Once(2)
    for nonce in (b"a", b"b", b"c"):
        assert once.take(nonce, 100 + ord(nonce))
    assert not once.take(b"a", 100 + ord(b"a"))
    assert len(once._seen) == 2
