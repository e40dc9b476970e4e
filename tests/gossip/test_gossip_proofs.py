"""Nobody speaks for another: claims and entries carry their subject's own proof, and what lacks it is counted."""

from __future__ import annotations

import random
from hashlib import blake2b

import pytest

from mesh.gossip.codec import Codec, pack_message, pack_sender
from mesh.gossip.config import GossipConfig
from mesh.gossip.core import GossipCore
from mesh.gossip.members import Claim
from mesh.gossip.messages import Ack, Message, Ping, Rumour, Sender
from mesh.gossip.proof import Proofs
from mesh.gossip.sealing import Forged

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


def core(site: str = "me", *, streaming: bool = False) -> GossipCore:
    config = GossipConfig(site, f"{site}:1", cluster="test", rng=random.Random(0))
    made = GossipCore(config, prover=Named(site), streaming=streaming)
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
    assert Ack(7) in answer.messages
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
