"""A mesh of fake peers in virtual time: they load, connect and "generate" as workers would, and can be lost."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import trio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mesh.errors import DeadlineExceeded, PeerUnreachable
from mesh.jobs.model import ModelInfo
from mesh.wire.v1 import peer_pb2
from topology.model import ModelSpec
from topology.snapshot import Device, Link, Site, Snapshot

VOCABULARY = 128
STEP_S = 0.05
SPEC = ModelSpec("toy", 6, 64, 4, 2, 16, 128, VOCABULARY, False, "float32", 256)


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer whose words are w0 .. w127, id by id."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def token_at(position: int) -> int:
    """What the fake model says at a position: a function of the position alone, so a resumed run says the same."""
    return (position * 37 + 11) % (VOCABULARY - 8) + 8


class FakePeer:
    """The calls of one site's peer."""

    def __init__(self, site: str, world: World) -> None:
        self.site = site
        self.world = world
        self.dead = False
        self.silent = False
        self.prepare_error = None
        self.listeners: list[trio.MemorySendChannel] = []
        self.released: list[tuple[int, tuple[str, ...]]] = []
        self.prepared: list[int] = []
        self.started: list[peer_pb2.StartRequest] = []
        self.stopped: list[str] = []
        self.displaced: list[tuple[str, str, int]] = []
        self.assigned: list[tuple[str, int, int]] = []
        self.neighbours: list[tuple[int, str, str]] = []
        self.relayed: list[tuple[str, str]] = []
        self.relay_error = None

    async def _answer(self):
        await trio.sleep(0.001)
        while self.silent:
            await trio.sleep(1)
        if self.dead:
            raise PeerUnreachable(f"nobody answers at {self.site}")

    async def prepare(self, request, progress):
        await self._answer()
        progress(1, 2)
        await trio.sleep(0.1 if not self.prepared else 0.0)
        await self._answer()
        if self.prepare_error:
            raise self.prepare_error
        progress(2, 2)
        self.prepared.append(request.epoch.counter)
        part = msgpack.unpackb(request.assignment)
        self.assigned.append((request.device, part["start"], part["end"]))
        return {"tcp": b"address"}

    async def connect(self, request):
        await self._answer()
        for neighbour in request.neighbours:
            self.neighbours.append((request.epoch.counter, neighbour.name.split("/")[0], neighbour.via))
            if not neighbour.via and frozenset((self.site, neighbour.name.split("/")[0])) in self.world.walls:
                await trio.sleep(20)
                raise DeadlineExceeded(f"no answer from {neighbour.name}")

    async def relay(self, request):
        await self._answer()
        if self.relay_error:
            raise self.relay_error
        self.relayed.append((request.other, request.site))
        return peer_pb2.RelayReply(address=b"through " + self.site.encode())

    async def start(self, request):
        await self._answer()
        self.started.append(request)
        self.world.nursery.start_soon(self.world.ring, request)

    async def stop(self, request):
        await self._answer()
        self.stopped.append(request.request)

    async def release(self, request):
        await self._answer()
        self.released.append((request.epoch.counter, tuple(request.keep)))

    async def displace(self, request):
        await self._answer()
        self.displaced.append((request.job, request.by, request.priority))
        self.world.held.pop(request.job, None)

    async def ping(self, timeout_s):
        with trio.move_on_after(timeout_s):
            await self._answer()
            return
        raise PeerUnreachable(f"{self.site} is silent")

    @asynccontextmanager
    async def events(self, request):
        await self._answer()
        send, receive = trio.open_memory_channel(math.inf)
        self.listeners.append(send)

        async def iterate():
            async for event in receive:
                yield event
            raise PeerUnreachable(f"the connection to {self.site} broke")

        try:
            yield iterate()
        finally:
            if send in self.listeners:
                self.listeners.remove(send)

    def report(self, event):
        for listener in self.listeners:
            listener.send_nowait(event)

    def kill(self):
        self.dead = True
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()


class World:
    """Sites with `memory_bytes` each, their peers, and a ring that generates while its sites live."""

    def __init__(self, names, nursery, tokenizer: Path, memory_bytes: int) -> None:
        self.nursery = nursery
        self.tokenizer = tokenizer
        self.memory_bytes = memory_bytes
        self.peers = {name: FakePeer(name, self) for name in names}
        self.coordinator = None
        self.inspector_error = None
        self.stalled = False
        self.stepping = False
        self.first_token_s = 0.0
        self.step_s = STEP_S
        #: The relays of pairs, their round trips beyond 10 ms, and the pairs that do not reach each other directly,
        #: although gossip may say so.
        self.relays: dict[frozenset, str] = {}
        self.rtts_s: dict[frozenset, float] = {}
        self.walls: set[frozenset] = set()
        #: Other jobs: id -> (owner, running job).
        self.held = {}
        nursery.start_soon(self._heartbeats)

    def snapshot(self):
        alive = [peer for peer in self.peers.values() if not peer.dead]
        sites = tuple(Site(peer.site, "here", (self._device(peer.site),)) for peer in alive)
        names = [peer.site for peer in alive]
        return Snapshot(sites, tuple(self._link(a, b) for a in names for b in names if a != b))

    def recent(self):
        return self.snapshot()

    def _link(self, one, other):
        pair = frozenset((one, other))
        return Link(one, other, self.rtts_s.get(pair, 0.01), via=self.via(one, other))

    def _device(self, site):
        held = sum(job.held_bytes.get(f"{site}/cpu0", 0) for _, job in self.held.values())
        return Device("cpu0", "cpu", "test", self.memory_bytes, self.memory_bytes - held, {"float32": 1e9}, 1e9)

    def running(self):
        return self.held

    def via(self, one, other):
        return self.relays.get(frozenset((one, other)), "")

    def reaches(self, one, other):
        return True

    def alive(self, site):
        return not self.peers[site].dead

    def peer(self, site):
        return self.peers[site]

    async def inspector(self, model):
        await trio.sleep(0.01)
        if self.inspector_error:
            raise self.inspector_error
        return ModelInfo(SPEC, self.tokenizer, frozenset({7}))

    async def _heartbeats(self):
        while True:
            await trio.sleep(1)
            for peer in self.peers.values():
                if not peer.silent:
                    steps = int(trio.current_time()) if self.stepping else 0
                    epoch = peer_pb2.Epoch(counter=self.coordinator.job.counter, owner="a")
                    alive = peer_pb2.AliveEvent(steps=steps)
                    peer.report(peer_pb2.WorkerEvent(device="cpu0", epoch=epoch, alive=alive))

    async def ring(self, request: peer_pb2.StartRequest):
        plan = self.coordinator.job.plan
        last = self.peers[plan.stages[-1].lead.site]
        position = len(request.tokens)
        await trio.sleep(self.first_token_s)
        while position - request.prompt_tokens < request.max_tokens:
            await trio.sleep(self.step_s)
            while self.stalled:
                await trio.sleep(1)
            if any(self.peers[site].dead or self.peers[site].silent for site in plan.sites):
                return
            index = position - request.prompt_tokens
            finish = "length" if index + 1 == request.max_tokens else ""
            token = peer_pb2.TokenEvent(
                request=request.request,
                index=index,
                token=token_at(position),
                finish_reason=finish,
                timings=msgpack.packb({"compute_s": 0.01, "network_s": 0.02, "waiting_s": 0.02}),
            )
            last.report(peer_pb2.WorkerEvent(device="cpu0", epoch=request.epoch, token=token))
            position += 1
