"""Collectives: the same bits everywhere, for every dtype and size, in lock step or not at all."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transport_harness import PROCESSES, Neighbour, connect_pair

from transport import ChannelBroken, DeadlineExceeded, Message, TransportError, open_fabric
from transport.collective_choice import HIERARCHY, ONE_SHOT, RING, SCATTER, TREE, Costs, choose, predict
from transport.collectives import ALGORITHMS, Group

BACKENDS = ("memory", "tcp")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(size, work, *, backend="memory", **options):
    """Run work(group) for every rank in a thread of its own; give the results in the order of the ranks."""
    fabrics = [open_fabric(backend) for _ in range(size)]
    channels = [{} for _ in range(size)]
    for low in range(size):
        for high in range(low + 1, size):
            channels[low][high], channels[high][low] = connect_pair(fabrics[low], fabrics[high])
    results, errors = [None] * size, []

    def one(rank):
        try:
            results[rank] = work(Group(rank, size, channels[rank], **options))
        except TransportError as error:
            results[rank] = error
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for fabric in fabrics:
        fabric.linger_s = 0.01
        fabric.close()
    if errors:
        raise errors[0]
    return results


def noise(rank, shape, dtype):
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(shape, generator=generator) * 10 ** (rank % 3)
    return values.to(dtype) if dtype.is_floating_point else (values * 10).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 576), (300_001,)], ids=str)
def test_all_reduce_gives_the_sum_in_rank_order_with_the_same_bits_on_every_rank(backend, size, dtype, shape):
    def work(group):
        tensor = noise(group.rank, shape, dtype)
        assert group.all_reduce_(tensor, 20) is tensor
        return tensor

    results = run(size, work, backend=backend)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    expected = noise(0, shape, dtype).to(wide)
    for rank in range(1, size):
        expected = expected + noise(rank, shape, dtype).to(wide)
    for result in results:
        assert result.shape == expected.shape
        assert torch.equal(result, expected.to(dtype))


def summed(size, shape, dtype):
    """The sum in the order of the ranks, of 16-bit floats in float32 with one rounding at the end."""
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = noise(0, shape, dtype).to(wide)
    for rank in range(1, size):
        total = total + noise(rank, shape, dtype).to(wide)
    return total.to(dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_algorithm_gives_the_same_bits_on_every_rank(algorithm, size, dtype):
    shapes = [(0,), (1,), (7, 3), (150_001,)]

    def work(group):
        group._island = 2
        return [group.all_reduce_(noise(group.rank, shape, dtype), 20, algorithm=algorithm) for shape in shapes]

    for result in run(size, work):
        for shape, found in zip(shapes, result, strict=True):
            assert torch.equal(found, summed(size, shape, dtype))


def test_a_ring_passes_on_many_pieces(monkeypatch):
    monkeypatch.setattr("transport.reductions.PIECE_BYTES", 4000)

    def work(group):
        return group.all_reduce_(noise(group.rank, (20_011,), torch.float16), 20, algorithm=RING)

    for result in run(3, work):
        assert torch.equal(result, summed(3, (20_011,), torch.float16))


def test_the_choice_goes_by_size_ranks_and_costs():
    near = Costs(latency_s=8e-6, work_s=6e-6, byte_s=2e-10)
    assert choose(2304, 2, near) == choose(2304, 4, near) == ONE_SHOT
    assert choose(16 << 20, 4, near) == SCATTER
    assert choose(64, 64, near._replace(latency_s=1e-6)) == TREE
    far = Costs(latency_s=1e-3, work_s=6e-6, byte_s=1e-8)
    assert choose(8 << 20, 8, far, island=4) == HIERARCHY
    assert set(predict(100, 2, near)) == {ONE_SHOT, SCATTER}


def test_costs_are_measured_and_the_same_at_every_rank():
    def work(group):
        costs = group.measure(20)
        return costs, group.all_reduce_(torch.ones(4), 10)

    results = run(3, work)
    assert len({costs for costs, _ in results}) == 1
    assert all(value > 0 for value in results[0][0])
    assert all(torch.equal(result, torch.full((4,), 3.0)) for _, result in results)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_gather_and_scatter_of_unequal_pieces(size):
    def work(group):
        pieces = [noise(rank, (rank * 500,), torch.float32) for rank in range(size)]
        everyone = group.all_gather(pieces[group.rank], 10)
        root = size - 1
        return everyone, group.scatter(pieces if group.rank == root else None, torch.empty(0), root, 10)

    for rank, (everyone, own) in enumerate(run(size, work)):
        assert torch.equal(own, noise(rank, (rank * 500,), torch.float32))
        for other, piece in enumerate(everyone):
            assert torch.equal(piece, noise(other, (other * 500,), torch.float32))


def test_a_root_that_scatters_too_few_is_told():
    with pytest.raises(ValueError, match="gives 1 tensors"):
        Group(0, 1, {}).scatter([], torch.empty(0), 0, 1)


@pytest.mark.parametrize("algorithm", [TREE, RING, HIERARCHY])
def test_a_rank_that_gives_up_is_an_exception_at_every_rank_at_once(algorithm):
    began = time.monotonic()

    def work(group):
        group._island = 2
        if group.rank == 3:
            return None  # never comes: its neighbour's deadline is the first
        return group.all_reduce_(torch.ones(1000), 0.3 if group.rank == 2 else 25, algorithm=algorithm)

    results = run(4, work)
    assert isinstance(results[2], DeadlineExceeded)
    assert all(isinstance(result, TransportError) for result in results[:3])
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("algorithm", [TREE, RING, HIERARCHY])
def test_a_rank_that_is_lost_is_an_exception_at_every_rank_at_once(algorithm):
    def work(group):
        group._island = 2
        if group.rank == 3:
            for channel in group._x.channels.values():
                channel.abort()
            return ChannelBroken("itself")
        return group.all_reduce_(torch.ones(1000), 25, algorithm=algorithm)

    for result in run(4, work):
        assert isinstance(result, ChannelBroken)


def test_a_tensor_that_is_not_contiguous_is_reduced_in_place():
    def work(group):
        whole = torch.ones(6, 4)
        group.all_reduce_(whole.t()[1], 10)
        return whole

    for result in run(2, work):
        assert torch.equal(result[:, 1], torch.full((6,), 2.0))
        assert torch.equal(result[:, 0], torch.ones(6))


def test_many_collectives_in_a_row_stay_in_step():
    def work(group):
        total = torch.zeros(576)
        for index in range(200):
            tensor = torch.full((576,), float(group.rank + index))
            total += group.all_reduce_(tensor, 10)
        return total

    first, second = run(2, work)
    assert torch.equal(first, second)
    assert first[0] == sum(2 * index + 1 for index in range(200))


@pytest.mark.parametrize("root", [0, 1, 2])
def test_broadcast_gives_everyone_the_roots_tensor(root):
    def work(group):
        tensor = noise(group.rank, (5, 7), torch.bfloat16)
        return group.broadcast_(tensor, root, 10)

    for result in run(3, work):
        assert torch.equal(result, noise(root, (5, 7), torch.bfloat16))


@pytest.mark.parametrize("root", [0, 2])
def test_gather_gives_the_root_every_tensor_also_of_unequal_sizes(root):
    def work(group):
        return group.gather(noise(group.rank, (group.rank * 1000,), torch.float32), root, 10)

    for rank, result in enumerate(run(3, work)):
        if rank != root:
            assert result is None
        else:
            for other, tensor in enumerate(result):
                assert torch.equal(tensor, noise(other, (other * 1000,), torch.float32))


def test_a_group_of_one_does_nothing():
    group = Group(0, 1, {})
    tensor = torch.ones(3)
    assert group.all_reduce_(tensor, 0.1) is tensor
    assert group.broadcast_(tensor, 0, 0.1) is tensor
    assert torch.equal(group.gather(tensor, 0, 0.1)[0], tensor)


def test_ordinary_messages_on_the_channel_pass_by_a_collective():
    def work(group):
        channel = group._x.channels[1 - group.rank]
        channel.send(b"step", b"x" * 100, kind=3)
        result = group.all_reduce_(torch.ones(4), 10)
        channel.send(b"after")
        return result, channel.receive(10).meta, channel.receive(10).meta

    for result, first, second in run(2, work):
        assert torch.equal(result, torch.full((4,), 2.0))
        assert (first, second) == (b"step", b"after")


@pytest.mark.parametrize(
    "other",
    [
        lambda group: group.all_reduce_(torch.ones(5), 2),
        lambda group: group.all_reduce_(torch.ones(4, dtype=torch.int32), 2),
        lambda group: group.gather(torch.ones(4), 0, 2) or group.broadcast_(torch.ones(1), 0, 2),
    ],
    ids=["size", "dtype", "operation"],
)
def test_ranks_that_disagree_are_found_out(other):
    def work(group):
        return group.all_reduce_(torch.ones(4), 2) if group.rank == 0 else other(group)

    results = run(2, work)
    assert any(isinstance(result, ChannelBroken) for result in results)


def test_a_rank_that_never_comes_is_a_deadline_that_names_it():
    def work(group):
        if group.rank == 0:
            return group.all_reduce_(torch.ones(4), 0.05)
        time.sleep(0.2)
        return None

    assert isinstance(run(2, work)[0], DeadlineExceeded)


def test_an_impossible_group_is_refused():
    with pytest.raises(ValueError, match="channel to each other rank"):
        Group(0, 2, {})
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Group(2, 2, {})


@pytest.mark.parametrize("backend", PROCESSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_reduce_works_across_processes_and_a_killed_rank_breaks_it(backend, dtype):
    with Neighbour(backend, "reduce", bytes(range(32))) as neighbour:
        group = Group(0, 2, {1: neighbour.channel})
        for count in (576, 1_000_000):
            neighbour.channel.send(f"{count} {dtype} 3".encode())
            tensor = torch.ones(count, dtype=getattr(torch, dtype))
            for _ in range(3):  # the child begins with zeros: 1 + 0, then both have 1, then both have 2
                group.all_reduce_(tensor, 20)
            assert torch.equal(tensor, torch.full_like(tensor, 4.0))
        neighbour.process.kill()
        with pytest.raises(ChannelBroken, match="child"):
            group.all_reduce_(torch.ones(4), 20)


def test_nothing_is_taken_in_between_looking_for_a_message_and_waiting_for_it(monkeypatch):
    """Or the message would be put aside, and the wait be for one that is there already."""
    done = []

    class Close:
        name, fabric, due_s = "neighbour", None, None

        def send(self, meta, view, *, kind):
            self.meta = meta
            return SimpleNamespace(done=True)

        def stashed(self, kind):
            return None

        def poll(self, kind):
            done.append("look")
            ready = "wait" in done
            return Message(kind, self.meta, memoryview(bytearray(4))) if ready else None

    monkeypatch.setattr("transport.exchange.wait_any", lambda *_, **__: done.append("wait"))
    Group(0, 2, {1: Close()}).all_reduce_(torch.ones(1), 1.0)
    assert done == ["look", "wait", "look"]
