"""Text to token ids and back, with `tokenizers` and `jinja2` alone: light enough for the daemon.

Chat templates are code that came with a model, so they run in jinja2's immutable sandbox, with the few names that
transformers offers them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mesh.errors import ModelError, RequestError

#: What a decoder gives for bytes that are not, or not yet, a whole character.
_REPLACEMENT = "\ufffd"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class Text:
    """One model's tokenizer and chat template. `eos` are the ids that end a stream, `vocab` the number of ids."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        special: Mapping[str, str],
        eos: Iterable[int],
        *,
        name: str = "the model",
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special = dict(special)
        self._name = name
        self._now = now
        self.eos = frozenset(eos)
        self.vocab: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: str | Path, *, now: Callable[[], datetime] = datetime.now) -> Text:
        """Read tokenizer.json, tokenizer_config.json, the template and the eos ids of a folder. Raises ModelError."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise ModelError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _read(folder / "tokenizer_config.json")
        special = {key: _content(settings[key]) for key in _SPECIAL if settings.get(key)}
        template = settings.get("chat_template")
        if isinstance(template, list):  # several by name; "default" is the one for chats
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        beside = folder / "chat_template.jinja"
        if beside.is_file():
            template = beside.read_text(encoding="utf-8")
        return cls(tokenizer, template, special, eos_ids(folder, tokenizer, special), name=folder.name, now=now)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, of chat messages [{"role", "content"}, ...], or of token ids, which are checked.

        A chat ends where the assistant's turn begins. Raises RequestError for what is empty, unknown or malformed.
        """
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer.encode(_utf8(prompt)).ids
        elif not isinstance(prompt, Sequence) or not prompt:
            raise RequestError("the prompt is empty: give a text, chat messages or token ids")
        elif all(isinstance(item, Mapping) for item in prompt):
            chat = self.render(prompt)  # type: ignore[arg-type]
            ids = self._tokenizer.encode(_utf8(chat), add_special_tokens=False).ids
        else:
            ids = [self._checked(item) for item in prompt]
        if not ids:
            raise RequestError("the prompt is empty: it gives no tokens")
        return ids

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The chat template's text for `messages`, ready for the assistant's turn. Raises RequestError."""
        for message in messages:
            if not isinstance(message.get("role"), str) or message.get("content") is None:
                raise RequestError('a chat message needs "role" and "content"')
        if not self._template:
            raise RequestError(f"{self._name} has no chat template: give the prompt as text")
        try:
            template = self._environment().from_string(self._template)
            return template.render(messages=list(messages), add_generation_prompt=True, **self._special)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"the chat template of {self._name} refuses these messages: {reason}") from error

    def stream(self, prompt: Sequence[int]) -> Detokenizer:
        """A detokenizer for the tokens that follow `prompt`."""
        return Detokenizer(self._tokenizer, prompt)

    def _checked(self, token: object) -> int:
        if isinstance(token, bool) or not isinstance(token, int):
            raise RequestError(f"{token!r:.80} is not a token id")
        if not 0 <= token < self.vocab:
            raise RequestError(f"token id {token} is unknown: this model's ids are 0..{self.vocab - 1}")
        return token

    def _environment(self) -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: self._now().strftime(form)
        return environment


class Detokenizer:
    """Token ids in, text out, whole characters only: a character made of several tokens appears with its last one."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The tokens before the first one decide whether it starts with a space; a few are enough.
        self._stream = DecodeStream(ids=list(prompt[-8:]), skip_special_tokens=True)
        self._pending: list[int] = []
        self._context = list(prompt[-8:])

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty in the middle of a character."""
        self._pending.append(token)
        try:
            text: str | None = self._stream.step(self._tokenizer, token)
        except Exception:
            # A prompt may end inside a character, which the library does not forgive: begin anew with this token.
            self._stream = DecodeStream(skip_special_tokens=True)
            text = self._stream.step(self._tokenizer, token)
        if text is None:
            return ""
        self._context = (self._context + self._pending)[-8:]
        self._pending.clear()
        return text

    def finish(self) -> str:
        """What is left when the stream ends: the whole characters of tokens held back; never part of one."""
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._context, skip_special_tokens=True)
        after = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=True)
        self._pending.clear()
        return after[len(before) :].rstrip(_REPLACEMENT) if after.startswith(before) else ""


class StopStrings:
    """Ends a stream at the first of some strings, which may lie across tokens; holds back what could become one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was met; the string itself is not shown."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            safe, self._held = self._held[: min(found)], ""
            return safe, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe, False

    def finish(self) -> str:
        """What was held back, when the stream ends otherwise."""
        held, self._held = self._held, ""
        return held


def eos_ids(folder: Path, tokenizer: Tokenizer, special: Mapping[str, str]) -> list[int]:
    """The ids that end a stream: of generation_config.json, else config.json, and the tokenizer's own, sorted."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        given = _read(folder / name).get("eos_token_id")
        found |= {given} if isinstance(given, int) else set(given or ())
        if found:
            break
    own = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return sorted(found | ({own} if own is not None else set()))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    return document if isinstance(document, dict) else {}


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _utf8(text: str) -> str:
    """The text, unless it holds half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode at character {error.start}") from error
    return text


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
