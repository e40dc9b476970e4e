"""Bulk: messages that may wait (weights, copies of a KV cache), so that tokens need not wait for them.

A bulk message is not queued in a pipe; its *source* is. The pipe pulls a piece of at most 1 MiB whenever it has room
for one, and the piece is sealed in that moment, while earlier ones travel. Whatever is sent meanwhile goes first.
"""

from __future__ import annotations

from collections import deque

from transport.base import Pipe, Source

#: The longest piece: with its metadata within 1 MiB, which AES-GCM seals in 0.1 ms, holding the interpreter.
PIECE_BYTES = (1 << 20) - 4096
#: A pipe with one queue has no more than this of bulk in it: what an urgent message may have to wait for.
_AHEAD_BYTES = 2 << 20


class BulkQueue:
    """Bulk over a pipe that has one queue for everything: fed to it while the queue is short."""

    def __init__(self) -> None:
        self._sources: deque[Source] = deque()

    def __bool__(self) -> bool:
        return bool(self._sources)

    @property
    def pending_bytes(self) -> int:
        """Bytes that the pipe was not given yet."""
        return sum(source.left_bytes for source in self._sources)

    def add(self, source: Source, pipe: Pipe) -> None:
        """Queue a source behind those before it."""
        self._sources.append(source)
        self.pump(pipe)

    def pump(self, pipe: Pipe) -> bool:
        """Give the pipe what it has room for. True if it got something. Raises what `Pipe.send` raises."""
        moved = False
        while self._sources and pipe.pending_bytes < _AHEAD_BYTES:
            source = self._sources[0]
            parts = source.pull(PIECE_BYTES)
            if parts is None:
                self._sources.popleft()
                continue
            source.sent(pipe.send(parts))
            moved = True
        return moved

    def clear(self) -> None:
        """The pipe has ended."""
        while self._sources:
            self._sources.popleft().cancel()
