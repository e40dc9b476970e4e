"""What a daemon and its worker say to each other over the worker's stdin and stdout. Pure: bytes and values.

A message is a 4-byte big-endian length and that many bytes of msgpack, a
map with the message's name and its fields. Every command carries an `id` and gets exactly one `Reply` with that id.
What workers say to each other is in `mesh.runtime.frames`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import msgpack

from mesh.errors import BY_CODE, MeshError, WorkerError
from mesh.runtime.work import NOTHING_DECODED, Decoded

#: A job's totally ordered (counter, owner) pair.
Epoch = tuple[int, str]

#: The longest control message. A prompt of a million tokens is 5 MB; anything longer is a broken peer.
MAX_MESSAGE_BYTES = 64 << 20

_LENGTH_BYTES = 4


class ProtocolError(WorkerError):
    """Bytes arrived that the other end never sends: a length, a type or a name is wrong."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One channel to open. `role` is "next", "previous" or "shard" (then `rank` is that shard's rank in the stage).

    `address` is empty where the neighbour connects to us. `key` is 32 bytes; frames are sealed when `seal` is true.
    `hello` names the channel to the listening end. `delay_s` is emulated one-way latency, 0 outside drills. `beside`:
    it is a worker of this same peer, and so of this host.
    """

    role: str
    rank: int
    name: str
    backend: str
    address: bytes
    key: bytes
    hello: bytes
    seal: bool = True
    delay_s: float = 0.0
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A request to begin or to resume. `tokens` are the prompt and all tokens generated so far.

    The next token drawn has index `len(tokens) - prompt_tokens`. `max_tokens` counts from the end of the prompt.
    `stop_tokens` are the end-of-sequence ids; empty to ignore them.
    """

    request: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    @property
    def index(self) -> int:
        """The index of the next token to draw."""
        return len(self.tokens) - self.prompt_tokens


# --- commands: daemon to worker -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare:
    """Load what `assignment` (a document of `Assignment.to_dict`) names, keep what overlaps, listen on each backend.

    Reply: {"addresses": {backend: bytes}, "weight_bytes": int}. Progress events carry the same id.
    """

    name: ClassVar[str] = "prepare"
    id: int
    epoch: Epoch
    assignment: dict[str, Any]
    backends: tuple[str, ...]
    host: str


@dataclass(frozen=True, slots=True)
class Connect:
    """Open the channels. The reply comes when every neighbour has answered, or an error after `timeout_s`."""

    name: ClassVar[str] = "connect"
    id: int
    epoch: Epoch
    neighbours: tuple[Neighbour, ...]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Start:
    """Begin or resume a request, at the lead of the first stage. The reply says that it was accepted."""

    name: ClassVar[str] = "start"
    id: int
    epoch: Epoch
    request: Request


@dataclass(frozen=True, slots=True)
class Stop:
    """End a request early, at the lead of the first stage. A request that is already over is no error."""

    name: ClassVar[str] = "stop"
    id: int
    epoch: Epoch
    request: str


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop all requests and channels of this epoch and older ones; keep the weights."""

    name: ClassVar[str] = "abort"
    id: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Release:
    """End the worker. The process exits after the reply."""

    name: ClassVar[str] = "release"
    id: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by the control thread at once. Reply: {"steps": int, "epoch": [counter, owner], "pid": int}."""

    name: ClassVar[str] = "ping"
    id: int


Command = Prepare | Connect | Start | Stop | Abort | Release | Ping


# --- events: worker to daemon -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the command `id`. `code` is empty on success, else the code of a `MeshError` (`mesh.errors`)."""

    name: ClassVar[str] = "reply"
    id: int
    code: str = ""
    message: str = ""
    body: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_error(cls, id: int, error: MeshError) -> Reply:
        """The reply that carries `error`."""
        return cls(id, error.code, str(error))

    def check(self) -> dict[str, Any]:
        """The body. Raises the error that the reply carries, as the class it was in the worker."""
        if self.code:
            raise BY_CODE.get(self.code, WorkerError)(self.message)
        return self.body


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the `Prepare` of that id has got."""

    name: ClassVar[str] = "progress"
    id: int
    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Token `index` of a request, from the lead of the last stage. `finish_reason` is "", "stop" or "length".

    `timings` are of this turn of the ring, in seconds: `compute_s` in the model and `network_s` in collectives, summed
    over the stages; `waiting_s` the rest of the time since the token before (or since the request reached this stage).
    Where hidden states travel in a lossy code also what that cost them: `code_rms`, `code_worst` (`codes.CodeError`).
    """

    name: ClassVar[str] = "token"
    epoch: Epoch
    request: str
    index: int
    token: int
    finish_reason: str
    timings: dict[str, float]


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """The ring is broken under this epoch. `neighbour` fell silent, or is empty: the worker itself failed.

    `fatal` means that the process is gone; otherwise it keeps its weights and waits for a higher epoch.
    """

    name: ClassVar[str] = "failure"
    epoch: Epoch
    neighbour: str
    reason: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class AliveEvent:
    """Said at least once a second. `steps` counts the forward passes so far: the owner watches that it grows.

    `decoded` is what of them decoded (`mesh.runtime.work.Decoded`): its daemon watches how fast the device is.
    """

    name: ClassVar[str] = "alive"
    epoch: Epoch
    steps: int
    decoded: Decoded = NOTHING_DECODED


Event = Reply | Progress | TokenEvent | FailureEvent | AliveEvent

_COMMANDS: dict[str, type[Any]] = {c.name: c for c in (Prepare, Connect, Start, Stop, Abort, Release, Ping)}
_EVENTS: dict[str, type[Any]] = {e.name: e for e in (Reply, Progress, TokenEvent, FailureEvent, AliveEvent)}


# --- bytes --------------------------------------------------------------------------------------------------------


def encode(message: Command | Event) -> bytes:
    """The bytes of one control message, length included."""
    body: bytes = msgpack.packb({"name": message.name, **_document(message)})
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"control message {message.name} of {len(body)} bytes: the most is {MAX_MESSAGE_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class Decoder:
    """Bytes in, messages out. One per direction of a pipe: `Decoder.commands()` or `Decoder.events()`."""

    def __init__(self, known: dict[str, type[Any]]) -> None:
        self._known = known
        self._buffer = bytearray()

    @classmethod
    def commands(cls) -> Decoder:
        """For the worker's end."""
        return cls(_COMMANDS)

    @classmethod
    def events(cls) -> Decoder:
        """For the daemon's end."""
        return cls(_EVENTS)

    def feed(self, data: bytes | bytearray) -> list[Any]:
        """The messages that `data` completes, in order. Raises ProtocolError; nothing after that can be trusted."""
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + _LENGTH_BYTES], "big")
            if length > MAX_MESSAGE_BYTES:
                raise ProtocolError(f"control message of {length} bytes announced: the most is {MAX_MESSAGE_BYTES}")
            end = start + _LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            messages.append(self._decode(bytes(self._buffer[start + _LENGTH_BYTES : end])))
            start = end
        del self._buffer[:start]
        return messages

    def _decode(self, body: bytes) -> Any:
        try:
            document = msgpack.unpackb(body)
            kind = self._known[document.pop("name")]
            return _build(kind, document)
        except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
            raise ProtocolError(f"control message that nobody sends ({type(error).__name__}: {error})") from error


def _document(value: Any) -> dict[str, Any]:
    # dataclasses.asdict copies deeply (0.1 ms for a long prompt's tokens); one level is all these messages need.
    return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Neighbour | Request):
        return _document(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Neighbour):
        return [_document(item) for item in value]
    return value


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "epoch": lambda value: (int(value[0]), str(value[1])),
    "backends": tuple,
    "decoded": lambda value: Decoded(*(float(number) for number in value)),
    "neighbours": lambda value: tuple(Neighbour(**item) for item in value),
}


def _build(kind: type[Any], document: dict[str, Any]) -> Any:
    for key in document.keys() & _FIELDS.keys():
        document[key] = _FIELDS[key](document[key])
    if kind is Start:
        document["request"] = _request(document["request"])
    return kind(**document)


def _request(document: dict[str, Any]) -> Request:
    document["tokens"] = tuple(document["tokens"])
    document["stop_tokens"] = tuple(document["stop_tokens"])
    return Request(**document)
