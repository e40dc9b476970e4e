"""One generation: what was asked, what has been generated, and the text that is safe to show.

A request outlives the plan it started on. After a loss it starts again under the new epoch with its prompt and its
tokens so far; because the random number of token i depends on (seed, i) alone, the stream goes on as if nothing
had happened.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgpack
import trio

from mesh.errors import RequestError
from mesh.runtime.text import StopStrings, Text
from mesh.wire.v1 import mesh_pb2, peer_pb2

#: Bounds of what a client may ask; a number outside them is a mistake, not a wish.
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TEMPERATURE = 16, 256, 100.0


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options of one generation. `temperature` 0 is greedy, `top_p` 1 and `top_k` 0 are off."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool

    @classmethod
    def parse(cls, message: mesh_pb2.GenerateRequest) -> Options:
        """Check every number; raises RequestError that names the option and its bounds."""
        if message.max_tokens < 1:
            raise RequestError(f"max_tokens is {message.max_tokens}: it must be at least 1")
        if not 0 <= message.temperature <= MAX_TEMPERATURE:
            raise RequestError(f"temperature is {message.temperature}: it must lie between 0 and {MAX_TEMPERATURE:g}")
        if not 0 < message.top_p <= 1:
            raise RequestError(f"top_p is {message.top_p}: it must be above 0 and at most 1")
        if len(message.stop) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in message.stop):
            raise RequestError(f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")
        return cls(
            message.max_tokens,
            message.temperature,
            message.top_p,
            message.top_k,
            message.seed,
            tuple(message.stop),
            message.ignore_eos,
        )


def prompt_of(message: mesh_pb2.GenerateRequest) -> str | list[dict[str, str]] | list[int]:
    """The prompt in the form `Text.encode` takes. Raises RequestError where there is none."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "chat":
            return [{"role": item.role, "content": item.content} for item in message.chat.messages]
        case "tokens":
            return list(message.tokens.ids)
    raise RequestError("the prompt is empty: give a text, a list of chat messages or a list of token ids")


@dataclass
class Timeline:
    """When things happened (trio's clock, seconds), and where the workers say the time went."""

    started: float = field(default_factory=trio.current_time)
    first: float | None = None
    last: float | None = None
    longest_gap_s: float = 0.0
    compute_s: float = 0.0
    network_s: float = 0.0
    waiting_s: float = 0.0
    code_rms: float = 0.0
    code_worst: float = 0.0

    def token(self, now: float) -> None:
        """Note the arrival of one token."""
        if self.first is None:
            self.first = now
        elif self.last is not None:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last)
        self.last = now

    def add(self, timings: bytes) -> None:
        """Add what a worker measured of one turn: msgpack of `mesh.runtime.protocol.TokenEvent.timings`."""
        if not timings:
            return
        measured = msgpack.unpackb(timings)
        self.compute_s += float(measured.get("compute_s", 0.0))
        self.network_s += float(measured.get("network_s", 0.0))
        self.waiting_s += float(measured.get("waiting_s", 0.0))
        self.code_rms = max(self.code_rms, float(measured.get("code_rms", 0.0)))
        self.code_worst = max(self.code_worst, float(measured.get("code_worst", 0.0)))

    def summary(self, tokens: int) -> dict[str, float]:
        """Seconds and tokens per second, as the client gets them; and the errors of lossy codes, where there were."""
        first, last = self.first or self.started, self.last or self.started
        decode_s = last - first
        return {
            "first_token_s": first - self.started,
            "total_s": last - self.started,
            "decode_tokens_per_s": (tokens - 1) / decode_s if tokens > 1 and decode_s > 0 else 0.0,
            "longest_gap_s": self.longest_gap_s,
            "compute_s": self.compute_s,
            "network_s": self.network_s,
            "waiting_s": self.waiting_s,
            **({"code_rms": self.code_rms, "code_worst": self.code_worst} if self.code_rms else {}),
        }


class Request:
    """One live generation. Fed with tokens by the coordinator, read by whoever streams it to the client."""

    def __init__(self, name: str, prompt: Sequence[int], options: Options, text: Text, eos: frozenset[int]) -> None:
        self.name = name
        self.prompt = tuple(prompt)
        self.options = options
        self.tokens: list[int] = []
        self.finish_reason = ""
        self.ended_by_worker = False
        self.error: RequestError | None = None
        self.progress_at = trio.current_time()
        self.timeline = Timeline()
        self._eos = eos
        self._detokenizer = text.stream(list(prompt))
        self._stops = StopStrings(options.stop)
        self._events: deque[mesh_pb2.GenerateEvent] = deque()
        self._arrived = trio.Event()

    def start_message(self, job: str, epoch: peer_pb2.Epoch, device: str) -> peer_pb2.StartRequest:
        """What begins, or resumes, this request at the lead of the first stage."""
        options = self.options
        return peer_pb2.StartRequest(
            job=job,
            epoch=epoch,
            device=device,
            request=self.name,
            tokens=[*self.prompt, *self.tokens],
            prompt_tokens=len(self.prompt),
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            stop_tokens=[] if options.ignore_eos else sorted(self._eos),
        )

    def accept(self, event: peer_pb2.TokenEvent) -> bool:
        """Take the next token; False where it is not the next one (a repeat, or of a request already finished).

        A token that ends the sequence is part of `token_ids` but not of the text, as in transformers' `generate`.
        """
        if self.finish_reason or event.index != len(self.tokens):
            return False
        self.tokens.append(event.token)
        self.progress_at = trio.current_time()
        self.timeline.token(self.progress_at)
        self.timeline.add(event.timings)
        self.ended_by_worker = bool(event.finish_reason)
        ended_by_token = event.finish_reason == "stop"
        text, hit = ("", False) if ended_by_token else self._stops.push(self._detokenizer.push(event.token))
        if hit:
            self.finish_reason = "stop"
        elif event.finish_reason:
            self.finish_reason = event.finish_reason
            rest, hit = self._stops.push(self._detokenizer.finish())
            text += rest if hit else rest + self._stops.finish()
        self._emit(mesh_pb2.GenerateEvent(text=text, token_ids=[event.token], finish_reason=self.finish_reason))
        return True

    def _emit(self, event: mesh_pb2.GenerateEvent) -> None:
        self._events.append(event)
        self._arrived.set()

    def take(self) -> mesh_pb2.GenerateEvent | None:
        """The next event for the client, or None."""
        return self._events.popleft() if self._events else None

    async def arrived(self) -> None:
        """Wait until `take` may have something, or `wake` was called. The caller bounds the wait."""
        if not self._events:
            self._arrived = trio.Event()
            await self._arrived.wait()

    def fail(self, error: RequestError) -> None:
        """The workers refuse the request: whoever waits for it is to raise `error`."""
        self.error = error
        self.wake()

    def wake(self) -> None:
        """Let whoever waits look again: the job has ended."""
        self._arrived.set()

    def timings_json(self) -> str:
        """Where the time went, as JSON; the keys are those of `Timeline.summary`."""
        return json.dumps(self.timeline.summary(len(self.tokens)))
