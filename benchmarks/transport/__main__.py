"""How fast bytes, tensors and sums travel, beside raw sockets, UCX's own tool, gloo and one plain TCP stream.

    python -m benchmarks.transport [--only WORD]... [--quick] [--rounds N] [--json]

Every figure is the median over interleaved rounds. A part that cannot be measured on this machine says so in one line
on standard error and leaves its rows out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.command import command
from benchmarks.transport.rows import LeftOut, Options, Row
from mesh.cli.tables import table
from mesh.errors import MeshError
from simulations.processes import ending_on_signals

#: The modules of this package that give rows: each has `rows(options) -> Iterator[Row]` and a tuple `WHAT` with the
#: names that its rows may have, so that --only need not import, or set up, what was not asked for.
PARTS = (
    "local",
    "collectives",
    "wide",
)

FIGURES = """\
rows: what was measured; size of a message in bytes; link; gb_per_s (10^9 bytes a second, one way); us_per_message (one
way unless the row's name says otherwise; of a stream, what a message of that size takes of it); ratio_to_raw (this
row's figure divided by that of what it is held against: of rates from 64 KiB on, of times below, of all-reduces how
many times faster than gloo; 1 for what others are held against).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. A mistake in the arguments is exit code 2; an error of ours one line and exit code 1."""
    options = _parser().parse_args(arguments)
    chosen = Options(only=tuple(options.only), quick=options.quick, rounds=options.rounds or 3)
    rows: list[Row] = []
    try:
        with ending_on_signals():
            for row in _measured(chosen, asked=options.rounds is not None):
                rows.append(row.whole())
                if not options.json:
                    print(f"  {row.what} {row.size} {row.link}", file=sys.stderr, flush=True)
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print("[\n" + ",\n".join(json.dumps(row.to_dict()) for row in rows) + "\n]")
    else:
        columns = ["what", "size", "link", "gb_per_s", "us_per_message", "ratio_to_raw"]
        cells = [[_cell(row.to_dict()[column]) for column in columns] for row in rows]
        table(["what", "size", "link", "GB/s", "us a message", "ratio to raw"], cells)
    return 0


def _measured(options: Options, *, asked: bool) -> Iterator[Row]:
    for name in PARTS:
        part = importlib.import_module(f"benchmarks.transport.{name}")
        if not any(options.wants(what) for what in part.WHAT):
            continue
        # A part whose rounds take minutes has fewer of them, unless a number was asked for.
        rounds = options.rounds if asked else getattr(part, "ROUNDS", options.rounds)
        try:
            yield from part.rows(replace(options, rounds=rounds))
        except LeftOut as reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{value} rounds; give 1 to 1000")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport",
        description=__doc__,
        epilog=FIGURES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="rows whose name has WORD in it")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and links, shorter runs")
    parser.add_argument("--rounds", type=_count, metavar="N", help="measure everything N times (3; wide links once)")
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    return parser


if __name__ == "__main__":
    command(main)
