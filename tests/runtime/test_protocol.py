"""The control messages and the frames of the ring: what goes in comes out, and nonsense is refused in words."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RequestError, WorkerError
from mesh.runtime.frames import About, Drawn, Sampling, Step
from mesh.runtime.protocol import (
    Abort,
    AliveEvent,
    Connect,
    Decoder,
    FailureEvent,
    Neighbour,
    Ping,
    Prepare,
    Progress,
    ProtocolError,
    Release,
    Reply,
    Request,
    Start,
    Stop,
    TokenEvent,
    encode,
)
from mesh.runtime.work import Decoded

ids = st.integers(0, 2**32)
epochs = st.tuples(st.integers(0, 2**63), st.text(max_size=8))
tokens = st.lists(st.integers(0, 2**31), max_size=20).map(tuple)
requests = st.builds(
    Request, st.text(max_size=9), tokens, ids, ids, st.floats(0, 2), st.floats(0, 1), ids, st.integers(0, 2**64 - 1),
    tokens,
)  # fmt: skip
neighbours = st.builds(
    Neighbour, st.sampled_from(["next", "previous", "shard"]), st.integers(0, 99), st.text(max_size=9), st.just("tcp"),
    st.binary(max_size=40), st.binary(min_size=32, max_size=32), st.binary(max_size=40), st.booleans(), st.floats(0, 1),
)  # fmt: skip
commands = st.one_of(
    st.builds(Prepare, ids, epochs, st.just({"job": "j", "kv_heads": [0, 1]}), st.just(("tcp", "ucx")), st.just("::1")),
    st.builds(Connect, ids, epochs, st.lists(neighbours, max_size=3).map(tuple), st.floats(0, 99)),
    st.builds(Start, ids, epochs, requests),
    st.builds(Stop, ids, epochs, st.text(max_size=9)),
    st.builds(Abort, ids, epochs),
    st.builds(Release, ids, epochs),
    st.builds(Ping, ids),
)
events = st.one_of(
    st.builds(Reply, ids, st.text(max_size=9), st.text(max_size=9), st.just({"addresses": {"tcp": b"a"}})),
    st.builds(Progress, ids, ids, ids),
    st.builds(TokenEvent, epochs, st.text(max_size=9), ids, ids, st.just("stop"), st.just({"compute_s": 0.5})),
    st.builds(FailureEvent, epochs, st.text(max_size=9), st.text(max_size=9), st.booleans()),
    st.builds(AliveEvent, epochs, ids, st.builds(Decoded, *(st.floats(0, 9) for _ in Decoded._fields))),
)


def in_pieces(decoder: Decoder, data: bytes, size: int) -> list:
    return [message for start in range(0, len(data), size) for message in decoder.feed(data[start : start + size])]


@given(st.lists(commands, max_size=4), st.integers(1, 50))
def test_commands_arrive_as_they_were_sent_however_the_pipe_cuts_them(sent, size):
    assert in_pieces(Decoder.commands(), b"".join(encode(command) for command in sent), size) == sent


@given(st.lists(events, max_size=4), st.integers(1, 50))
def test_events_arrive_as_they_were_sent_however_the_pipe_cuts_them(sent, size):
    assert in_pieces(Decoder.events(), b"".join(encode(event) for event in sent), size) == sent


@given(st.binary(max_size=60))
def test_bytes_that_nobody_sends_are_a_protocol_error_or_wait_for_more(data):
    try:
        Decoder.commands().feed(len(data).to_bytes(4, "big") + data)
    except ProtocolError:
        pass


def test_a_length_that_would_fill_the_memory_is_refused_before_it_arrives():
    with pytest.raises(ProtocolError, match="announced"):
        Decoder.events().feed(b"\xff\xff\xff\xff")


def test_a_reply_raises_the_error_that_the_worker_met():
    assert Reply(1, body={"a": 1}).check() == {"a": 1}
    with pytest.raises(RequestError, match="too long"):
        Reply.of_error(1, RequestError("too long")).check()
    with pytest.raises(WorkerError, match="odd"):
        Reply(1, "unheard-of", "odd").check()


def test_a_resumed_request_counts_from_the_end_of_its_prompt():
    assert Request("r", (1, 2, 3, 4, 5), 3, 9).index == 2


@given(
    st.builds(
        Step, st.integers(1, 2**40), st.integers(0, 2**40), st.integers(1, 65536), st.booleans(), st.floats(0, 9),
        st.floats(0, 9),
        st.none() | st.builds(Sampling, st.text(max_size=5), ids, ids, st.floats(0, 1), st.floats(0, 1), ids, ids,
                              st.lists(ids, max_size=3)),
        st.floats(0, 9), st.floats(0, 9),
    )
)  # fmt: skip
def test_steps_arrive_as_they_were_sent(step):
    assert Step.decode(step.encode()) == step


def test_small_frames_arrive_as_they_were_sent():
    assert Drawn.decode(Drawn(1, 2, 3, "stop").encode()) == Drawn(1, 2, 3, "stop")
    assert About.decode(About(7).encode()) == About(7)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [1, 2, 3],
        [-1, 0, 1, True, 0.0, 0.0, None],
        [1, -1, 1, True, 0.0, 0.0, None],
        [1, 0, 0, True, 0.0, 0.0, None],
        [1, 0, 1 << 40, True, 0.0, 0.0, None],
        [1, 0, 1, True, float("nan"), 0.0, None],
        ["1", 0, 1, True, 0.0, 0.0, None],
        [1, 0, 1, True, 0.0, 0.0, ["r"]],
        {"number": 1},
    ],
)
def test_a_step_out_of_bounds_is_refused(fields):
    with pytest.raises(ProtocolError):
        Step.decode(msgpack.packb(fields))


@given(st.binary(max_size=40))
def test_frames_of_random_bytes_never_raise_anything_but_a_protocol_error(meta):
    for kind in (Step, Drawn, About):
        try:
            kind.decode(meta)
        except ProtocolError:
            pass
