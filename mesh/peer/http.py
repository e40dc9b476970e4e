"""The peer's HTTP side: `/health` for people and load balancers, `/metrics` for Prometheus.

A Starlette application over an injected `Observer`, served by hypercorn's trio worker. Every handler is `async`, so the
observer is asked in the daemon's own thread and needs no locks.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mesh.address import join_address, split_address
from mesh.errors import AddressInUse, ConfigError
from mesh.peer.metrics import Observer, build_registry

_log = logging.getLogger("mesh.http")
#: How long requests under way may go on once the peer leaves.
_GRACE_S = 2.0
_RESOLVE_S = 10.0


def build_app(observer: Observer, routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The application. `routes` come beside `/health` and `/metrics`.

    `/health` answers 200 while the peer serves and 503 while it starts or leaves, with the same document: `site`,
    `state`, `members` (site to state) and `jobs` (job to state).
    """
    registry = build_registry(observer)

    async def health(request: Request) -> Response:
        state = observer.state()
        document = {
            "site": observer.site,
            "state": state,
            "members": dict(observer.members()),
            "jobs": dict(observer.jobs()),
        }
        return JSONResponse(document, 200 if state == "serving" else 503)

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return Starlette(routes=[Route("/health", health), Route("/metrics", metrics), *routes])


async def serve(
    app: Starlette,
    bind: str,
    *,
    shutdown: trio.Event | None = None,
    grace_s: float = _GRACE_S,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `shutdown` is set (requests under way then have `grace_s`) or the task is cancelled (they have none).

    `bind` is `HOST:PORT`; port 0 takes a free one. `task_status` is given the address bound, once connections are
    accepted. Raises AddressInUse where the port is taken, ConfigError where the host is not this machine's.
    """
    listener = await _bound(bind)
    address = join_address(*listener.getsockname()[:2])
    config = Config()
    config.errorlog = _log
    config.accesslog = None
    config.graceful_timeout = grace_s
    config.include_server_header = False
    event = trio.Event() if shutdown is None else shutdown
    # hypercorn takes the socket over; detaching keeps Python from closing it a second time
    config.bind = [f"fd://{listener.detach()}"]
    async with trio.open_nursery() as nursery:
        await nursery.start(_run, app, config, event)
        task_status.started(address)


async def _run(app: Starlette, config: Config, shutdown: trio.Event, task_status: trio.TaskStatus[list[str]]) -> None:
    await hypercorn_serve(app, config, shutdown_trigger=shutdown.wait, task_status=task_status)  # type: ignore[arg-type]


async def _bound(bind: str) -> socket.socket:
    """A listening TCP socket."""
    try:
        host, port = split_address(bind)
        with trio.fail_after(_RESOLVE_S):
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as error:
        raise ConfigError(f"http={bind}: {error}") from None
    except (OSError, trio.TooSlowError):
        raise ConfigError(f"http={bind}: host {host!r} is not known to the resolver; give an address") from None
    family, kind, protocol, _, where = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()  # here, so that a port taken shows before anything is served
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"http={bind} is in use; stop what listens there or give another --http") from None
        raise ConfigError(f"http={bind}: cannot listen there ({error.strerror}); give another --http") from None
    return listener
