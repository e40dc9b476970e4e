"""How bulk is held back for tokens, on a link of the textbook: a rate, a delay, and a queue before it."""

from __future__ import annotations

import pytest

from transport.pace import Pace


class Pipeline:
    """A fluid link. `turn` sends at a rate for a round trip and gives what the sender then sees: (round trip, rate)."""

    def __init__(self, rate, rtt_s):
        self.rate, self.rtt_s, self.queue_bytes = rate, rtt_s, 0.0
        self.past = [(0.0, 0.0)]

    def turn(self, offered, steps=20):
        delivered = 0.0
        step_s = self.rtt_s / steps
        for _ in range(steps):
            waiting = self.queue_bytes + offered * step_s
            out = min(waiting, self.rate * step_s)
            self.queue_bytes = waiting - out
            delivered += out
        self.past.append((self.rtt_s + self.queue_bytes / self.rate, delivered / self.rtt_s))
        return self.past[-2]


@pytest.mark.parametrize("rate", [12.5e6, 125e6])
@pytest.mark.parametrize("rtt_s", [0.01, 0.1, 0.2])
def test_beside_tokens_bulk_finds_the_links_rate_and_keeps_its_queue_short(rate, rtt_s):
    link, pace, now = Pipeline(rate, rtt_s), Pace(), 0.0
    pace.begin()
    queues, delivered = [], []
    for turn in range(400):
        now += rtt_s
        seen_s, got = link.turn(pace.rate)
        pace.tick(now, rtt_s=max(seen_s, rtt_s), least_rtt_s=rtt_s, delivered=got)
        if turn >= 200:
            queues.append(link.queue_bytes / rate)
            delivered.append(got)
    assert sum(delivered) / len(delivered) > 0.9 * rate
    assert sorted(queues)[round(0.95 * len(queues))] < 5e-3


@pytest.mark.parametrize("rtt_s", [0.01, 0.1, 0.2])
def test_without_tokens_bulk_fills_the_link_and_not_its_queue(rtt_s):
    rate = 125e6
    link, pace, now = Pipeline(rate, rtt_s), Pace(), 0.0
    queues, delivered = [], []
    for turn in range(400):
        now += rtt_s
        seen_s, got = link.turn(min(1.3 * rate, pace.rate or 2 * rate))
        pace.tick(now, rtt_s=max(seen_s, rtt_s), least_rtt_s=rtt_s, delivered=got, urgent=False)
        if turn >= 20:
            queues.append(link.queue_bytes / rate)
            delivered.append(got)
    assert sum(delivered) / len(delivered) > 0.95 * rate
    assert sorted(queues)[round(0.95 * len(queues))] < max(0.5 * rtt_s, 0.06)


@pytest.mark.parametrize("urgent", [False, True])
def test_a_limit_that_was_taken_for_too_low_is_raised_by_what_passes(urgent):
    pace, now = Pace(), 0.0
    pace.begin()
    for turn in range(320):
        now += 0.05
        # At first the streams lose packets, and deliver less than the link would; later a queue tells what it carries.
        lossy, queue_s = turn < 8, 0.03 if turn < 8 or turn == 300 else 0.0
        got = 6e6 if lossy else min(20e6, pace.rate or 15e6)
        pace.tick(now, rtt_s=0.05 + queue_s, least_rtt_s=0.05, delivered=got, urgent=urgent)
        if turn == 310:
            assert pace.rate > 15e6


def test_without_tokens_bulk_does_not_give_way_to_a_queue_of_others():
    pace, now, held = Pace(), 0.0, 0
    for _ in range(600):
        now += 0.1
        pace.tick(now, rtt_s=0.2, least_rtt_s=0.1, delivered=10e6, urgent=False)
        held += pace.rate is not None
    assert held < 150


def test_bulk_begins_at_what_the_link_was_seen_to_carry():
    new, known = Pace(), Pace()
    new.begin()
    known.begin(50e6)
    assert new.rate == 1 << 20
    assert 0.5 * 50e6 < known.rate < 50e6


def test_a_link_that_got_faster_is_found_out():
    link, pace, now = Pipeline(2e6, 0.05), Pace(), 0.0
    pace.begin()
    for turn in range(300):
        if turn == 100:
            link.rate = 20e6
        now += 0.05
        seen_s, got = link.turn(pace.rate)
        pace.tick(now, rtt_s=max(seen_s, 0.05), least_rtt_s=0.05, delivered=got)
    assert pace.rate > 15e6


def test_bulk_is_not_starved_by_others_who_fill_the_queue():
    pace, now = Pace(), 0.0
    pace.begin()
    for _ in range(20):
        now += 0.1
        pace.tick(now, rtt_s=0.1, least_rtt_s=0.1, delivered=10e6)
    for _ in range(100):
        now += 0.1
        pace.tick(now, rtt_s=0.3, least_rtt_s=0.1, delivered=4e6)
    assert pace.rate >= 0.5 * 4e6
    pace.tick(now + 0.1, rtt_s=0.1, least_rtt_s=0.1, delivered=4e6, urgent=False)
    assert pace.rate is None
