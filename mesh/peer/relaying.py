"""Relaying for others, in a process of its own, and being relayed: the way to peers that are cut off from this one.

Whoever needs a relay asks its peer over the control plane, proven as any peer's call is, and is given a port there that
leads to one worker or one control plane, and nowhere else: only to a host where gossip knows that site's peer. The
bytes are sealed end to end, by TLS or by the transport; see `transport.relay` for its bounds.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from mesh.address import join_address, split_address
from mesh.errors import DeadlineExceeded, MeshError, RequestError, WorkerError
from mesh.peer.calls import RemotePeer
from mesh.peer.view import MeshView
from mesh.wire.v1 import peer_pb2
from transport import TransportError
from transport.relay import UNUSED_S, endpoint, readdressed

logger = logging.getLogger(__name__)

COMMAND: Final = (sys.executable, "-m", "transport.relay")
#: The process starts and answers.
ANSWER_S: Final = 15.0
#: Forwards for one other site: a worker for each of its devices, and the control plane.
MAX_FOR_ONE: Final = 16
#: How often this peer looks whom it does not reach, and how often it says that a way around is still wanted.
LOOK_S, RENEW_S = 1.0, UNUSED_S / 3

Key = tuple[str, str, bytes]


@dataclass
class _Wanted:
    """One forward: what its order says, and the answer."""

    number: int
    port: int = 0
    error: str = ""
    known: trio.Event = field(default_factory=trio.Event)


class Relaying:
    """What this site relays. `run` belongs in a nursery; the process is started when it is first needed.

    `address(site)` is where gossip knows a site's peer, `delay_s(site)` the emulated one-way latency to it.
    """

    def __init__(
        self,
        site: str,
        host: str,
        mbps: float,
        address: Callable[[str], str],
        delay_s: Callable[[str], float],
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._site = site
        self._host = host
        self._mbps = mbps
        self._address = address
        self._delay_s = delay_s
        self._command = tuple(command)
        self._wanted: dict[Key, _Wanted] = {}
        self._numbers = itertools.count(1)
        self._process: trio.Process | None = None
        self._starting = trio.Lock()
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Until cancelled; then the process is gone."""
        async with trio.open_nursery() as self._nursery:
            await trio.sleep_forever()

    async def open(self, request: peer_pb2.RelayRequest) -> peer_pb2.RelayReply:
        """Hand bytes on to `request.site`. Asking again keeps what there is. Raises RequestError, WorkerError."""
        if not self._mbps:
            raise RequestError(f"{self._site} relays for nobody (relay_mbps = 0)")
        host, port = split_address(self._address(request.site))
        cookie = b""
        if request.address:
            try:
                worker, port, cookie = endpoint(request.address)
            except TransportError as error:
                raise RequestError(str(error)) from None
            if worker not in await _hosts(host):
                raise RequestError(f"{self._site} relays to where {request.site}'s peer is, and not to {worker}")
            host = worker
        key = (request.site, request.other, bytes(request.address))
        wanted = self._wanted.get(key)
        if wanted is None:
            if sum(other == request.other for _, other, _ in self._wanted) >= MAX_FOR_ONE:
                raise RequestError(f"{self._site} relays {MAX_FOR_ONE} times for {request.other} already")
            wanted = self._wanted[key] = _Wanted(next(self._numbers))
            await self._tell({"id": wanted.number, "open": [host, port], "cookie": cookie.hex() or None})
        else:
            await self._tell({"id": wanted.number, "keep": True})
        with trio.move_on_after(ANSWER_S) as waiting:
            await wanted.known.wait()
        if waiting.cancelled_caught:
            self._wanted.pop(key, None)
            raise DeadlineExceeded(f"{self._site}: the relay did not answer within {ANSWER_S:g} s")
        if wanted.error:
            raise WorkerError(f"{self._site} cannot relay: {wanted.error}")
        delay_s = self._delay_s(request.site) + self._delay_s(request.other)
        if request.address:
            return peer_pb2.RelayReply(address=readdressed(request.address, self._host, wanted.port), delay_s=delay_s)
        return peer_pb2.RelayReply(address=join_address(self._host, wanted.port).encode(), delay_s=delay_s)

    async def _tell(self, order: Mapping[str, Any]) -> None:
        async with self._starting:
            if self._process is None:
                if self._nursery is None:
                    raise WorkerError(f"{self._site} does not relay yet")
                bytes_per_s = self._mbps * 1e6 / 8
                try:
                    self._process = await trio.lowlevel.open_process(
                        (*self._command, self._host, str(bytes_per_s)),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                    )
                except OSError as error:
                    raise WorkerError(f"{self._site}: no relay could be started ({error})") from error
                self._nursery.start_soon(self._listen, self._process)
            assert self._process.stdin is not None
            try:
                await self._process.stdin.send_all(json.dumps(order).encode() + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise WorkerError(f"{self._site}: the relay has ended") from None

    async def _listen(self, process: trio.Process) -> None:
        """Take what the process says, until it ends; everything it handed on ends with it."""
        assert process.stdout is not None
        rest = b""
        try:
            while data := await process.stdout.receive_some(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
        except (trio.BrokenResourceError, ValueError) as error:
            logger.warning("the relay said something else: %s", error)
        finally:
            self._process = None
            for wanted in self._wanted.values():
                wanted.error = wanted.error or "its process has ended"
                wanted.known.set()
            self._wanted.clear()
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        await stream.aclose()

    def _take(self, said: Mapping[str, Any]) -> None:
        for key, wanted in tuple(self._wanted.items()):
            if wanted.number == said.get("id"):
                wanted.port, wanted.error = int(said.get("port", 0)), str(said.get("error", ""))
                wanted.known.set()
                if not wanted.port:  # refused, or not used for long
                    del self._wanted[key]


async def _hosts(host: str) -> set[str]:
    """The numeric addresses of a host, itself included."""
    try:
        found = await trio.socket.getaddrinfo(host, None)
    except OSError:
        return {host}
    return {host, *(str(each[4][0]) for each in found)}


class Gossip(Protocol):
    """The part of the gossip shell that detours need."""

    def links(self) -> Mapping[str, Any]: ...


async def keep_detours(gossip: Gossip, view: MeshView, dial: Callable[[str], RemotePeer]) -> None:
    """Keep a way to the control plane of every peer that is cut off from this one. Runs until cancelled.

    `dial(site)` is the direct connection to a site's peer.
    """
    renewed: dict[str, tuple[str, float]] = {}
    while True:
        cut = {site: via for site, link in gossip.links().items() if link.cut and (via := view.via(view.site, site))}
        for site in renewed.keys() - cut.keys():
            del renewed[site]
            view.detour(site, "")
        for site, via in sorted(cut.items()):
            former, when_s = renewed.get(site, ("", -math.inf))
            if via == former and trio.current_time() - when_s < RENEW_S:
                continue
            try:
                reply = await dial(via).relay(peer_pb2.RelayRequest(site=site, other=view.site))
                at = reply.address.decode()
                split_address(at)
            except (MeshError, ValueError) as error:
                logger.warning("%s gives no way to %s: %s", via, site, error)
                renewed.pop(site, None)
                view.detour(site, "")
                continue
            if via != former:
                logger.info("%s is reached through %s", site, via)
            renewed[site] = (via, trio.current_time())
            view.detour(site, at)
        await trio.sleep(LOOK_S)
