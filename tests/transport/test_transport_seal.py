"""The handshake and the seal: the same keys at both ends, new ones in time, and nobody else's bytes."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import FrameError
from transport.frames import FrameReader, FrameWriter
from transport.handshake import RANDOM_BYTES, answer_hello, read_hello, read_welcome, write_hello
from transport.seal import TAG_BYTES, Seal

KEY = bytes(range(32))
CONNECTOR, ACCEPTOR = b"c" * RANDOM_BYTES, b"a" * RANDOM_BYTES
keys = st.sampled_from([None, KEY])
randoms = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)
few = settings(max_examples=40, deadline=None)


def shake(key=KEY, name=b"name", connector=CONNECTOR, acceptor=ACCEPTOR):
    """The hello, the welcome, and the keys."""
    hello = write_hello(name, key, connector)
    welcome, made = answer_hello(read_hello(memoryview(hello)), key, acceptor)
    return hello, welcome, made


@few
@given(keys, st.binary(max_size=200), randoms, randoms)
def test_a_handshake_gives_both_ends_the_same_keys_each_way(key, name, connector, acceptor):
    hello, welcome, made = shake(key, name, connector, acceptor)
    assert read_hello(memoryview(hello)).name == name
    assert read_welcome(memoryview(welcome), hello, key, connector) == made
    assert made.connector != made.acceptor or key is None


def test_the_keys_change_with_everything_that_goes_into_them():
    made = [
        shake()[2],
        shake(key=bytes(32))[2],
        shake(name=b"another")[2],
        shake(connector=b"d" * RANDOM_BYTES)[2],
        shake(acceptor=b"d" * RANDOM_BYTES)[2],
    ]
    assert len({key for pair in made for key in pair}) == 2 * len(made)


def test_who_knows_the_channel_key_and_what_was_said_does_not_know_the_keys():
    hello, welcome, made = shake()
    for guess in (bytes(RANDOM_BYTES), ACCEPTOR[::-1], KEY):
        with pytest.raises(FrameError):
            assert read_welcome(memoryview(welcome), hello, KEY, guess) != made


@few
@given(st.binary(max_size=300))
def test_random_bytes_are_no_hello_and_no_welcome(data):
    with pytest.raises(FrameError):
        read_hello(memoryview(data))
    with pytest.raises(FrameError):
        read_welcome(memoryview(data), shake()[0], KEY, CONNECTOR)


@few
@given(keys, st.data())
def test_a_changed_hello_or_welcome_is_not_believed(key, data):
    hello, welcome, _ = shake(key)
    for genuine in (hello, welcome):
        changed = bytearray(genuine)
        bit = data.draw(st.integers(0, 8 * len(changed) - 1))
        changed[bit // 8] ^= 1 << bit % 8
        if key is None:
            continue  # nothing is proven without a key
        with pytest.raises(FrameError):
            if genuine is hello:
                answer_hello(read_hello(memoryview(changed)), key, ACCEPTOR)
            else:
                read_welcome(memoryview(changed), hello, key, CONNECTOR)


def test_a_recorded_handshake_proves_nothing():
    hello, welcome, _ = shake()
    again = write_hello(b"name", KEY, b"e" * RANDOM_BYTES)
    with pytest.raises(FrameError, match="does not hold"):
        read_welcome(memoryview(welcome), again, KEY, b"e" * RANDOM_BYTES)
    # A repeated hello is answered, with an ephemeral key of its own: what was recorded does not open.
    recorded = bytes(b"".join(FrameWriter(shake()[2].connector).write(1, b"", b"secret", 0)))
    _, fresh = answer_hello(read_hello(memoryview(hello)), KEY, b"f" * RANDOM_BYTES)
    with pytest.raises(FrameError, match="seal"):
        FrameReader(fresh.connector).read(memoryview(recorded))


def test_an_ephemeral_key_of_small_order_is_refused():
    hello = bytearray(write_hello(b"name", None, CONNECTOR))  # its ephemeral key is zero
    with pytest.raises(FrameError):
        answer_hello(read_hello(memoryview(hello))._replace(sealed=True), KEY, ACCEPTOR)
    from transport.handshake import _agree

    with pytest.raises(FrameError, match="no honest end"):
        _agree(KEY, CONNECTOR, bytes(32), b"")


def test_where_sealing_is_off_the_ends_prove_themselves_all_the_same():
    hello = write_hello(b"name", KEY, CONNECTOR, seal=False)
    for key, seal in ((bytes(32), False), (KEY, True), (None, False)):
        with pytest.raises(FrameError):
            answer_hello(read_hello(memoryview(hello)), key, ACCEPTOR, seal=seal)
    welcome, made = answer_hello(read_hello(memoryview(hello)), KEY, ACCEPTOR, seal=False)
    assert made == read_welcome(memoryview(welcome), hello, KEY, CONNECTOR) == (None, None)
    for key in (bytes(32), None):
        with pytest.raises(FrameError):
            read_welcome(memoryview(welcome), hello, key, CONNECTOR)


def test_an_unsealed_handshake_carries_no_keys():
    hello, welcome, made = shake(None)
    assert made == (None, None)
    changed = bytearray(welcome)
    changed[10] = 1
    with pytest.raises(FrameError):
        read_welcome(memoryview(changed), hello, None, CONNECTOR)


@pytest.mark.parametrize(("theirs", "ours"), [(KEY, bytes(32)), (KEY, None), (None, KEY)])
def test_ends_with_different_keys_do_not_meet(theirs, ours):
    with pytest.raises(FrameError):
        answer_hello(read_hello(memoryview(write_hello(b"name", theirs, CONNECTOR))), ours, ACCEPTOR)


def test_keys_and_names_of_another_length_are_mistakes_of_the_caller():
    for name, key, random in ((b"n", b"short", CONNECTOR), (b"n", KEY, b"short"), (bytes(5000), KEY, CONNECTOR)):
        with pytest.raises(ValueError, match="bytes"):
            write_hello(name, key, random)


# -- the seal


def turning(key=KEY):
    """A seal whose key lasts three calls or a hundred bytes."""
    return Seal(key, calls=3, size_bytes=100)


@few
@given(st.lists(st.binary(max_size=80), max_size=20))
def test_both_ends_replace_the_key_at_the_same_place_and_without_a_word(sent):
    near, far = turning(), turning()
    keys = set()
    for index, plain in enumerate(sent):
        header = b"%d" % index
        if index % 2:
            assert far.open(memoryview(near.seal(plain, header)), header) == plain
        else:
            sealed, opened = bytearray(len(plain) + TAG_BYTES), bytearray(len(plain))
            near.seal_into(memoryview(plain), header, memoryview(sealed))
            far.open_into(memoryview(sealed), header, memoryview(opened))
            assert opened == plain
        assert near._key == far._key
        keys.add(near._key)
    assert len(keys) >= -(-len(sent) // 3)


def test_a_replaced_key_is_forgotten_and_does_not_open_what_comes_after():
    near, old = turning(), turning()
    for _ in range(3):
        near.seal(b"", b"")
    later = near.seal(b"later", b"")
    assert near._key != KEY
    with pytest.raises(InvalidTag):
        Seal(KEY).open(memoryview(later), b"")
    for _ in range(3):
        old.seal(b"", b"")
    assert old.open(memoryview(later), b"") == b"later"


def test_no_two_calls_seal_alike_also_across_keys():
    near = turning()
    assert len({near.seal(b"same", b"") for _ in range(50)}) == 50


def test_lanes_under_one_key_never_seal_alike_and_do_not_open_each_other():
    first, second = Seal(KEY, calls=3), Seal(KEY, calls=3, lane=1)
    assert not {first.seal(b"same", b"") for _ in range(20)} & {second.seal(b"same", b"") for _ in range(20)}
    with pytest.raises(InvalidTag):
        Seal(KEY).open(memoryview(Seal(KEY, lane=1).seal(b"", b"")), b"")


@few
@given(st.lists(st.binary(max_size=60), min_size=2, max_size=12), st.data())
def test_frames_corrupted_truncated_replayed_swapped_or_reflected_do_not_open(sent, data):
    _, _, made = shake()
    writer, back, reader = FrameWriter(made.connector), FrameWriter(made.acceptor), FrameReader(made.connector)
    frames = [b"".join(writer.write(1, b"meta", plain, 0)) for plain in sent]
    at = data.draw(st.integers(0, len(frames) - 1))
    for frame in frames[:at]:
        reader.read(memoryview(frame))
    mirrored = [b"".join(back.write(1, b"meta", plain, 0)) for plain in sent]
    good = bytearray(frames[at])
    flipped = bytearray(good)
    flipped[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    hostile = {
        "corrupted": flipped,
        "truncated": good[: data.draw(st.integers(0, len(good) - 1))],
        "longer": good + b"\0",
        "another": frames[data.draw(st.integers(0, len(frames) - 1).filter(lambda index: index != at))],
        "reflected": mirrored[at],
    }
    with pytest.raises(FrameError):
        reader.read(memoryview(hostile[data.draw(st.sampled_from(sorted(hostile)))]))
    with pytest.raises(FrameError):  # and nothing opens any more
        reader.read(memoryview(good))
