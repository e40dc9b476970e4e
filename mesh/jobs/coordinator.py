"""The owner's side of one job: plan, deploy, serve, and plan again around what was lost.

    run ──> plan ──> deploy ──> serve ──(a shard or a site is lost)──> diagnose ──> plan ──> ...

Every turn of that loop is a new epoch; workers refuse what comes under an older one, so nothing of the former turn can
do harm. Live requests wait through a recovery and start again with the tokens they have.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import trio

from mesh.errors import MeshError, ModelError, PeerUnreachable, PlanError, RequestError
from mesh.jobs.deploy import ShardFailed, deploy, wire_epoch
from mesh.jobs.job import Job
from mesh.jobs.model import Inspector, ModelInfo
from mesh.jobs.peers import View
from mesh.jobs.request import Options, Request, prompt_of
from mesh.runtime.text import Text
from mesh.wire.v1 import mesh_pb2, peer_pb2
from topology import Constraints, Plan, TopologyError, partition
from topology.model import ModelSpec
from topology.snapshot import Device, Site, Snapshot

#: Workers report once a second; a peer silent for this long is asked, and lost if it does not answer.
SILENCE_S = 4.0
#: How long a peer may take to answer a ping before it counts as lost.
PING_DEADLINE_S = 2.0
#: A ring in which no worker takes a step for this long while requests are live is set up anew.
STALL_S = 60.0
#: A site that was lost is not planned on again for this long, unless gossip says meanwhile that it is gone anyway.
QUARANTINE_S = 30.0
#: Clients hear at least this often from a request that waits: for room, for a prefill, or for a recovery.
HEARTBEAT_S = 10.0
#: Set-ups that may fail one after the other before the job does.
MAX_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a running plan came to its end: the sites to avoid (none where a worker died but its site answers)."""

    reason: str
    sites: frozenset[str]


class Coordinator:
    """Runs one job until it is cancelled or fails. `run` belongs in a nursery of the daemon."""

    def __init__(self, job: Job, view: View, inspector: Inspector, on_change: Callable[[], None]) -> None:
        self.job = job
        self.requests: dict[str, Request] = {}
        self.tokens_total = 0
        self._view = view
        self._inspector = inspector
        self._on_change = on_change
        self._info: ModelInfo | None = None
        self._text: Text | None = None
        self._serial = 0
        self._lost: dict[str, float] = {}
        self._suspects: trio.MemorySendChannel[tuple[str, str]] | None = None
        self._reserved_tokens = 0
        self._room = trio.Event()
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """The life of the job. Returns when it has ended; never raises a MeshError, the job carries it."""
        with self._scope:
            try:
                self._info = await self._inspector(self.job.model)
                self._text = Text.load(self._info.tokenizer)
                await self._turns()
            except MeshError as error:
                cause = error.error if isinstance(error, ShardFailed) else error
                self._update(state="failed", error=cause)
            except TopologyError as error:
                self._update(state="failed", error=PlanError(str(error)))
        if not self.job.ended:
            self._update(state="cancelled")
        for request in self.requests.values():
            request.wake()
        await self._release(self.job.plan)

    def cancel(self) -> None:
        """End the job: its requests, its workers, its plan."""
        self._scope.cancel()

    def site_left(self, site: str) -> None:
        """Gossip says the site is gone or is leaving: if the job is on it, go on without it."""
        if self.job.plan and site in self.job.plan.sites and self._suspects:
            self._lost[site] = trio.current_time()
            self._suspect(site, f"{site} left the mesh")

    def plan(self, info: ModelInfo) -> Plan:
        """Where the job would run now. Raises TopologyError."""
        constraints = Constraints.parse(self.job.constraints)
        spec = info.spec if constraints.dtype is None else _with_dtype(info.spec, constraints.dtype)
        snapshot = _without(self._view.snapshot(), self._avoid())
        return partition(_with_freed(snapshot, self.job.plan), spec, constraints, strategy=self.job.strategy)

    async def _turns(self) -> None:
        assert self._info is not None
        failures = 0
        while True:
            former = self.job.plan
            plan = self.plan(self._info)
            self._update(plan=plan, counter=self.job.counter + 1, loaded_bytes=0, total_bytes=0)
            if self.job.state == "planning":
                self._update(state="loading")
            if former is not None:
                await self._release(former, plan)
            try:
                loss = await self._turn(plan)
                failures = 0
            except ShardFailed as failure:
                failures += 1
                if failures >= MAX_ATTEMPTS or not _worth_another_try(failure.error):
                    raise
                loss = Loss(str(failure), await self._silent({failure.site}))
            for site in loss.sites:
                self._lost[site] = trio.current_time()
            self._update(state="recovering", recoveries=self.job.recoveries + 1)

    async def _turn(self, plan: Plan) -> Loss:
        """Deploy `plan`, serve until something is lost. Raises ShardFailed while deploying."""
        send, receive = trio.open_memory_channel[tuple[str, str]](math.inf)
        self._suspects = send
        heard = dict.fromkeys(plan.sites, trio.current_time())
        failure: ShardFailed | None = None
        reason = ""
        async with trio.open_nursery() as nursery:
            for site in plan.sites:
                await nursery.start(self._listen, site, heard)
            failure = await self._deploy_unless_lost(plan, receive)
            if failure is None:
                self._update(state="ready")
                for request in list(self.requests.values()):
                    nursery.start_soon(self._start, request)
                nursery.start_soon(self._watch_silence, plan, heard)
                _, reason = await receive.receive()
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return Loss(reason, await self._silent(set(plan.sites)))

    async def _deploy_unless_lost(
        self, plan: Plan, suspects: trio.MemoryReceiveChannel[tuple[str, str]]
    ) -> ShardFailed | None:
        """Deploy, but give up as soon as a peer of the plan is lost: its shard would only run into a deadline.

        The failure is returned, not raised: it has to cross two nurseries, which would wrap it in groups.
        """
        failure: ShardFailed | None = None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal failure
                site, reason = await suspects.receive()
                failure = ShardFailed(site, PeerUnreachable(reason))
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                await deploy(
                    self._view,
                    plan,
                    job=self.job.id,
                    epoch=self.job.epoch,
                    model=self.job.model,
                    progress=lambda done, total: self.job.update(loaded_bytes=done, total_bytes=total),
                )
            except ShardFailed as error:
                failure = error
            nursery.cancel_scope.cancel()
        return failure

    async def _listen(
        self, site: str, heard: dict[str, float], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take in what the workers of one site report; a stream that ends is a suspicion."""
        request = peer_pb2.EventsRequest(job=self.job.id, epoch=wire_epoch(self.job.epoch))
        reason = f"the peer at {site} ended its reports"
        started = False
        try:
            async with self._view.peer(site).events(request) as events:
                task_status.started()
                started = True
                async for event in events:
                    heard[site] = trio.current_time()
                    self._take(site, event)
        except MeshError as error:
            reason = str(error)
        if not started:
            task_status.started()
        self._suspect(site, reason)

    def _take(self, site: str, event: peer_pb2.WorkerEvent) -> None:
        if (event.epoch.counter, event.epoch.owner) != self.job.epoch and event.HasField("epoch"):
            return
        match event.WhichOneof("event"):
            case "token":
                request = self.requests.get(event.token.request)
                if request is not None and request.accept(event.token):
                    self.tokens_total += 1
            case "failure":
                accused = event.failure.neighbour.split("/")[0] or site
                self._suspect(accused, f"{site}/{event.device}: {event.failure.reason}")

    def _suspect(self, site: str, reason: str) -> None:
        if self._suspects is not None:
            self._suspects.send_nowait((site, reason))

    async def _watch_silence(self, plan: Plan, heard: dict[str, float]) -> None:
        """Suspect a site that reports nothing, and the ring when live requests get no token."""
        while True:
            await trio.sleep(SILENCE_S / 4)
            now = trio.current_time()
            for site in plan.sites:
                if now - heard[site] > SILENCE_S:
                    self._suspect(site, f"{site} was silent for {SILENCE_S:.0f} s")
            for request in self.requests.values():
                if not request.finish_reason and now - request.progress_at > STALL_S:
                    self._suspect("", f"no token for request {request.name} in {STALL_S:.0f} s")

    async def _silent(self, sites: set[str]) -> frozenset[str]:
        """Which of `sites` do not answer now. Those that left or are known dead count as silent without being asked."""
        silent = {site for site in sites if site in self._lost or not self._view.alive(site)}

        async def ask(site: str) -> None:
            try:
                await self._view.peer(site).ping(PING_DEADLINE_S)
            except MeshError:
                silent.add(site)

        async with trio.open_nursery() as nursery:
            for site in sorted(sites - silent):
                nursery.start_soon(ask, site)
        return frozenset(silent)

    def _avoid(self) -> frozenset[str]:
        now = trio.current_time()
        self._lost = {site: since for site, since in self._lost.items() if now - since < QUARANTINE_S}
        return frozenset(self._lost)

    async def _release(self, former: Plan | None, following: Plan | None = None) -> None:
        """End the workers of `former` that `following` does not use. Best effort: a lease ends them anyway."""
        if former is None:
            return
        kept = [shard for stage in following.stages for shard in stage.shards] if following else []

        async def one(site: str) -> None:
            keep = [shard.device for shard in kept if shard.site == site]
            message = peer_pb2.ReleaseRequest(job=self.job.id, epoch=wire_epoch(self.job.epoch), keep=keep)
            try:
                await self._view.peer(site).release(message)
            except MeshError:
                pass  # gone, or going: its workers end when their lease does

        with trio.move_on_after(PING_DEADLINE_S, shield=True):
            async with trio.open_nursery() as nursery:
                for site in set(former.sites) - set(self._lost):
                    nursery.start_soon(one, site)

    async def generate(self, message: mesh_pb2.GenerateRequest) -> AsyncGenerator[mesh_pb2.GenerateEvent, None]:
        """Serve one request: events until the last, which carries the finish reason and the timings.

        Raises RequestError for a request that cannot be served, and the job's error if the job ends meanwhile.
        Closing the iterator ends the request everywhere.
        """
        options = Options.parse(message)
        await self.job.ready()
        assert self._info is not None and self._text is not None and self.job.plan is not None
        prompt = self._text.encode(prompt_of(message))
        context = self.job.plan.context
        if len(prompt) >= context:
            raise RequestError(f"the prompt has {len(prompt)} tokens: the context of this job holds {context}")
        budget = min(len(prompt) + options.max_tokens, context)
        while not self._take_room(budget, context):
            yield mesh_pb2.GenerateEvent()
            with trio.move_on_after(HEARTBEAT_S):
                await self._request_ended()
            self.job.raise_if_ended()
        self._serial += 1
        request = Request(f"{self.job.id}.{self._serial}", prompt, options, self._text, self._info.eos)
        self.requests[request.name] = request
        try:
            if self.job.state == "ready":
                await self._start(request)
            yield mesh_pb2.GenerateEvent(prompt_tokens=len(prompt))
            while True:
                event = await self._next_event(request)
                if event.finish_reason:
                    event.timings_json = request.timings_json()
                yield event
                if event.finish_reason:
                    return
        finally:
            del self.requests[request.name]
            self._reserved_tokens -= budget
            self._room.set()
            await self._stop(request)

    async def idle(self) -> None:
        """Wait until no request is live. The caller bounds the wait."""
        while self.requests:
            await self._request_ended()

    async def _request_ended(self) -> None:
        self._room = trio.Event()
        await self._room.wait()

    def _take_room(self, tokens: int, context: int) -> bool:
        """Reserve KV-cache room, sized for `context` tokens in all, for `tokens` more. False where there is none."""
        if self._reserved_tokens and self._reserved_tokens + tokens > context:
            return False
        self._reserved_tokens += tokens
        return True

    async def _next_event(self, request: Request) -> mesh_pb2.GenerateEvent:
        """The next event; an empty one after a silence, so that the client knows that somebody is there."""
        with trio.move_on_after(HEARTBEAT_S):
            while True:
                event = request.take()
                if event is not None:
                    return event
                self.job.raise_if_ended()
                await request.arrived()
        return mesh_pb2.GenerateEvent()

    async def _start(self, request: Request) -> None:
        """Start, or start again, at the lead of the first stage. A failure there is a suspicion, not an end."""
        assert self.job.plan is not None
        lead = self.job.plan.stages[0].lead
        request.progress_at = trio.current_time()
        if request.finish_reason:
            return
        message = request.start_message(self.job.id, wire_epoch(self.job.epoch), lead.device)
        try:
            await self._view.peer(lead.site).start(message)
        except RequestError:
            raise
        except MeshError as error:
            self._suspect(lead.site, f"{lead.key}: {error}")

    async def _stop(self, request: Request) -> None:
        """Free what the workers hold for the request, unless they ended it themselves."""
        if request.ended_by_worker or self.job.plan is None or self.job.state != "ready":
            return
        lead = self.job.plan.stages[0].lead
        message = peer_pb2.StopRequest(
            job=self.job.id, epoch=wire_epoch(self.job.epoch), device=lead.device, request=request.name
        )
        with trio.move_on_after(PING_DEADLINE_S, shield=True):
            try:
                await self._view.peer(lead.site).stop(message)
            except MeshError:
                pass  # the worker is gone, and with it what it held

    def _update(self, **changes: object) -> None:
        self.job.update(**changes)
        self._on_change()


def _worth_another_try(error: MeshError) -> bool:
    """A dead peer, a lost race for memory or a late answer may pass; a bad model or a bad request will not."""
    return not isinstance(error, ModelError | RequestError)


def _with_dtype(spec: ModelSpec, dtype: str) -> ModelSpec:
    return ModelSpec.from_dict({**spec.to_dict(), "dtype": dtype})


def _without(snapshot: Snapshot, sites: frozenset[str]) -> Snapshot:
    kept = tuple(site for site in snapshot.sites if site.name not in sites)
    names = {site.name for site in kept}
    return Snapshot(kept, tuple(link for link in snapshot.links if link.source in names and link.target in names))


def _with_freed(snapshot: Snapshot, plan: Plan | None) -> Snapshot:
    """Count the memory that the job's own present shards hold as free: the new plan takes their place."""
    if plan is None:
        return snapshot
    held = {shard.key: shard.memory_bytes for stage in plan.stages for shard in stage.shards}

    def freed(site: Site, device: Device) -> Device:
        free = min(device.memory_bytes, device.free_bytes + held.get(f"{site.name}/{device.name}", 0))
        return Device(
            device.name,
            device.kind,
            device.vendor,
            device.memory_bytes,
            free,
            device.flops,
            device.memory_bandwidth,
            device.reserve,
        )

    sites = tuple(
        Site(
            site.name,
            site.region,
            tuple(freed(site, device) for device in site.devices),
            site.local_rtt_s,
            site.local_bandwidth,
        )
        for site in snapshot.sites
    )
    return Snapshot(sites, snapshot.links)
