"""Bandwidth of links that nobody has used, by rare short bursts, and the transport that a near link is best at.

A burst is 1 MiB or 0.15 s, between two short-lived processes (`transport.measure`), whose keys travel over the control
plane. Gossip says when one is due, and of which link: see `mesh.gossip.links`. Never are two under way at one site,
whether it measures or answers; none is while workers here compute or load, or where the configuration forbids them
(`probes = false`, for lines that are paid by the byte). What fails is left alone for longer and longer.

Which transport a link is best at is a question only where both ends have more than one and are near: across a distance
UCX over TCP is one stream with no way around loss, and needs three round trips where its rendezvous sets in, so that a
wide-area link uses our own TCP.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from mesh.errors import DeadlineExceeded, MeshError, RequestError, WorkerError
from mesh.gossip.links import MAX_BANDWIDTH, MAX_RTT_S
from mesh.gossip.rtt import Rtt

logger = logging.getLogger(__name__)

#: How often gossip is asked whether a link is due, and how long after the start for the first time: between one and two
#: such times, so that sites that start together do not measure together.
LOOK_S: Final = 2.0
FIRST_LOOK_S: Final = 4.0
#: A process starts and loads cryptography, UCX perhaps, on a busy machine; then it measures.
START_S, LIMIT_S = 10.0, 10.0
#: What two processes say in a line.
MAX_LINE_BYTES: Final = 1 << 16
#: A link this long is no fabric: 1 ms is 100 km of fibre.
WIDE_RTT_S: Final = 1e-3
#: How long a choice holds.
CHOICE_AGE_S: Final = 6 * 3600.0
#: What a choice is made for: the hidden state of a token of a large model, which is 8,192 numbers of two bytes.
TYPICAL_BYTES: Final = 16 * 1024

COMMAND: Final = (sys.executable, "-m", "transport.measure")

Answerer = Callable[[Sequence[str], bytes], Awaitable[Mapping[str, bytes]]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One backend over one link: median round trip of a short message, bytes and seconds of the burst."""

    rtt_s: float
    size_bytes: int
    seconds: float

    @property
    def message_s(self) -> float:
        """One way for `TYPICAL_BYTES`."""
        return self.rtt_s / 2 + (TYPICAL_BYTES * self.seconds / self.size_bytes if self.size_bytes else 0.0)


def best_of(found: Mapping[str, Figures]) -> str:
    """The backend that takes least for a typical message; empty where none was measured."""
    return min(found, key=lambda backend: (found[backend].message_s, backend), default="")


def figures(document: object) -> dict[str, Figures]:
    """What a measuring process printed. Figures that cannot be are left out."""
    found = {}
    for backend, entry in document.items() if isinstance(document, Mapping) else ():
        try:
            one = Figures(float(entry["rtt_s"]), int(entry["bytes"]), float(entry["seconds"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        told = one.size_bytes == 0 or 0 < one.size_bytes <= one.seconds * MAX_BANDWIDTH
        if 0 < one.rtt_s <= MAX_RTT_S and 0 <= one.seconds <= MAX_RTT_S and told:
            found[str(backend)] = one
    return found


class Gossip(Protocol):
    """The part of the gossip shell that measuring needs."""

    def bandwidth_probe(self) -> str | None: ...
    def probe_failed(self, site: str) -> None: ...
    def transferred(self, site: str, size_bytes: int, seconds: float) -> None: ...
    def chose(self, site: str, transport: str | None) -> None: ...
    def rtts(self) -> Mapping[str, Rtt]: ...


class Measuring:
    """The measurements of one site. `run` belongs in a nursery.

    `backends` are what workers here listen on, `host` where. `answerer(site)` begins an answer at another site.
    """

    def __init__(
        self,
        site: str,
        gossip: Gossip,
        answerer: Callable[[str], Answerer],
        *,
        host: str,
        backends: Sequence[str],
        busy: Callable[[], bool],
        enabled: bool = True,
        command: Sequence[str] = COMMAND,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._site = site
        self._gossip = gossip
        self._answerer = answerer
        self._host = host
        self._backends = tuple(backends)
        self._busy = busy
        self._enabled = enabled
        self._command = tuple(command)
        self._rng = rng
        self._chosen: dict[str, tuple[float, frozenset[str], str]] = {}
        self._measuring = self._answering = False
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Measure what gossip says is due, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            await trio.sleep(FIRST_LOOK_S * (1 + self._rng()))
            while True:
                if self._enabled and not (self._busy() or self._measuring or self._answering):
                    site = self._gossip.bandwidth_probe()
                    if site is not None:
                        await self._probe(site)
                await trio.sleep(LOOK_S)

    async def _probe(self, site: str) -> None:
        try:
            await self._measure(site, self._comparable(site, self._backends))
        except MeshError as error:
            self._gossip.probe_failed(site)
            logger.debug("the bandwidth to %s was not measured: %s", site, error)

    # -- choosing

    async def choose(self, site: str, backends: Sequence[str]) -> str:
        """The best of `backends`, which both ends have, for channels to `site`: measured now, or not long ago.

        Raises RequestError where there is nothing to choose from. Where nothing can be measured it is the first.
        """
        if not backends:
            raise RequestError(f"{self._site} and {site} share no transport")
        candidates = self._comparable(site, backends)
        known = self._chosen.get(site)
        if known is not None and known[1] >= set(candidates) and trio.current_time() - known[0] < CHOICE_AGE_S:
            return known[2] if known[2] in candidates else candidates[0]
        if len(candidates) > 1 and self._enabled:
            try:
                return best_of(await self._measure(site, candidates)) or candidates[0]
            except MeshError as error:
                logger.warning("the transports to %s were not compared, %s is used: %s", site, candidates[0], error)
        return candidates[0]

    def _comparable(self, site: str, backends: Sequence[str]) -> tuple[str, ...]:
        """Those of `backends` worth comparing: TCP alone where the site is far."""
        if site != self._site and "tcp" in backends:
            rtt = self._gossip.rtts().get(site)
            if rtt is None or rtt.min_s >= WIDE_RTT_S:
                return ("tcp",)
        return tuple(backends)

    # -- measuring

    async def _measure(self, site: str, backends: Sequence[str]) -> dict[str, Figures]:
        """One measurement of the link to `site`. Raises MeshError where it fails."""
        if self._measuring:
            raise RequestError(f"{self._site} is measuring another link")
        self._measuring = True
        try:
            key = secrets.token_bytes(32)
            addresses = await (self.answer if site == self._site else self._answerer(site))(backends, key)
            order = {
                "addresses": {backend: addresses[backend].hex() for backend in backends if backend in addresses},
                "key": key.hex(),
                "limit_s": LIMIT_S,
            }
            process, said = await self._ask(order, START_S + LIMIT_S)
            await _end(process)
        finally:
            self._measuring = False
        found = figures(said)
        best = best_of(found)
        if not best:
            raise WorkerError(f"no transport works between {self._site} and {site}")
        if site != self._site:
            self._gossip.transferred(site, found[best].size_bytes, found[best].seconds)
            self._gossip.chose(site, best if len(found) > 1 else None)
        self._chosen[site] = (trio.current_time(), frozenset(backends), best)
        return found

    async def answer(self, backends: Sequence[str], key: bytes) -> dict[str, bytes]:
        """Begin to answer one measurement, over those of `backends` that this site has; the addresses.

        Raises RequestError where another is under way, or this site is to be left alone.
        """
        if not self._enabled:
            raise RequestError(f"{self._site} takes part in no measurements (probes = false)")
        if self._answering or self._busy() or self._nursery is None:
            raise RequestError(f"{self._site} is busy: measure it later")
        if len(key) != 32:
            raise RequestError("a measurement has a key of 32 bytes")
        self._answering = True
        own = [backend for backend in self._backends if backend in backends]
        try:
            process, said = await self._ask(
                {"answer": own, "host": self._host, "key": key.hex(), "limit_s": LIMIT_S}, START_S
            )
        except BaseException:
            self._answering = False
            raise
        self._nursery.start_soon(self._see_out, process)
        try:
            return {str(backend): bytes.fromhex(address) for backend, address in said["addresses"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            process.kill()
            raise WorkerError(f"{self._site}: the process that was to answer said something else") from None

    async def _see_out(self, process: trio.Process) -> None:
        try:
            with trio.move_on_after(2 * LIMIT_S):
                await process.wait()
        finally:
            self._answering = False
            await _end(process)

    async def _ask(self, order: Mapping[str, Any], deadline_s: float) -> tuple[trio.Process, Any]:
        """Start a process, give it its order, and take the one line that it answers. It may run on."""
        try:
            process = await trio.lowlevel.open_process(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise WorkerError(f"no process to measure links could be started ({error})") from error
        try:
            with trio.fail_after(deadline_s):
                assert process.stdin is not None
                await process.stdin.send_all(json.dumps(order).encode() + b"\n")
                return process, json.loads(await _line(process))
        except BaseException as error:
            await _end(process)
            if isinstance(error, trio.TooSlowError):
                raise DeadlineExceeded(f"a measurement took more than {deadline_s:g} s") from None
            if isinstance(error, trio.BrokenResourceError | ValueError):
                raise WorkerError("the process that measures links ended without a word") from None
            raise


async def _line(process: trio.Process) -> bytes:
    assert process.stdout is not None
    read = bytearray()
    while b"\n" not in read and len(read) < MAX_LINE_BYTES:
        data = await process.stdout.receive_some(MAX_LINE_BYTES)
        if not data:
            break
        read += data
    return bytes(read)


async def _end(process: trio.Process) -> None:
    """See that it is gone, and its pipes with it."""
    with trio.CancelScope(shield=True):
        process.kill()
        await process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                await stream.aclose()
