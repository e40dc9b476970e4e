"""What this peer does for the owners of jobs: it keeps their workers, and tells them what those report.

An owner that listens to a job's events holds the lease on its workers here. When nobody listens, because the owner died
or lost touch, the workers end after `LEASE_S`: no orphan lives on.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import msgpack
import trio

from mesh.devices.local import LocalDevice
from mesh.errors import MeshError, ModelError, ModelMissing, PeerUnreachable, RequestError, WorkerError
from mesh.jobs.model import Inspector
from mesh.jobs.peers import Progress
from mesh.peer.pace import Pace
from mesh.peer.weights import Placed, Weights
from mesh.peer.workers import WorkerPool
from mesh.runtime.assignment import Assignment
from mesh.runtime.work import Decoded
from mesh.weights.locate import there
from mesh.wire.v1 import peer_pb2
from topology.plan import device_of

#: How long a job's workers outlive the last listener of its events. A recovery re-attaches within milliseconds.
LEASE_S = 5.0

#: As far apart as sites can be.
MAX_DELAY_S = 60.0
#: A site whose workers took a step so lately computes.
BUSY_S = 3.0

Epoch = tuple[int, str]


@dataclass
class Served:
    """One job as this peer serves it."""

    epoch: Epoch = (0, "")
    listeners: set[trio.MemorySendChannel[peer_pb2.WorkerEvent]] = field(default_factory=set)
    orphaned_at: float | None = None
    reserved_bytes: dict[str, int] = field(default_factory=dict)
    shards: dict[str, Assignment] = field(default_factory=dict)


class PeerService:
    """The local half of `mesh.jobs.peers.PeerCalls`."""

    def __init__(
        self,
        site: str,
        pool: WorkerPool,
        devices: Iterable[LocalDevice],
        *,
        delay_s: Callable[[str], float],
        on_load: Callable[[], None],
        inspector: Inspector,
        displace: Callable[[peer_pb2.DisplaceRequest], Awaitable[None]],
        measure: Callable[[str, Sequence[str]], Awaitable[str]],
        relay: Callable[[peer_pb2.RelayRequest], Awaitable[peer_pb2.RelayReply]],
        cut: Callable[[str], bool] = lambda site: False,
        seal_inside: bool = True,
        weights: Weights | None = None,
    ) -> None:
        """Without `weights` models are opened under the names they come with."""
        self._weights = weights
        self.site = site
        self._seal_inside = seal_inside
        self._pool = pool
        self._devices = {device.device.name: device for device in devices}
        self._delay_s = delay_s
        self._on_load = on_load
        self._inspector = inspector
        self._displace = displace
        self._measure = measure
        self._relay = relay
        self._cut = cut
        self._steps: dict[tuple[str, str], int] = {}
        self._decoded: dict[tuple[str, str], Decoded] = {}
        self._pace = Pace({name: local.device.decoding for name, local in self._devices.items()})
        self._paces: dict[str, float] = {}
        self._loading = 0
        self._stepped_s = -math.inf
        self._lease_s = LEASE_S
        self._jobs: dict[str, Served] = {}
        self._ended = trio.Event()

    def free_bytes(self) -> dict[str, int]:
        """What is left of each device's memory, by device name."""
        free = {}
        for name, local in self._devices.items():
            free[name] = max(0, local.device.free_bytes - self._held_bytes(name))
        return free

    def paces(self) -> dict[str, float]:
        """How many times as long as calibrated the devices take to decode, where that is worth telling."""
        return dict(self._paces)

    @property
    def busy(self) -> bool:
        """Whether workers here load weights, or have taken a step within the last seconds."""
        return self._loading > 0 or self.stepping

    @property
    def stepping(self) -> bool:
        """Whether workers here have taken a step within the last seconds."""
        return trio.current_time() - self._stepped_s < BUSY_S

    async def drain(self) -> None:
        """This peer leaves: take on nothing more, and wait until it is idle. The caller bounds the wait.

        An owner that has moved its job away does not come back for what it left here, so leases end at once.
        """
        self._lease_s = 0.0
        await self.idle()

    async def idle(self) -> None:
        """Wait until this peer holds workers for nobody. The caller bounds the wait."""
        while any(job.reserved_bytes for job in self._jobs.values()):
            self._ended = trio.Event()
            await self._ended.wait()

    async def prepare(self, request: peer_pb2.PrepareRequest, progress: Progress) -> dict[str, bytes]:
        """Load one shard on a device of this site. Raises WorkerError where memory is short or the worker fails."""
        if not self._lease_s:
            raise PeerUnreachable(f"{self.site} is leaving the mesh")
        job = self._admit(request.job, request.epoch)
        local = self._device(request.device)
        assignment = _assignment(request.assignment)
        own_bytes = job.reserved_bytes.get(request.device, 0)
        room = local.device.free_bytes - self._held_bytes(local.device.name) + own_bytes
        if assignment.memory_bytes > room:
            raise WorkerError(
                f"{self.site}/{request.device} has {room / 1e6:.0f} MB left, "
                f"the shard needs {assignment.memory_bytes / 1e6:.0f} MB"
            )
        job.reserved_bytes[request.device] = assignment.memory_bytes
        self._loads_changed()
        own = replace(assignment, device=local.torch_device, threads=local.threads)
        job.shards[request.device] = own
        self._loading += 1
        try:
            return await self._load(own, request, progress)
        except MeshError:
            job.reserved_bytes.pop(request.device, None)
            self._loads_changed()
            raise
        finally:
            self._loading -= 1

    async def _load(self, own: Assignment, request: peer_pb2.PrepareRequest, progress: Progress) -> dict[str, bytes]:
        if self._weights is None:
            if own.model.endswith(".gguf"):
                own = replace(own, model=(await self._inspector(own.model)).path)
            return await self._pool.prepare(own, progress, name=request.device)
        placed: Placed | None = None
        try:
            async with self._weights.place(own, request.weights, progress) as placed:
                return await self._pool.prepare(replace(own, model=placed.path), progress, name=request.device)
        except ModelMissing:
            raise
        except ModelError as error:
            # A worker that finds nothing under a hub's id may yet get it from other sites.
            if not request.weights and not there(own.model):
                raise ModelMissing(str(error)) from None
            if placed is None or not placed.cached:
                raise
        # It reads what was not foreseen of a family of models: then it gets its layers whole.
        async with self._weights.place(own, request.weights, progress, cut=False) as placed:
            return await self._pool.prepare(replace(own, model=placed.path), progress, name=request.device)

    async def connect(self, request: peer_pb2.ConnectRequest) -> None:
        """Open the channels of one shard to its neighbours, each with the delay that this site emulates towards it.

        Whether frames inside this site are sealed is this site's to say; between sites they are, whoever asks.
        """
        self._admit(request.job, request.epoch)
        for neighbour in request.neighbours:
            site = neighbour.name.split("/")[0]
            if not neighbour.via:
                neighbour.delay_s = self._delay_s(site)
                if self._cut(site):
                    raise PeerUnreachable(f"{self.site} does not reach {neighbour.name} (a drill)")
            elif not 0 <= neighbour.delay_s <= MAX_DELAY_S:
                raise RequestError(f"a delay of {neighbour.delay_s} s towards {neighbour.name} cannot be")
            if site == self.site and not self._seal_inside:
                neighbour.seal = False
            elif not neighbour.seal:
                raise WorkerError(
                    f"{self.site} seals what goes to {neighbour.name}: a site may leave that out "
                    "between its own shards alone, where its own `seal` is off"
                )
        epoch = _epoch(request.epoch)
        await self._pool.connect(request.job, epoch, request.device, request.neighbours, site=self.site)

    async def start(self, request: peer_pb2.StartRequest) -> None:
        """Begin or resume a request."""
        self._admit(request.job, request.epoch)
        await self._pool.start(request)

    async def stop(self, request: peer_pb2.StopRequest) -> None:
        """End a request early."""
        self._admit(request.job, request.epoch)
        await self._pool.stop(request.job, _epoch(request.epoch), request.device, request.request)

    async def release(self, request: peer_pb2.ReleaseRequest) -> None:
        """End the job's workers here, but for those on the devices to keep."""
        job = self._jobs.get(request.job)
        if job is None:
            return
        self._admit(request.job, request.epoch)
        await self._end(request.job, job, frozenset(request.keep))

    async def displace(self, request: peer_pb2.DisplaceRequest) -> None:
        """End a job that this peer owns. Raises RequestError where its priority is not lower."""
        await self._displace(request)

    async def measure(self, site: str, backends: Sequence[str]) -> str:
        """Which of `backends` is best from here to `site`."""
        return await self._measure(site, backends)

    async def relay(self, request: peer_pb2.RelayRequest) -> peer_pb2.RelayReply:
        """Hand bytes on to another site; where to send them."""
        return await self._relay(request)

    async def ping(self, timeout_s: float) -> None:
        """This peer answers itself."""
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def events(self, request: peer_pb2.EventsRequest) -> AsyncIterator[AsyncIterator[peer_pb2.WorkerEvent]]:
        """What the job's workers here report while the block is open; the block is the lease on them."""
        job = self._admit(request.job, request.epoch)
        send, receive = trio.open_memory_channel[peer_pb2.WorkerEvent](math.inf)
        job.listeners.add(send)
        job.orphaned_at = None
        try:
            yield receive
        finally:
            job.listeners.discard(send)
            if not job.listeners:
                job.orphaned_at = trio.current_time()

    async def run(self) -> None:
        """Hand on what the workers report, and end the workers of jobs whose lease is over. Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hand_on)
            nursery.start_soon(self._end_orphans)

    async def _hand_on(self) -> None:
        async for event in self._pool.events:
            job = self._jobs.get(event.job)
            if job is not None:
                message = event.message
                if message.HasField("alive"):
                    self._note_steps((event.job, message.device), message.alive.steps)
                    self._note_decoded(event.job, message.device, event.decoded)
                if message.HasField("failure") and message.failure.fatal:
                    job.reserved_bytes.pop(message.device, None)
                    self._loads_changed()
                for listener in list(job.listeners):
                    listener.send_nowait(message)

    def _note_steps(self, worker: tuple[str, str], steps: int) -> None:
        if steps != self._steps.get(worker, 0):
            self._steps[worker] = steps
            self._stepped_s = trio.current_time()

    def _note_decoded(self, name: str, slot: str, decoded: Decoded | None) -> None:
        """How fast the device is, by what its worker has done since it last said."""
        shard = self._jobs[name].shards.get(slot)
        if decoded is None or shard is None:
            return
        before = self._decoded.get((name, slot), Decoded())
        self._decoded[name, slot] = decoded
        if decoded.steps > before.steps:
            beside = [each for each in self._jobs[name].shards.values() if each.stage == shard.stage]
            self._pace.observe(
                device_of(slot), shard.dtype, decoded.since(before), trio.current_time(), together=len(beside) > 1
            )

    def _look_at_paces(self) -> None:
        paces = self._pace.told(trio.current_time())
        if paces != self._paces:
            self._paces = paces
            self._on_load()

    async def _end_orphans(self) -> None:
        while True:
            await trio.sleep(LEASE_S / 5)
            self._look_at_paces()
            now = trio.current_time()
            for name, job in list(self._jobs.items()):
                for listener in list(job.listeners):
                    # With no worker up yet nobody else speaks; silence must mean that the peer is gone.
                    listener.send_nowait(peer_pb2.WorkerEvent(alive=peer_pb2.AliveEvent()))
                if job.orphaned_at is not None and now - job.orphaned_at > self._lease_s:
                    await self._end(name, job, frozenset())

    async def _end(self, name: str, job: Served, keep: frozenset[str]) -> None:
        for device in [device for device in job.reserved_bytes if device not in keep]:
            await self._pool.release(name, device)
            job.reserved_bytes.pop(device, None)
            job.shards.pop(device, None)
            self._steps.pop((name, device), None)
            self._decoded.pop((name, device), None)
        if not job.reserved_bytes and not job.listeners:
            self._jobs.pop(name, None)
        self._loads_changed()

    def _loads_changed(self) -> None:
        self._ended.set()
        self._on_load()

    def _admit(self, name: str, message: peer_pb2.Epoch) -> Served:
        """The job's record, if the epoch is not older than one seen before. Raises RequestError where it is."""
        epoch = _epoch(message)
        job = self._jobs.setdefault(name, Served(orphaned_at=trio.current_time()))
        if epoch < job.epoch:
            raise RequestError(f"job {name}: epoch {epoch[0]} of {epoch[1]} is over, {self.site} obeys {job.epoch[0]}")
        job.epoch = epoch
        return job

    def _held_bytes(self, device: str) -> int:
        """What jobs hold of a device, in all of its slots."""
        return sum(
            held
            for job in self._jobs.values()
            for slot, held in job.reserved_bytes.items()
            if device_of(slot) == device
        )

    def _device(self, slot: str) -> LocalDevice:
        name = device_of(slot)
        if name not in self._devices:
            raise RequestError(f"{self.site} has no device {name!r}: it has {', '.join(sorted(self._devices))}")
        return self._devices[name]


def _epoch(message: peer_pb2.Epoch) -> Epoch:
    return (message.counter, message.owner)


def _assignment(packed: bytes) -> Assignment:
    try:
        document: Mapping[str, object] = msgpack.unpackb(packed)
        return Assignment.from_dict(dict(document))
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"the assignment is not one: {error}") from None
