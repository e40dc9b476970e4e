"""A long prompt lets others' tokens pass, and whatever overtakes whatever, every request gets its own tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fakes import EPOCH, Cast, expected
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.runtime.frames import Kind, Step
from mesh.runtime.priorities import LONG_S, Priorities
from mesh.runtime.protocol import FailureEvent, Stop

LONG = [token % 50 for token in range(1100)]  # two chunks, and a short one
SHORT = [5, 17, 3]
#: A link, and what takes it just long enough.
RATE, LARGE = 12.5e6, 1_250_000


def step(number, position, length, draw=False):
    return Step(number, position, length, draw, 0.0, 0.0)


def decoding(bytes_per_s=RATE):
    """What a lead has sent on of request 1, which decodes."""
    found = Priorities(bytes_per_s)
    assert not found.bulk(step(1, 0, 3, draw=True), 100)
    assert not found.bulk(step(1, 3, 1, draw=True), 100)
    return found


def test_a_prompt_is_bulk_to_its_short_last_chunk_and_its_tokens_are_not():
    found = decoding()
    assert found.bulk(step(2, 0, 512), LARGE)
    assert not found.bulk(step(1, 4, 1, draw=True), 100)
    assert found.bulk(step(2, 512, 1, draw=True), 100)
    assert not found.bulk(step(2, 513, 1, draw=True), 100)
    assert not found.end(2)


def test_where_nobody_else_decodes_a_prompt_goes_the_fastest_way():
    found = Priorities(RATE)
    assert not found.bulk(step(1, 0, 512), LARGE)
    assert not found.bulk(step(2, 0, 512), LARGE)
    assert not found.bulk(step(1, 512, 3, draw=True), 100)
    assert not found.bulk(step(1, 515, 1, draw=True), 100)
    # It began in order and stays so, although somebody decodes by now.
    assert not found.bulk(step(2, 512, 512), LARGE)
    found.end(1)
    assert not found.bulk(step(3, 0, 512), LARGE)


@pytest.mark.parametrize(("rate", "size"), [(0.0, 1 << 30), (RATE, LARGE - 1), (10 * RATE, LARGE)])
def test_within_a_site_and_where_a_chunk_is_soon_through_nothing_is_bulk(rate, size):
    assert not decoding(rate).bulk(step(2, 0, 512), size)


def test_an_end_tells_whether_bulk_may_come_after_it():
    found = decoding()
    found.bulk(step(2, 0, 512), LARGE)
    found.bulk(step(3, 0, 512), LARGE - 1)
    assert [found.end(number) for number in (1, 2, 3, 2)] == [False, True, False, False]


# ------------------------------------------------------------------------------------------------ rings


class Overtaken:
    """A channel on which bulk stays until it is let go, in order, while everything else passes."""

    def __init__(self, channel):
        self.channel = channel
        self.held = []
        self.sent = []

    def send(self, meta, payload=b"", *, kind=0, bulk=False):
        self.sent.append((kind, bulk))
        if bulk:
            self.held.append((meta, bytes(payload), kind))
            return None
        return self.channel.send(meta, payload, kind=kind)

    def let_go(self, count=1 << 30):
        for meta, payload, kind in self.held[:count]:
            self.channel.send(meta, payload, kind=kind)
        del self.held[:count]

    def __getattr__(self, name):
        return getattr(self.channel, name)


#: The fake model's hidden states are eight bytes a position: over such a link a whole chunk takes long, and no other.
SLOW = 512 * 8 / LONG_S


class Ring(Cast):
    """A ring over slow links, whose first stage has time for a prompt beside what decodes: it waits for the others."""

    def __init__(self, stages, backend="memory"):
        super().__init__([1] * stages, backend=backend)
        for seat in self.seats:
            seat.a = replace(seat.a, onward_bytes_per_s=SLOW)
        self.connect()

    def until(self, done, within_s=10.0):
        def turned():
            self.first.engine.turn()
            return done()

        super().until(turned, within_s)


def overtaking(ring):
    """Put bulk on hold between all stages; the channels."""
    found = []
    for lead in ring.leads[:-1]:
        lead.engine.links.next = Overtaken(lead.engine.links.next)
        found.append(lead.engine.links.next)
    return found


def broken(ring):
    return [event for seat in ring.seats for event in seat.of(FailureEvent)]


def rest(ring):
    """What is left behind anywhere."""
    rings = [seat.engine._ring for seat in ring.seats]
    return [seat.model.held for seat in ring.seats if seat.model.held] + [r._ended for r in rings if r._ended]


@pytest.fixture
def cast():
    made = []

    def make(stages, **options):
        made.append(Ring(stages, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("stages", [2, 3])
def test_others_decode_while_a_prompt_waits_and_its_own_tokens_are_right(cast, stages):
    ring = cast(stages)
    ways = overtaking(ring)
    ring.start(SHORT, 400, request="other").check()
    ring.until(lambda: len(ring.last.tokens("other")) > 2)
    ring.start(LONG, 5).check()
    ring.until(lambda: len(ways[0].held) == 3)
    before = len(ring.last.tokens("other"))
    ring.until(lambda: len(ring.last.tokens("other")) > before + 20)
    assert not ring.last.tokens()

    def let_go():
        for way in ways:
            way.let_go(1)
        return ring.last.tokens() and ring.last.tokens()[-1].finish_reason

    ring.until(let_go)
    assert ring.finish() == expected(LONG, 5)
    assert ring.finish("other") == expected(SHORT, 400)
    ring.settle()
    assert (rest(ring), broken(ring)) == ([], [])


def test_over_tcp_a_prompt_and_what_decodes_beside_it_get_their_tokens(cast):
    ring = cast(3, backend="tcp")
    ring.start(SHORT, 200, request="other").check()
    ring.until(lambda: len(ring.last.tokens("other")) > 2)
    ring.start(LONG, 5).check()
    ring.until(lambda: len(ring.last.tokens()) == 5)
    assert ring.first.engine.links.next._bulk_bytes == len(LONG) * 8
    assert ring.finish() == expected(LONG, 5)
    assert ring.finish("other") == expected(SHORT, 200)
    ring.settle()
    assert (rest(ring), broken(ring)) == ([], [])


def test_alone_a_prompt_is_not_bulk(cast):
    ring = cast(2)
    (way,) = overtaking(ring)
    ring.start(LONG, 5).check()
    assert ring.finish() == expected(LONG, 5)
    assert not any(bulk for _, bulk in way.sent)


@pytest.mark.parametrize("arrived", [0, 1, 2])
def test_a_prompt_that_is_stopped_leaves_nothing_behind_whatever_of_it_had_arrived(cast, arrived):
    ring = cast(3)
    ways = overtaking(ring)
    ring.start(SHORT, 2000, request="other").check()
    ring.until(lambda: len(ring.last.tokens("other")) > 2)
    ring.start(LONG, 5).check()
    ring.until(lambda: len(ways[0].held) == 3)
    ways[0].let_go(arrived)
    ring.until(lambda: len(ways[1].held) == arrived)
    ring.told(ring.first, ring.first.tell(Stop, EPOCH, "r")).check()
    ring.until(lambda: len(ring.seats[1].model.held) == 1)  # its cache is gone at once, not behind its chunks
    steps = len(ring.seats[1].model.chunks)
    for way in ways:
        way.let_go()
    ring.until(lambda: not any(seat.engine._ring._ended for seat in ring.seats))
    assert 512 not in ring.seats[1].model.chunks[steps:]  # and nothing was computed for nobody
    ring.start(LONG, 5, request="r").check()
    ring.until(lambda: ways[0].held)

    def let_go():
        for way in ways:
            way.let_go()
        return ring.last.tokens() and ring.last.tokens()[-1].finish_reason

    ring.until(let_go)
    assert ring.finish() == expected(LONG, 5)
    ring.told(ring.first, ring.first.tell(Stop, EPOCH, "other")).check()
    ring.settle()
    assert (rest(ring), broken(ring)) == ([], [])


def test_a_prompt_whose_first_token_is_its_last_leaves_nothing_behind(cast):
    ring = cast(2)
    (way,) = overtaking(ring)
    ring.start(SHORT, 50, request="other").check()
    ring.until(lambda: len(ring.last.tokens("other")) > 2)
    ring.start(LONG, 1).check()
    ring.until(lambda: len(way.held) == 3)
    way.let_go()
    assert ring.finish() == expected(LONG, 1)
    ring.until(lambda: [kind for _, _, kind in way.held] == [Kind.END])
    way.let_go()
    assert ring.finish("other") == expected(SHORT, 50)
    ring.settle()
    assert (rest(ring), broken(ring)) == ([], [])


def test_what_waits_as_bulk_ends_with_its_epoch(cast):
    ring = cast(2)
    (way,) = overtaking(ring)
    ring.start(SHORT, 2000, request="other").check()
    ring.until(lambda: len(ring.last.tokens("other")) > 2)
    ring.start(LONG, 5).check()
    ring.until(lambda: len(way.held) == 3)
    ring.epoch = (2, "owner")
    for seat in ring.seats:
        seat.a = replace(seat.a, epoch=ring.epoch)
        seat.events.clear()
    ring.connect()
    ring.start(LONG, 5).check()
    assert ring.finish() == expected(LONG, 5)
    ring.settle()
    assert (rest(ring), broken(ring)) == ([], [])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_overtakes_whatever_every_request_gets_its_tokens(data):
    ring = Ring(3)
    ways = overtaking(ring)
    ring.start(SHORT, 200, request="steady").check()
    prompts, stopped = {}, set()
    for number in range(data.draw(st.integers(1, 4))):
        for _ in range(data.draw(st.integers(0, 12))):
            for seat in ring.seats:
                seat.engine.turn()
            data.draw(st.sampled_from(ways)).let_go(data.draw(st.integers(0, 2)))
        name, prompt = f"r{number}", [(token + number) % 50 for token in range(data.draw(st.integers(1, 1300)))]
        prompts[name] = prompt
        ring.start(prompt, 4, request=name).check()
        if data.draw(st.booleans()):
            victim = data.draw(st.sampled_from(sorted(prompts)))
            stopped.add(victim)
            ring.told(ring.first, ring.first.tell(Stop, EPOCH, victim)).check()

    def done():
        for way in ways:
            way.let_go()
        wanted = [name for name in ("steady", *prompts) if name not in stopped]
        told = [ring.last.tokens(name) for name in wanted]
        return broken(ring) or all(events and events[-1].finish_reason for events in told)

    ring.until(done)
    ring.until(lambda: done() and not any(way.held for way in ways))
    ring.settle()
    assert broken(ring) == []
    for name, prompt in prompts.items():
        if name not in stopped:
            assert [event.token for event in ring.last.tokens(name)] == expected(prompt, 4)
    assert rest(ring) == []
    ring.close()
