"""What a request may ask for, checked before anything is sent. Every mistake is one RequestError that names the key."""

from __future__ import annotations

import difflib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from mesh.errors import RequestError
from mesh.wire.v1 import mesh_pb2 as pb

#: What a prompt may be: a text, a list of chat messages (`{"role": ..., "content": ...}`), or a list of token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]

#: Bits of a seed drawn here: enough never to meet twice, short enough to type again.
SEED_BITS = 32


class Options(TypedDict, total=False):
    """How to continue a prompt. Absent keys take the default.

    max_tokens: how many tokens at most (default 128).
    temperature: 0 is greedy (default 0.0).
    top_p: keep the likeliest tokens that together reach this probability; 1 is off (default 1.0).
    top_k: keep this many of the likeliest tokens; 0 is off (default 0).
    seed: with the same seed, the same tokens on every plan (default: drawn at random, reported in `Generation.seed`;
        0 where the decoding is greedy, which draws nothing).
    stop: a text or several; generation ends before the first that appears (default none).
    ignore_eos: go on after the model's end-of-text token (default False).
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class _Number:
    default: float
    low: float
    high: float
    whole: bool

    def __call__(self, key: str, value: object) -> float:
        kind = "a whole number" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RequestError(f"{key} must be {kind}, not {value!r}")
        if self.whole and value != int(value):
            raise RequestError(f"{key} must be {kind}, not {value!r}")
        if not self.low <= value <= self.high:
            raise RequestError(f"{key} must lie between {self.low:g} and {self.high:g}, not {value!r}")
        return int(value) if self.whole else float(value)


# Upper bounds are those of the wire's integers; a temperature over 100 is uniform noise, so surely a slip.
_NUMBERS: dict[str, _Number] = {
    "max_tokens": _Number(128, 1, 2**32 - 1, whole=True),
    "temperature": _Number(0.0, 0.0, 100.0, whole=False),
    "top_p": _Number(1.0, 1e-9, 1.0, whole=False),
    "top_k": _Number(0, 0, 2**32 - 1, whole=True),
}


def generate_request(job: str, prompt: Prompt, options: Mapping[str, Any]) -> pb.GenerateRequest:
    """The request on the wire. Raises RequestError for an empty or malformed prompt, an unknown or a bad option."""
    for key in options:
        if key not in Options.__annotations__:
            raise RequestError(f"unknown option {key!r}{nearest(key, Options.__annotations__)}")
    numbers = {key: check(key, options.get(key, check.default)) for key, check in _NUMBERS.items()}
    ignore_eos = options.get("ignore_eos", False)
    if not isinstance(ignore_eos, bool):
        raise RequestError(f"ignore_eos must be True or False, not {ignore_eos!r}")
    request = pb.GenerateRequest(
        job=job,
        max_tokens=int(numbers["max_tokens"]),
        temperature=numbers["temperature"],
        top_p=numbers["top_p"],
        top_k=int(numbers["top_k"]),
        seed=_seed(options.get("seed"), greedy=numbers["temperature"] == 0.0),
        stop=_stops(options.get("stop", ())),
        ignore_eos=ignore_eos,
    )
    _set_prompt(request, prompt)
    return request


def nearest(key: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known key most like `key`, else the list of all."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _seed(seed: object, *, greedy: bool) -> int:
    if seed is None:
        return 0 if greedy else secrets.randbits(SEED_BITS)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise RequestError(f"seed must be a whole number from 0 to 2^64 - 1, not {seed!r}")
    return seed


def _stops(stop: object) -> list[str]:
    stops: list[object] = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, (list, tuple)) else [stop]
    for text in stops:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop must be a non-empty text or a list of them, not {text!r}")
    return cast(list[str], stops)


def _set_prompt(request: pb.GenerateRequest, prompt: object) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("the prompt is empty")
        _encodable(prompt, "the prompt")
        request.text = prompt
        return
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
        raise RequestError(
            f"a prompt is a text, a list of chat messages or a list of token ids, not a {type(prompt).__name__}"
        )
    items = list(prompt)
    if not items:
        raise RequestError("the prompt is empty")
    if isinstance(items[0], Mapping):
        request.chat.messages.extend(_each(items, "message", _message))
    else:
        request.tokens.ids.extend(_each(items, "token", _token))


def _each(items: list[Any], what: str, convert: Callable[[str, Any], Any]) -> list[Any]:
    return [convert(f"{what} {index} of the prompt", item) for index, item in enumerate(items)]


def _message(where: str, item: object) -> pb.ChatMessage:
    if not isinstance(item, Mapping):
        raise RequestError(f"{where} must be a mapping with role and content, not {item!r}")
    for key in item:
        if key not in ("role", "content"):
            raise RequestError(f"{where} has the unknown key {key!r}{nearest(str(key), ('role', 'content'))}")
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise RequestError(f"{where} needs a text as {key!r}")
        _encodable(item[key], where)
    if not item["role"]:
        raise RequestError(f"{where} has an empty role")
    return pb.ChatMessage(role=item["role"], content=item["content"])


def _token(where: str, item: object) -> int:
    try:
        value = item.__index__()  # type: ignore[attr-defined]  # numpy's and torch's integers count as well
    except (AttributeError, TypeError):
        value = -1
    if isinstance(item, bool) or not 0 <= value < 2**32:
        raise RequestError(f"{where} must be a token id, a whole number from 0, not {item!r}")
    return int(value)


def _encodable(text: str, where: str) -> None:
    """A lone surrogate (from a wrongly decoded file name or terminal) cannot travel as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is not valid Unicode at character {error.start}") from None
