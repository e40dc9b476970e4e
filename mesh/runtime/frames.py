"""What the stages of a ring say to each other: the meta of the frames on their channels. Pure: bytes and values.

A frame's meta is a small msgpack array, its payload activations. Frames name a request by a number that the first stage
gives out anew for every start, so that a frame of a request's earlier life is never taken for one of its present life.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

import msgpack

from mesh.runtime.protocol import ProtocolError

_T = TypeVar("_T")


class Kind:
    """What a frame on a channel is; the channel's `kind`. Collectives have lanes of their own in `transport`."""

    STEP = 2  # lead to next lead, and lead to the shards of its stage
    TOKEN = 3  # last lead to first lead
    ACK = 4  # last lead to first lead: a prefill chunk that is not a request's last got through
    END = 5  # first lead around the ring, and lead to its shards: drop the request's KV cache


#: The longest run of positions in one frame; a neighbour that announces more is broken.
MAX_STEP_TOKENS = 65536


class Sampling(NamedTuple):
    """How the last stage draws; travels with a request's first frame. `ordinal` is of the first token to draw."""

    request: str
    ordinal: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_tokens: list[int]


class Step(NamedTuple):
    """`length` positions of request `number` from `position` on; their hidden states (or token ids) are the payload.

    `draw`: the last stage draws a token after it. `compute_s` and `network_s` are the sums of the stages before;
    `code_rms` and `code_worst` the largest errors that lossy codes were last seen to make there (`codes.CodeError`).
    """

    number: int
    position: int
    length: int
    draw: bool
    compute_s: float
    network_s: float
    sampling: Sampling | None = None
    code_rms: float = 0.0
    code_worst: float = 0.0

    def encode(self) -> bytes:
        """The frame's meta."""
        meta: bytes = msgpack.packb(self)
        return meta

    @classmethod
    def decode(cls, meta: bytes) -> Step:
        """Raises ProtocolError where a field is missing, of another type or out of bounds."""
        step = _fields(cls, meta)
        if step.sampling is not None:
            if not isinstance(step.sampling, list) or len(step.sampling) != len(Sampling._fields):
                raise ProtocolError("ring frame with malformed sampling parameters")
            step = step._replace(sampling=Sampling(*step.sampling))
        sums = (step.compute_s, step.network_s, step.code_rms, step.code_worst)
        if not (_natural(step.number) and _natural(step.position) and isinstance(step.length, int)) or not all(
            isinstance(value, float) and math.isfinite(value) for value in sums
        ):
            raise ProtocolError("ring frame with malformed fields")
        if not 1 <= step.length <= MAX_STEP_TOKENS:
            raise ProtocolError(f"ring frame of {step.length} positions: 1 to {MAX_STEP_TOKENS} are allowed")
        return step


class Drawn(NamedTuple):
    """Token number `ordinal` that the last stage drew, on its way to the first. `finish_reason` as in `TokenEvent`."""

    number: int
    ordinal: int
    token: int
    finish_reason: str

    def encode(self) -> bytes:
        """The frame's meta."""
        meta: bytes = msgpack.packb(self)
        return meta

    @classmethod
    def decode(cls, meta: bytes) -> Drawn:
        """Raises ProtocolError where a field is missing, of another type or out of bounds."""
        drawn = _fields(cls, meta)
        if not (_natural(drawn.number) and _natural(drawn.ordinal) and _natural(drawn.token)):
            raise ProtocolError("token frame with malformed fields")
        return drawn


class About(NamedTuple):
    """A frame that says no more than which request it is about: ACK and END.

    `more`, of an END: steps of the request are still to come, as bulk, and then another END; all of that is to be
    dropped.
    """

    number: int
    more: bool = False

    def encode(self) -> bytes:
        """The frame's meta."""
        meta: bytes = msgpack.packb(self)
        return meta

    @classmethod
    def decode(cls, meta: bytes) -> Self:
        """Raises ProtocolError where a field is missing or malformed."""
        about = _fields(cls, meta)
        if not _natural(about.number) or not isinstance(about.more, bool):
            raise ProtocolError("ring frame with malformed fields")
        return about


def _natural(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _fields(kind: Callable[..., _T], meta: bytes) -> _T:
    try:
        return kind(*msgpack.unpackb(meta))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"ring frame that no stage sends ({error})") from error
