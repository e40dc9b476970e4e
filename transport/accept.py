"""The accepting end of channels: pipes in, expected channels out, everything else dropped without a word."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from transport.base import Fabric, FrameError, Listener, Pipe, TransportError
from transport.channel import Channel, Clock, Entropy
from transport.deadlines import PATIENCE_S
from transport.handshake import RANDOM_BYTES, Hello, answer_hello, read_hello

#: How long a pipe may wait for its hello to be expected: the two ends of a channel are told of it by different
#: messages of the control plane, in any order.
STRANGER_S = 10.0
_STRANGERS = 64


class _Expected(NamedTuple):
    name: str
    key: bytes | None
    seal: bool
    delay_s: float
    silence_s: float | None
    patience_s: float


class Acceptor:
    """Turns pipes of a listener into channels. An expectation is used up by the first channel that meets it."""

    def __init__(
        self,
        fabric: Fabric,
        listener: Listener,
        *,
        patience_s: float = STRANGER_S,
        clock: Clock = time.monotonic_ns,
        entropy: Entropy = os.urandom,
    ) -> None:
        self.fabric = fabric
        self.listener = listener
        self._patience_ns = round(patience_s * 1e9)
        self._clock = clock
        self._entropy = entropy
        self._expected: dict[bytes, _Expected] = {}
        self._strangers: dict[Pipe, tuple[int, Hello | None]] = {}

    @property
    def address(self) -> bytes:
        """The listener's address."""
        return self.listener.address

    def expect(
        self,
        hello: bytes,
        *,
        name: str,
        key: bytes | None,
        seal: bool = True,
        delay_s: float = 0.0,
        silence_s: float | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Let the next pipe that says `hello`, proven by `key`, become the channel to `name`. See `connect_channel`."""
        self._expected[hello] = _Expected(name, key, seal, delay_s, silence_s, patience_s)

    def forget(self, hello: bytes) -> None:
        """No longer expect `hello`."""
        self._expected.pop(hello, None)

    def poll(self) -> list[tuple[bytes, Channel]]:
        """The channels established since the last call, each with its hello. Drives the fabric once; never raises."""
        self.fabric.progress()
        now_ns = self._clock()
        while (pipe := self.listener.accept()) is not None:
            if len(self._strangers) >= _STRANGERS:
                self._drop(next(iter(self._strangers)))
            self._strangers[pipe] = (now_ns + self._patience_ns, None)
        made = []
        for pipe, (deadline_ns, said) in tuple(self._strangers.items()):
            hello = said
            try:
                if hello is None:
                    message = pipe.take()
                    if message is not None:
                        hello = read_hello(message)
                        self._strangers[pipe] = (deadline_ns, hello)
                if hello is not None and hello.name in self._expected:
                    made.append((hello.name, self._establish(pipe, hello)))
                elif now_ns >= deadline_ns:
                    self._drop(pipe)
            except (FrameError, TransportError):
                self._drop(pipe)
        return made

    def _establish(self, pipe: Pipe, hello: Hello) -> Channel:
        expected = self._expected[hello.name]
        welcome, keys = answer_hello(hello, expected.key, self._entropy(RANDOM_BYTES), seal=expected.seal)
        pipe.send((welcome,))
        del self._expected[hello.name]
        del self._strangers[pipe]
        pipe.trust()
        return Channel(
            self.fabric,
            pipe,
            (keys.acceptor, keys.connector),
            name=expected.name,
            delay_s=expected.delay_s,
            silence_s=expected.silence_s,
            patience_s=expected.patience_s,
            sealed=hello.sealed,
            clock=self._clock,
        )

    def _drop(self, pipe: Pipe) -> None:
        self._strangers.pop(pipe, None)
        pipe.abort()

    def close(self) -> None:
        """Stop listening and drop the strangers. Channels live on. Idempotent."""
        for pipe in tuple(self._strangers):
            self._drop(pipe)
        self.listener.close()
