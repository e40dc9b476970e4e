"""How an error of `mesh.errors` crosses gRPC: its code in the trailing metadata, its message in the details.

The gRPC status code beside it serves foreign clients, proxies and metrics; our own client reads the metadata only, so
two errors may share a status code and stay two classes.
"""

from __future__ import annotations

from typing import NoReturn

import grpc

from mesh import errors

#: Key of the trailing metadata that carries `MeshError.code`.
METADATA_KEY = "mesh-error"

#: Longest message sent. gRPC refuses trailers over 8 KiB, and percent encoding can triple a byte.
MAX_MESSAGE_BYTES = 2048

STATUS: dict[type[errors.MeshError], grpc.StatusCode] = {
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.PlanError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.JobNotFound: grpc.StatusCode.NOT_FOUND,
    errors.JobFailed: grpc.StatusCode.ABORTED,
    errors.JobCancelled: grpc.StatusCode.CANCELLED,
    errors.WorkerError: grpc.StatusCode.ABORTED,
    errors.PeerUnreachable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.IdentityRequired: grpc.StatusCode.PERMISSION_DENIED,
    errors.IdentityError: grpc.StatusCode.UNAUTHENTICATED,
    errors.NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
}


def one_line(text: object) -> str:
    """`text` on one line, for messages that must not break a terminal or a log."""
    return " ".join(str(text).split())


def status_of(error: errors.MeshError) -> grpc.StatusCode:
    """The gRPC status code that comes nearest to `error`; UNKNOWN where none does."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), grpc.StatusCode.UNKNOWN)


def abort(context: grpc.ServicerContext, error: errors.MeshError) -> NoReturn:
    """End an RPC with `error`, in a servicer's handler. Raises: grpc unwinds the handler with an exception of its own.

    The client raises the same class with the same message (cut at `MAX_MESSAGE_BYTES`).
    """
    message = one_line(error).encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
    context.set_trailing_metadata(((METADATA_KEY, error.code),))
    context.abort(status_of(error), message)
    raise AssertionError("context.abort returned")
