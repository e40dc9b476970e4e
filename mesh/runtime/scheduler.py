"""What the first stage feeds into the ring next. Pure: requests and tokens in, pieces of work out.

Decode goes before prefill, and prompts enter in chunks, in turn, so that a long prompt does not stall the streams that
run beside it (chunked prefill, after Sarathi-Serve, arXiv:2403.02310). Requests whose KV caches would not fit beside
those already running wait in order of arrival, so that no stage ever runs out of memory in the middle of a stream.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mesh.errors import RequestError
from mesh.runtime.frames import Drawn, Sampling
from mesh.runtime.protocol import Request

#: Positions per prefill chunk: on the small model's two cores about half a second, on an accelerator a few
#: milliseconds; activations of a 70B model at this length are 8 MB a frame.
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Work:
    """Token ids to push through the ring from `position` on. `sampling` is set on a request's first piece."""

    number: int
    position: int
    tokens: list[int]
    draw: bool
    sampling: Sampling | None


@dataclass(slots=True)
class _Running:
    number: int
    request: Request
    reserved: int
    position: int = 0
    unacknowledged: int = 0
    ordinal: int = field(init=False)

    def __post_init__(self) -> None:
        self.ordinal = self.request.index

    @property
    def prefilling(self) -> bool:
        return self.position < len(self.request.tokens)


class Scheduler:
    """The request table of the first stage.

    `context` is the longest sequence, and so many tokens times `requests` may be under way at once. `window` is how
    many prefill chunks of one request may be in the ring at once.
    """

    def __init__(self, *, context: int, window: int, requests: int = 1, chunk: int = CHUNK) -> None:
        self._context = context
        self._room = context * requests
        self._window = window
        self._chunk = chunk
        self._numbers = 0
        self._reserved = 0
        self._waiting: deque[Request] = deque()
        self._running: dict[int, _Running] = {}
        self._prefill: deque[_Running] = deque()
        self._decode: deque[Work] = deque()

    def start(self, request: Request) -> None:
        """Take a request. Raises RequestError where it is malformed or a request of that name is under way."""
        if not 1 <= request.prompt_tokens <= len(request.tokens):
            raise RequestError(f"request {request.request}: the prompt is empty; give at least one token")
        if len(request.tokens) >= self._context:
            raise RequestError(
                f"request {request.request}: {len(request.tokens)} tokens leave no room in a context of {self._context}"
            )
        if request.index >= request.max_tokens:
            raise RequestError(
                f"request {request.request}: max_tokens {request.max_tokens} leaves no token to generate"
            )
        if any(known.request == request.request for known in self._known()):
            raise RequestError(f"request {request.request} is already under way")
        self._waiting.append(request)
        self._admit()

    def stop(self, name: str) -> int | None:
        """Forget a request. The number whose KV caches the ring must drop, or None where it never entered the ring."""
        for request in self._waiting:
            if request.request == name:
                self._waiting.remove(request)
                return None
        for running in self._running.values():
            if running.request.request == name:
                self._forget(running)
                return running.number
        return None

    def drawn(self, drawn: Drawn) -> int | None:
        """A token came back from the last stage. The number to drop where it was the request's last, else None."""
        running = self._running.get(drawn.number)
        if running is None or running.prefilling or drawn.ordinal != running.ordinal:
            return None  # of a request that was stopped
        if drawn.finish_reason:
            self._forget(running)
            return running.number
        running.ordinal += 1
        self._decode.append(Work(running.number, running.position, [drawn.token], True, None))
        running.position += 1
        return None

    def acknowledged(self, number: int) -> None:
        """A prefill chunk got through the last stage."""
        running = self._running.get(number)
        if running is not None:
            running.unacknowledged = max(0, running.unacknowledged - 1)

    def next(self) -> Work | None:
        """The next piece of work, or None where everything waits for the ring."""
        while self._decode:
            work = self._decode.popleft()
            if work.number in self._running:
                return work
        for _ in range(len(self._prefill)):
            running = self._prefill.popleft()
            if running.unacknowledged >= self._window:
                self._prefill.append(running)
                continue
            work = self._piece(running)
            if running.prefilling:
                self._prefill.append(running)
            return work
        return None

    def _piece(self, running: _Running) -> Work:
        request = running.request
        start, end = running.position, min(running.position + self._chunk, len(request.tokens))
        running.position = end
        draw = end == len(request.tokens)
        if not draw:
            running.unacknowledged += 1
        sampling = None
        if start == 0:
            sampling = Sampling(
                request.request,
                request.index,
                request.max_tokens,
                request.temperature,
                request.top_p,
                request.top_k,
                request.seed,
                list(request.stop_tokens),
            )
        return Work(running.number, start, list(request.tokens[start:end]), draw, sampling)

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            reserved = min(self._context, request.prompt_tokens + request.max_tokens)
            if self._reserved + reserved > self._room:
                return
            self._waiting.popleft()
            self._numbers += 1
            self._reserved += reserved
            running = _Running(self._numbers, request, reserved)
            self._running[running.number] = running
            self._prefill.append(running)

    def _forget(self, running: _Running) -> None:
        del self._running[running.number]
        if running in self._prefill:
            self._prefill.remove(running)
        self._reserved -= running.reserved
        self._admit()

    def _known(self) -> list[Request]:
        return [*self._waiting, *(running.request for running in self._running.values())]
