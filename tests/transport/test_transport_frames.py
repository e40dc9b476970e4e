"""Frames and the handshake are pure: honest bytes open, all others are a FrameError."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import FrameError
from transport.frames import CHUNK_BYTES, HEADER_BYTES, MAX_META_BYTES, FrameReader, FrameWriter

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
@pytest.mark.parametrize("size", [CHUNK_BYTES - 4, CHUNK_BYTES - 3, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_long_frames_are_sealed_in_chunks_and_the_next_frame_still_opens(key, size):
    writer, reader = FrameWriter(key), FrameReader(key)
    payload = bytes(range(251)) * (size // 251) + bytes(size % 251)
    for _ in range(2):
        frame = reader.read(joined(writer.write(3, b"meta", memoryview(payload), 0)))
        assert frame.meta == b"meta"
        assert frame.payload == payload
    assert reader.read(joined(writer.write(4, b"small", b"", 0))).meta == b"small"


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
