"""Entries merge the same way whatever the order, and values are bounded before anybody looks at them."""

from __future__ import annotations

import random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip import config, values
from mesh.gossip.state import Entry, Outcome, State
from mesh.gossip.values import pack_value, unpack_value

entries = st.tuples(
    st.sampled_from(["a", "b"]),
    st.integers(1, 3),
    st.sampled_from(["load", "jobs", "links"]),
    st.builds(Entry, st.integers(1, 4), st.integers(0, 3).map(lambda number: pack_value({"n": number}))),
)
documents = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(2**63), 2**63),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(max_size=20),
            st.binary(max_size=20),
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
        max_leaves=20,
    ),
    max_size=6,
)


def content(state: State) -> dict[str, object]:
    return {site: (state.owner(site).generation, dict(sorted(state.owner(site).entries.items()))) for site in "ab"}


def merged(items) -> State:
    state = State("me", 1)
    for item in items:
        state.merge(*item)
    return state


@settings(deadline=None)
@given(st.lists(entries, max_size=12), st.randoms(use_true_random=False))
def test_merging_is_commutative_and_idempotent(items, chance):
    shuffled = items * 2
    chance.shuffle(shuffled)
    assert content(merged(items)) == content(merged(shuffled))


@settings(deadline=None)
@given(st.lists(entries, max_size=12), st.lists(entries, max_size=12))
def test_two_peers_that_exchange_what_is_newer_hold_the_same(ours, theirs):
    # Two writers of one version do not exist: the owner alone writes, and counts.
    first = {(site, generation, key, entry.version): entry for site, generation, key, entry in ours + theirs}
    ours = [(*place[:3], first[*place[:3], item[3].version]) for item in ours for place in [item]]
    theirs = [(*place[:3], first[*place[:3], item[3].version]) for item in theirs for place in [item]]
    left, right = merged(ours), merged(theirs)
    for source, target in ((left, right), (right, left)):
        for site in "ab":
            known = target.owner(site)
            for key in source.newer_than(site, known.generation, known.versions()):
                for page in source.pages(site, key):
                    target.take(page, 0.0)
    assert content(left) == content(right)


@settings(deadline=None)
@given(documents)
def test_values_come_back_as_they_were(document):
    assert unpack_value(pack_value(document)) == document


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_or_a_value_error(data):
    try:
        assert isinstance(unpack_value(data), dict)
    except ValueError:
        pass


@pytest.mark.parametrize(
    "value",
    [
        [],
        None,
        {"a": float("nan")},
        {"a": float("inf")},
        {1: 2},
        {b"a": 1},
        {"a": {1: 2}},
        {"a": object()},
        {"a": 2**70},
        {"a": "x" * config.MAX_VALUE_BYTES},
        {"a": [0] * (values.MAX_ELEMENTS + 1)},
        {"a": [[0] * 2000, [0] * 2000, [0] * 2000]},
        {"a": [[[[[[[[[]]]]]]]]]},
        {"a": {1, 2}},
    ],
)
def test_values_out_of_bounds_are_refused_where_they_are_written(value):
    with pytest.raises(ValueError, match="gossip"):
        State("me", 1).publish("key", value)


@pytest.mark.parametrize("data", [b"\x91" * 30000, b"\xdd\xff\xff\xff\xff", b"\x80\x80", b"\xd6\xff\0\0\0\0", b""])
def test_bombs_are_not_values(data):
    with pytest.raises(ValueError, match="gossip"):
        unpack_value(data)


def test_large_values_travel_in_pages_of_any_order():
    source, target = State("a", 1), State("me", 1)
    value = {"devices": [{"name": f"cuda:{number}", "note": "x" * 300} for number in range(16)]}
    source.publish("capabilities", value)
    pages = source.pages("a", "capabilities")
    assert len(pages) > 4
    random.Random(1).shuffle(pages)
    taken = [target.take(page, 0.0) for page in [*pages, *pages]]
    assert taken.count(Outcome.NEWS) == 1
    assert target.value("a", "capabilities") == value


def test_pages_of_an_older_version_do_not_disturb_the_newer_one():
    source, target = State("a", 1), State("me", 1)
    source.publish("k", {"old": "x" * 2000})
    old = source.pages("a", "k")
    source.publish("k", {"new": "y" * 2000})
    new = source.pages("a", "k")
    for page in [old[0], new[0], old[1], new[1], old[2], new[2]]:
        target.take(page, 0.0)
    assert target.value("a", "k") == {"new": "y" * 2000}


def test_unfinished_values_do_not_pile_up():
    target = State("me", 1)
    source = State("a", 1)
    source.publish("k", {"v": "x" * 2000})
    page = source.pages("a", "k")[0]
    for number in range(1000):
        target.take(page._replace(owner=f"o{number}"), 0.0)
    assert len(target._assemblies) <= 64


def test_a_value_that_is_not_a_document_is_not_kept():
    source, target = State("a", 1), State("me", 1)
    source.publish("k", {"v": 1})
    page = source.pages("a", "k")[0]
    assert target.take(page._replace(data=msgpack.packb([1, 2])), 0.0) is Outcome.MALFORMED
    assert target.take(page, 0.0) is Outcome.NEWS


def test_nobody_else_writes_our_entries():
    state = State("me", 3)
    state.publish("k", {"v": 1})
    assert not state.merge("me", 9, "k", Entry(9, pack_value({"v": 2})))
    assert state.value("me", "k") == {"v": 1}


def test_an_owner_that_lost_its_counter_raises_its_generation_above_what_others_hold():
    old, new, other = State("a", 5), State("a", 1), State("me", 1)
    for number in range(3):
        old.publish("k", {"v": number})
    other.take(old.pages("a", "k")[0], 0.0)
    new.publish("k", {"v": "new"})
    held = other.pages("a", "k")[0]
    assert new.take(held, 0.0) is Outcome.DEFENDED
    assert new.take(held, 0.0) is Outcome.STALE
    assert other.take(new.pages("a", "k")[0], 0.0) is Outcome.NEWS
    assert other.value("a", "k") == {"v": "new"}


def test_an_owner_cannot_fill_the_memory_of_others():
    state = State("me", 1)
    for number in range(config.MAX_KEYS_PER_SITE):
        state.publish(f"k{number}", {})
    with pytest.raises(ValueError, match="16 keys"):
        state.publish("one-more", {})
    full = State("me", 1)
    full.publish("a", {"v": "x" * 30000})
    full.publish("b", {"v": "x" * 30000})
    with pytest.raises(ValueError, match="bytes"):
        full.publish("c", {"v": "x" * 10000})
    for number in range(100):
        full.merge("b", 1, f"k{number}", Entry(1, pack_value({})))
    assert len(full.owner("b").entries) == config.MAX_KEYS_PER_SITE


def test_publishing_the_same_value_again_is_no_news():
    state = State("me", 1)
    assert state.publish("k", {"v": 1})
    assert not state.publish("k", {"v": 1})
    assert state.owner("me").entries["k"].version == 1
