"""The UCX backend alone: how long messages are laid out and received, and whether a process lives."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_harness import connect_pair, until

from transport import ChannelBroken, available, open_fabric
from transport.ucx_life import WORD_BYTES, watch, word
from transport.ucx_wire import CONTROL, LANES, LONG, SLOT_BYTES, lay_out, read_layout

sizes = st.lists(st.one_of(st.integers(0, 50), st.integers(8000, 9000), st.just(40_000)), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None)
@given(sizes)
def test_a_long_message_is_put_together_as_it_was_cut(sizes):
    parts = [bytes([index & 255]) * size for index, size in enumerate(sizes)]
    whole = b"".join(parts)
    layout = lay_out(parts, len(whole))
    assert len(layout.control) <= SLOT_BYTES
    length, lane, head_bytes, head = read_layout(memoryview(layout.control))
    assert (length, lane) == (len(whole), 1)
    bulk = iter(layout.bulk)
    if head is None:
        head = bytes(next(bulk))
    assert len(head) == head_bytes
    assert head + b"".join(bulk) == whole


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 9), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_an_impossible_layout_is_refused(tail, lane, head_bytes, length):
    message = memoryview(CONTROL.pack(LONG, 0, lane, head_bytes, length) + tail)
    try:
        found = read_layout(message)
    except ChannelBroken:
        return
    assert 1 <= found.lane == lane <= LANES
    assert found.head_bytes == head_bytes <= found.length == length
    assert found.head == (tail[:head_bytes] if found.head is not None else None)


@pytest.mark.skipif("ucx" not in available(), reason="ucxx is not installed (extra `ucx`)")
def test_few_long_messages_are_received_at_once_inside_a_machine():
    near, far = open_fabric("ucx"), open_fabric("ucx")
    try:
        sender, receiver = connect_pair(near, far)
        data = [bytes([n]) * (1 << 20) for n in range(12)]
        tickets = [sender.send(b"", each) for each in data]
        for each in data:
            found = []
            until(lambda found=found: (m := receiver.poll()) is not None and (found.append(m) or True), near)
            assert found[0].payload == each
        until(lambda: all(ticket.done for ticket in tickets), near, far)
        assert len(far._landings._known) <= 4
    finally:
        near.close()
        far.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pidfd is Linux's")
def test_the_end_of_a_process_is_told_also_while_nobody_waits_for_it():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = word()[: WORD_BYTES - 4] + struct.pack("<I", process.pid)
    descriptor = watch(theirs)
    assert descriptor is not None
    with os.fdopen(descriptor, "rb"):
        assert not select.select([descriptor], [], [], 0)[0]
        process.kill()
        assert select.select([descriptor], [], [], 10)[0]
    process.stdin.close()
    process.wait()
    with pytest.raises(ProcessLookupError):
        watch(theirs)


def test_a_process_of_elsewhere_or_oneself_is_not_watched():
    assert watch(word()) is None
    assert watch(bytes(WORD_BYTES)) is None
    assert watch(b"another." + struct.pack("<I", 1)) is None
    assert watch(word()[:-4] + b"\xff" * 4) is None


CLOSES = """
import sys
from transport import open_fabric
fabric = open_fabric("ucx")
print(fabric.listen().address.hex(), flush=True)
sys.stdin.readline()
fabric.close()
print("closed", flush=True)
"""
SENDS = """
import sys, time
from transport import open_fabric
fabric = open_fabric("ucx")
pipe = fabric.connect(bytes.fromhex(sys.stdin.readline()))
tickets = [pipe.send((bytes(200_000),)) for _ in range(20)]
end = time.monotonic() + 0.5
while time.monotonic() < end:
    fabric.progress()
print("sent", flush=True)
time.sleep(60)
"""


def _python(source):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", source], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )


@pytest.mark.skipif("ucx" not in available(), reason="ucxx is not installed (extra `ucx`)")
def test_half_a_message_of_a_process_that_was_killed_does_not_keep_a_fabric_from_closing():
    with _python(CLOSES) as near, _python(SENDS) as far:
        try:
            far.stdin.write(near.stdout.readline())
            far.stdin.flush()
            assert far.stdout.readline() == "sent\n"
            far.kill()
            far.wait(10)
            near.stdin.write("\n")
            near.stdin.flush()
            assert select.select([near.stdout], [], [], 10)[0], "it does not close"
            assert near.stdout.readline() == "closed\n"
            assert near.wait(10) == 0
        finally:
            near.kill()
            far.kill()


@pytest.mark.skipif("ucx" not in available(), reason="ucxx is not installed (extra `ucx`)")
def test_a_wait_that_ucx_refuses_again_and_again_is_slept_and_costs_no_core(monkeypatch):
    fabric = open_fabric("ucx")
    fabric.listen()
    fabric.progress()
    worker, slept = fabric._worker, []
    try:
        monkeypatch.setattr("transport.ucx.time.sleep", slept.append)
        fabric._worker = SimpleNamespace(arm=lambda: False)
        assert not any(fabric.arm() for _ in range(20))
        assert not slept
        assert not any(fabric.arm() for _ in range(5))
        assert len(slept) == 5
        assert max(slept) <= 1e-3
    finally:
        fabric._worker = worker
        fabric.close()
