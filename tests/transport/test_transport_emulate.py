"""The delay line: exact, ordered, and safe from bad clocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.emulate import DelayLine

SECOND = 10**9


def test_an_item_is_due_one_delay_after_it_was_sent_not_after_it_arrived():
    line = DelayLine(0.04)
    line.put("a", 1 * SECOND, 1 * SECOND + 30_000_000)
    assert line.due_ns == 1 * SECOND + 40_000_000
    assert line.take(line.due_ns - 1) is None
    assert line.take(line.due_ns) == "a"
    assert line.due_ns is None


@given(st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 2**40))), st.floats(0, 1))
def test_order_holds_and_nothing_is_held_longer_than_a_delay_after_it_arrived(arrivals, delay_s):
    line = DelayLine(delay_s)
    now_ns = 0
    for index, (stamp_ns, step_ns) in enumerate(arrivals):
        now_ns += step_ns
        line.put(index, stamp_ns, now_ns)
        assert line.due_ns <= now_ns + line.delay_ns
    taken = []
    while len(line):
        taken.append(line.take(now_ns + line.delay_ns))
    assert taken == list(range(len(arrivals)))


def test_a_negative_delay_is_refused():
    with pytest.raises(ValueError, match="past"):
        DelayLine(-1)
