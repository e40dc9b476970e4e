"""The worker process: `python -m mesh.runtime.worker`, started by a peer's daemon, one for each job and device.

Its stdin and stdout belong to the daemon (`mesh.runtime.protocol`); whatever prints goes to stderr. Two threads:

    control   reads commands, answers pings, says twice a second that the worker lives, and ends the process when the
              daemon is gone, whatever the other thread is doing
    step      (the main thread) owns the model, the fabrics and the channels: see `mesh.runtime.engine`

The control thread starts before torch is imported, so that a worker answers within a fraction of a second.

A daemon that is gone is noticed by the end of stdin, and where something else holds the other end of that pipe, by the
parent's process id. The kernel's parent-death signal only hastens that check: it fires when the *thread* that spawned
the worker ends, and trio spawns from a thread of its pool that ends after ten idle seconds, so a signal that kills
outright would end healthy workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from mesh.runtime.inbox import Inbox
from mesh.runtime.protocol import AliveEvent, Decoder, Event, Ping, ProtocolError, Reply, encode

if TYPE_CHECKING:
    from mesh.runtime.engine import Engine

#: How often the worker says that it lives; the owner expects it once a second.
ALIVE_S = 0.5
_READ_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Outbox:
    """Events on their way to the daemon, from either thread. A daemon that is gone ends the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def put(self, event: Event) -> None:
        """Write an event. Blocks while the pipe is full, which means that the daemon does not read at all."""
        with self._lock:
            self._write(encode(event))

    def offer(self, event: Event) -> None:
        """Write an event unless another thread is writing or the pipe is full: what the control thread uses."""
        if not self._lock.acquire(timeout=0.05):
            return
        try:
            if select.select((), (self._descriptor,), (), 0)[1]:
                self._write(encode(event))
        finally:
            self._lock.release()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            _end(0)


class Control:
    """The control thread: see the module. `engine` is None until torch is imported."""

    def __init__(self, descriptor: int, alarm: int, inbox: Inbox, outbox: Outbox, parent: int) -> None:
        self.engine: Engine | None = None
        self._descriptor = descriptor
        self._alarm = alarm
        self._inbox = inbox
        self._outbox = outbox
        self._parent = parent
        self._decoder = Decoder.commands()

    def run(self) -> None:
        """Until the daemon is gone; then the process ends from here, as the step thread may be deep in a step."""
        try:
            self._run()
        except ProtocolError as error:
            print(f"the daemon sent nonsense: {error}", file=sys.stderr)
            _end(2)
        except BaseException as error:
            print(f"control thread: {type(error).__name__}: {error}", file=sys.stderr)
            _end(2)

    def _run(self) -> None:
        due = 0.0
        while True:
            now = time.monotonic()
            if now >= due:
                due = now + ALIVE_S
                self._say_alive()
            readable, _, _ = select.select((self._descriptor, self._alarm), (), (), due - now if due > now else 0)
            if os.getppid() != self._parent:
                _end(0)
            if self._alarm in readable:
                os.read(self._alarm, 64)
            if self._descriptor in readable:
                data = os.read(self._descriptor, _READ_BYTES)
                if not data:
                    _end(0)
                for command in self._decoder.feed(data):
                    if isinstance(command, Ping):
                        self._answer(command)
                    else:
                        self._inbox.put(command)

    def _say_alive(self) -> None:
        engine = self.engine
        if engine is not None:
            self._outbox.offer(AliveEvent(engine.epoch, engine.steps, engine.decoded))
        else:
            self._outbox.offer(AliveEvent((0, ""), 0))

    def _answer(self, ping: Ping) -> None:
        engine = self.engine
        steps, epoch = (0, (0, "")) if engine is None else (engine.steps, engine.epoch)
        self._outbox.offer(Reply(ping.id, body={"steps": steps, "epoch": list(epoch), "pid": os.getpid()}))


def main() -> None:
    """Take over stdin and stdout, start the control thread, then run the engine in this one."""
    parent = os.getppid()
    commands, events = _take_pipes()
    # Ctrl-C in a terminal reaches the whole process group; the daemon decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    alarm = _watch_parent()
    for key, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(key, value)
    inbox, outbox = Inbox(), Outbox(events)
    control = Control(commands, alarm, inbox, outbox, parent)
    threading.Thread(target=control.run, name="control", daemon=True).start()

    from mesh.runtime.engine import Engine

    control.engine = engine = Engine(inbox, outbox.put)
    engine.run()
    # Without the interpreter's farewell: torch's and UCX's take seconds, and there is nothing left to save.
    _end(0)


def _take_pipes() -> tuple[int, int]:
    """Private descriptors for commands and events; stdin becomes empty and stdout becomes stderr for everybody else."""
    sys.stdout.flush()
    commands, events = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return commands, events


def _watch_parent() -> int:
    """A descriptor that turns readable when the kernel signals the parent's death (on Linux; elsewhere silent)."""
    alarm, bell = os.pipe()
    os.set_blocking(alarm, False)
    os.set_blocking(bell, False)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGUSR1), 0, 0, 0)
    return alarm


def _end(code: int) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
