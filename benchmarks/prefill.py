"""What a long prompt costs the tokens of others, and what letting them pass costs its own first token.

    python -m benchmarks.prefill [--prompts N] [--json]

Two stages at the ends of an emulated link; one request decodes all the time, others with prompts of 2048 tokens come
one after the other. Hidden states are those of a 70B model, 8192 numbers of two bytes; a step computes nothing and
takes 2 ms, a chunk of 512 positions 20 ms. Prompts travel as `mesh.runtime.priorities` has it, or all in order.
"""

from __future__ import annotations

import argparse
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from benchmarks.command import command
from mesh.cli.tables import table
from mesh.errors import MeshError
from simulations.processes import ending_on_signals
from simulations.wide_area import FAR_HOST, NEAR_HOST, Line, WideArea, WideAreaUnavailable

LINES: Final = (Line(1e9, 0.020), Line(100e6, 0.050))
HIDDEN: Final = 8192
PROMPT: Final = 2048
#: Before anything is timed, after each prompt, and the longest that anything may take.
WARM_S, PAUSE_S, ANSWER_S = 1.0, 2.0, 60.0
STEADY: Final = "steady"


class BenchmarkError(MeshError):
    """An end was lost."""

    code = "benchmark"


class _End:
    """One stage's process."""

    def __init__(self, space: str, host: str, stage: int, bytes_per_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.prefill_ends", space, host, str(stage), str(bytes_per_s), str(HIDDEN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._rest = b""

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def said(self, deadline: float) -> dict[str, Any] | None:
        """The next line, or None where none comes until then. Raises BenchmarkError where the process is gone."""
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            data = self.process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not data:
                raise BenchmarkError("an end of the link has ended")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        document: dict[str, Any] = json.loads(line)
        if "failure" in document:
            raise BenchmarkError(document["failure"])
        return document

    def answer(self) -> dict[str, Any]:
        found = self.said(time.monotonic() + ANSWER_S)
        if found is None:
            raise BenchmarkError(f"an end of the link said nothing for {ANSWER_S:.0f} s")
        return found


def measure(line: Line, *, bulk: bool, prompts: int) -> dict[str, Any]:
    """First tokens of the prompts, and the gaps between the tokens of the request beside them, in milliseconds."""
    with WideArea(line) as area:
        ends = (
            _End(area.near, NEAR_HOST, 0, line.rate / 8 if bulk else 0.0),
            _End(area.far, FAR_HOST, 1, 0.0),
        )
        try:
            return _measured(*ends, prompts)
        finally:
            for end in ends:
                end.process.kill()
                end.process.communicate()


def _measured(near: _End, far: _End, prompts: int) -> dict[str, Any]:
    addresses = [end.answer() for end in (near, far)]
    near.tell(**addresses[1])
    far.tell(**addresses[0])
    for end in (near, far):
        end.answer()
    tokens: dict[str, list[float]] = {}

    def listen(seconds: float, until: str = "") -> None:
        deadline = time.monotonic() + seconds
        while until not in tokens and (said := far.said(deadline)) is not None:
            tokens.setdefault(said["request"], []).append(said["at"])

    near.tell(request=STEADY, prompt=PROMPT, tokens=100_000)
    listen(ANSWER_S, STEADY)
    listen(WARM_S)
    spans = []
    for number in range(prompts):
        began = time.monotonic()
        near.tell(request=f"r{number}", prompt=PROMPT, tokens=1)
        listen(ANSWER_S, f"r{number}")
        if f"r{number}" not in tokens:
            raise BenchmarkError("no first token came")
        spans.append((began, tokens[f"r{number}"][0]))
        listen(PAUSE_S)
    steady = tokens[STEADY]
    gaps = list(pairwise(steady))
    beside = [1e3 * (b - a) for a, b in gaps if any(start < b and a < end for start, end in spans)]
    alone = [1e3 * (b - a) for a, b in gaps if not any(start < b and a < end for start, end in spans)]
    return {
        "first_ms": [round(1e3 * (end - start)) for start, end in spans],
        "alone_ms": round(statistics.median(alone), 1),
        "beside_ms": round(statistics.median(beside), 1),
        "worst_ms": round(max(beside), 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. An error of ours is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="prompts a run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    try:
        with ending_on_signals():
            for line in LINES:
                for how, bulk in (("in order", False), ("as bulk where it is long", True)):
                    rows.append(
                        {"link": str(line), "prompts": how, **measure(line, bulk=bulk, prompts=options.prompts)}
                    )
    except (MeshError, WideAreaUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        head = ["link", "prompts", "first tokens ms", "a token alone ms", "beside a prompt", "the latest"]
        cells = [
            [
                row["link"], row["prompts"], " ".join(str(first) for first in row["first_ms"]), f"{row['alone_ms']}",
                f"{row['beside_ms']}", f"{row['worst_ms']}",
            ]
            for row in rows
        ]  # fmt: skip
        table(head, cells)
    return 0


if __name__ == "__main__":
    command(main)
