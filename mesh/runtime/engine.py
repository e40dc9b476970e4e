"""The step loop of a worker: commands in, frames in and out, events out. One thread owns it, and with it the model.

    while not engine.ended:
        if not engine.turn():
            links.wait(...)

A worker is in one epoch at a time. Commands under an older one are refused; one under a newer one ends everything that
was in flight, closes the channels and drops the KV caches before it is obeyed. A neighbour that dies breaks the ring,
not the worker: it says so once, keeps its weights and waits for the next epoch. Its other channels stay open until
then, for if it closed them, its living neighbours would accuse it, and the owner could not tell the dead from the hurt.

What the shards of a stage do within a step is in `mesh.runtime.ring`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mesh.errors import DeadlineExceeded, MeshError, WorkerError
from mesh.runtime.assignment import Assignment
from mesh.runtime.inbox import Inbox, Interrupted
from mesh.runtime.links import Links
from mesh.runtime.loading import Loader, Model, load_stage
from mesh.runtime.protocol import (
    Abort,
    Command,
    Connect,
    Epoch,
    Event,
    FailureEvent,
    Ping,
    Prepare,
    Progress,
    ProtocolError,
    Release,
    Reply,
    Start,
    Stop,
)
from mesh.runtime.ring import Ring, Sampler
from mesh.runtime.work import NOTHING_DECODED, Decoded
from transport import TransportError

#: A worker with nothing to do looks at its commands this often even if a wake-up was lost.
IDLE_S = 0.25
#: Progress is reported this often at most.
_PROGRESS_S = 0.1


class Engine:
    """One worker's state and its loop. `emit` takes events and must not block for long; `sample` draws tokens."""

    def __init__(
        self,
        inbox: Inbox,
        emit: Callable[[Event], None],
        *,
        links: Links | None = None,
        load: Loader = load_stage,
        sample: Sampler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ended = False
        self.epoch: Epoch = (0, "")
        self.links = Links(lambda: inbox.interrupted) if links is None else links
        self._inbox = inbox
        self._emit = emit
        self._load = load
        self._sample = sample
        self._clock = clock
        self._model: Model | None = None
        self._assignment: Assignment | None = None
        self._connect: tuple[Connect, float] | None = None
        self._ring: Ring | None = None
        self._steps_before = 0
        self._decoded_before = NOTHING_DECODED
        self._spin_until = 0.0
        inbox.wake = self.links.wake

    @property
    def steps(self) -> int:
        """Forward passes since the worker began."""
        return self._steps_before + (self._ring.steps if self._ring is not None else 0)

    @property
    def decoded(self) -> Decoded:
        """Decoding steps since the worker began."""
        ring = self._ring
        return self._decoded_before if ring is None else ring.decoded

    def run(self) -> None:
        """Turn until released."""
        while not self.ended:
            if not self.turn() and not self._inbox:
                self.links.wait(self._patience())
        self.links.close()

    def turn(self) -> bool:
        """Do what can be done without waiting. True if something was done."""
        busy = False
        while (command := self._inbox.take()) is not None:
            self._obey(command)
            busy = True
        if self._connect is not None:
            busy = self._open_more() or busy
        ring = self._ring
        if ring is None or ring.broken:
            return busy
        try:
            self.links.guarded = True
            return ring.turn() or busy
        except Interrupted:
            ring.broken = True  # a command waits that ends this ring anyway
        except (TransportError, ProtocolError) as error:
            self._fail(error)
        except Exception as error:
            self._fail(error, own=True)
        finally:
            self.links.guarded = False
        return True

    def _patience(self) -> float:
        if self._connect is not None:
            return min(0.02, IDLE_S)  # a connecting channel may have to be looked at although nothing arrives
        return IDLE_S

    # -- commands

    def _obey(self, command: Command) -> None:
        try:
            body = self._do(command)
        except MeshError as error:
            self._emit(Reply.of_error(command.id, error))
        except MemoryError:
            self._emit(Reply.of_error(command.id, WorkerError("out of memory; give the device less to hold")))
        except Exception as error:
            self._emit(Reply.of_error(command.id, WorkerError(_one_line(error))))
        else:
            if body is not None:
                self._emit(Reply(command.id, body=body))

    def _do(self, command: Command) -> dict[str, object] | None:
        """The reply's body, or None where the reply comes later."""
        if isinstance(command, Ping):
            return {"steps": self.steps, "epoch": list(self.epoch)}
        self._fence(command.epoch)
        match command:
            case Prepare():
                return self._prepare(command)
            case Connect():
                self._begin_connecting(command)
                return None
            case Start():
                self._open_ring().start(command.request)
            case Stop():
                if self._ring is not None and not self._ring.broken:
                    self._ring.stop(command.request)
            case Abort():
                self._reset("aborted")
            case Release():
                self._reset("released")
                self.ended = True
        return {}

    def _fence(self, epoch: Epoch) -> None:
        if epoch < self.epoch:
            raise WorkerError(
                f"epoch {epoch[0]} of {epoch[1]} is over: this worker obeys epoch {self.epoch[0]} of {self.epoch[1]}"
            )
        if epoch > self.epoch:
            self._reset(f"superseded by epoch {epoch[0]} of {epoch[1]}")
            self.epoch = self._inbox.fence = epoch

    def _reset(self, why: str) -> None:
        """Everything in flight ends; the weights and the listeners stay."""
        if self._connect is not None:
            command, self._connect = self._connect[0], None
            self._emit(Reply.of_error(command.id, WorkerError(f"connecting was {why}")))
        self._steps_before, self._decoded_before = self.steps, self.decoded
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self.links.drop()
        if self._model is not None:
            self._model.drop_all()

    def _prepare(self, command: Prepare) -> dict[str, object]:
        self._reset("ended by another prepare")
        assignment = Assignment.from_dict({**command.assignment, "epoch": list(command.epoch)})
        addresses = self.links.listen(command.backends, command.host)
        reported = -_PROGRESS_S

        def progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal reported
            now = self._clock()
            if now - reported >= _PROGRESS_S or done_bytes >= total_bytes:
                reported = now
                self._emit(Progress(command.id, done_bytes, total_bytes))

        # A reload spends the former model, also when it fails: hold on to nothing that may be half taken apart.
        former, self._model, self._assignment = self._model, None, None
        self._model = self._load(assignment, former, progress)
        self._assignment = assignment
        return {"addresses": addresses, "weight_bytes": self._model.weight_bytes}

    def _begin_connecting(self, command: Connect) -> None:
        assignment = self._prepared()
        self._reset("begun anew")
        self._check_roles(assignment, command)
        self._connect = (command, self._clock() + command.timeout_s)
        try:
            self.links.open(command.neighbours)
        except MeshError:
            self._connect = None
            self.links.drop()
            raise

    def _open_more(self) -> bool:
        assert self._connect is not None
        command, deadline = self._connect
        try:
            opened = self.links.opened()
            if not opened and self._clock() > deadline:
                missing = ", ".join(self.links.missing)
                raise DeadlineExceeded(f"no answer from {missing} within {command.timeout_s:g} s; is it reachable?")
        except (TransportError, MeshError) as error:
            self._connect = None
            self.links.drop()
            wrapped = error if isinstance(error, MeshError) else WorkerError(str(error))
            self._emit(Reply.of_error(command.id, wrapped))
            return True
        if not opened:
            return False
        self._connect = None
        assert self._model is not None
        if self._sample is None:
            from mesh.runtime.sampling import sample

            self._sample = sample
        self._ring = Ring(
            self._prepared(),
            self._model,
            self.links,
            self._emit,
            self._sample,
            epoch=self.epoch,
            decoded=self._decoded_before,
            clock=self._clock,
        )
        self._emit(Reply(command.id))
        return True

    def _prepared(self) -> Assignment:
        if self._assignment is None or self._model is None or self._assignment.epoch != self.epoch:
            raise WorkerError(f"nothing is prepared under epoch {self.epoch[0]} of {self.epoch[1]}")
        return self._assignment

    def _check_roles(self, assignment: Assignment, command: Connect) -> None:
        ring = {"next", "previous"} if assignment.leads and assignment.stages > 1 else set()
        wanted = {(role, 0) for role in ring} | {
            ("shard", rank) for rank in range(assignment.size) if rank != assignment.rank
        }
        given = {(n.role, n.rank if n.role == "shard" else 0) for n in command.neighbours}
        if given != wanted or len(given) != len(command.neighbours):
            raise WorkerError(
                f"stage {assignment.stage} rank {assignment.rank} needs the neighbours {sorted(wanted)}, "
                f"was given {sorted(given)}"
            )

    def _open_ring(self) -> Ring:
        if self._ring is None:
            raise WorkerError(f"not connected under epoch {self.epoch[0]} of {self.epoch[1]}")
        if self._ring.broken:
            raise WorkerError(f"the ring of epoch {self.epoch[0]} of {self.epoch[1]} is broken")
        return self._ring

    # -- failure

    def _fail(self, error: Exception, *, own: bool = False) -> None:
        assert self._ring is not None
        self._ring.broken = True
        self.links.guarded = False
        neighbour = "" if own else self.links.accused(error)
        self._emit(FailureEvent(self.epoch, neighbour, _one_line(error), fatal=False))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MeshError | TransportError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
