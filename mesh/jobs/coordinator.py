"""The owner's side of one job: plan, deploy, serve, and plan again around what was lost.

    run ──> plan ──> deploy ──> serve ──(a shard or a site is lost)──> diagnose ──> plan ──> ...

Every turn of that loop is a new epoch; workers refuse what comes under an older one, so nothing of the former turn can
do harm. Live requests wait through a recovery and start again with the tokens they have. A turn also ends where there
is a better way between two sites (`mesh.jobs.detours`); then the same plan is deployed again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

import trio

from mesh.errors import JobFailed, MeshError, ModelError, PeerUnreachable, PlanError, RequestError
from mesh.jobs.deploy import CONNECT_DEADLINE_S, DISPLACE_DEADLINE_S, ShardFailed, deploy, release
from mesh.jobs.detours import Detours, Move, next_move
from mesh.jobs.job import Job, wire_epoch
from mesh.jobs.model import Inspector, ModelInfo
from mesh.jobs.peers import View
from mesh.jobs.replicas import Replicas
from mesh.jobs.routes import Routes
from mesh.jobs.serving import Serving
from mesh.jobs.standbys import keep_standbys
from mesh.runtime.assignment import assignments
from mesh.wire.v1 import mesh_pb2, peer_pb2
from topology import Constraints, Plan, TopologyError, partition

logger = logging.getLogger(__name__)

#: Workers report once a second; a peer silent for this long is asked, and lost if it does not answer.
SILENCE_S = 4.0
#: How long a peer may take to answer a ping before it counts as lost.
PING_DEADLINE_S = 2.0
#: A ring in which no worker takes a step for this long while requests are live is set up anew.
STALL_S = 60.0
#: A site that was lost is not planned on again for this long, unless gossip says meanwhile that it is gone anyway.
QUARANTINE_S = 30.0
#: Set-ups that may fail one after the other before the job does.
MAX_ATTEMPTS = 5
#: Opening channels over another way: those that there were worked, so that requests do not wait long for one that does
#: not. Twenty round trips of 0.25 s.
MOVE_DEADLINE_S = 5.0
_BETTER_WAY = "there is a better way"


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a running plan came to its end: the sites to avoid (none where a worker died but its site answers)."""

    reason: str
    sites: frozenset[str]


class Coordinator:
    """Runs one job until it is cancelled or fails. `run` belongs in a nursery of the daemon."""

    def __init__(
        self,
        job: Job,
        view: View,
        inspector: Inspector,
        on_change: Callable[[], None],
        *,
        spawn: Callable[..., None],
        first: Plan | None = None,
    ) -> None:
        """`spawn` starts the rings of replicas, `first` is a plan that was made already."""
        self.job = job
        self.serving = Serving(job, view, self._suspect)
        self.replicas = Replicas(
            job, lambda job, plan: Coordinator(job, view, inspector, on_change, spawn=spawn, first=plan), spawn
        )
        self._made = first
        self._detours = Detours()
        self._move: Move | None = None
        self._view = view
        self._inspector = inspector
        self._on_change = on_change
        self._info: ModelInfo | None = None
        self._lost: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._stepped_at = -math.inf
        self._suspects: trio.MemorySendChannel[tuple[str, str]] | None = None
        self._scope = trio.CancelScope()
        self._over = trio.Event()

    async def run(self) -> None:
        """The life of the job. Returns when it has ended; never raises a MeshError, the job carries it."""
        with self._scope:
            try:
                self._info = await self._inspector(self.job.model)
                self.serving.open(self._info)
                await self._turns()
            except MeshError as error:
                cause = error.error if isinstance(error, ShardFailed) else error
                self._update(state="failed", error=cause)
            except TopologyError as error:
                never_ran = self.job.plan is None
                reason = PlanError(str(error)) if never_ran else JobFailed(f"no plan is left after a loss: {error}")
                self._update(state="failed", error=reason)
            except Exception as error:
                # A fault of ours must cost this job, not the daemon and every other job with it.
                logger.exception("job %s failed", self.job.id)
                self._update(state="failed", error=JobFailed(f"a fault in its owner: {type(error).__name__}: {error}"))
        if not self.job.ended:
            self._update(state="cancelled")
        self.replicas.cancel()
        self.serving.wake()
        await self._release(self.job.plan)
        self._over.set()

    def cancel(self) -> None:
        """End the job: its requests, its workers, its plan."""
        self._scope.cancel()

    async def give_way(self, reason: str) -> None:
        """Fail the job for `reason` and wait until its workers are gone. The caller bounds the wait."""
        if not self.job.ended:
            self._update(state="failed", error=JobFailed(f"{reason}: submit it again when there is room"))
        self._scope.cancel()
        await self._over.wait()

    def generate(self, message: mesh_pb2.GenerateRequest) -> AsyncGenerator[mesh_pb2.GenerateEvent, None]:
        """Serve one request, on the ring that has the most room for it. See `Serving.generate`."""
        share = self.job.plan.share if self.job.plan is not None else 1.0
        return self.replicas.choose(self.serving, share).generate(message)

    def site_left(self, site: str) -> None:
        """Gossip says the site is gone or is leaving: if the job is on it, go on without it."""
        for ring in self.replicas:
            ring.site_left(site)
        if self.job.plan and site in self.job.plan.sites and self._suspects:
            self._lost[site] = trio.current_time()
            self._suspect(site, f"{site} left the mesh")

    @property
    def tokens_total(self) -> int:
        """Tokens given by this ring and its replicas."""
        return sum(serving.tokens_total for serving in self._servings())

    @property
    def code_rms(self) -> float:
        """The largest error of lossy codes in this ring and its replicas: see `Serving.code_rms`."""
        return max(serving.code_rms for serving in self._servings())

    def close(self) -> None:
        """Take no more requests on."""
        for serving in self._servings():
            serving.closing = True

    async def idle(self) -> None:
        """Wait until no request is live. The caller bounds the wait."""
        for serving in self._servings():
            await serving.idle()

    def _servings(self) -> tuple[Serving, ...]:
        """The requests of this ring and of each replica."""
        return (self.serving, *(ring.serving for ring in self.replicas))

    def plan(self, info: ModelInfo) -> Plan:
        """Where the job would run now. Raises TopologyError."""
        constraints = Constraints.parse(self.job.constraints)
        # The job's own present shards make room for the next ones. Those of its replicas stay theirs.
        held = replace(self.job.plan, replicas=()).memory_bytes if self.job.plan else {}
        snapshot = self._view.snapshot().without(self._avoid()).with_freed(held)
        own = (self.job.id, *(ring.job.id for ring in self.replicas))
        return partition(
            snapshot,
            info.spec,
            constraints,
            strategy=self.job.strategy,
            previous=self.job.plan,
            origin=self.job.owner,
            running=[job for name, (_, job) in self._view.running().items() if name not in own],
        )

    async def _turns(self) -> None:
        assert self._info is not None
        failures = 0
        while True:
            former = self.job.plan
            plan = await self._next_plan(self._info)
            await self._displace(plan)
            self._update(plan=plan, counter=self.job.counter + 1, loaded_bytes=0, total_bytes=0)
            if self.job.state == "planning":
                self._update(state="loading")
            await self._release(former, plan)
            if former is None:
                self.replicas.start(plan)
            try:
                loss = await self._turn(plan)
                failures = 0
            except ShardFailed as failure:
                failures += 1
                if failures >= MAX_ATTEMPTS or not _worth_another_try(failure.error):
                    raise
                loss = Loss(str(failure), await self._silent({failure.site}))
                if self._move is not None and not loss.sites:
                    self._detours.failed(self._move, trio.current_time())
                    self._made = plan
                self._move = None
            if loss is None:
                logger.info("job %s goes on over other ways: %s", self.job.id, self._move)
                self._made = self._told_anew(plan)
                self._update(state="recovering")
                continue
            gone = f"without {', '.join(sorted(loss.sites))}" if loss.sites else "on the same sites"
            logger.warning("job %s goes on %s: %s", self.job.id, gone, loss.reason)
            for site in loss.sites:
                self._lost[site] = trio.current_time()
            self._update(state="recovering", recoveries=self.job.recoveries + 1)

    async def _next_plan(self, info: ModelInfo) -> Plan:
        """The plan of the next turn. Where a loss leaves none, replicas give way one by one. Raises TopologyError."""
        if self._made is not None:
            plan, self._made = self._made, None
            return plan
        while True:
            try:
                return self.plan(info)
            except TopologyError:
                if not await self.replicas.give_way():
                    raise

    def _told_anew(self, plan: Plan) -> Plan:
        """The same plan with the figures and reasons of now; as it is, where the planner would have another."""
        assert self._info is not None
        try:
            now = self.plan(self._info)
        except TopologyError:
            return plan
        parts = [assignments(each, job=self.job.id, epoch=(0, ""), model="") for each in (plan, now)]
        return replace(plan, predicted=now.predicted, why=now.why) if parts[0] == parts[1] else plan

    async def _displace(self, plan: Plan) -> None:
        """Have the jobs that the plan displaces end, each by its owner. One that is gone already has given way."""
        running = self._view.running() if plan.displaces else {}

        async def one(job: str) -> None:
            request = peer_pb2.DisplaceRequest(job=job, by=self.job.id, priority=self.job.priority)
            try:
                await self._view.peer(running[job][0]).displace(request)
            except MeshError as error:
                logger.warning("job %s could not displace %s: %s", self.job.id, job, error)

        with trio.move_on_after(DISPLACE_DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for job in plan.displaces:
                    if job in running:
                        nursery.start_soon(one, job)

    async def _turn(self, plan: Plan) -> Loss | None:
        """Deploy `plan`, serve until something is lost, or until a better way is there: then None, and `_move` says so.

        Raises ShardFailed while deploying.
        """
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
                self._move = None
                self._update(state="ready")
                for request in self.serving.live:
                    nursery.start_soon(self.serving.start, request)
                nursery.start_soon(self._watch_silence, plan, heard)
                nursery.start_soon(keep_standbys, self._view, plan, self.job)
                nursery.start_soon(self._watch_ways)
                _, reason = await receive.receive()
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if reason == _BETTER_WAY:
            return None
        self._move = None
        return Loss(reason, await self._silent(set(plan.sites)))

    async def _deploy_unless_lost(
        self, plan: Plan, suspects: trio.MemoryReceiveChannel[tuple[str, str]]
    ) -> ShardFailed | None:
        """Deploy, but give up as soon as a peer of the plan is lost: its shard would only run into a deadline.

        The failure is returned, not raised: it has to cross two nurseries, which would wrap it in groups.
        """
        failure: ShardFailed | None = None
        routes = Routes(self._view, self._detours.kept(trio.current_time()))
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
                    routes=routes,
                    connect_s=CONNECT_DEADLINE_S if self._move is None else MOVE_DEADLINE_S,
                )
                self._detours.begin(routes.ways)
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
                self.serving.accept(event.token)
            case "alive":
                self._note_steps(f"{site}/{event.device}", event.alive.steps)
            case "failure" if not self._stands_by(f"{site}/{event.device}"):
                accused = event.failure.neighbour.split("/")[0] or site
                self._suspect(accused, f"{site}/{event.device}: {event.failure.reason}")

    def _stands_by(self, worker: str) -> bool:
        """Whether the job does not run on this worker: a standby that fails is no loss."""
        return self.job.plan is not None and any(standby.key == worker for standby in self.job.plan.standbys)

    def _note_steps(self, worker: str, steps: int) -> None:
        """A worker's step counter that has moved is progress, also where no token comes of it yet (a long prefill)."""
        if steps != self._steps.get(worker, 0):
            self._steps[worker] = steps
            self._stepped_at = trio.current_time()

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
            for request in self.serving.live:
                if not request.finish_reason and now - max(request.progress_at, self._stepped_at) > STALL_S:
                    self._suspect("", f"no token and no step for request {request.name} in {STALL_S:.0f} s")

    async def _watch_ways(self) -> None:
        """End the turn where the ring is to be opened anew over better ways."""
        self._move = await next_move(self._view, self._detours, self.serving)
        self._suspect("", _BETTER_WAY)

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
        """End the workers of `former` that `following` does not use."""
        if former is not None:
            with trio.move_on_after(PING_DEADLINE_S, shield=True):
                await release(
                    self._view, former, following, job=self.job.id, epoch=self.job.epoch, lost=frozenset(self._lost)
                )

    def _update(self, **changes: object) -> None:
        self.job.update(**changes)
        self._on_change()


def _worth_another_try(error: MeshError) -> bool:
    """A dead peer, a lost race for memory or a late answer may pass; a bad model or a bad request will not."""
    return not isinstance(error, ModelError | RequestError)
