"""Nobody speaks for another: claims and entries carry their subject's own proof, and what lacks it is counted."""

from __future__ import annotations

import random
from hashlib import blake2b

import pytest

from mesh.errors import ConfigError
from mesh.gossip import config
from mesh.gossip.codec import Codec, pack_message, pack_sender
from mesh.gossip.config import GossipConfig
from mesh.gossip.core import GossipCore
from mesh.gossip.members import Claim
from mesh.gossip.messages import Ack, Digest, Message, Page, Ping, Rumour, Sender
from mesh.gossip.proof import CLUSTER, Proofs, Statement
from mesh.gossip.sealing import Forged
from mesh.gossip.state import State
from mesh.gossip.values import pack_value

CODEC = Codec("test")


class Named:
    """Signs with the site's name as the key: enough to tell whose word it is."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.verified = 0

    def sign(self, message: bytes) -> bytes:
        return blake2b(message, key=self.site.encode()).digest()

    def verify(self, site: str, message: bytes, proof: bytes) -> bool:
        self.verified += 1
        return Named(site).sign(message) == proof

    def knows(self, site: str) -> bool:
        return True


def core(site: str = "me", *, streaming: bool = False) -> GossipCore:
    settings = GossipConfig(site, f"{site}:1", cluster="test", rng=random.Random(0))
    made = GossipCore(settings, prover=Named(site), streaming=streaming)
    made.start(0.0)
    made.datagrams(0.0)
    return made


def claim(site: str, *, state: str = "alive", incarnation: int = 1, address: str = "") -> Claim:
    """A claim that is what its subject says."""
    return Proofs("test", Named(site)).prove(Claim(site, address or f"{site}:1", state, incarnation))


def head(site: str, incarnation: int = 1, *, left: bool = False) -> Sender:
    said = claim(site, state="left" if left else "alive", incarnation=incarnation)
    return Sender(site, said.address, incarnation, left, bytes(8), said.proof)


def datagram(sender: Sender, *messages: Message) -> bytes:
    return CODEC.join(pack_sender(sender), [pack_message(message) for message in messages])


def states(target: GossipCore) -> dict[str, tuple[str, int]]:
    return {member.site: (member.state, member.incarnation) for member in target.members()}


def test_what_a_site_says_of_itself_is_believed():
    target = core()
    target.receive(datagram(head("a"), Rumour(claim("b", incarnation=3))), "a:1", 1.0)
    assert states(target) == {"me": ("alive", 1), "a": ("alive", 1), "b": ("alive", 3)}
    assert target.counters["forged"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        claim("b", incarnation=3)._replace(incarnation=4),
        claim("b")._replace(address="mallory:1"),
        claim("b")._replace(state="left"),
        claim("b", state="left")._replace(state="alive"),
        claim("b")._replace(site="c"),
        claim("b")._replace(proof=b""),
        claim("b")._replace(state="suspect", incarnation=9, accuser="a"),
        claim("b")._replace(state="dead", incarnation=9),
        claim("me")._replace(state="suspect", incarnation=2**60),
    ],
)
def test_what_its_subject_never_said_is_refused_and_counted(wrong):
    target = core()
    target.receive(datagram(head("a"), Rumour(wrong)), "a:1", 1.0)
    assert target.counters["forged"] == 1
    assert states(target) == {"me": ("alive", 1), "a": ("alive", 1)}


def test_nobody_says_anothers_farewell():
    target = core()
    target.receive(datagram(head("b")), "b:1", 1.0)
    target.receive(datagram(head("a"), Rumour(claim("b")._replace(state="left"))), "a:1", 1.0)
    target.receive(datagram(head("b")._replace(left=True)), "b:1", 1.0)
    assert states(target)["b"] == ("alive", 1)
    assert target.counters["forged"] == 2
    target.receive(datagram(head("a"), Rumour(claim("b", state="left"))), "a:1", 1.0)
    assert states(target)["b"] == ("left", 1)


def test_a_head_that_its_site_did_not_sign_is_not_heard():
    target = core()
    target.receive(datagram(head("b")._replace(incarnation=9), Ping(1, "")), "b:1", 1.0)
    assert target.counters["forged"] == 1
    assert target.datagrams(1.0) == []


def test_a_proof_is_checked_once():
    target = core()
    prover = target._proofs._prover
    for _ in range(50):
        target.receive(datagram(head("a"), Rumour(claim("b"))), "a:1", 1.0)
    assert prover.verified == 2


def test_what_is_passed_on_carries_its_subjects_proof():
    target, third = core(), core("third")
    target.receive(datagram(head("a"), Rumour(claim("b"))), "a:1", 1.0)
    target.receive(datagram(head("third"), Ping(7, "me")), "third:1", 1.0)
    now = 1.0
    while now < 3.0:
        for address, data in target.datagrams(now):
            if address == "third:1":
                third.receive(data, "me:1", now)
        now = target.next_timer()
        target.handle_timer(now)
    assert {"me", "a", "b", "third"} <= set(states(third))
    assert third.counters["forged"] == 0


def test_a_stream_is_answered_by_what_would_have_been_sent_back():
    target = core()
    request = CODEC.join_stream(pack_sender(head("a")), [pack_message(Ping(7, "me"))])
    answer = CODEC.decode_stream(target.serve_stream(request, "a:1", 1.0, "a"), "me")
    assert any(isinstance(message, Ack) and message.seq == 7 for message in answer.messages)
    assert all(address != "a:1" for address, _ in target.datagrams(1.0))


def test_a_stream_in_anothers_name_is_refused():
    target = core()
    request = CODEC.join_stream(pack_sender(head("a")), [pack_message(Ping(7, "me"))])
    with pytest.raises(Forged):
        target.serve_stream(request, "b:1", 1.0, "b")
    assert target.counters["forged"] == 1


def test_streams_ask_and_take_the_answer():
    target, other = core(streaming=True), core("other")
    assert target.ask("other:1", "other", [Ping(1, "other")])
    (request,) = target.streams()
    answer = other.serve_stream(request.data, "me:1", 1.0, "me")
    target.stream_answered(request.token, answer, 1.1)
    assert states(target)["other"] == states(other)["me"] == ("alive", 1)
    target.stream_answered(request.token, answer, 1.2)  # a second answer has no question
    assert target.ask("third:1", "third", [Ping(1, "third")])
    (request,) = target.streams()
    target.stream_answered(request.token, answer, 1.3)
    assert target.counters["forged"] == 1
    target.stream_answered(99, None, 1.3)


def test_without_streams_nothing_is_asked():
    assert not core().ask("other:1", "other", [Ping(1, "other")])


def page(site: str, name: str, value: dict[str, object], *, signer: str = "", **changed: object) -> Page:
    """The only page of an entry as its owner writes it, or as somebody else does."""
    writer = State(site, 1, sign=Proofs("test", Named(signer or site)).sign_entry)
    writer.publish(name, value)
    return writer.pages(site, name)[0]._replace(**changed)


def told(target: GossipCore, *messages: Message, now: float = 1.0) -> None:
    for message in (Rumour(claim("b")), *messages):
        target.receive(datagram(head("a"), message), "a:1", now)


def test_an_entry_signed_by_its_owner_is_taken_from_anybody_and_passed_on_unchanged():
    target, entry = core(), page("b", "load", {"free": 1})
    told(target, entry)
    assert target.entry("b", "load") == {"free": 1}
    assert target._state.pages("b", "load") == [entry]
    assert target.counters["forged"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        page("b", "load", {"free": 1}, signer="a"),
        page("b", "load", {"free": 1}, owner="a"),
        page("b", "load", {"free": 1}, key="jobs"),
        page("b", "load", {"free": 1}, version=2),
        page("b", "load", {"free": 1}, generation=2),
        page("b", "load", {"free": 1}, proof=b""),
        page("b", "load", {"free": 1}, data=page("b", "load", {"free": 2}).data),
        page("me", "load", {"free": 1}, signer="a", generation=9),
    ],
)
def test_an_entry_that_its_owner_did_not_sign_is_refused_and_counted(wrong):
    target = core()
    told(target, wrong)
    assert target.counters["forged"] == 1
    assert all(target.entry(site, key) is None for site in ("a", "b", "me") for key in ("load", "jobs"))


def test_an_entry_that_was_replaced_is_refused_and_counted_when_it_comes_again():
    writer = State("b", 1, sign=Proofs("test", Named("b")).sign_entry)
    writer.publish("load", {"free": 1})
    old = writer.pages("b", "load")[0]
    writer.publish("load", {"free": 2})
    new = writer.pages("b", "load")[0]
    target = core()
    told(target, new, new, new)
    assert target.counters["stale"] == 0  # the same again is how gossip works
    told(target, old)
    assert target.counters["stale"] == 1
    restarted = State("b", 2, sign=Proofs("test", Named("b")).sign_entry)
    restarted.publish("load", {"free": 3})
    told(target, restarted.pages("b", "load")[0])
    told(target, new)
    assert target.counters["stale"] == 2
    assert target.entry("b", "load") == {"free": 3}


def test_a_claim_about_an_earlier_start_is_refused_and_counted():
    target = core()
    told(target, Rumour(claim("c", incarnation=5)))
    told(target, Rumour(claim("c", incarnation=4)), Rumour(claim("c", incarnation=5)))
    assert target.counters["stale"] == 1
    assert states(target)["c"] == ("alive", 5)


def test_pages_forged_by_one_peer_do_not_keep_a_value_from_coming_through_another():
    writer = State("b", 1, sign=Proofs("test", Named("b")).sign_entry)
    writer.publish("jobs", {"x": "y" * 2000})
    pages = writer.pages("b", "jobs")
    target = core()
    told(target, *pages[:-1])
    target.receive(datagram(head("mallory"), pages[-1]._replace(data=b"z")), "mallory:1", 1.1)
    assert target.counters["forged"] == 1
    target.receive(datagram(head("mallory"), pages[0]._replace(data=b"z")), "mallory:1", 1.2)
    told(target, *pages, now=1.3)
    assert target.entry("b", "jobs") == {"x": "y" * 2000}


def test_a_lie_about_our_own_entries_moves_nothing():
    target = core()
    target.publish("load", {"free": 1}, 0.5)
    told(target, Digest("me", 1, config.MAX_COUNTER, {"load": config.MAX_COUNTER}, False))
    assert target._state.owner("me").generation == 1
    assert target.entry("me", "load") == {"free": 1}


def test_counters_near_their_end_are_still_served():
    last = State("b", config.MAX_COUNTER, sign=Proofs("test", Named("b")).sign_entry)
    last.publish("load", {"free": 1})
    heir = State("b", 1)
    heir.publish("load", {"free": 2})
    heir.take(last.pages("b", "load")[0], 0.0)
    assert heir.owner("b").generation == config.MAX_COUNTER
    heir.publish("load", {"free": 3})
    other = State("me", 1)
    other.take(last.pages("b", "load")[0], 0.0)
    other.take(heir.pages("b", "load")[0], 0.0)
    assert other.value("b", "load") == {"free": 3}


def signed_by_authority(key: str, value: dict[str, object], version: int, signer: str = CLUSTER) -> bytes:
    return Proofs("test", Named(signer)).sign_entry(Statement(CLUSTER, 1, key, version, pack_value(value)))


def test_what_the_authority_says_spreads_and_belongs_to_no_member():
    target, third = core(), core("third")
    value = {"revoked": ["x"]}
    proof = signed_by_authority("revoked", value, 3)
    assert target.publish_cluster("revoked", value, 3, proof, 0.5)
    assert not target.publish_cluster("revoked", value, 3, proof, 0.6)
    assert ("updated", CLUSTER, "revoked") in target.events()
    (sent,) = target._state.pages(CLUSTER, "revoked")
    third.receive(datagram(head("a"), sent), "a:1", 1.0)
    assert third.entry(CLUSTER, "revoked") == value
    assert CLUSTER not in states(third)
    assert CLUSTER not in third.entries("revoked")


@pytest.mark.parametrize("signer", ["me", "a"])
def test_nobody_but_the_authority_speaks_for_the_cluster(signer):
    target, value = core(), {"revoked": []}
    with pytest.raises(ValueError, match="not signed by the cluster's authority"):
        target.publish_cluster("revoked", value, 1, signed_by_authority("revoked", value, 1, signer), 0.5)
    data = pack_value(value)
    proof = signed_by_authority("revoked", value, 1, signer)
    told(target, Page(CLUSTER, 1, "revoked", 1, 0, 1, data, proof))
    assert target.counters["forged"] == 1
    told(target, Page(CLUSTER, 2, "revoked", 1, 0, 1, data, signed_by_authority("revoked", value, 1)))
    assert target.counters["malformed"] == 1
    assert target.entry(CLUSTER, "revoked") is None


def test_no_site_can_be_named_like_the_authority():
    with pytest.raises(ConfigError, match="@cluster"):
        GossipConfig(CLUSTER)
