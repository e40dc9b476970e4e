"""Sums through the GPUs' own library, with gloo in its place: chosen by all or by none, and never stuck."""

from __future__ import annotations

import time
from pathlib import Path

import msgpack
import pytest
import torch
from test_transport_collectives import noise, one_thread, run, summed  # noqa: F401

from transport import ChannelBroken, DeadlineExceeded, board
from transport.vendor_sums import NoVendorLibrary, VendorSums, backend_for

GLOO = {"beside": True, "vendor": lambda device: "gloo"}


@pytest.fixture(autouse=True)
def no_board(monkeypatch):
    """A GPU's tensors never lie on a board; nor do these."""
    monkeypatch.setattr(board, "available", lambda: False)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Where rank 0 makes its folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return lambda: list(tmp_path.iterdir())


def test_a_cpu_has_no_library_of_a_vendor():
    assert backend_for("cpu") is None
    assert backend_for("mps") is None


def test_a_gpu_has_one_where_torch_has(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda there=there: there)
        assert backend_for("cuda:1") == ("nccl" if there else None)


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_broadcasts_go_through_it(size, folders):
    def work(group):
        found = noise(group.rank, (3, 576), torch.float32)
        group.all_reduce_(found, 20.0)
        assert group._sums is not None
        first = torch.full((5,), float(group.rank))
        group.broadcast_(first, size - 1, 20.0)
        group.close()
        return found, first

    for found, first in run(size, work, **GLOO):
        torch.testing.assert_close(found, summed(size, (3, 576), torch.float32))
        assert first.tolist() == [size - 1.0] * 5
    assert folders() == []


def test_where_one_rank_has_none_all_exchange_messages(folders):
    def work(group):
        if group.rank == 1:
            group._vendor = backend_for
        found = noise(group.rank, (7,), torch.float32)
        group.all_reduce_(found, 20.0)
        assert group._sums is None
        return found

    for found in run(2, work, **GLOO):
        assert torch.equal(found, summed(2, (7,), torch.float32))
    assert folders() == []


def test_where_it_cannot_be_joined_all_exchange_messages(monkeypatch, folders):
    def refuse(sums, path):
        raise RuntimeError("no\n driver")

    monkeypatch.setattr("transport.vendor_sums._process_group", refuse)

    def work(group):
        found = noise(group.rank, (7,), torch.float32)
        group.all_reduce_(found, 20.0)
        assert group._sums is None
        return found

    for found in run(2, work, **GLOO):
        assert torch.equal(found, summed(2, (7,), torch.float32))
    assert folders() == []


def test_a_rank_that_does_not_come_ends_the_sum_at_its_deadline_and_the_others_hear_of_it():
    def work(group):
        group.all_reduce_(torch.ones(3), 20.0)
        if group.rank == 1:
            end = time.monotonic() + 10
            while time.monotonic() < end:
                group._x.watch(end)
                time.sleep(0.01)
        group.all_reduce_(torch.ones(3), 0.2)

    waited, told = run(2, work, **GLOO)
    assert isinstance(waited, DeadlineExceeded)
    assert isinstance(told, ChannelBroken) and "gave up" in str(told)


def nothing():
    pass


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (["nccl", "", ""], "different libraries"),
        (["gloo", "GPU-1", ""], "share a GPU"),
        (["gloo", ""], "is none"),
        (["gloo", 1, ""], "is none"),
        (7, "is none"),
    ],
)
def test_offers_that_do_not_go_together_are_refused(other, why, monkeypatch):
    monkeypatch.setattr("transport.vendor_sums._identity", lambda device: "GPU-1")
    sums = VendorSums(0, 2, "cpu", "gloo")
    folder = Path(msgpack.unpackb(sums.offer())[2])
    assert folder.stat().st_mode & 0o077 == 0
    with pytest.raises(NoVendorLibrary, match=why):
        sums.join([sums.offer(), msgpack.packb(other)], nothing)
    sums.close()
    sums.close()
    assert not folder.exists()
