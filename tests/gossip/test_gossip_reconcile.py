"""Two peers that know different things find out what, at a cost that follows the difference; in any mesh's size."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip import config
from mesh.gossip.codec import pack_message
from mesh.gossip.fingerprint import LEAVES, Fingerprints, mark
from mesh.gossip.members import Claim
from mesh.gossip.messages import Buckets, Digest, Message, Page, Rumour, Summary, Want
from mesh.gossip.reconcile import ANSWER_BYTES, BURST_BYTES, MAX_GAP_S, SUMMARY_ROWS, Budget, Reconciler
from mesh.gossip.state import State

marks = st.dictionaries(st.sampled_from([f"s{number}" for number in range(40)]), st.integers(1, 5))


def prints_of(values: dict[str, int]) -> Fingerprints:
    prints = Fingerprints()
    for site, value in values.items():
        prints.set(site, mark(site, value, 0, {}))
    return prints


@settings(deadline=None)
@given(marks, marks, st.sampled_from([1, 16, 64, LEAVES]))
def test_what_differs_lies_in_a_bucket_that_differs_and_nothing_else_does(ours, theirs, count):
    one, other = prints_of(ours), prints_of(theirs)
    assert (one.whole() == other.whole()) == (ours == theirs)
    assert len(one) == len(ours)
    differing = one.differing(count, other.buckets(count))
    for bucket in range(count):
        same = one.rows(count, bucket) == other.rows(count, bucket)
        assert same == (bucket not in differing)
    found = {one.site(name) for bucket in range(count) for name in one.rows(count, bucket)}
    assert found == set(ours)


@settings(deadline=None)
@given(marks, marks)
def test_a_fingerprint_depends_on_what_is_known_and_not_on_how_it_came_about(first, last):
    prints = prints_of(first)
    for site in first.keys() - last.keys():
        prints.drop(site)
    for site, value in last.items():
        prints.set(site, None)
        prints.set(site, mark(site, value, 0, {}))
    assert prints.whole() == prints_of(last).whole()
    assert prints.buckets(64) == prints_of(last).buckets(64)


def test_a_mark_tells_incarnations_generations_and_versions_apart():
    places = itertools.product(("a", "b"), (1, 2), (0, 3), ({}, {"k": 1}, {"k": 2}, {"j": 1}))
    assert len({mark(*place) for place in places}) == 32
    assert mark("a", 1, 1, {"x": 1, "y": 2}) == mark("a", 1, 1, {"y": 2, "x": 1})


class Peer:
    """What one peer holds: claims by site, a state, and the fingerprints of both."""

    def __init__(self, name: str) -> None:
        self.claims: dict[str, Claim] = {}
        self.prints = Fingerprints()
        self.state = State(name, 1, touched=self.marked)
        self.reconciler = Reconciler(self.prints, self.state, claim=self.claims.get, gap_s=0.2)

    def marked(self, site: str) -> None:
        claim, owner = self.claims.get(site), self.state.owner(site)
        if claim is not None:
            self.prints.set(site, mark(site, claim.incarnation, owner.generation, owner.versions()))

    def welcome(self, claim: Claim) -> None:
        held = self.claims.get(claim.site)
        if held is None or claim.beats(held):
            self.claims[claim.site] = claim
            self.marked(claim.site)

    def take(self, message: Message) -> list[Message]:
        if isinstance(message, Rumour):
            self.welcome(message.claim)
        elif isinstance(message, Page):
            if message.owner in self.claims:
                self.state.take(message, 0.0)
        elif isinstance(message, Buckets):
            return self.reconciler.on_buckets(message)
        elif isinstance(message, Summary):
            return self.reconciler.on_summary(message)
        elif isinstance(message, Want):
            return self.reconciler.on_want(message)
        elif isinstance(message, Digest):
            return self.reconciler.on_digest(message)
        return []


def exchange(one: Peer, other: Peer, now: float = 100.0) -> tuple[int, int]:
    """Let `one` start an exchange and play it to its end: messages and bytes."""
    messages = size_bytes = 0
    waiting = [(other, message) for message in one.reconciler.start("other", b"theirs", now)]
    while waiting:
        target, message = waiting.pop(0)
        messages, size_bytes = messages + 1, size_bytes + len(pack_message(message))
        back = one if target is other else other
        waiting += [(back, answer) for answer in target.take(message)]
    return messages, size_bytes


def populate(peers: list[Peer], sites: int, *, bytes_each: int = 100) -> None:
    for number in range(sites):
        site = f"site-{number:05}"
        source = State(site, 1)
        source.publish("load", {"x": "y" * bytes_each})
        for peer in peers:
            peer.welcome(Claim(site, f"{site}:1", "alive", 1))
            for page in source.pages(site, "load"):
                peer.state.take(page, 0.0)


versions = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.dictionaries(st.sampled_from("xyz"), st.integers(1, 4))),
)


def filled(holds: dict[str, tuple[int, int, dict[str, int]]]) -> Peer:
    peer = Peer("me")
    for site, (incarnation, generation, entries) in holds.items():
        peer.welcome(Claim(site, f"{site}:1", "alive", incarnation))
        for key, version in entries.items():
            writer = State(site, generation)
            for number in range(version):  # the same version of a key is the same value everywhere
                writer.publish(key, {"n": number})
            for page in writer.pages(site, key):
                peer.state.take(page, 0.0)
    return peer


@settings(deadline=None)
@given(versions, versions, st.integers(0, 300))
def test_two_peers_hold_the_same_after_exchanges_both_ways(ours, theirs, others):
    one, other = filled(ours), filled(theirs)
    if others > 60:
        populate([one, other], others)
    for now in (100.0, 200.0):
        exchange(one, other, now)
        exchange(other, one, now)
    assert one.prints.whole() == other.prints.whole()
    assert one.claims == other.claims
    for site in "abcd":
        assert one.state.owner(site) == other.state.owner(site)


@pytest.mark.parametrize(("sites", "at_most_bytes"), [(11, 600), (64, 1500), (490, 1500), (1000, 2000), (5000, 3000)])
def test_one_difference_costs_the_same_in_a_large_mesh_as_in_a_small_one(sites, at_most_bytes):
    one, other = Peer("one"), Peer("other")
    populate([one, other], sites)
    changed = State("site-00007", 1)
    changed.publish("load", {"x": "y" * 100})
    changed.publish("load", {"x": "z" * 100})
    one.state.take(changed.pages("site-00007", "load")[0], 0.0)
    _, size_bytes = exchange(one, other)
    assert one.prints.whole() == other.prints.whole()
    assert size_bytes < at_most_bytes


def test_five_thousand_sites_meet_a_newcomer_in_bounded_answers():
    old, new = Peer("old"), Peer("new")
    populate([old], 5000, bytes_each=400)
    largest = 0
    for _ in range(40):
        waiting = [(new, message) for message in old.reconciler.start("new", b"", 0.0)]
        old.reconciler._next_s = 0.0
        while waiting:
            target, message = waiting.pop(0)
            answers = target.take(message)
            largest = max(largest, sum(len(pack_message(answer)) for answer in answers))
            waiting += [(old if target is new else new, answer) for answer in answers]
        if old.prints.whole() == new.prints.whole():
            break
    assert old.prints.whole() == new.prints.whole()
    assert largest <= config.MAX_STREAM_BYTES


def test_rows_are_cut_to_datagrams():
    one, other = Peer("one"), Peer("other")
    populate([one], 2000)
    for bucket in range(0, LEAVES, 64):
        for message in one.reconciler.on_buckets(Buckets(64, other.prints.buckets(64))):
            assert isinstance(message, Summary)
            assert len(message.rows) <= SUMMARY_ROWS * 10
            assert bucket < LEAVES
            assert len(pack_message(message)) <= 850


def test_exchanges_are_rare_while_there_is_nothing_to_learn_and_follow_each_other_while_there_is():
    peer = Peer("me")
    populate([peer], 490)
    reconciler, chance = peer.reconciler, random.Random(1)

    def started(duration_s: float, learn: int) -> int:
        count, begin_s = 0, reconciler._next_s
        now = begin_s
        while now < begin_s + duration_s:
            if reconciler.start(chance.choice("abc"), chance.randbytes(8), now):
                count += 1
                for _ in range(learn):
                    reconciler.learnt()
            now += 0.05
        return count

    started(60.0, 0)
    assert started(60.0, 0) <= 60.0 / MAX_GAP_S * 1.2
    assert started(10.0, 100) >= 100
    started(60.0, 0)
    assert started(60.0, 0) <= 60.0 / MAX_GAP_S * 1.2


def test_the_budget_bounds_bytes_over_time():
    budget, sent = Budget(), 0
    for step in range(10_000):
        if budget.take(1000, step / 1000):
            sent += 1000
    assert BURST_BYTES <= sent <= BURST_BYTES + 11 * 128 * 1024
    assert ANSWER_BYTES < config.MAX_STREAM_BYTES
