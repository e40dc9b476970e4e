"""Buffers that messages are received into are used again, and never while somebody still looks at them."""

from __future__ import annotations

import random

import numpy as np

from transport.buffers import Landings

LONG = 300_000


def where(view):
    return np.frombuffer(view, np.uint8).ctypes.data


def test_memory_is_used_again_once_the_last_view_of_it_is_gone():
    landings = Landings()
    first = landings.take(LONG)
    place, part = where(first), first[100:200]
    del first
    second = landings.take(LONG)
    assert where(second) != place  # a slice still shows it
    del part
    assert where(landings.take(LONG)) == place


def test_the_memory_that_was_used_last_is_used_first():
    landings = Landings()
    views = [landings.take(LONG) for _ in range(4)]
    places = [where(view) for view in views]
    for view in views:
        view.release()
    views.clear()
    assert where(landings.take(LONG)) == places[-1]


def test_no_more_memory_is_remembered_than_may_be():
    landings = Landings(3 * LONG)
    held = [landings.take(LONG) for _ in range(10)]
    held.clear()
    assert landings._known_bytes == sum(memory.nbytes for _, memory in landings._known) == 3 * LONG


def test_what_was_made_from_a_view_keeps_it_too():
    landings = Landings()
    array = np.frombuffer(landings.take(LONG), np.float32)
    place = array.ctypes.data
    assert where(landings.take(LONG)) != place
    assert array.size == LONG // 4


def test_no_two_messages_that_are_held_share_memory():
    landings, rng, held = Landings(), random.Random(4), []
    for turn in range(300):
        view = landings.take(rng.choice((10, LONG, LONG + 5000, 2 * LONG)))
        view[:] = bytes([turn & 255]) * view.nbytes
        held.append((turn & 255, view))
        while len(held) > rng.randrange(6):
            held.pop(rng.randrange(len(held)))
        assert all(view[0] == view[-1] == mark for mark, view in held)
