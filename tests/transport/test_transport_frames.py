"""Frames and the handshake are pure: honest bytes open, all others are a FrameError."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import FrameError
from transport.buffers import _KEPT_BYTES, Buffers
from transport.frames import CHUNK_BYTES, HEADER_BYTES, JOINED_BYTES, MAX_META_BYTES, FrameReader, FrameWriter
from transport.tickets import DONE, Pending

KEY = bytes(range(32))
keys = st.sampled_from([None, KEY])
messages = st.tuples(st.integers(0, 255), st.binary(max_size=300), st.binary(max_size=5000))


def joined(parts):
    return memoryview(b"".join(parts))


@given(keys, st.lists(messages, max_size=6), st.integers(0, 2**64 - 1))
def test_what_is_written_is_read_in_order(key, sent, stamp_ns):
    writer, reader = FrameWriter(key), FrameReader(key)
    for kind, meta, payload in sent:
        frame = reader.read(joined(writer.write(kind, meta, payload, stamp_ns)))
        assert (frame.kind, frame.meta, bytes(frame.payload), frame.stamp_ns) == (kind, meta, payload, stamp_ns)


@pytest.mark.parametrize("key", [None, KEY], ids=["unsealed", "sealed"])
@pytest.mark.parametrize(
    "size", [JOINED_BYTES - 4, JOINED_BYTES - 3, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5]
)
def test_long_frames_are_sealed_in_chunks_and_the_next_frame_still_opens(key, size):
    writer, reader = FrameWriter(key), FrameReader(key)
    payload = bytes(range(251)) * (size // 251) + bytes(size % 251)
    for _ in range(2):
        frame = reader.read(joined(writer.write(3, b"meta", memoryview(payload), 0)))
        assert frame.meta == b"meta"
        assert frame.payload == payload
    assert reader.read(joined(writer.write(4, b"small", b"", 0))).meta == b"small"


@pytest.mark.parametrize("size", [100, JOINED_BYTES, CHUNK_BYTES, 2 * CHUNK_BYTES + 9])
def test_a_sealed_frame_opens_alike_in_memory_that_may_be_written_and_in_memory_that_may_not(size):
    payload = bytes(range(256)) * (size // 256 + 1)
    message = b"".join(FrameWriter(KEY).write(3, b"meta", payload, 0))
    for data in (memoryview(message), memoryview(bytearray(message))):
        frame = FrameReader(KEY).read(data)
        assert (frame.meta, frame.payload) == (b"meta", payload)
    assert FrameReader(KEY).read(memoryview(message)).payload == payload  # and what may not be written was not


@pytest.mark.parametrize("size", [JOINED_BYTES, CHUNK_BYTES, 2 * CHUNK_BYTES + 9])
def test_a_long_sealed_payload_is_opened_where_its_metadata_says(size):
    payload = bytes(range(256)) * (size // 256 + 1)
    message = b"".join(FrameWriter(KEY).write(3, b"meta", payload, 0))
    target = memoryview(bytearray(len(payload)))
    asked = []
    frame = FrameReader(KEY).read(memoryview(message), place=lambda *args: asked.append(args) or target)
    assert asked == [(b"meta", len(payload))]
    assert frame.payload is target
    assert target == payload
    assert FrameReader(KEY).read(memoryview(message)).payload == payload  # what may not be written was not


def test_a_sealed_payload_lies_in_a_buffer_that_is_used_again_once_its_ticket_is_done():
    writer, ticket = FrameWriter(KEY), Pending()
    payload = bytes(CHUNK_BYTES)

    def address(parts):
        return np.frombuffer(parts[1], np.uint8).ctypes.data

    first = address(writer.write(1, b"", payload, 0))
    writer.sent(ticket)
    second = address(writer.write(1, b"", payload, 0))
    writer.sent(DONE)
    assert second != first
    assert address(writer.write(1, b"", payload, 0)) == second
    # That frame was never said to be sent: its buffer is lost rather than used under somebody's hands.
    writer.write(1, b"", b"short", 0)
    writer.sent(DONE)
    ticket.done = True
    assert address(writer.write(1, b"", payload, 0)) == first


def test_no_more_buffers_are_kept_than_may_be():
    buffers = Buffers()
    tickets = [Pending() for _ in range(70)]
    for ticket in tickets:
        buffers.take(1 << 20)
        buffers.lend(ticket)
    for ticket in tickets:
        ticket.done = True
    assert buffers.take(1000).nbytes == 1000
    assert sum(buffer.nbytes for buffer in buffers._free) <= _KEPT_BYTES - (1 << 20)


@given(keys, st.binary(max_size=400))
def test_random_bytes_are_a_frame_error_and_nothing_worse(key, data):
    with pytest.raises(FrameError):
        FrameReader(key).read(memoryview(data))


@given(keys, st.binary(min_size=HEADER_BYTES, max_size=120))
def test_a_plausible_beginning_does_not_help_random_bytes(key, data):
    genuine = bytes(joined(FrameWriter(key).write(1, b"meta", b"payload", 0)))
    forged = genuine[:4] + data[4:]
    if forged != genuine:
        try:
            FrameReader(key).read(memoryview(forged))
        except FrameError:
            return
        assert key is None  # without a seal a frame of the right shape is a frame


@given(st.binary(max_size=50), st.binary(max_size=200), st.data())
def test_a_sealed_frame_with_any_bit_changed_does_not_open(meta, payload, data):
    sealed = bytearray(joined(FrameWriter(KEY).write(1, meta, payload, 123)))
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        FrameReader(KEY).read(memoryview(sealed))


@settings(max_examples=10)
@given(st.integers(0, 8 * (2 * CHUNK_BYTES + 100)))
def test_a_long_sealed_frame_with_a_bit_changed_does_not_open(bit):
    sealed = bytearray(joined(FrameWriter(KEY).write(1, b"meta", bytes(2 * CHUNK_BYTES + 10), 123)))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        FrameReader(KEY).read(memoryview(sealed))


@given(keys, st.integers(0, 300))
def test_a_frame_cut_short_or_made_longer_does_not_open(key, cut):
    whole = bytes(joined(FrameWriter(key).write(1, b"meta", bytes(200), 0)))
    for changed in (whole[: min(cut, len(whole) - 1)], whole + bytes(cut + 1)):
        with pytest.raises(FrameError):
            FrameReader(key).read(memoryview(changed))


@pytest.mark.parametrize("key", [None, KEY], ids=["unsealed", "sealed"])
@pytest.mark.parametrize("order", [(1,), (0, 0), (0, 2), (1, 0)])
def test_frames_lost_repeated_or_swapped_do_not_open(key, order):
    writer, reader = FrameWriter(key), FrameReader(key)
    frames = [joined(writer.write(1, b"%d" % n, b"", 0)) for n in range(3)]
    with pytest.raises(FrameError):
        for index in order:
            reader.read(frames[index])


def test_after_a_frame_error_nothing_opens_any_more():
    writer, reader = FrameWriter(KEY), FrameReader(KEY)
    good = joined(writer.write(1, b"", b"x", 0))
    with pytest.raises(FrameError):
        reader.read(memoryview(b"bad"))
    with pytest.raises(FrameError):
        reader.read(good)


def test_equal_frames_are_never_sealed_to_equal_bytes():
    writer = FrameWriter(KEY)
    bodies = {bytes(joined(writer.write(1, b"m", b"payload", 0))[HEADER_BYTES:]) for _ in range(100)}
    assert len(bodies) == 100


def test_what_no_neighbour_accepts_is_refused_at_the_sender():
    with pytest.raises(ValueError, match="too long"):
        FrameWriter(None).write(1, bytes(MAX_META_BYTES + 1), b"", 0)
