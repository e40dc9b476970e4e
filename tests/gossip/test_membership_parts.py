"""Helpers, buddies, namesakes and graves, one core or part at a time."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip import absent
from mesh.gossip.absent import Known
from mesh.gossip.codec import pack_message
from mesh.gossip.config import GossipConfig, Timing
from mesh.gossip.members import Claim, Reach
from mesh.gossip.messages import Ack, Message, Nack, Ping, PingRequest, Rumour, Sender, Taken
from mesh.gossip.swim import Swim
from mesh.gossip.timers import Timers
from simulations.network import VirtualNetwork


class Bench:
    """One `Swim` by hand: what it sends is kept, time passes when told."""

    def __init__(self, *others: str, timing: Timing | None = None) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.events: list[tuple[str, str]] = []
        self.timers = Timers(stall_s=60.0, grace_s=0.0)
        self.now = 100.0
        self.swim = Swim(
            GossipConfig("me", address="me:1", rng=random.Random(1), timing=timing or Timing()),
            "me:1",
            self.timers,
            send=lambda address, message: self.sent.append((address, message)),
            emit=lambda kind, site: self.events.append((kind, site)),
            pack=pack_message,
            gone=lambda _: None,
        )
        self.swim.start(self.now, [])
        for other in others:
            self.hear(other)

    @staticmethod
    def sender(site: str, incarnation: int = 1) -> Sender:
        return Sender(site, f"{site}:1", incarnation, False, bytes(8))

    def hear(self, site: str, incarnation: int = 1) -> None:
        self.swim.hear(self.sender(site, incarnation), f"{site}:1", self.now)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.timers.next_s()) is not None and due <= until:
            self.now = max(self.now, due)
            self.timers.run(self.now)
        self.now = until

    def to(self, site: str, kind: type) -> list[Message]:
        return [message for address, message in self.sent if address == f"{site}:1" and type(message) is kind]


def test_a_helper_says_at_four_fifths_of_the_budget_that_it_heard_nothing():
    bench = Bench("a")
    bench.swim.ping_request(bench.sender("a"), "a:1", PingRequest(7, "x", "x:1", 1000), bench.now)
    bench.run(0.79)
    assert not bench.to("a", Nack)
    bench.run(0.02)
    assert bench.to("a", Nack) == [Nack(7)]


def test_who_is_pinged_by_a_helper_answers_the_asker_too():
    bench = Bench("helper", "asker")
    bench.swim.ping(bench.sender("helper"), "helper:1", Ping(7, "me", "asker", 9))
    bench.swim.ping(bench.sender("helper"), "helper:1", Ping(8, "me", "stranger", 9))
    assert bench.to("helper", Ack) == [Ack(7), Ack(8)]
    assert bench.to("asker", Ack) == [Ack(9)]
    assert not bench.to("stranger", Ack)


def test_a_helper_says_for_whom_it_asks():
    bench = Bench("a", "x")
    bench.swim.ping_request(bench.sender("a"), "a:1", PingRequest(7, "x", "x:1", 1000), bench.now)
    ping = bench.to("x", Ping)[-1]
    assert isinstance(ping, Ping)
    assert (ping.asker, ping.asker_seq) == ("a", 7)


def test_the_target_of_an_indirect_probe_may_answer_itself_and_nobody_else_for_it():
    bench = Bench("x", "helper", "other")
    bench.now += 10.0  # what they said when they came is no answer any more
    bench.swim._prober.probe(bench.swim.peers["x"], bench.now)
    bench.run(0.6)
    request = bench.to("helper", PingRequest)[-1]
    assert isinstance(request, PingRequest)
    bench.swim.ack(bench.sender("other"), Ack(request.seq), bench.now)
    assert bench.swim.peers["x"].probe is not None
    bench.swim.ack(bench.sender("x"), Ack(request.seq), bench.now)
    assert bench.swim.peers["x"].probe is None
    assert bench.swim.peers["x"].guides == ("helper",)


def test_who_spoke_since_the_probe_began_is_not_suspected_though_it_answers_nothing():
    for speaks, expected in ((True, "alive"), (False, "suspect")):
        bench = Bench("x")
        bench.now += 10.0
        bench.swim._prober.probe(bench.swim.peers["x"], bench.now)
        bench.run(0.1)
        if speaks:
            bench.hear("x")
        bench.run(1.2)
        assert bench.swim.peers["x"].state == expected


def test_a_helper_passes_on_what_it_hears():
    bench = Bench("a", "x")
    bench.swim.ping_request(bench.sender("a"), "a:1", PingRequest(7, "x", "x:1", 1000), bench.now)
    ping = bench.to("x", Ping)[-1]
    assert isinstance(ping, Ping)
    bench.swim.ack(Sender("x", "x:1", 1, False, bytes(8)), Ack(ping.seq), bench.now)
    assert bench.to("a", Ack) == [Ack(7)]
    bench.run(2.0)
    assert not bench.to("a", Nack)


def accused(bench: Bench) -> set[str]:
    """Whom it accuses in what it passes on."""
    told = b"".join(bench.swim.rumours.take(100_000))
    return {site for site in bench.swim.peers if pack_message(Rumour(bench.swim.peers[site].claim("me"))) in told}


def until_suspect(bench: Bench) -> None:
    while not any(kind == "suspect" for kind, _ in bench.events):
        bench.run(0.01)


def test_who_has_no_witness_asks_others_and_then_accuses_nobody():
    bench = Bench(*"abcdefghijkl")
    bench.swim.rumours.take(100_000)
    until_suspect(bench)  # nobody answers anything
    first = bench.events[-1][1]
    asked = [address for address, message in bench.sent if type(message) is PingRequest and message.target == first]
    assert len(set(asked)) == len(asked) == 3 + 6
    bench.run(20.0)
    assert not accused(bench)


def test_who_has_a_witness_accuses():
    bench = Bench(*"abcdefghijkl")
    bench.swim.rumours.take(100_000)
    while not any(kind == "suspect" for kind, _ in bench.events):
        bench.run(0.01)
        for address, message in bench.sent:
            if type(message) is PingRequest:
                helper = address.partition(":")[0]
                bench.swim.nack(Sender(helper, address, 1, False, bytes(8)), Nack(message.seq))
    assert accused(bench) == {site for kind, site in bench.events if kind == "suspect"}
    first = bench.events[-1][1]
    assert len([1 for _, message in bench.sent if type(message) is PingRequest and message.target == first]) == 3


def test_a_suspicion_is_said_as_soon_as_there_is_a_witness():
    bench = Bench(*"abcdef")
    bench.swim.rumours.take(100_000)
    until_suspect(bench)
    suspect = bench.events[-1][1]
    assert not accused(bench)
    for _ in range(1000):
        bench.run(0.01)
        sent, bench.sent = bench.sent, []
        for address, message in sent:
            if address != f"{suspect}:1" and isinstance(message, Ping | PingRequest):
                site = address.partition(":")[0]
                bench.hear(site)
                sender = Sender(site, address, 1, False, bytes(8))
                if message.target == suspect:
                    bench.swim.nack(sender, Nack(message.seq))
                else:
                    bench.swim.ack(sender, Ack(message.seq), bench.now)
        if accused(bench):
            break
    assert accused(bench) == {suspect}


def test_a_helper_cannot_be_made_to_flood_a_target():
    bench = Bench("a")
    for number in range(1000):
        bench.swim.ping_request(bench.sender("a"), "a:1", PingRequest(number, "x", "x:1", 1000), bench.now)
    assert len(bench.to("x", Ping)) <= 64


def test_pings_to_a_suspect_carry_the_accusation():
    bench = Bench("a", "b", "c")
    bench.run(1.05)
    bench.swim.consider(Claim("a", "a:1", "suspect", 1, "b"), bench.now)
    assert ("suspect", "a") in bench.events
    bench.sent.clear()
    bench.run(0.6)
    rumours = bench.to("a", Rumour)
    assert bench.to("a", Ping)
    assert {rumour.claim.state for rumour in rumours if isinstance(rumour, Rumour)} == {"suspect"}


def test_a_sign_of_life_acquits_and_the_same_accuser_is_not_heard_again():
    bench = Bench("a", "b", "c")
    bench.run(1.05)
    bench.swim.consider(Claim("a", "a:1", "suspect", 1, "b"), bench.now)
    bench.hear("a")
    assert bench.swim.peers["a"].state == "alive"
    bench.run(1.05)
    bench.swim.consider(Claim("a", "a:1", "suspect", 1, "b"), bench.now)
    assert bench.swim.peers["a"].state == "alive"
    bench.swim.consider(Claim("a", "a:1", "suspect", 1, "c"), bench.now)
    assert bench.swim.peers["a"].state == "suspect"


def test_a_name_is_given_up_at_the_word_of_its_holder_only():
    bench = Bench("a")
    bench.swim.taken(Sender("a", "a:1", 1, False, bytes(8)), Taken("x:1"), bench.now)
    assert bench.swim.taken_by is None
    assert bench.to("x", Ping)  # asked
    bench.swim.taken(Sender("me", "x:1", 1, False, bytes(8)), Taken("x:1"), bench.now)
    assert bench.swim.taken_by == "x:1"


def test_the_book_of_the_absent_is_bounded(monkeypatch):
    monkeypatch.setattr(absent, "MAX_ABSENT", 50)
    bench = Bench(timing=Timing(dead_reap_s=1.0, left_reap_s=1.0))
    bench.swim.remember([Known(f"x{number}", f"x{number}:1", 1, "alive") for number in range(80)], bench.now)
    for number in range(80):
        site = f"y{number}"
        bench.hear(site)
        bench.swim.consider(Claim(site, f"{site}:1", "left", 1), bench.now)
    bench.run(5.0)
    assert len(bench.swim.known()) <= 51


def test_a_path_is_broken_after_four_misses_and_whole_after_one_answer():
    reach = Reach()
    assert (reach.out, reach.into) == (None, None)
    reach.came_back(1.0)
    assert (reach.out, reach.into) == (True, True)
    for now in (2.0, 3.0, 4.0):
        reach.missed(now)
    assert not reach.broken
    reach.missed(5.0)
    assert (reach.out, reach.into) == (None, False)
    reach.heard_s = 6.0
    assert (reach.out, reach.into) == (False, True)
    reach.came_back(7.0)
    assert (reach.out, reach.into) == (True, True)


LIES = st.lists(
    st.tuples(
        st.sampled_from(["suspect", "dead"]),
        st.sampled_from(["s00", "s02", "m", "n", ""]),
        st.integers(-1, 3),
        st.floats(0.0, 0.8),
    ),
    max_size=30,
)


@settings(max_examples=25, deadline=None)
@given(LIES)
def test_no_sequence_of_lies_kills_a_site_that_answers(lies):
    net = VirtualNetwork(seed=1, latency=0.01)
    for number in range(3):
        net.spawn(f"s{number:02}", seeds=["s00"])
    net.run_for(2.0)
    swim = net.nodes["s00"].core._swim
    for state, accuser, ahead, pause_s in lies:
        incarnation = max(1, swim.peers["s01"].incarnation + ahead)
        swim.consider(Claim("s01", "s01:7700", state, incarnation, accuser), net.clock())
        net.settle(net.nodes["s00"])
        net.run_for(pause_s)
    net.run_for(5.0)
    assert net.agreed()
    assert not [event for node in net.nodes.values() for _, event in node.events if event.kind == "dead"]
