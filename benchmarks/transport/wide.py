"""Wide-area rows: emulated links, one plain TCP stream over each, the transport's own, and a token beside bulk."""

from __future__ import annotations

import json
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from benchmarks.transport.rows import Contender, LeftOut, Options, Row, Sample, interleaved
from simulations.wide_area import Line, WideArea, WideAreaUnavailable

#: Of a packet of 1500 bytes, what TCP with time stamps leaves for data.
_DATA_SHARE = 1448 / 1500
_ANSWER_S = 120.0

#: A round of all links takes ten minutes.
ROUNDS = 1
LINES = (
    Line(100e6, 0.010),
    Line(100e6, 0.100),
    Line(100e6, 0.100, 0.01),
    Line(300e6, 0.050, 0.001),
    Line(1e9, 0.010),
    Line(1e9, 0.100),
    Line(1e9, 0.100, 0.01),
    Line(1e9, 0.200),
)
_QUICK = (LINES[1], LINES[2])

OURS, BESIDE_PLAIN, PLAIN, LINK = "wide tcp", "wide tcp beside one plain stream", "wide plain {}", "wide link"
IDLE, IDLE_LATE, DURING, LATE, SHARED = (
    "wide token idle",
    "wide token idle 95th percentile",
    "wide token during bulk",
    "wide token during bulk 95th percentile",
    "wide tcp with tokens",
)
WHAT = tuple(
    f"{what} {line}"
    for line in LINES
    for what in (OURS, BESIDE_PLAIN, PLAIN, LINK, IDLE, IDLE_LATE, DURING, LATE, SHARED)
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every emulated link that was asked for. Raises LeftOut where links cannot be emulated.

    `ratio_to_raw` of throughputs is the share of what the link can carry (data in packets of 1500 bytes), of "beside
    one plain stream", which is held against a stream under cubic, Linux's default. Tokens are held against those on the
    idle link, the 95th percentile against theirs.
    """
    for line in _QUICK if options.quick else LINES:
        if options.wants(f"wide {line}") or any(options.wants(f"{w} {line}") for w in (OURS, PLAIN, IDLE, DURING)):
            yield from _link(line, options)


def _link(line: Line, options: Options) -> Iterator[Row]:
    with ExitStack() as stack:
        try:
            area = stack.enter_context(WideArea(line))
        except WideAreaUnavailable as reason:
            raise LeftOut(str(reason)) from None
        far, near = stack.enter_context(_End("far", area.far)), stack.enter_context(_End("near", area.near))
        bench = _Bench(line, near, far, far.answer()["address"], options.quick)
        limit = line.rate / 8e9 * _DATA_SHARE * (1 - line.loss)
        contenders = [
            Contender(PLAIN.format("cubic"), lambda: bench.plain("cubic"), LINK),
            Contender(PLAIN.format("bbr"), lambda: bench.plain("bbr"), LINK),
            Contender(OURS, bench.bulk, LINK),
            Contender(IDLE, bench.idle),
            Contender(DURING, bench.tokens, IDLE),
            Contender(LINK, lambda: Sample(limit)),
        ]
        measured = [
            replace(row, size=bench.token_bytes) if row.what in (IDLE, DURING) else row
            for row in interleaved(contenders, bench.size, str(line), options.rounds)
        ]
        yield from measured
        by_name = {row.what: row for row in measured}
        ours, plain = by_name[OURS], by_name[PLAIN.format("cubic")]
        if ours.gb_per_s and plain.gb_per_s:
            ratio = ours.gb_per_s / plain.gb_per_s
            yield Row(BESIDE_PLAIN, bench.size, str(line), ours.gb_per_s, None, ratio)
        idle, late = (statistics.median(each) for each in (bench.idle_late_us, bench.late_us))
        yield Row(IDLE_LATE, bench.token_bytes, str(line), None, idle, None)
        yield Row(LATE, bench.token_bytes, str(line), None, late, late / idle)
        shared = statistics.median(bench.shared)
        yield Row(SHARED, bench.size, str(line), shared, None, shared / limit)


class _Bench:
    """One link's two ends, and the orders they get."""

    token_bytes = 64

    def __init__(self, line: Line, near: _End, far: _End, address: str, quick: bool) -> None:
        self.size = (1 if line.rate <= 300e6 else 4) << 20
        #: Slow start, and the growth of buffers and streams, are over after some tens of round trips.
        self._warm_s = max(4.0, 40 * line.rtt_s)
        self._last_s = 4.0
        #: Of 20 tokens a second, enough for a 95th percentile.
        self._tokens_s = 10.0
        self._near, self._far, self._address = near, far, address
        self.idle_late_us: list[float] = []
        self.late_us: list[float] = []
        self.shared: list[float] = []

    def plain(self, congestion: str) -> Sample:
        """One TCP stream, blocking sockets."""
        self._far.order(what="plain", last_s=self._last_s)
        self._far.answer()
        self._near.order(what="plain", congestion=congestion, seconds=self._warm_s + self._last_s)
        rate = self._far.answer()["bytes_per_s"]
        self._near.answer()
        return Sample(rate / 1e9)

    def bulk(self) -> Sample:
        """Bulk over a channel, sealed."""
        return Sample(self._ours(bulk=True, tokens=False)["bytes_per_s"] / 1e9)

    def idle(self) -> Sample:
        """Small messages alone."""
        seen = self._ours(bulk=False, tokens=True)
        self.idle_late_us.append(seen["late_s"] * 1e6)
        return Sample(None, seen["delay_s"] * 1e6)

    def tokens(self) -> Sample:
        """Small messages while bulk travels."""
        seen = self._ours(bulk=True, tokens=True)
        self.late_us.append(seen["late_s"] * 1e6)
        self.shared.append(seen["bytes_per_s"] / 1e9)
        return Sample(None, seen["delay_s"] * 1e6)

    def _ours(self, *, bulk: bool, tokens: bool) -> dict[str, Any]:
        last_s = self._tokens_s if tokens else self._last_s
        self._far.order(what="ours", last_s=last_s)
        hello = self._far.answer()["hello"]
        seconds = (self._warm_s if bulk else 0.5) + last_s
        self._near.order(
            what="ours", address=self._address, hello=hello, seconds=seconds, size=self.size, bulk=bulk, tokens=tokens
        )
        seen = self._far.answer()
        if "error" in (said := self._near.answer()):
            raise LeftOut(said["error"])
        return {**seen, **said}


class _End:
    """One end's process."""

    def __init__(self, role: str, space: str) -> None:
        self._role, self._space = role, space

    def __enter__(self) -> _End:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transport.wide_ends", self._role, self._space],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def order(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line. Raises LeftOut when the end is lost."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _ANSWER_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise LeftOut(f"the {self._role} end of the link gave no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer
