"""What the blocking and the async job have in common: who they are, and when a wait for them is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.errors import DeadlineExceeded, JobFailed, MeshError, PeerUnreachable

if TYPE_CHECKING:
    from mesh.client.values import Collected, JobStatus


class Handle:
    """A job as last heard of. Subclasses ask."""

    def __init__(self, status: JobStatus) -> None:
        self._last = status

    @property
    def id(self) -> str:
        """The job's name, unique in the mesh."""
        return self._last.id

    @property
    def model(self) -> str:
        """The model as it was submitted."""
        return self._last.model

    @property
    def owner(self) -> str:
        """The site whose peer coordinates the job."""
        return self._last.owner

    @property
    def last(self) -> JobStatus:
        """The status as last heard, without asking."""
        return self._last

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.model} {self._last.state}>"

    def _settled(self, status: JobStatus) -> bool:
        """Whether a wait is over: True when ready, raises the job's own error when it failed or was cancelled."""
        self._last = status
        if status.failure is not None:
            raise status.failure
        return status.state == "ready"

    def _unsettled(self, timeout_s: float) -> DeadlineExceeded:
        """A wait that ran out."""
        last = self._last
        loaded = f", {last.loaded_bytes} of {last.total_bytes} bytes loaded" if last.total_bytes else ""
        return DeadlineExceeded(f"job {last.id} was still {last.state} after {timeout_s:g} s{loaded}")


def watch_ended(job: str, address: str) -> MeshError:
    """The peer closed a watch although the job was neither ready nor over."""
    return PeerUnreachable(f"the peer at {address} stopped telling about job {job}: is it shutting down?")


def checked_end(collected: Collected, job: str) -> None:
    """A stream may only end with a reason. Raises JobFailed where it did not."""
    if not collected.finish_reason:
        raise JobFailed(f"the stream of job {job} ended after {len(collected.token_ids)} tokens without a reason")
