"""The live requests of one job: admitted, started, fed with tokens, streamed to their clients and stopped.

Knows nothing of plans that fail: the coordinator starts every request again after a recovery, and is told when a start
did not get through.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import trio

from mesh.errors import MeshError, PeerUnreachable, RequestError
from mesh.jobs.job import Job, wire_epoch
from mesh.jobs.model import ModelInfo
from mesh.jobs.peers import View
from mesh.jobs.request import Options, Request, prompt_of
from mesh.runtime.text import Text
from mesh.wire.v1 import mesh_pb2, peer_pb2
from topology import Plan

#: Clients hear at least this often from a request that waits: for room, for a prefill, or for a recovery.
HEARTBEAT_S = 10.0
#: How long a worker may take to let go of a request.
STOP_DEADLINE_S = 2.0


class Serving:
    """The requests of `job`. `suspect(site, reason)` tells the coordinator that a site did not obey."""

    def __init__(self, job: Job, view: View, suspect: Callable[[str, str], None]) -> None:
        self.tokens_total = 0
        #: The largest error, root mean square, that lossy codes were seen to make of hidden states; 0 without codes.
        self.code_rms = 0.0
        #: Set while the peer leaves: what is live is finished, nothing more is taken on.
        self.closing = False
        self._job = job
        self._view = view
        self._suspect = suspect
        self._requests: dict[str, Request] = {}
        self._info: ModelInfo | None = None
        self._text: Text | None = None
        self._serial = 0
        self._reserved_tokens = 0
        self._ended = trio.Event()

    def open(self, info: ModelInfo) -> None:
        """The model is known: load its tokenizer. Raises ModelError."""
        self._text = Text.load(info.tokenizer)
        self._info = info

    @property
    def live(self) -> tuple[Request, ...]:
        """Every request that a client still waits for."""
        return tuple(self._requests.values())

    async def idle(self) -> None:
        """Wait until no request is live. The caller bounds the wait."""
        while self._requests:
            await self._one_ended()

    def accept(self, event: peer_pb2.TokenEvent) -> None:
        """Take a token from a worker; one that is not the next of its request is dropped."""
        request = self._requests.get(event.request)
        if request is not None and request.accept(event):
            self.tokens_total += 1
            self.code_rms = max(self.code_rms, request.timeline.code_rms)

    def wake(self) -> None:
        """The job has ended: let every request find out."""
        for request in self._requests.values():
            request.wake()

    async def generate(self, message: mesh_pb2.GenerateRequest) -> AsyncGenerator[mesh_pb2.GenerateEvent, None]:
        """Serve one request: events until the last, which carries the finish reason and the timings.

        Raises RequestError for a request that cannot be served, and the job's error if the job ends meanwhile.
        Closing the iterator ends the request everywhere.
        """
        options = Options.parse(message)
        if self.closing:
            raise PeerUnreachable(f"{self._job.owner}, which owns job {self._job.id}, is leaving the mesh")
        await self._job.ready()
        assert self._info is not None and self._text is not None
        prompt = self._text.encode(prompt_of(message))
        context = _running(self._job).context
        if len(prompt) >= context:
            raise RequestError(f"the prompt has {len(prompt)} tokens: the context of this job holds {context}")
        budget = min(len(prompt) + options.max_tokens, context)
        room = context * _running(self._job).concurrency
        while self._reserved_tokens and self._reserved_tokens + budget > room:
            yield mesh_pb2.GenerateEvent()
            with trio.move_on_after(HEARTBEAT_S):
                await self._one_ended()
            self._job.raise_if_ended()
        self._reserved_tokens += budget
        self._serial += 1
        request = Request(f"{self._job.id}.{self._serial}", prompt, options, self._text, self._info.eos)
        self._requests[request.name] = request
        try:
            if self._job.state == "ready":
                await self.start(request)
            yield mesh_pb2.GenerateEvent(prompt_tokens=len(prompt))
            while True:
                event = await self._next_event(request)
                if event.finish_reason:
                    event.timings_json = request.timings_json()
                yield event
                if event.finish_reason:
                    return
        finally:
            del self._requests[request.name]
            self._reserved_tokens -= budget
            # One event for all who wait, replaced once it is set: a waiter that made its own would silence the others.
            self._ended.set()
            self._ended = trio.Event()
            await self._stop(request)

    async def start(self, request: Request) -> None:
        """Start, or start again, at the lead of the first stage. Raises nothing: a coordinator starts many at once.

        A request that is refused fails; any other failure is a suspicion, not an end.
        """
        lead = _running(self._job).stages[0].lead
        request.progress_at = trio.current_time()
        if request.finish_reason:
            return
        message = request.start_message(self._job.id, wire_epoch(self._job.epoch), lead.device)
        try:
            await self._view.peer(lead.site).start(message)
        except RequestError as error:
            request.fail(error)
        except MeshError as error:
            self._suspect(lead.site, f"{lead.key}: {error}")

    async def _stop(self, request: Request) -> None:
        """Free what the workers hold for the request, unless they ended it themselves."""
        if request.ended_by_worker or self._job.plan is None or self._job.state != "ready":
            return
        lead = self._job.plan.stages[0].lead
        message = peer_pb2.StopRequest(
            job=self._job.id, epoch=wire_epoch(self._job.epoch), device=lead.device, request=request.name
        )
        with trio.move_on_after(STOP_DEADLINE_S, shield=True):
            try:
                await self._view.peer(lead.site).stop(message)
            except MeshError:
                pass  # the worker is gone, and with it what it held

    async def _next_event(self, request: Request) -> mesh_pb2.GenerateEvent:
        """The next event; an empty one after a silence, so that the client knows that somebody is there."""
        with trio.move_on_after(HEARTBEAT_S):
            while True:
                event = request.take()
                if event is not None:
                    return event
                self._job.raise_if_ended()
                if request.error is not None:
                    raise request.error
                await request.arrived()
        return mesh_pb2.GenerateEvent()

    async def _one_ended(self) -> None:
        await self._ended.wait()


def _running(job: Job) -> Plan:
    assert job.plan is not None, "a job that is ready has a plan"
    return job.plan
