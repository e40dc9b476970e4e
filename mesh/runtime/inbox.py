"""Commands on their way from the control thread to the step thread, and whether one of them ends what is in flight.

The step thread may sit in a collective that will never end, because a neighbour died. A command under a higher epoch,
an `Abort` or a `Release` must get it out: transports ask `interrupted` whenever they would wait (`mesh.runtime.links`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mesh.runtime.protocol import Abort, Command, Epoch, Ping, Release


class Interrupted(Exception):
    """What is in flight was ended by a waiting command. Never leaves the engine."""


class Inbox:
    """A queue with one writer thread and one reader thread. Counters written by one thread each need no lock."""

    def __init__(self) -> None:
        self.fence: Epoch = (0, "")
        self.wake: Callable[[], None] = lambda: None
        self._queue: deque[tuple[Command, bool]] = deque()
        self._urgent_in = 0
        self._urgent_out = 0

    def put(self, command: Command) -> None:
        """Queue a command and wake the step thread. Called by the writer thread only."""
        urgent = False
        if not isinstance(command, Ping):
            ends = isinstance(command, Abort | Release) and command.epoch == self.fence
            urgent = ends or command.epoch > self.fence
        # Counted before it can be taken: a command must never be taken while it still counts as waiting.
        self._urgent_in += urgent
        self._queue.append((command, urgent))
        self.wake()

    def take(self) -> Command | None:
        """The next command, or None. Called by the reader thread only."""
        if not self._queue:
            return None
        command, urgent = self._queue.popleft()
        self._urgent_out += urgent
        return command

    @property
    def interrupted(self) -> bool:
        """Whether a command waits that ends what is in flight."""
        return self._urgent_in > self._urgent_out

    def __bool__(self) -> bool:
        return bool(self._queue)
