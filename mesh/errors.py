"""Every mistake and mishap a user can meet, each a class of its own with an exit code of its own.

A message is one line: what is wrong, where, and what to do. Over gRPC an error travels as its `code`, so that the class
raised in a client is the class raised in the peer.
"""

from __future__ import annotations


class MeshError(Exception):
    """The base of everything `mesh` raises on purpose."""

    code = "mesh"
    exit_code = 1


class ConfigError(MeshError):
    """An option, a configuration key or a `MESH_*` variable is unknown or out of bounds. Names the key."""

    code = "config"
    exit_code = 2


class RequestError(MeshError):
    """A request is malformed: an empty prompt, an unknown option, a prompt longer than the context."""

    code = "request"
    exit_code = 3


class PeerUnreachable(MeshError):
    """Nobody answers at a peer's address."""

    code = "peer-unreachable"
    exit_code = 4


class ModelError(MeshError):
    """The model does not exist, is not a decoder, or its files are damaged or of an unknown architecture."""

    code = "model"
    exit_code = 5


class PlanError(MeshError):
    """No plan satisfies the constraints. Lists, per constraint, how much is missing."""

    code = "plan"
    exit_code = 6


class JobNotFound(MeshError):
    """No job of that name is known to the peer that was asked."""

    code = "job-not-found"
    exit_code = 7


class JobFailed(MeshError):
    """The job cannot go on: a worker died while loading, or no plan is left after a loss."""

    code = "job-failed"
    exit_code = 8


class JobCancelled(MeshError):
    """The job or the request was cancelled."""

    code = "job-cancelled"
    exit_code = 9


class AddressInUse(MeshError):
    """A port that the peer was told to listen on is taken."""

    code = "address-in-use"
    exit_code = 10


class DataDirInUse(MeshError):
    """Another peer runs on the same data directory."""

    code = "data-dir-in-use"
    exit_code = 11


class IdentityRequired(MeshError):
    """The peer would listen beyond loopback without an identity."""

    code = "identity-required"
    exit_code = 12


class DeadlineExceeded(MeshError):
    """Something did not answer in time."""

    code = "deadline"
    exit_code = 13


class WorkerError(MeshError):
    """A worker process died or refused. Names the device and the reason."""

    code = "worker"
    exit_code = 14


class IdentityError(MeshError):
    """A certificate, invitation, token or document does not prove what it should. The subclass says why."""

    code = "identity"
    exit_code = 15


class NotAllowed(MeshError):
    """Who asks is known, and may not do this."""

    code = "not-allowed"
    exit_code = 16


#: Exit code of a command that Ctrl-C ended: 128 + SIGINT, as shells expect.
EXIT_INTERRUPTED = 130


class ModelMissing(ModelError):
    """The model, or a slice of it that is needed, is not at this site; other sites may have it.

    It stays within a peer: whoever asks from outside reads it as the ModelError that it is.
    """


_CLASSES: tuple[type[MeshError], ...] = (MeshError, *MeshError.__subclasses__())
BY_CODE: dict[str, type[MeshError]] = {cls.code: cls for cls in _CLASSES}
