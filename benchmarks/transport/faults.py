"""Random faults on every backend of the transport, and what must hold after each.

    python -m benchmarks.transport.faults [--count N] [--seed N] [--backend NAME]... [--json]

Each fault meets a fresh sealed channel between two processes in the middle of messages, bulk on its streams, or
collectives; over TCP also through a relay.

    cancel      the tasks of one end are cancelled and its channel aborted, or the other end aborts
    kill        SIGKILL, of the other end or of the relay
    stall       SIGSTOP, of the other end or of the relay; or an end that does not look at its channels for a while
    half-open   the path swallows everything, or takes nothing more, and never ends a connection
    cut         the path is reset
    corrupt     one bit is changed on the path, or in a frame
    none        and none of that

Both ends must get all that was sent, or an exception of the transport's own by the deadline of what they were doing,
the stopped one when it goes on. What is received must be what was sent. At the end of each batch no pipe, task,
descriptor or payload may be left. Exit code 1 where anything else was seen. In memory both ends are in this process.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import trio

from benchmarks.transport.fault_ends import (
    COUNT,
    HELLO,
    ROUNDS,
    Limits,
    Wrong,
    check,
    descriptors,
    payload,
    prepare,
    wide_everywhere,
)
from benchmarks.transport.fault_memory import in_memory
from benchmarks.transport.fault_paths import Bad, Helper, Pool, Relayed, open_pool
from transport import Channel, TransportError, available, connect_channel, open_fabric
from transport.trio_shell import Driver, open_driver

#: What a neighbour may take beside the time on the wire, here; and what an end may be late by on a busy machine.
PATIENCE_S, LATE_S = 1.0, 3.0
#: A meeting that is not over by then hangs: its longest deadline is that of 4 MB at the least rate, 33 s.
_HANG_S = 40.0
_AT_ONCE, _BATCH = 24, 500
#: When after its beginning a fault strikes, and after how many bytes, as a power of ten.
_STRIKES_S, _STRIKES_DIGITS = 0.015, 6.5
_MARGIN_BYTES = 64 << 20

KINDS = {
    "tcp": {
        "none": ("none",),
        "cancel": ("cancel", "abort"),
        "kill": ("kill", "kill", "relay killed"),
        "stall": ("stop", "deaf", "relay stopped"),
        "half-open": ("swallow", "freeze"),
        "cut": ("cut",),
        "corrupt": ("flip", "flip", "frame"),
    },
    "ucx": {
        "none": ("none",),
        "cancel": ("cancel", "abort"),
        "kill": ("kill",),
        "stall": ("stop", "deaf"),
        "corrupt": ("frame",),
    },
}
_PATHS = ("swallow", "freeze", "cut", "flip")


class Case(NamedTuple):
    """One fault: what is going on, what goes wrong, and a number that settles everything else."""

    kind: str
    fault: str
    work: str
    relayed: bool
    seed: int


class Meetings:
    """The faults of one backend, and what was found."""

    def __init__(self, backend: str, pool: Pool, driver: Driver) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over_s = self.slowest_s = 0.0
        self._backend, self._pool, self._driver = backend, pool, driver
        self._gaps: list[tuple[float, float]] = []
        self._held = 0
        self._far: dict[int, int] = {}
        self._doing: dict[int, str] = {}

    def draw(self, seed: int) -> Case:
        """The case of this number."""
        rng = random.Random(seed)
        kinds = KINDS[self._backend]
        kind = rng.choice([*kinds, *kinds])
        fault = rng.choice(kinds[kind])
        work = rng.choice(("messages", "messages", "bulk", "collective"))
        relayed = fault.startswith("relay") or (self._backend == "tcp" and rng.random() < 0.1)
        return Case(kind, fault, work, relayed, seed)

    async def meet(self, case: Case) -> None:
        """One meeting, counted; never raises."""
        began = time.monotonic()
        limits = Limits()
        try:
            outcome = ""
            with trio.fail_after(_HANG_S):
                outcome = await self._meet(case, limits)
            if not outcome:  # what is open below swallows the cancellation that its own end makes
                raise trio.TooSlowError
        except Wrong as error:
            outcome = f"wrong: {error}"
        except trio.TooSlowError:
            outcome = f"wrong: {self._doing.get(case.seed)} hangs"
        except Exception as error:
            outcome = f"wrong: {_leaves(error)}"
        self._doing.pop(case.seed, None)
        took_s = time.monotonic() - began
        halted_s = max((length for at, length in self._gaps if at + length >= began), default=0.0)
        over_s = limits.over_s - halted_s
        if over_s > LATE_S:
            outcome = f"wrong: {over_s:.1f} s beyond a deadline"
        if outcome.startswith("wrong"):
            self.wrong.append(f"{self._backend} {case}: {outcome}")
        self.over_s = max(self.over_s, over_s)
        self.slowest_s = max(self.slowest_s, took_s - halted_s)
        self.outcomes[f"{case.kind}: {outcome}"] += 1

    async def _meet(self, case: Case, limits: Limits) -> str:
        rng = random.Random(f"{case.seed} meeting")
        async with AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(self._helper("end"))]
            if case.work == "collective":
                ends.append(await stack.enter_async_context(self._helper("end")))
            order = {
                "backend": self._backend,
                "work": case.work,
                "seed": case.seed,
                "key": rng.randbytes(32).hex(),
                "patience_s": PATIENCE_S,
                "rank": 0,
            }
            steps = ROUNDS if case.work == "collective" else 2 * COUNT
            own = {"abort": "abort_at", "deaf": "deaf_at", "frame": "corrupt_at"}
            if case.fault in own:
                order[own[case.fault]] = rng.randrange(COUNT if case.fault == "frame" else steps)
            await ends[0].say(order)
            address = bytes.fromhex((await ends[0].hear(_HANG_S) or {})["address"])
            relay = None
            if case.relayed:
                relay = await stack.enter_async_context(self._helper("relay"))
                address = await stack.enter_context(Relayed(relay)).open(address)
            if case.fault in _PATHS:
                after = round(10 ** rng.uniform(1, _STRIKES_DIGITS))  # as often among the first as among the last
                bad = Bad(case.fault, after, rng.randrange(2), rng)
                address = await stack.enter_async_context(bad.open(address))
            victim = relay if case.fault.startswith("relay") else rng.choice(ends)
            assert victim is not None
            stopped = case.fault in ("stop", "relay stopped")
            blow = {"kill": signal.SIGKILL, "relay killed": signal.SIGKILL}.get(case.fault)
            blow = signal.SIGSTOP if stopped else blow
            strike_s = rng.uniform(0, _STRIKES_S)
            struck_at = 0.0

            async def strike() -> None:
                nonlocal struck_at
                await trio.sleep(strike_s)
                if blow is not None:
                    victim.signal(blow)
                    struck_at = time.monotonic()

            outcome = ""
            answers: dict[Helper, dict[str, Any]] = {}
            self._doing[case.seed] = "this end"
            async with trio.open_nursery() as nursery:
                if case.work != "collective":
                    nursery.start_soon(strike)
                    outcome = await self._near(case, address, strike_s, limits)
                else:
                    second = {**order, "address": address.hex(), "rank": 1}
                    for name in own.values():
                        second.pop(name, None)
                    await ends[1].say(second)
                    early = await ends[1].hear(_HANG_S)
                    if early is not None and "outcome" in early:  # the other end was gone before this one came
                        answers[ends[1]] = early
                    nursery.start_soon(strike)
            said = [outcome] if outcome else []
            for end in sorted(ends, key=lambda each: each is victim):
                stopped_s = 0.0  # for so long it could keep no deadline
                if end is victim and stopped:  # the other one has ended by its own deadlines
                    stopped_s = time.monotonic() - struck_at
                    victim.signal(signal.SIGCONT)
                self._doing[case.seed] = f"end {ends.index(end)} after {said}"
                answer = answers.get(end) or await end.hear(_HANG_S)
                if answer is None:
                    said.append("killed")
                    continue
                limits.over_s = max(limits.over_s, answer["over_s"] - stopped_s)
                if answer["wrong"]:
                    raise Wrong(answer["wrong"])
                said.append(answer["outcome"])
                self._count(end, answer["descriptors"])
            return " / ".join(said)

    async def _near(self, case: Case, address: bytes, strike_s: float, limits: Limits) -> str:
        """This process's end: tasks under trio."""
        try:
            channel = connect_channel(
                self._driver.fabric,
                address,
                name="far",
                key=random.Random(f"{case.seed} meeting").randbytes(32),
                hello=HELLO,
                patience_s=PATIENCE_S,
            )
        except TransportError as error:
            return type(error).__name__
        outcome = "cancelled"
        payloads: list[bytes] = []
        with trio.CancelScope() as scope:
            if case.fault == "cancel":
                scope.deadline = trio.current_time() + strike_s
            outcome = await self._talk(case, channel, limits, payloads)
        if outcome == "delivered":
            channel.close()
        else:
            channel.abort()
        self._driver.fabric.wake()
        if outcome != "delivered" and _held(payloads):
            gc.collect()
            self._held += _held(payloads)
        return outcome

    async def _talk(self, case: Case, channel: Channel, limits: Limits, payloads: list[bytes]) -> str:
        seen: set[int] = set()
        found = "delivered"

        async def send() -> None:
            for index in range(COUNT):
                data = payload(case.seed, "near", index, case.work)
                payloads.append(data)
                began, allowed_s = time.monotonic(), channel.allowance_s(len(data))
                try:
                    await self._driver.send(channel, b"%d" % index, data, bulk=case.work == "bulk")
                finally:
                    limits.took(began, allowed_s)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                for _ in range(COUNT):
                    began, allowed_s = time.monotonic(), channel.allowance_s(1_000_000)
                    try:
                        message = await self._driver.receive(channel, size_bytes=1_000_000)
                    finally:
                        limits.took(began, allowed_s)
                    check(message, {"seed": case.seed, "work": case.work}, "far", seen)
        except* TransportError as group:
            found = type(group.exceptions[0]).__name__
        except* Wrong as group:
            raise group.exceptions[0] from None
        return found

    @asynccontextmanager
    async def _helper(self, what: str) -> AsyncIterator[Helper]:
        helper = await self._pool.take(what)
        sound = False
        try:
            yield helper
            sound = not helper.doomed
        finally:
            if sound:
                self._pool.give(helper)
            else:
                self._far.pop(helper.pid, None)
                self._pool.drop(helper)

    def _count(self, end: Helper, open_now: int) -> None:
        """A helper's descriptors: what its first few meetings open once is kept."""
        if end.uses < 8:
            self._far[end.pid] = max(self._far.get(end.pid, 0), open_now)
        elif open_now > self._far.get(end.pid, open_now):
            had = self._far[end.pid]
            self.wrong.append(f"{self._backend}: process {end.pid} has {open_now} descriptors, had {had}")
            self._far[end.pid] = open_now

    async def watch_the_clock(self) -> None:
        """When this process was not run, nothing here could keep a deadline."""
        while True:
            began = time.monotonic()
            await trio.sleep(0.02)
            late_s = time.monotonic() - began - 0.02
            if late_s > 0.1:
                self._gaps.append((began, late_s))

    async def left(self) -> dict[str, int]:
        """What is still there between batches."""
        pipes: Any = self._driver.fabric._pipes  # type: ignore[attr-defined]
        for _ in range(100):
            if not pipes:
                break
            await trio.sleep(0.03)
        await trio.sleep(0.1)
        gc.collect()
        return {
            "pipes": len(pipes),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "descriptors": descriptors() - self._pool.open,
            "payloads": self._held,
            "kib": _resident_kib(),
        }


async def _processes(backend: str, count: int, seed: int) -> dict[str, Any]:
    wide_everywhere()
    fabric = prepare(open_fabric(backend))
    try:
        async with open_pool() as pool, open_driver(fabric) as driver, trio.open_nursery() as nursery:
            meetings = Meetings(backend, pool, driver)
            nursery.start_soon(meetings.watch_the_clock)
            warm = min(count, 100)
            await _batch(meetings, [meetings.draw(-1 - index) for index in range(warm)])  # what is opened once and kept
            meetings.outcomes.clear()
            before = after = await meetings.left()
            for start in range(0, count, _BATCH):
                numbers = range(start, min(count, start + _BATCH))
                await _batch(meetings, [meetings.draw(seed * 1_000_003 + number) for number in numbers])
                after = await meetings.left()
                for name in ("pipes", "tasks", "descriptors", "payloads"):
                    if after[name] > before[name]:
                        meetings.wrong.append(f"{backend}: {after[name]} {name} left, {before[name]} before")
                print(f"{backend}: {numbers.stop} of {count}", file=sys.stderr)
            if after["kib"] - before["kib"] > _MARGIN_BYTES >> 10:
                meetings.wrong.append(f"{backend}: grew from {before['kib']} to {after['kib']} KiB")
            nursery.cancel_scope.cancel()
    finally:
        fabric.close()
    return {
        "backend": backend,
        "count": count,
        "processes": pool.started,
        "beyond_deadline_s": round(meetings.over_s, 3),
        "slowest_s": round(meetings.slowest_s, 3),
        "before": before,
        "after": after,
        "outcomes": dict(sorted(meetings.outcomes.items())),
        "wrong": meetings.wrong,
    }


async def _batch(meetings: Meetings, cases: Sequence[Case]) -> None:
    todo = iter(cases)

    async def work() -> None:
        for case in todo:
            await meetings.meet(case)

    async with trio.open_nursery() as nursery:
        for _ in range(min(_AT_ONCE, len(cases))):
            nursery.start_soon(work)


def run(backend: str, count: int, seed: int) -> dict[str, Any]:
    """`count` faults; how they ended, and what was found wrong (nothing, if all is well)."""
    if backend == "memory":
        return in_memory(count, seed)
    return trio.run(functools.partial(_processes, backend, count, seed))


def _held(payloads: list[bytes]) -> int:
    """How many of them somebody else still has: the list, the loop's variable and the argument are three."""
    return sum(sys.getrefcount(data) > 3 for data in payloads if data)


def _leaves(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_leaves(each) for each in error.exceptions)
    return f"{type(error).__name__}: {error}"


def _resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found; exit code 1 where something was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=10_000, help="faults in all (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", action="append", choices=("memory", "tcp", "ucx"), help="these alone")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count is at least 1")
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")  # that a neighbour has died is what this is about
    backends = options.backend or ["memory", *reversed(available())]
    share = -(-options.count // len(backends))
    found = [run(backend, share, options.seed) for backend in backends]
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for each in found:
            print(f"{each['backend']}: {each['count']} faults, at most {each['beyond_deadline_s']} s beyond a deadline")
            print(f"  before {each['before']}, after {each['after']}")
            for outcome, times in [*each["outcomes"].items(), *((line, "!") for line in each["wrong"])]:
                print(f"  {outcome}  {times}")
    return 1 if any(each["wrong"] for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
