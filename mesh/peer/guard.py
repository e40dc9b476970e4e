"""Who may call what: every call proves itself in its metadata, before a handler sees it.

A peer proves itself by an assertion that its key signed for this very peer, a user by a token with a role. TLS hides
both and proves the server to them (`mesh.client.credentials`). What one peer asks of another is for peers alone; what a
user may call depends on the role. Only `Enrol` is open: a new site has nothing yet but its invitation.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import grpc

from mesh.client.credentials import AUTHORIZATION
from mesh.errors import IdentityError, MeshError, NotAllowed
from mesh.wire.errors import abort

_OBSERVE = ("Status", "Topology", "Plan", "Watch", "Jobs")
_SUBMIT = ("Submit", "Cancel", "Generate")
_ADMINISTER = ("Invite", "CreateToken", "Revoke", "Rotate")
#: Method -> the least role of a user. What is not here is for peers.
NEEDED: Mapping[str, str] = {
    **{f"/mesh.wire.v1.Mesh/{name}": "observe" for name in _OBSERVE},
    **{f"/mesh.wire.v1.Mesh/{name}": "submit" for name in _SUBMIT},
    **{f"/mesh.wire.v1.Identity/{name}": "administer" for name in _ADMINISTER},
}
#: What a stranger may call.
OPEN = frozenset({"/mesh.wire.v1.Identity/Enrol"})


class Caller(Protocol):
    """`mesh.identity.tokens.Principal`."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def id(self) -> bytes: ...
    def require(self, role: str) -> None: ...


class Guard(grpc.ServerInterceptor):
    """Refuses calls that prove nothing or not enough. `refused` counts them by the code of the error."""

    def __init__(self, authenticate: Callable[[str], Caller]) -> None:
        """`authenticate(proof)` is called from gRPC's threads, one at a time; it raises MeshError."""
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
        method = handler_call_details.method
        if handler is None or method in OPEN:
            return handler
        try:
            caller = self.caller(handler_call_details.invocation_metadata)
            if caller.kind != "peer":
                if method not in NEEDED:
                    raise NotAllowed(f"{method.rpartition('/')[2]} is what peers ask of each other")
                caller.require(NEEDED[method])
        except MeshError as error:
            self.refused[error.code] += 1
            return _refusal(handler, error)
        return handler

    def caller(self, metadata: Any) -> Caller:
        """Who makes a call with this metadata. Raises MeshError."""
        proof = next((value for key, value in metadata or () if key == AUTHORIZATION), None)
        if not isinstance(proof, str):
            raise IdentityError("this peer answers members and holders of an access token: set MESH_TOKEN")
        with self._lock:
            return self._authenticate(proof)


def _refusal(handler: grpc.RpcMethodHandler[Any, Any], error: MeshError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same shape that ends each call with `error`."""

    def refuse(request: object, context: grpc.ServicerContext) -> NoReturn:
        abort(context, error)

    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(refuse, handler.request_deserializer, handler.response_serializer)
