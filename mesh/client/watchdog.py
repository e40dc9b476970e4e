"""A deadline on silence: ends a call when its reader has waited too long for the next message.

gRPC's own deadline covers a whole call, and a generation may rightly take an hour. One sleeping thread per stream does
it, and costs the reader two assignments per message; a timer per message would start a thread for every token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls `expire` once when `waiting` was left on for `idle_s` seconds. Starts its thread at the first wait."""

    def __init__(self, expire: Callable[[], object], idle_s: float) -> None:
        self.fired = False
        self._expire = expire
        self._idle_s = idle_s
        self._since: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def wait_begins(self) -> None:
        """The reader asks for a message."""
        self._since = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mesh-watchdog", daemon=True)
            self._thread.start()

    def wait_ends(self) -> None:
        """The reader has its message, or gave up. A slow reader is not a silent peer."""
        self._since = None

    def stop(self) -> None:
        """End the thread. May be called twice."""
        self._stop.set()

    def _run(self) -> None:
        while True:
            since = self._since
            left_s = self._idle_s if since is None else since + self._idle_s - time.monotonic()
            if left_s <= 0:
                self.fired = True
                self._expire()
                return
            if self._stop.wait(left_s):
                return
