"""Noise and mutations of everything that arrives: refused in the declared way, nothing else, memory bounded.

A few thousand by default; `ISTHMUS_FUZZ=1000000 python -m pytest tests/identity/test_identity_fuzz.py` does a million
of each kind.
"""

from __future__ import annotations

import os
import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.errors import IdentityError
from mesh.gossip.sealing import Malformed
from mesh.identity.certificate import check_csr, make_csr
from mesh.identity.invitation import Invitation, read_grant, read_request
from mesh.identity.keys import open_sealed
from mesh.identity.ring import KeyRing

ROUNDS = int(os.environ.get("ISTHMUS_FUZZ", "3000"))
MEMORY_BYTES = 64 * 1024 * 1024
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """One of the ways in which bytes go wrong, by accident or not."""
    way, spoilt = chance.randrange(7), bytearray(data)
    if way == 0:
        return chance.randbytes(chance.randrange(1500))
    if way == 1:
        return data[: chance.randrange(len(data))]
    if way == 2:
        return data + chance.randbytes(chance.randrange(1, 40))
    if way == 3:
        cut = chance.randrange(min(len(data), len(other)))
        return data[:cut] + other[cut:]
    if way == 4:
        start = chance.randrange(len(data))
        spoilt[start : start + chance.randrange(20)] = chance.randbytes(chance.randrange(20))
        return bytes(spoilt)
    for _ in range(chance.randrange(1, 4)):
        spoilt[chance.randrange(len(spoilt))] ^= 1 << chance.randrange(8)
    return bytes(spoilt)


@pytest.fixture
def readers(cluster):
    """Name -> (a reader of bytes, good bytes)."""
    oslo, lima, authority, now = cluster.oslo, cluster.join("lima"), cluster.authority, cluster.now
    text = authority.invite(now, ["127.0.0.1:7700"])
    invitation = Invitation.parse(text)
    request = invitation.request(make_csr(lima.key, "lima"))
    token = authority.create_token("ada", "submit", now)
    handover = oslo.handover(lima.certificate.der, now)
    certificate = oslo.certificate.der

    def as_text(read):
        return lambda data: read(data.decode("utf-8", "surrogateescape"))

    return {
        "certificate": (lambda data: oslo.anchor.check(data, now), lima.certificate.der),
        "directory": (lambda data: oslo.directory.learn(data, now), lima.certificate.der),
        "directory file": (lambda data: oslo.directory.load(data, now), lima.directory.to_bytes() + certificate),
        "request": (check_csr, make_csr(lima.key, "lima")),
        "invitation": (as_text(Invitation.parse), text.encode()),
        "enrolment": (read_request, request),
        "redemption": (lambda data: authority.redeem(data, now), request),
        "grant": (read_grant, authority.redeem(request, now)),
        "token": (as_text(lambda text: oslo.verify_token(text, now)), token.encode()),
        "assertion": (lambda data: oslo.verify_assertion(data, now), lima.assertion(oslo.certificate.fingerprint, now)),
        "document": (oslo.take_document, oslo.document_bytes),
        "ring": (lambda data: KeyRing.check(data, oslo.anchor.cluster_id, None), oslo.ring.to_bytes()),
        "handover": (lambda data: lima.take(data, now), handover),
        "sealed": (lambda data: open_sealed(lima.key, "ring", data), handover[-200:]),
    }


def test_every_reader_refuses_noise_with_one_class_of_errors(readers):
    chance = random.Random(1)
    good = [data for _, data in readers.values()]
    tracemalloc.start()
    try:
        for _ in range(max(1, ROUNDS // 10)):
            for read, data in readers.values():
                try:
                    read(mutated(data, chance.choice(good), chance))
                except IdentityError as error:
                    assert "\n" not in str(error)
        assert tracemalloc.get_traced_memory()[0] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


@relaxed
@given(data=st.binary(max_size=1200))
def test_every_reader_refuses_any_bytes(readers, data):
    for read, _ in readers.values():
        with pytest.raises(IdentityError):
            read(data)


@relaxed
@given(text=st.text(max_size=400))
def test_every_text_is_a_token_or_refused(cluster, text):
    for prefix in ("", "isthmus1.", "isthmus-api1."):
        for read in (Invitation.parse, lambda word: cluster.oslo.verify_token(word, cluster.now)):
            with pytest.raises(IdentityError):
                read(prefix + text)


def test_a_sealer_refuses_noise_and_stays_small(cluster):
    oslo, lima = cluster.oslo, cluster.join("lima")
    ours, theirs = oslo.sealer(lambda: cluster.now), lima.sealer(lambda: cluster.now)
    chance = random.Random(2)

    def fresh():
        return [
            theirs.seal(b"x" * 200, address="oslo:1", site="oslo", now=0.0),
            theirs._hello(b"", "oslo:1", cluster.now),
            theirs._hello(chance.randbytes(16), "oslo:1", cluster.now),
            theirs._who(lima.ring.active, ours._boot, (1).to_bytes(6)),
        ]

    lima.directory.learn(oslo.certificate.der, cluster.now)
    good = fresh()
    tracemalloc.start()
    try:
        for index in range(ROUNDS):
            if index % 50 == 0:
                good = fresh()
            data = mutated(chance.choice(good), chance.choice(good), chance)
            if index % 3 == 0:  # under a ring key that is known, or it ends at once
                data = data[:1] + oslo.ring.active + data[5:]
            try:
                opened = ours.open(data, source=f"10.0.{index % 200}.{index % 251}:{1 + index % 9999}", now=0.0)
            except Malformed:
                continue
            assert opened.site in (None, "lima")
            assert opened.reply is None or len(opened.reply) <= len(data)
        assert tracemalloc.get_traced_memory()[0] < MEMORY_BYTES
    finally:
        tracemalloc.stop()
