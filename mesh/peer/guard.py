"""Who may call what: every call proves itself in its metadata, before a handler sees it.

A peer proves itself by an assertion that its certificate's key signed for this very peer, a user by a token with a role.
TLS hides both and proves the server to them (`mesh.client.credentials`). The calls of one peer to another are for peers
alone; what a user may call depends on the role. Only `Enrol` is open: a new site has nothing yet but its invitation.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NoReturn

import grpc

from mesh.errors import MeshError, NotAllowed, IdentityError
from mesh.identity import Principal
from mesh.wire.errors import abort

logger = logging.getLogger(__name__)

#: The metadata key of a call's proof, lower case as HTTP/2 wants it.
AUTHORIZATION = "authorization"


class Role(IntEnum):
    """What a caller may do; each includes those below. A peer may all."""

    OBSERVE = 1
    SUBMIT = 2
    ADMINISTER = 3
    PEER = 4


_OBSERVE = ("Status", "Topology", "Plan", "Watch", "Jobs")
_SUBMIT = ("Submit", "Cancel", "Generate")
_ADMINISTER = ("Invite", "CreateToken", "Revoke", "Rotate")
#: Method -> the least role. What is not here is for peers.
NEEDED: Mapping[str, Role] = {
    **{f"/mesh.wire.v1.Mesh/{name}": Role.OBSERVE for name in _OBSERVE},
    **{f"/mesh.wire.v1.Mesh/{name}": Role.SUBMIT for name in _SUBMIT},
    **{f"/mesh.wire.v1.Identity/{name}": Role.ADMINISTER for name in _ADMINISTER},
}
#: What a stranger may call.
OPEN = frozenset({"/mesh.wire.v1.Identity/Enrol"})


class Guard(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Refuses calls that prove nothing or not enough. `authenticate` raises MeshError; `refused` counts, by reason."""

    def __init__(self, authenticate: Callable[[str], Principal]) -> None:
        """`authenticate(proof)` is called from gRPC's threads, one at a time."""
        self.refused: Counter[str] = Counter()
        self._authenticate = authenticate
        self._lock = threading.Lock()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's own handler, or one that refuses."""
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method in OPEN:
            return handler
        try:
            self._check(handler_call_details)
        except MeshError as error:
            return _refusal(handler, error)
        return handler

    def _check(self, details: grpc.HandlerCallDetails) -> None:
        proof = next((value for key, value in details.invocation_metadata or () if key == AUTHORIZATION), "")
        try:
            if not proof:
                raise IdentityError("this peer answers members and users with a token only: set MESH_TOKEN")
            with self._lock:
                principal = self._authenticate(proof if isinstance(proof, str) else proof.decode("ascii", "replace"))
        except MeshError as error:
            self.refused[error.code] += 1
            raise
        needed = NEEDED.get(details.method, Role.PEER)
        role = Role.PEER if principal.kind == "peer" else Role[principal.role.upper()]
        if role < needed:
            self.refused[NotAllowed.code] += 1
            verb = details.method.rpartition("/")[2]
            raise NotAllowed(
                f"{verb} needs the role {needed.name.lower()}; the token of {principal.name!r} has {role.name.lower()}"
            )


def _refusal(handler: grpc.RpcMethodHandler[Any, Any], error: MeshError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same shape that ends each call with `error`."""

    def refuse(request: object, context: grpc.ServicerContext) -> NoReturn:
        abort(context, error)

    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(refuse, handler.request_deserializer, handler.response_serializer)
