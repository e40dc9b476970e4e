"""The step loop, in one process: real channels in memory, a model that notices every mistake."""

from __future__ import annotations

import threading
import time

import pytest
from engine_fakes import EPOCH, Cast, argmax, expected

from mesh.errors import RequestError, WorkerError
from mesh.runtime.protocol import (
    Abort,
    Connect,
    FailureEvent,
    Neighbour,
    Ping,
    Prepare,
    Progress,
    Release,
    Request,
    Start,
    Stop,
)

PROMPT = [5, 17, 3, 60, 2]


@pytest.fixture
def cast(request):
    made = []

    def make(*sizes, **options):
        made.append(Cast(list(sizes), **options))
        made[-1].connect()
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_any_number_of_stages_gives_the_same_tokens(cast, stages):
    ring = cast(*[1] * stages)
    ring.start(PROMPT, 20).check()
    assert ring.finish() == expected(PROMPT, 20)
    events = ring.last.tokens()
    assert [event.index for event in events] == list(range(20))
    assert [event.finish_reason for event in events] == [""] * 19 + ["length"]
    assert all(event.epoch == EPOCH and min(event.timings.values()) >= 0 for event in events)


@pytest.mark.parametrize("stages", [1, 3])
def test_a_finished_request_leaves_no_kv_cache_in_any_stage(cast, stages):
    ring = cast(*[1] * stages)
    ring.start(PROMPT, 4).check()
    ring.finish()
    ring.settle()
    assert [seat.model.held for seat in ring.seats] == [{}] * stages


def test_a_long_prompt_goes_through_in_chunks_and_draws_once(cast):
    ring = cast(1, 1, 1)
    prompt = [token % 50 for token in range(1300)]
    ring.start(prompt, 3).check()
    assert ring.finish() == expected(prompt, 3)
    assert ring.last.model.chunks == [512, 512, 276, 1, 1]


def test_several_requests_share_the_ring(cast):
    ring = cast(1, 1)
    for number in range(5):
        ring.start([number + 1, 9], 12, request=f"r{number}").check()
    for number in range(5):
        assert ring.finish(f"r{number}") == expected([number + 1, 9], 12)


def test_a_request_resumed_with_its_tokens_continues_at_the_next_index(cast):
    whole = expected(PROMPT, 10)
    indices = []

    def sample(logits, **options):
        indices.append((options["seed"], options["index"]))
        return argmax(logits)

    ring = cast(1, 1, sample=sample)
    ring.start(PROMPT, 10, done=whole[:6], seed=11).check()
    assert ring.finish() == whole[6:]
    assert indices == [(11, index) for index in range(6, 10)]


def test_an_end_of_sequence_token_ends_the_request(cast):
    ring = cast(1, 1)
    whole = expected(PROMPT, 10)
    ring.start(PROMPT, 10, stop_tokens=(whole[3],)).check()
    assert ring.finish() == whole[: whole.index(whole[3]) + 1]
    assert ring.last.tokens()[-1].finish_reason == "stop"


def test_a_full_context_ends_the_request(cast):
    ring = cast(1, 1, context=9)
    ring.start(PROMPT, 100).check()
    assert len(ring.finish()) == 4
    assert ring.last.tokens()[-1].finish_reason == "length"


def test_a_stopped_request_ends_everywhere_and_the_others_go_on(cast):
    ring = cast(1, 1, 1)
    ring.start(PROMPT, 3000, request="long").check()
    ring.start(PROMPT, 30, request="r").check()
    ring.until(lambda: len(ring.last.tokens("long")) > 3)
    ring.told(ring.first, ring.first.tell(Stop, EPOCH, "long")).check()
    assert ring.finish() == expected(PROMPT, 30)
    ring.settle()
    assert [seat.model.held for seat in ring.seats] == [{}] * 3
    assert len(ring.last.tokens("long")) < 100
    ring.told(ring.first, ring.first.tell(Stop, EPOCH, "long")).check()


def test_a_request_that_cannot_be_served_is_refused_with_its_reason(cast):
    ring = cast(1, 1, context=16)
    with pytest.raises(RequestError, match="context of 16"):
        ring.start(list(range(16)), 5).check()
    other = ring.seats[1]
    with pytest.raises(WorkerError, match="first stage"):
        ring.told(other, other.tell(Start, EPOCH, Request("r", (1,), 1, 5))).check()


def test_loading_reports_progress_and_answers_pings(cast):
    ring = cast(1)
    assert [event.loaded_bytes for event in ring.first.of(Progress)] == [0, 1000]
    assert ring.told(ring.first, ring.first.tell(Ping)).check()["epoch"] == list(EPOCH)


def test_an_older_epoch_is_refused_whatever_it_asks(cast):
    ring = cast(1, 1)
    old = (0, "zzz")
    seat = ring.first
    for tell in (
        (Prepare, old, seat.a.to_dict(), ("memory",), ""),
        (Connect, old, (), 1.0),
        (Start, old, Request("r", (1,), 1, 5)),
        (Stop, old, "r"),
        (Abort, old),
        (Release, old),
    ):
        with pytest.raises(WorkerError, match="is over"):
            ring.told(seat, seat.tell(*tell)).check()
    ring.start(PROMPT, 5).check()
    assert ring.finish() == expected(PROMPT, 5)
    assert not seat.engine.ended


def test_a_newer_epoch_ends_what_is_in_flight_and_keeps_the_weights(cast):
    ring = cast(1, 1)
    ring.start(PROMPT, 3000).check()
    ring.until(lambda: len(ring.last.tokens()) > 5)
    so_far = [event.token for event in ring.last.tokens()]
    ring.epoch = (2, "a")
    ring.connect()
    for seat in ring.seats:
        seat.events.clear()
    assert [seat.model.loads for seat in ring.seats] == [2, 2]
    assert [seat.model.held for seat in ring.seats] == [{}, {}]
    ring.start(PROMPT, len(so_far) + 5, done=so_far).check()
    assert so_far + ring.finish() == expected(PROMPT, len(so_far) + 5)
    assert {event.epoch for event in ring.last.tokens()} == {(2, "a")}


def test_a_request_needs_a_connected_ring(cast):
    ring = cast(1)
    ring.told(ring.first, ring.first.tell(Abort, EPOCH)).check()
    with pytest.raises(WorkerError, match="not connected"):
        ring.start(PROMPT, 5).check()
    with pytest.raises(WorkerError, match="nothing is prepared under epoch 3"):
        ring.told(ring.first, ring.first.tell(Connect, (3, ""), (), 1.0)).check()


def test_neighbours_that_do_not_fit_the_assignment_are_refused(cast):
    ring = cast(1, 1)
    stray = Neighbour("shard", 1, "x", "memory", b"", bytes(32), b"h")
    with pytest.raises(WorkerError, match="needs the neighbours"):
        ring.told(ring.first, ring.first.tell(Connect, EPOCH, (stray,), 1.0)).check()


def test_a_neighbour_that_never_answers_is_named_after_the_deadline():
    ring = Cast([1, 1])
    ends = ring.neighbours(ring.prepare())
    seat = ring.first
    began = time.monotonic()
    id = seat.tell(Connect, EPOCH, tuple(ends[seat.name]), 0.05)
    ring.seats = [seat]
    ring.told(seat, id)
    assert time.monotonic() - began < 2
    assert "site1/0" in seat.reply(id).message and seat.reply(id).code == "deadline"
    ring.close()


def test_a_dead_neighbour_is_accused_once_and_the_survivors_serve_the_next_epoch(cast):
    ring = cast(1, 1, 1)
    ring.start(PROMPT, 3000).check()
    ring.until(lambda: len(ring.last.tokens()) > 3)
    dead = ring.seats.pop(1)
    for channel in dead.engine.links.channels:
        channel.abort()
    ring.until(lambda: all(seat.of(FailureEvent) for seat in ring.seats))
    ring.settle()
    for seat in ring.seats:
        (failure,) = seat.of(FailureEvent)
        assert (failure.neighbour, failure.fatal, failure.epoch) == ("site1/0", False, EPOCH)
    with pytest.raises(WorkerError, match="broken"):
        ring.start(PROMPT, 5, request="other").check()
    ring.epoch = (2, "")
    replacement = Cast([1, 1, 1]).seats[1]
    ring.seats.insert(1, replacement)
    ring.connect()
    ring.start(PROMPT, 10, request="again").check()
    assert ring.finish("again") == expected(PROMPT, 10)
    dead.engine.links.close()


def test_a_model_that_fails_breaks_the_ring_and_blames_nobody_else(cast):
    ring = cast(1, 1)
    ring.seats[1].model.raises = ValueError("a nan\nsomewhere")
    ring.start(PROMPT, 5).check()
    ring.until(lambda: ring.seats[1].of(FailureEvent))
    ring.settle()
    (failure,) = ring.seats[1].of(FailureEvent)
    assert (failure.neighbour, failure.reason, failure.fatal) == ("", "ValueError: a nan somewhere", False)
    assert not ring.first.of(FailureEvent)


def test_activations_that_do_not_continue_what_is_held_break_the_ring(cast):
    ring = cast(1, 1)
    ring.start(PROMPT, 3000).check()
    ring.until(lambda: len(ring.last.tokens()) > 2)
    ring.last.engine._ring._filled[1] += 1
    ring.until(lambda: ring.last.of(FailureEvent))
    (failure,) = ring.last.of(FailureEvent)
    assert failure.neighbour == "site0/0" and "arrived where" in failure.reason


def test_released_it_ends(cast):
    ring = cast(1)
    ring.told(ring.first, ring.first.tell(Release, EPOCH)).check()
    assert ring.first.engine.ended


class TestShards:
    """Stages of several shards: collectives wait for each other, so every engine has a thread."""

    @pytest.fixture
    def running(self):
        casts, threads = [], []

        def make(*sizes):
            ring = Cast(list(sizes), backend="tcp")
            ring.threaded = True
            casts.append(ring)
            for seat in ring.seats:
                threads.append(threading.Thread(target=seat.engine.run, daemon=True))
                threads[-1].start()
            ring.connect()
            return ring

        yield make
        for ring in casts:
            for seat in ring.seats:
                seat.tell(Release, (99, ""))
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()

    @pytest.mark.parametrize("sizes", [(2,), (3,), (2, 1), (1, 2), (2, 2)])
    def test_any_mix_of_stages_and_shards_gives_the_same_tokens(self, running, sizes):
        ring = running(*sizes)
        ring.start(PROMPT, 8).check()
        ring.start([4, 4], 8, request="other").check()
        assert ring.finish() == expected(PROMPT, 8)
        assert ring.finish("other") == expected([4, 4], 8)
        ring.until(lambda: all(seat.model.held == {} for seat in ring.seats))

    def test_the_death_of_a_shard_is_noticed_by_its_stage(self, running):
        ring = running(2, 1)
        dead = ring.seats.pop(1)
        dead.tell(Release, EPOCH)
        ring.until(lambda: ring.first.of(FailureEvent))
        assert ring.first.of(FailureEvent)[0].neighbour == "site0/1"
        assert not ring.seats[1].of(FailureEvent)

    def test_a_newer_epoch_gets_a_shard_out_of_a_collective_that_nobody_else_joins(self, running):
        ring = running(2)
        stuck = threading.Event()
        other = ring.seats[1]

        def hang(*args, **options):
            stuck.set()
            time.sleep(1.0)
            raise ValueError("late")

        other.model.forward = hang
        ring.start(PROMPT, 5).check()
        stuck.wait(5)
        began = time.monotonic()
        ring.epoch = (2, "")
        id = ring.first.tell(Prepare, (2, ""), ring.first.a.to_dict(), ("tcp",), "127.0.0.1")
        ring.told(ring.first, id).check()
        assert time.monotonic() - began < 0.5
        assert not ring.first.of(FailureEvent)
