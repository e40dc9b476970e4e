"""From a failed RPC to the error class the peer raised, or to the one that describes the silence."""

from __future__ import annotations

import grpc

from mesh.errors import BY_CODE, DeadlineExceeded, JobCancelled, MeshError, PeerUnreachable
from mesh.wire.errors import METADATA_KEY, one_line


def unreachable(address: str) -> PeerUnreachable:
    """Nobody listens at `address`."""
    return PeerUnreachable(
        f"nobody answers at {address}: start a peer there with `mesh up`, or name another with --peer"
    )


def silent(address: str, what: str, deadline_s: float) -> DeadlineExceeded:
    """Somebody listens at `address`, but `what` was not answered in time."""
    return DeadlineExceeded(f"the peer at {address} did not answer {what} within {deadline_s:g} s")


def from_rpc(error: grpc.RpcError, address: str, what: str, deadline_s: float, *, begun: bool = False) -> MeshError:
    """The `MeshError` behind a failed call of `what` (a verb for the message) at `address`.

    An error that the peer raised itself keeps its class and message. `begun` says that the call had already delivered
    something, so a lost connection is reported as lost and not as absent.
    """
    status, details, code = _parts(error)
    if code is not None:
        return BY_CODE.get(code, MeshError)(details)
    if status is grpc.StatusCode.UNAVAILABLE:
        if begun:
            return PeerUnreachable(f"the connection to the peer at {address} broke during {what}: is it still running?")
        return unreachable(address)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return silent(address, what, deadline_s)
    if status is grpc.StatusCode.CANCELLED:
        return JobCancelled(f"{what} was cancelled")
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return MeshError(f"the peer at {address} cannot take {what}: {details or 'it serves as much as it can'}")
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return MeshError(f"what answers at {address} does not know {what}: it is no peer, or of another version")
    name = status.name if status is not None else "UNKNOWN"
    return MeshError(f"{what} failed in the peer at {address}: {details or name} ({name})")


def _parts(error: grpc.RpcError) -> tuple[grpc.StatusCode | None, str, str | None]:
    """Status, one-line details and mesh code. grpc's errors are calls too, but the type `RpcError` does not say so."""
    if not isinstance(error, grpc.Call):
        return None, one_line(error), None
    code = next((value for key, value in error.trailing_metadata() or () if key == METADATA_KEY), None)
    if isinstance(code, bytes):
        code = code.decode(errors="replace")
    return error.code(), one_line(error.details() or ""), code
