"""One shard's part in the ring of one epoch: what it does with a frame, a token, a request.

The lead of the first stage schedules, embeds and sends hidden states on; leads in between compute and pass on; the lead
of the last stage draws the token, sends it straight back to the first lead and then tells its daemon. A stage of one is
first and last at once and feeds itself. The other shards of a stage do what their lead tells them, and sum with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mesh.runtime.assignment import Assignment
from mesh.runtime.frames import About, Drawn, Kind, Sampling, Step
from mesh.runtime.links import Links
from mesh.runtime.loading import Model
from mesh.runtime.priorities import Priorities
from mesh.runtime.protocol import Epoch, Event, ProtocolError, Request, TokenEvent
from mesh.runtime.scheduler import Scheduler
from mesh.runtime.work import NOTHING_DECODED, Decoded
from transport import Channel, Message

if TYPE_CHECKING:
    import torch


class Sampler(Protocol):
    """`mesh.runtime.sampling.sample`."""

    def __call__(
        self, logits: torch.Tensor, *, temperature: float, top_p: float, top_k: int, seed: int, index: int
    ) -> int: ...


@dataclass(slots=True)
class _Drawing:
    """A request as the last stage knows it. `since` is when its present turn of the ring began here."""

    sampling: Sampling
    ordinal: int
    stop: frozenset[int]
    since: float
    compute_s: float = 0.0
    network_s: float = 0.0
    code_rms: float = 0.0
    code_worst: float = 0.0


class Ring:
    """The present epoch's work. `turn` raises TransportError or ProtocolError where the ring is broken."""

    def __init__(
        self,
        assignment: Assignment,
        model: Model,
        links: Links,
        emit: Callable[[Event], None],
        sample: Sampler,
        *,
        epoch: Epoch,
        decoded: Decoded = NOTHING_DECODED,
        collective_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import torch

        self.broken = False
        self.steps = 0
        self.decoded = decoded
        self._a = assignment
        self._model = model
        self._links = links
        self._emit = emit
        self._sample = sample
        self._epoch = epoch
        self._clock = clock
        self._collective_s = collective_s
        self._dtype: torch.dtype = getattr(torch, assignment.wire_dtype or assignment.dtype)
        self._from_buffer = torch.frombuffer
        self._uint8 = torch.uint8
        self._filled: dict[int, int] = {}
        self._coded = 0
        #: Of the hidden states sent on, as last measured: see `mesh.runtime.codes.CodeError`.
        self._code_error: tuple[float, float] = (0.0, 0.0)
        self._drawings: dict[int, _Drawing] = {}
        self._priorities = Priorities(assignment.onward_bytes_per_s)
        #: Requests that are over, of which the stage before has more on its way.
        self._ended: set[int] = set()
        self._scheduler: Scheduler | None = None
        if assignment.leads and assignment.first:
            # Enough prefill chunks under way to keep every stage busy and one more on each link.
            self._scheduler = Scheduler(
                context=assignment.context, requests=assignment.requests, window=2 * assignment.stages + 2
            )
        self._group = _group(assignment, links, clock) if assignment.size > 1 else None
        self._followers = list(links.shards.values()) if assignment.leads else []
        self._ears = self._listen_to()

    def _listen_to(self) -> list[tuple[Channel, Callable[[Message], None]]]:
        if not self._a.leads:
            return [(self._links.shards[0], self._from_lead)]
        ears: list[tuple[Channel, Callable[[Message], None]]] = []
        if self._links.previous is not None:
            ears.append((self._links.previous, self._from_last if self._a.first else self._from_previous))
        if self._links.next is not None:
            ears.append((self._links.next, self._from_next))
        ears.extend((channel, self._from_shard) for channel in self._followers)
        return ears

    def close(self) -> None:
        """Let go of what the shards share. The channels are not the ring's to close."""
        if self._group is not None:
            self._group.close()

    def start(self, request: Request) -> None:
        """Begin or resume a request. Raises RequestError; ProtocolError where this is not the first stage's lead."""
        self._first().start(request)

    def stop(self, request: str) -> None:
        """End a request early. An unknown one is over already."""
        number = self._first().stop(request)
        if number is not None:
            self._end(number)

    def turn(self) -> bool:
        """Take one message of each channel, and do one piece of scheduled work. True if there was anything to do."""
        busy = False
        for channel, take in self._ears:
            message = channel.poll()
            if message is not None:
                busy = True
                try:
                    take(message)
                except ProtocolError as error:
                    raise ProtocolError(f"{channel.name}: {error}") from error
        if self._scheduler is not None:
            work = self._scheduler.next()
            if work is not None:
                step = Step(work.number, work.position, len(work.tokens), work.draw, 0.0, 0.0, work.sampling)
                self._step(step, work.tokens, None)
                busy = True
        return busy

    # -- frames in

    def _from_previous(self, message: Message) -> None:
        if message.kind == Kind.STEP:
            step = Step.decode(message.meta)
            if step.number not in self._ended:
                self._check(step)
                self._step(step, None, message.payload)
        elif message.kind == Kind.END:
            about = About.decode(message.meta)
            if about.number in self._ended:
                self._ended.discard(about.number)
                return
            if about.more:
                self._ended.add(about.number)
            self._end(about.number)
        else:
            raise ProtocolError(f"the stage before sent a frame of kind {message.kind}")

    def _from_last(self, message: Message) -> None:
        if message.kind == Kind.TOKEN:
            self._returned(Drawn.decode(message.meta))
        elif message.kind == Kind.ACK:
            self._first().acknowledged(About.decode(message.meta).number)
        else:
            raise ProtocolError(f"the last stage sent a frame of kind {message.kind}")

    def _from_lead(self, message: Message) -> None:
        if message.kind == Kind.STEP:
            step = Step.decode(message.meta)
            self._check(step)
            self._forward(step, None, None)
        elif message.kind == Kind.END:
            self._end(About.decode(message.meta).number)
        else:
            raise ProtocolError(f"the stage's lead sent a frame of kind {message.kind}")

    def _from_next(self, message: Message) -> None:
        raise ProtocolError(f"the stage after sent a frame of kind {message.kind} against the ring")

    def _from_shard(self, message: Message) -> None:
        raise ProtocolError(f"a shard sent its lead a frame of kind {message.kind}")

    def _check(self, step: Step) -> None:
        """What arrived must continue what is here: a gap or an overlap would silently give another text."""
        filled = self._filled.get(step.number, 0)
        if step.position != filled or step.position + step.length > self._a.context:
            raise ProtocolError(
                f"request {step.number}: positions {step.position} to {step.position + step.length} arrived "
                f"where {filled} were filled of {self._a.context}"
            )

    # -- a step

    def _step(self, step: Step, tokens: list[int] | None, payload: memoryview | None) -> None:
        """A lead's step: compute with the stage's shards, then draw or pass on."""
        a = self._a
        began = self._clock()
        if a.last and step.sampling is not None:
            s = step.sampling
            self._drawings[step.number] = _Drawing(s, s.ordinal, frozenset(s.stop_tokens), began)
        if self._followers:
            meta = step.encode()
            for channel in self._followers:
                channel.send(meta, kind=Kind.STEP)
        output = self._forward(step, tokens, payload)
        network_s = step.network_s
        if self._group is not None:
            network_s += self._group.spent_s
        compute_s = step.compute_s + (self._clock() - began) - (network_s - step.network_s)
        if not a.last:
            packed = self._packed(output)
            rms, worst = self._code_error
            onward = step._replace(
                compute_s=compute_s,
                network_s=network_s,
                code_rms=max(rms, step.code_rms),
                code_worst=max(worst, step.code_worst),
            )
            assert self._links.next is not None
            bulk = self._priorities.bulk(step, packed.nbytes)
            self._links.next.send(onward.encode(), packed, kind=Kind.STEP, bulk=bulk)
            return
        drawing = self._drawings.get(step.number)
        if drawing is None:
            raise ProtocolError(f"request {step.number} reached the last stage without its sampling parameters")
        drawing.compute_s += compute_s
        drawing.network_s += network_s
        drawing.code_rms = max(drawing.code_rms, step.code_rms)
        drawing.code_worst = max(drawing.code_worst, step.code_worst)
        if step.draw:
            self._draw(step, drawing, output)
        elif self._scheduler is not None:
            self._scheduler.acknowledged(step.number)
        else:
            assert self._links.next is not None
            self._links.next.send(About(step.number).encode(), kind=Kind.ACK)

    def _forward(self, step: Step, tokens: list[int] | None, payload: memoryview | None) -> torch.Tensor:
        hidden = None
        if payload is not None:
            hidden = self._unpacked(payload, step.length)
        if self._group is not None:
            self._group.spent_s = 0.0
        began = self._clock()
        output = self._model.forward(
            str(step.number),
            step.position,
            tokens=tokens,
            hidden=hidden,
            count=step.length,
            group=self._group,
            logits=step.draw,
            timeout_s=self._collective_s,
        )
        self._filled[step.number] = step.position + step.length
        self.steps += 1
        if step.length == 1:
            self._note_decoded(step.position, self._clock() - began)
        return output

    def _note_decoded(self, position: int, seconds: float) -> None:
        work = self._model.work(position)
        if work is not None:
            spent_s = 0.0 if self._group is None else self._group.spent_s
            self.decoded = self.decoded.after(max(0.0, seconds - spent_s), work)

    def _packed(self, states: torch.Tensor) -> memoryview | torch.Tensor:
        """What the next stage is sent: bytes on the host, or the tensor where the channel takes it from the device."""
        if not self._a.code:
            if states.is_cuda and self._links.next is not None and self._links.next.takes_device:
                return states.detach().to(self._dtype).contiguous().view(-1).view(self._uint8)
            return _bytes(states, self._dtype, self._uint8)
        from mesh.runtime.codes import SAMPLED, encode, measure

        coded = encode(states, self._a.code)
        if self._coded % SAMPLED == 0:
            self._code_error = measure(states, coded)
        self._coded += 1
        view: memoryview = coded.numpy().data
        return view

    def _unpacked(self, payload: memoryview, length: int) -> torch.Tensor:
        """Hidden states [length, hidden]. Raises ProtocolError where the bytes cannot be so many."""
        data = bytearray(payload) if payload.readonly else payload
        if self._a.code_in:
            from mesh.runtime.codes import decode

            return decode(self._from_buffer(data, dtype=self._uint8), length, self._model.hidden, self._dtype)
        if not payload.nbytes or payload.nbytes % (length * self._dtype.itemsize):
            raise ProtocolError(f"{payload.nbytes} bytes of activations arrived for {length} positions")
        return self._from_buffer(data, dtype=self._dtype).view(length, -1)

    def _draw(self, step: Step, drawing: _Drawing, logits: torch.Tensor) -> None:
        s = drawing.sampling
        began = self._clock()
        ordinal = drawing.ordinal
        token = self._sample(
            logits, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, seed=s.seed, index=ordinal
        )
        finish = ""
        if token in drawing.stop:
            finish = "stop"
        elif ordinal + 1 >= s.max_tokens or step.position + step.length + 1 >= self._a.context:
            finish = "length"
        drawn = Drawn(step.number, ordinal, token, finish)
        drawing.ordinal += 1
        now = self._clock()
        compute_s = drawing.compute_s + now - began
        waiting_s = max(0.0, now - drawing.since - compute_s - drawing.network_s)
        timings = {"compute_s": compute_s, "network_s": drawing.network_s, "waiting_s": waiting_s}
        if drawing.code_rms:
            timings |= {"code_rms": drawing.code_rms, "code_worst": drawing.code_worst}
        drawing.since, drawing.compute_s, drawing.network_s = now, 0.0, 0.0
        if self._scheduler is None:
            # The ring first: the daemon can wait, the next step cannot.
            assert self._links.next is not None
            self._links.next.send(drawn.encode(), kind=Kind.TOKEN)
            if finish:
                self._drawings.pop(step.number)
        else:
            self._returned(drawn)
        self._emit(TokenEvent(self._epoch, s.request, ordinal, token, finish, timings))

    def _returned(self, drawn: Drawn) -> None:
        number = self._first().drawn(drawn)
        if number is not None:
            self._end(number)

    def _end(self, number: int) -> None:
        """Drop what is held for a request here, in the stage's other shards, and in the stages after."""
        self._model.drop(str(number))
        self._filled.pop(number, None)
        self._drawings.pop(number, None)
        meta = About(number).encode()
        for channel in self._followers:
            channel.send(meta, kind=Kind.END)
        if self._a.leads and not self._a.last:
            assert self._links.next is not None
            if self._priorities.end(number):
                self._links.next.send(About(number, more=True).encode(), kind=Kind.END)
                self._links.next.send(meta, kind=Kind.END, bulk=True)
            else:
                self._links.next.send(meta, kind=Kind.END)

    def _first(self) -> Scheduler:
        if self._scheduler is None:
            raise ProtocolError("requests begin and end at the lead of the first stage; this shard is not it")
        return self._scheduler


class _TimedGroup:
    """A group that adds up the time spent in its collectives, in `spent_s`."""

    def __init__(self, inner: Any, clock: Callable[[], float]) -> None:
        self.rank: int = inner.rank
        self.size: int = inner.size
        self.spent_s = 0.0
        self._inner = inner
        self._clock = clock

    def close(self) -> None:
        self._inner.close()

    def all_reduce_(self, tensor: torch.Tensor, timeout_s: float | None) -> object:
        began = self._clock()
        result: object = self._inner.all_reduce_(tensor, timeout_s)
        self.spent_s += self._clock() - began
        return result

    def broadcast_(self, tensor: torch.Tensor, root: int, timeout_s: float | None) -> object:
        began = self._clock()
        result: object = self._inner.broadcast_(tensor, root, timeout_s)
        self.spent_s += self._clock() - began
        return result

    def gather(self, tensor: torch.Tensor, root: int, timeout_s: float | None) -> list[torch.Tensor] | None:
        began = self._clock()
        result: list[torch.Tensor] | None = self._inner.gather(tensor, root, timeout_s)
        self.spent_s += self._clock() - began
        return result


def _group(assignment: Assignment, links: Links, clock: Callable[[], float]) -> _TimedGroup:
    from transport.collectives import Group

    group = Group(
        assignment.rank, assignment.size, links.shards, beside=links.beside, device=_located(assignment.device)
    )
    return _TimedGroup(group, clock)


def _located(device: str) -> str:
    """As a tensor says where it lies: torch takes "cuda" for the first GPU."""
    return "cuda:0" if device == "cuda" else device


def _bytes(tensor: torch.Tensor, dtype: torch.dtype, uint8: torch.dtype) -> memoryview:
    """The bytes of hidden states, on the host. The view keeps the tensor alive until the frame has left."""
    flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().view(-1)
    view: memoryview = flat.view(uint8).numpy().data
    return view
