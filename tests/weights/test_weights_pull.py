"""Who is asked for which block: nothing is lost with a source, nothing waits for a slow one, and little comes twice."""

import heapq

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.weights.pull import FIRST_WINDOW, MAX_WINDOW, Puller

MIB = 1 << 20


def simulate(blocks, rates, *, delays=None, deaths=None, has=None, until=10_000.0):
    """Sources that send in order at `rates` blocks/s; (seconds, blocks sent in all, by source)."""
    delays, deaths, has = delays or {}, deaths or {}, has or {}
    puller = Puller(range(blocks), lambda block: MIB)
    now, sent, events, free_at, count = 0.0, dict.fromkeys(rates, 0), [], dict.fromkeys(rates, 0.0), 0
    for name in rates:
        puller.add(name, has.get(name, lambda block: True), now)
    for name, when in deaths.items():
        heapq.heappush(events, (when, -1, name, -1))

    def ask(name):
        nonlocal count
        while (block := puller.next(name, now)) is not None:
            start = max(free_at[name], now + delays.get(name, 0.0) / 2)
            free_at[name] = start + 1 / rates[name]
            count += 1
            sent[name] += 1
            heapq.heappush(events, (free_at[name] + delays.get(name, 0.0) / 2, count, name, block))

    for name in rates:
        ask(name)
    while not puller.done and now < until:
        if not events:
            now += 0.25
        else:
            now, _, name, block = heapq.heappop(events)
            if block < 0:
                puller.remove(name)
            elif name in puller.sources:
                puller.arrived(name, block, now)
        for each in puller.sources:
            ask(each)
    return now, sent


def test_two_sources_give_the_sum_of_their_links():
    seconds, sent = simulate(1000, {"fast": 90.0, "slow": 10.0})
    assert seconds < 1000 / 100.0 / 0.95
    assert sum(sent.values()) < 1000 * 1.02
    assert 0.07 < sent["slow"] / 1000 < 0.13


def test_a_long_link_is_filled():
    seconds, _ = simulate(1000, {"far": 119.0}, delays={"far": 0.2})
    assert seconds < 1000 / 119.0 / 0.9


def test_a_source_that_dies_loses_its_blocks_to_the_others():
    seconds, sent = simulate(200, {"a": 50.0, "b": 50.0}, deaths={"a": 1.0})
    assert seconds < 1.0 + 150 / 50.0 + 1.0
    assert sum(sent.values()) <= 200 + MAX_WINDOW


def test_the_last_blocks_do_not_wait_for_the_slowest():
    seconds, _ = simulate(100, {"fast": 100.0, "crawling": 0.1})
    assert seconds < 5.0


def test_a_source_is_asked_only_for_what_it_has():
    seconds, sent = simulate(100, {"a": 50.0, "b": 50.0}, has={"a": lambda block: block < 10})
    assert sent["a"] <= 10
    assert seconds < 3.0


def test_a_silent_source_is_noticed_and_an_idle_one_is_not():
    puller = Puller(range(3), lambda block: MIB)
    puller.add("a", lambda block: True, 0.0)
    assert puller.stalled(1000.0) == []
    assert puller.next("a", 1000.0) == 0
    assert puller.stalled(1001.0) == []
    assert puller.stalled(1031.0) == ["a"]


def test_a_block_that_was_refused_is_asked_of_another():
    puller = Puller([7], lambda block: MIB)
    puller.add("a", lambda block: True, 0.0)
    assert puller.next("a", 0.0) == 7
    puller.refuse("a", 7)
    assert puller.next("a", 0.0) is None
    puller.add("b", lambda block: True, 0.0)
    assert puller.next("b", 0.0) == 7


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_happens_every_block_arrives_once_and_windows_hold(data):
    blocks = data.draw(st.integers(1, 30))
    puller = Puller(range(blocks), lambda block: MIB)
    asked, useful, now = {}, set(), 0.0
    names = ["a", "b", "c"]
    for _ in range(200):
        now += data.draw(st.floats(0.0, 1.0))
        name = data.draw(st.sampled_from(names))
        step = data.draw(st.sampled_from(["add", "remove", "next", "next", "arrived", "arrived", "strange"]))
        if step == "add" and name not in puller.sources:
            puller.add(name, lambda block: True, now)
            asked[name] = []
        elif step == "remove":
            puller.remove(name)
            asked.pop(name, None)
        elif step == "next":
            block = puller.next(name, now)
            if block is not None:
                assert block not in useful and block not in asked[name]
                asked[name].append(block)
                assert len(asked[name]) <= MAX_WINDOW
        elif step == "arrived" and asked.get(name):
            block = asked[name].pop(0)
            found, others = puller.arrived(name, block, now)
            for other in others:
                if other in asked and block in asked[other]:
                    asked[other].remove(block)
            assert found is (block not in useful)
            useful.add(block)
        elif step == "strange":
            assert puller.arrived(name, blocks + 5, now) == (False, ())
    assert puller.done is (len(useful) == blocks)
    for name in list(puller.sources):
        puller.remove(name)
    puller.add("last", lambda block: True, now)
    while not puller.done:
        now += 1.0
        burst = []
        while (block := puller.next("last", now)) is not None:
            burst.append(block)
        assert burst and len(burst) >= min(FIRST_WINDOW, blocks - len(useful))
        for block in burst:
            assert puller.arrived("last", block, now)[0]
            useful.add(block)


def test_a_source_that_has_nothing_after_all_may_say_so_of_every_block():
    puller = Puller(range(5000), lambda block: 1)
    puller.add("a", lambda block: True, 0.0)
    for _ in range(5000):
        block = puller.next("a", 0.0)
        puller.refuse("a", block)
    assert puller.next("a", 0.0) is None
    puller.add("b", lambda block: True, 0.0)
    assert puller.next("b", 0.0) is not None


def test_a_block_that_was_spoilt_is_asked_for_again_before_all_others():
    puller = Puller(range(3), lambda block: 1)
    puller.add("a", lambda block: True, 0.0)
    first = puller.next("a", 0.0)
    assert puller.arrived("a", first, 1.0) == (True, ())
    puller.spoilt(first)
    assert not puller.done
    assert puller.next("a", 1.0) == first
