"""A model that is no model but notices every mistake of the loop that drives it, and engines wired in one process."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mesh.runtime.assignment import Assignment
from mesh.runtime.engine import Engine
from mesh.runtime.inbox import Inbox
from mesh.runtime.links import Links
from mesh.runtime.protocol import Connect, Epoch, Event, Neighbour, Prepare, Reply, Request, Start, TokenEvent
from mesh.runtime.work import Work
from transport import open_fabric

VOCAB = 97
EPOCH: Epoch = (1, "owner")


class FakeModel:
    """Hidden states are [n, 2]: the token id, and a count of the stages passed. The token drawn depends on all before.

    Asserts that positions are contiguous, and that shards are given what they need. In a group the lead's states are
    broadcast and a sum is taken, so that real collectives run.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.a = assignment
        self.held: dict[str, list[int]] = {}
        self.chunks: list[int] = []
        self.weight_bytes = 1000
        self.loads = 1
        self.raises: Exception | None = None

    def forward(
        self, request, position, *, tokens=None, hidden=None, count=None, group=None, logits=True, timeout_s=None
    ):
        if self.raises is not None:
            raise self.raises
        held = self.held.setdefault(request, [])
        assert position == len(held), f"position {position} where {len(held)} are held"
        if self.a.leads:
            assert (tokens is not None) == self.a.first and (hidden is not None) == (not self.a.first)
            if tokens is not None:
                hidden = torch.tensor([[float(token), 0.0] for token in tokens])
        else:
            hidden = torch.zeros((count, 2))
        assert hidden.shape == (count, 2)
        if group is not None:
            group.broadcast_(hidden, 0, timeout_s)
            part = torch.full((count, 1), 1.0 / group.size)
            group.all_reduce_(part, timeout_s)
            assert torch.allclose(part, torch.ones_like(part))
        held.extend(int(value) for value in hidden[:, 0])
        self.chunks.append(hidden.shape[0])
        hidden = hidden + torch.tensor([0.0, 1.0])
        if not self.a.last:
            return hidden
        assert int(hidden[-1, 1]) == self.a.stages, "a stage was left out"
        if not logits:
            return torch.empty(0)
        return torch.nn.functional.one_hot(torch.tensor(following(held)), VOCAB).float()

    def drop(self, request):
        self.held.pop(request, None)

    def drop_all(self):
        self.held.clear()

    def work(self, position):
        return Work(1, 2, 3 + position)


def following(tokens: list[int]) -> int:
    """What the fake model says after `tokens`."""
    return (sum((place + 1) * token for place, token in enumerate(tokens)) * 31 + 7) % VOCAB


def expected(prompt: list[int], count: int) -> list[int]:
    """The tokens that a run of `count` gives."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


def argmax(logits, **options) -> int:
    return int(logits.argmax())


def assignment(stage=0, stages=1, rank=0, size=1, *, epoch=EPOCH, context=4096) -> Assignment:
    return Assignment(
        job="job", epoch=epoch, model="fake", dtype="float32", device="cpu", threads=0, memory_bytes=0, context=context,
        stage=stage, stages=stages, start=stage, end=stage + 1, rank=rank, size=size, kv_heads=(0, 1), columns=(0, 1),
        vocabulary=(0, VOCAB if stage == stages - 1 else 0),
    )  # fmt: skip


class Seat:
    """One engine, its model and what it said."""

    def __init__(self, a: Assignment, backend: str = "memory", sample: Callable[..., int] = argmax) -> None:
        self.a = a
        self.name = f"site{a.stage}/{a.rank}"
        self.backend = backend
        self.events: list[Event] = []
        self.inbox = Inbox()
        self.model: FakeModel | None = None
        links = Links(lambda: self.inbox.interrupted, fabrics=open_fabric, usable=lambda: (backend,))
        self.engine = Engine(self.inbox, self.events.append, links=links, load=self._load, sample=sample)
        self.ids = 0

    def _load(self, a, former, progress):
        progress(0, 1000)
        progress(1000, 1000)
        loads = former.loads + 1 if former is not None else 1
        self.model = FakeModel(a)
        self.model.loads = loads
        return self.model

    def tell(self, kind, *args) -> int:
        self.ids += 1
        self.inbox.put(kind(self.ids, *args))
        return self.ids

    def reply(self, id: int) -> Reply | None:
        return next((event for event in list(self.events) if isinstance(event, Reply) and event.id == id), None)

    def of(self, kind) -> list:
        return [event for event in list(self.events) if isinstance(event, kind)]

    def tokens(self, request="r") -> list[TokenEvent]:
        return [event for event in self.of(TokenEvent) if event.request == request]


class Cast:
    """Seats on one ring. `turn` drives them all in this thread (unless they run in their own)."""

    def __init__(self, sizes: list[int], *, backend="memory", epoch=EPOCH, context=4096, sample=argmax) -> None:
        self.epoch = epoch
        self.seats = [
            Seat(assignment(stage, len(sizes), rank, size, epoch=epoch, context=context), backend, sample)
            for stage, size in enumerate(sizes)
            for rank in range(size)
        ]
        self.threaded = False

    @property
    def leads(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.a.leads]

    @property
    def first(self) -> Seat:
        return self.seats[0]

    @property
    def last(self) -> Seat:
        return self.leads[-1]

    def until(self, done: Callable[[], object], within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not done():
            assert time.monotonic() < deadline, [seat.events[-3:] for seat in self.seats]
            if self.threaded:
                time.sleep(0.001)
                continue
            for seat in self.seats:
                seat.engine.turn()

    def settle(self) -> None:
        """Turn until nobody has anything to do."""
        idle = 0
        while idle < 3:
            idle = 0 if sum(seat.engine.turn() for seat in self.seats) else idle + 1

    def told(self, seat: Seat, id: int) -> Reply:
        self.until(lambda: seat.reply(id))
        return seat.reply(id)

    def prepare(self, seats=None) -> dict[str, bytes]:
        ids = {}
        for seat in self.seats if seats is None else seats:
            ids[seat.name] = (seat, seat.tell(Prepare, self.epoch, seat.a.to_dict(), (seat.backend,), "127.0.0.1"))
        return {name: self.told(*pair).check()["addresses"][pair[0].backend] for name, pair in ids.items()}

    def neighbours(self, addresses) -> dict[str, list[Neighbour]]:
        ends: dict[str, list[Neighbour]] = {seat.name: [] for seat in self.seats}
        leads = self.leads
        wires = []
        if len(leads) > 1:
            wires = [(a, b, "next", "previous") for a, b in zip(leads, [*leads[1:], leads[0]], strict=True)]
        for a in self.seats:
            wires += [(a, b, "shard", "shard") for b in self.seats if a.a.stage == b.a.stage and a.a.rank < b.a.rank]
        for number, (a, b, role_a, role_b) in enumerate(wires):
            key, hello = bytes([number + 1] * 32), f"{self.epoch[0]}/{number}".encode()
            ends[a.name].append(Neighbour(role_a, b.a.rank, b.name, a.backend, addresses[b.name], key, hello))
            ends[b.name].append(Neighbour(role_b, a.a.rank, a.name, a.backend, b"", key, hello))
        return ends

    def connect(self) -> None:
        addresses = self.prepare()
        ends = self.neighbours(addresses)
        ids = [(seat, seat.tell(Connect, self.epoch, tuple(ends[seat.name]), 5.0)) for seat in self.seats]
        for seat, id in ids:
            self.told(seat, id).check()

    def start(self, prompt, count, *, request="r", done=(), **options) -> Reply:
        value = Request(request, (*prompt, *done), len(prompt), count, **options)
        return self.told(self.first, self.first.tell(Start, self.epoch, value))

    def finish(self, request="r") -> list[int]:
        self.until(lambda: self.last.tokens(request) and self.last.tokens(request)[-1].finish_reason)
        return [event.token for event in self.last.tokens(request)]

    def close(self) -> None:
        for seat in self.seats:
            seat.engine.links.close()
