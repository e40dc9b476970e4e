"""Ranks of one host over memory that they share: the same sums as over messages, sealed or not, and never stuck."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transport_collectives import noise, one_thread, run, summed  # noqa: F401
from transport_harness import Neighbour

from transport import ChannelBroken, DeadlineExceeded, TransportError, segment
from transport.board import PIECE_BYTES, SHORT_BYTES, Board, BoardUnavailable
from transport.collectives import Group
from transport.segment import Attached, Segment

pytestmark = pytest.mark.skipif(not segment.available(), reason="memory is shared so on Linux on x86-64 alone")


def boards(size, *, seal=False):
    """Boards of ranks in this process, joined."""
    made = [Board(rank, size, seal=seal, spin_s=50e-6) for rank in range(size)]
    offers = [board.offer() for board in made]
    for board in made:
        board.join(offers)
    return made


def together(made, work):
    """work(board) in a thread for each; the results, or the first error."""
    results, errors = [None] * len(made), []

    def one(rank):
        try:
            results[rank] = work(made[rank])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for board in made:
        board.close()
    if errors:
        raise errors[0]
    return results


def patient(rank):
    time.sleep(0.0005)


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_sums_over_shared_memory_have_the_bits_of_sums_over_messages(size, sealed, dtype):
    item = dtype.itemsize
    shapes = [(), (0,), (7, 3), (SHORT_BYTES // item,), (SHORT_BYTES // item + 1,), (2 * PIECE_BYTES // item + 5,)]

    def work(board):
        found = [noise(board.rank, shape, dtype) for shape in shapes]
        for tensor in found:
            board.all_reduce_(tensor, patient)
        return found

    for result in together(boards(size, seal=sealed), work):
        for shape, found in zip(shapes, result, strict=True):
            assert torch.equal(found, summed(size, shape, dtype))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.booleans(), st.lists(st.tuples(st.booleans(), st.integers(0, 80_000)), max_size=8))
def test_any_mixture_of_sums_and_broadcasts_stays_in_step(size, sealed, operations):
    def work(board):
        found = []
        for reduces, count in operations:
            tensor = noise(board.rank, (count,), torch.float32)
            if reduces:
                board.all_reduce_(tensor, patient)
            else:
                board.broadcast_(tensor, count % size, patient)
            found.append(tensor)
        return found

    for result in together(boards(size, seal=sealed), work):
        for (reduces, count), found in zip(operations, result, strict=True):
            root = noise(count % size, (count,), torch.float32)
            assert torch.equal(found, summed(size, (count,), torch.float32) if reduces else root)


def test_nothing_lies_open_on_a_sealed_board_and_nothing_changed_is_believed():
    made = boards(2, seal=True)
    secret = torch.arange(600, dtype=torch.float32)

    def work(board):
        board.all_reduce_(secret.clone(), patient)
        seen = bytes(board.segment.memory)
        if board.rank == 0:  # before its neighbour reads it
            tensor = secret.clone()
            say = board._say

            def spoiled(turn, code):
                board._memories[turn & 1][0][5] ^= 1
                say(turn, code)

            board._say = spoiled
            board.all_reduce_(tensor, patient)
            return seen
        with pytest.raises(ChannelBroken, match="does not hold"):
            board.all_reduce_(secret.clone(), patient)
        return seen

    for seen in together(made, work):
        assert secret.numpy().tobytes()[400:464] not in seen


def test_a_rank_that_does_something_else_is_found_out():
    def work(board):
        board.all_reduce_(torch.ones(4 + board.rank), patient)

    with pytest.raises(ChannelBroken, match="another collective"):
        together(boards(2), work)


def test_a_rank_that_sleeps_is_rung():
    first, second = boards(2)
    slept = []

    def pause(rank):
        slept.append(rank)
        until = time.monotonic() + 10
        while not first.segment.progress() and time.monotonic() < until:
            time.sleep(0.001)

    def work(board):
        if board.rank == 1:
            time.sleep(0.05)
        board.all_reduce_(torch.ones(3), pause if board.rank == 0 else patient)
        return time.monotonic()

    began = time.monotonic()
    assert max(together([first, second], work)) - began < 5
    assert slept == [1]


# -- within a group


def test_a_group_of_one_host_shares_memory_and_sums_the_same():
    def work(group):
        results = [group.all_reduce_(noise(group.rank, (576,), torch.float32), 20) for _ in range(3)]
        results.append(group.broadcast_(noise(group.rank, (40,), torch.bfloat16), 1, 20))
        gathered = group.gather(torch.full((group.rank,), 1.0), 0, 20)
        view = torch.ones(6, 4)
        group.all_reduce_(view.t()[1], 20)
        shared = group._board is not None
        group.close()
        return results, gathered, view, shared

    for rank, (results, gathered, view, shared) in enumerate(run(3, work, backend="tcp", beside=True)):
        assert shared
        assert all(torch.equal(result, summed(3, (576,), torch.float32)) for result in results[:3])
        assert torch.equal(results[3], noise(1, (40,), torch.bfloat16))
        assert (gathered is None) == (rank != 0)
        assert torch.equal(view[:, 1], torch.full((6,), 3.0))


@pytest.mark.parametrize("reason", ["system", "reach", "one rank"])
def test_ranks_that_cannot_share_memory_send_messages(monkeypatch, reason):
    def cannot(*_):
        raise OSError("out of reach")

    if reason == "system":
        monkeypatch.setattr("transport.board.available", lambda: False)
    elif reason == "reach":
        monkeypatch.setattr("transport.segment.Attached.__init__", cannot)
    else:
        made = Board.__init__

        def refused(self, rank, size, **options):
            if rank == 1:
                raise BoardUnavailable("no")
            made(self, rank, size, **options)

        monkeypatch.setattr(Board, "__init__", refused)

    def work(group):
        result = group.all_reduce_(torch.ones(4), 20)
        return result, group._board

    for result, board in run(3, work, beside=True):
        assert board is None
        assert torch.equal(result, torch.full((4,), 3.0))


def test_a_rank_that_gives_up_over_memory_is_an_exception_at_every_rank_at_once():
    began = time.monotonic()

    def work(group):
        group.all_reduce_(torch.ones(10), 20)
        if group.rank == 2:
            return None
        return group.all_reduce_(torch.ones(10), 0.2 if group.rank == 1 else 25)

    results = run(3, work, beside=True)
    assert isinstance(results[1], DeadlineExceeded)
    assert isinstance(results[0], TransportError)
    assert time.monotonic() - began < 15


def test_a_killed_rank_breaks_the_group_and_leaves_no_descriptor():
    gc.collect()  # of what other tests left
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Neighbour("tcp", "reduce-beside", bytes(range(32))) as neighbour:
        group = Group(0, 2, {1: neighbour.channel}, beside=True)
        for count in (576, 1_000_000):
            neighbour.channel.send(f"{count} float32 3".encode())
            tensor = torch.ones(count)
            for _ in range(3):
                group.all_reduce_(tensor, 20)
            assert torch.equal(tensor, torch.full_like(tensor, 4.0))
        assert group._board is not None
        neighbour.process.kill()
        with pytest.raises(ChannelBroken, match="child"):
            group.all_reduce_(torch.ones(4), 20)
        group.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# -- segments


def test_a_segment_is_read_but_not_written_by_others_and_is_not_believed_blindly():
    own = Segment(5000)
    offer = own.offer()
    there = Attached(offer, 5000)
    own.memory[5000] = 7
    assert there.memory[5000] == 7
    with pytest.raises(TypeError):
        there.memory[5000] = 8
    there.ring()
    assert own.progress()
    assert not own.progress()
    null = os.open(os.devnull, os.O_RDWR)
    for change in ({"size": 4999}, {"token": "00" * 16}, {"token": "x"}, {"file": null}, {"pid": -1}, {"pid": "no"}):
        with pytest.raises(ValueError, match="offer"):
            Attached({**offer, **change}, 5000)
    with pytest.raises(ValueError, match="bell"):
        Attached({**offer, "rope": null}, 5000)
    with pytest.raises(OSError, match="No such"):
        Attached({**offer, "file": 10**6}, 5000)
    os.close(null)
    there.close()
    own.close()
    own.close()
