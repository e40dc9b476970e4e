"""What the first stage feeds into the ring: decode first, prompts in chunks and in turn, and no more than fits."""

from __future__ import annotations

import pytest

from mesh.errors import RequestError
from mesh.runtime.frames import Drawn
from mesh.runtime.protocol import Request
from mesh.runtime.scheduler import Scheduler, Work


def request(name="r", length=5, max_tokens=10, done=0, **options) -> Request:
    return Request(name, tuple(range(length + done)), length, max_tokens, **options)


def all_work(scheduler: Scheduler) -> list[Work]:
    found = []
    while (work := scheduler.next()) is not None:
        found.append(work)
    return found


def test_a_prompt_enters_in_chunks_of_which_the_first_says_how_to_draw_and_the_last_draws():
    scheduler = Scheduler(context=100, window=9, chunk=4)
    scheduler.start(request(length=10, seed=3, stop_tokens=(2,)))
    work = all_work(scheduler)
    assert [(w.position, len(w.tokens), w.draw) for w in work] == [(0, 4, False), (4, 4, False), (8, 2, True)]
    assert [w.sampling is not None for w in work] == [True, False, False]
    assert (work[0].sampling.seed, work[0].sampling.stop_tokens, work[0].sampling.ordinal) == (3, [2], 0)


def test_a_resumed_request_draws_on_at_the_next_index():
    scheduler = Scheduler(context=100, window=9)
    scheduler.start(request(length=5, done=3))
    (work,) = all_work(scheduler)
    assert (len(work.tokens), work.sampling.ordinal) == (8, 3)
    assert scheduler.drawn(Drawn(work.number, 3, 42, "")) is None
    assert all_work(scheduler) == [Work(work.number, 8, [42], True, None)]


def test_decode_goes_before_prefill_and_prompts_take_turns():
    scheduler = Scheduler(context=1000, window=99, chunk=4)
    scheduler.start(request("a", 4))
    first = scheduler.next()
    scheduler.start(request("b", 12))
    scheduler.start(request("c", 12))
    order = [scheduler.next().number, scheduler.next().number]
    scheduler.drawn(Drawn(first.number, 0, 7, ""))
    order += [scheduler.next().number for _ in range(3)]
    assert order == [2, 3, 1, 2, 3]


def test_no_more_chunks_are_in_the_ring_than_the_window():
    scheduler = Scheduler(context=1000, window=2, chunk=1)
    scheduler.start(request(length=5))
    assert len(all_work(scheduler)) == 2
    scheduler.acknowledged(1)
    assert len(all_work(scheduler)) == 1


def test_requests_wait_until_the_kv_caches_have_room():
    scheduler = Scheduler(context=20, window=9)
    scheduler.start(request("a", 5, 10))
    scheduler.start(request("b", 5, 10))
    (only,) = all_work(scheduler)
    assert only.sampling.request == "a"
    assert scheduler.drawn(Drawn(only.number, 0, 1, "stop")) == only.number
    assert [work.sampling.request for work in all_work(scheduler)] == ["b"]


def test_a_stopped_request_leaves_nothing_behind():
    scheduler = Scheduler(context=20, window=9, chunk=1)
    scheduler.start(request("a", 5, 10))
    scheduler.start(request("b", 5, 10))
    assert scheduler.stop("b") is None
    number = scheduler.next().number
    assert scheduler.stop("a") == number
    assert scheduler.next() is None
    assert scheduler.drawn(Drawn(number, 0, 1, "")) is None
    assert scheduler.stop("a") is None
    scheduler.start(request("a", 5, 10))
    assert scheduler.next().number != number


def test_a_token_that_arrives_twice_or_out_of_turn_is_not_fed_on():
    scheduler = Scheduler(context=100, window=9)
    scheduler.start(request())
    (work,) = all_work(scheduler)
    scheduler.drawn(Drawn(work.number, 0, 1, ""))
    scheduler.drawn(Drawn(work.number, 0, 1, ""))
    assert len(all_work(scheduler)) == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Request("r", (), 0, 5), "empty"),
        (Request("r", (1,), 0, 5), "empty"),
        (Request("r", (1,), 2, 5), "empty"),
        (Request("r", tuple(range(100)), 100, 5), "no room in a context of 100"),
        (Request("r", (1, 2), 1, 1), "leaves no token"),
    ],
)
def test_a_malformed_request_is_refused_in_words(bad, words):
    with pytest.raises(RequestError, match=words):
        Scheduler(context=100, window=9).start(bad)


def test_a_request_under_way_is_not_started_twice():
    scheduler = Scheduler(context=100, window=9)
    scheduler.start(request())
    with pytest.raises(RequestError, match="already under way"):
        scheduler.start(request())
