"""A set of slices from two sites at once: its share of what both links carry, and what a kill in the middle costs.

    python -m benchmarks.weights [--gigabytes N] [--link MBITS,MS[,LOSS]]... [--skip killed|tokens]... [--json]

Two sites hold a model, each behind an emulated link of its own (by default 200 Mbit/s, 40 ms and 100 Mbit/s, 80 ms of
round trip), and a third fetches the middle layers of it with the processes that real peers run. Then again, but its
process is killed with SIGKILL when half is there, started again, and fetches the rest. Then again while a message of 64
bytes every 50 ms travels over the first link, as a token would, and the site says that tokens travel.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from benchmarks.command import command
from benchmarks.weights.model import slices, write_model
from benchmarks.weights.tokens import Seen
from benchmarks.weights.world import World, open_world
from mesh.cli.tables import table
from mesh.errors import MeshError
from simulations.processes import ending_on_signals
from simulations.wide_area import Line

DEFAULT_LINKS = (Line(200e6, 0.040), Line(100e6, 0.080))
#: Small messages are watched for so long before weights travel.
_IDLE_S = 3.0
#: Where the fetching process is killed: at this share of the whole.
_KILL_AT = 0.5

WHOLE, KILLED, RESUMED = "weights from two sites", "weights until the kill", "weights after the restart"
POLITE = "weights beside tokens"
IDLE, DURING, LATE = "token idle", "token during weights", "token during weights 95th percentile"
FIGURES = """\
rows: what was measured; size in bytes (of the slices, or of a message); link; gb_per_s (10^9 bytes a second, from the
first request to the last block on the disk); us_per_message (one way; median unless the row says otherwise);
ratio_to_raw (of what the links together carry, for a token of its time on the idle link); fetched_bytes that left the
sources; twice_bytes (what left the sources in both runs beyond what the slices are: blocks on their way when the
process was killed, and those fetched again).
"""


@dataclass(frozen=True)
class Row:
    """One figure; see FIGURES."""

    what: str
    size: int
    link: str
    gb_per_s: float | None = None
    us_per_message: float | None = None
    ratio_to_raw: float | None = None
    fetched_bytes: int | None = None
    twice_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object, with four significant digits."""
        return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in asdict(self).items()}


async def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Every row that was asked for."""
    lines = tuple(options.link) or DEFAULT_LINKS
    model = folder / "model"
    write_model(model, round(options.gigabytes * 1e9))
    rows: list[Row] = []
    async with open_world(lines, folder, model) as world:
        if not world.emulated:
            print(f"links are paced and delayed, not emulated: {world.reason}", file=sys.stderr)
        rows.append(await _whole(world, WHOLE))
        if "killed" not in options.skip:
            await world.forget()
            rows += await _killed(world)
        if "tokens" not in options.skip:
            await world.forget()
            rows += await _beside_tokens(world)
    return rows


async def _beside_tokens(world: World) -> list[Row]:
    await world.polite(True)
    with world.tokens() as tokens:
        await trio.sleep(_IDLE_S)
        began = time.monotonic()
        row = await _whole(world, POLITE)
        ended = time.monotonic()
        await trio.to_thread.run_sync(tokens.stop)
    return [row, *_delays(tokens.seen, str(world.lines[0]), began, ended)]


async def _whole(world: World, what: str) -> Row:
    sizes: list[int] = []
    before = await world.settled()
    began = time.monotonic()
    await world.fetch(slices(), lambda done, total: sizes.append(total))
    passed = time.monotonic() - began
    size = max(sizes)
    rate = size / passed
    served = await world.settled() - before
    return Row(what, size, world.words, rate / 1e9, None, rate / world.bytes_per_s, served)


async def _killed(world: World) -> list[Row]:
    before = await world.settled()
    size = 0
    began = time.monotonic()

    def kill(done: int, total: int) -> None:
        nonlocal size
        size = total
        if done >= _KILL_AT * total:
            world.here.kill()

    try:
        await world.fetch(slices(), kill)
    except MeshError:
        pass  # as it was meant to
    first_s = time.monotonic() - began
    first = await world.settled() - before
    began = time.monotonic()
    left: list[int] = []
    await world.fetch(slices(), lambda done, total: left.append(total))
    second_s = time.monotonic() - began
    second = await world.settled() - before - first
    kept = size - max(left)
    rate = max(left) / second_s
    return [
            Row(KILLED, kept, world.words, kept / first_s / 1e9, None, None, first),
            Row(
                RESUMED, max(left), world.words, rate / 1e9, None, rate / world.bytes_per_s, second,
                first + second - size,
            ),
    ]  # fmt: skip


def _delays(seen: Sequence[Seen], link: str, began: float, ended: float) -> Iterator[Row]:
    idle = sorted(each.delay_s for each in seen if began - _IDLE_S / 2 < each.sent_at < began)
    during = sorted(each.delay_s for each in seen if began <= each.sent_at < ended)
    if not idle or not during:
        return
    usual = statistics.median(idle)
    for what, delay_s in (
        (IDLE, usual),
        (DURING, statistics.median(during)),
        (LATE, during[int(0.95 * len(during))]),
    ):
        yield Row(what, 64, link, None, delay_s * 1e6, delay_s / usual if what != IDLE else None)


@contextmanager
def _folder(where: Path | None) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="isthmus-weights-", dir=where))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. A mistake in the arguments is exit code 2; an error of ours one line and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        with ending_on_signals(), _folder(options.folder) as folder:
            rows = trio.run(measure, options, folder)
    except BaseExceptionGroup as group:  # what crossed the nurseries
        found, _ = group.split(MeshError)
        if found is None:
            raise
        error: BaseException = found
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print("[\n" + ",\n".join(json.dumps(row.to_dict()) for row in rows) + "\n]")
        return 0
    columns = list(rows[0].to_dict())
    table(columns, [["" if (v := row.to_dict()[c]) is None else f"{v}" for c in columns] for row in rows])
    return 0


def _link(text: str) -> Line:
    try:
        rate, rtt, loss = (float(word) for word in f"{text},0".split(",")[:3])
        return Line(rate * 1e6, rtt / 1e3, loss)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give Mbit/s, milliseconds[, loss], as in 300,40,0.001") from None


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value:g} GB; give 0.01 to 100")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights",
        description=__doc__,
        epilog=FIGURES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=_gigabytes, default=1.0, metavar="N", help="of slices (1)")
    parser.add_argument(
        "--link", type=_link, action="append", default=[], metavar="MBITS,MS[,LOSS]", help="of a source; up to 4 times"
    )
    parser.add_argument("--skip", choices=("killed", "tokens"), action="append", default=[])
    parser.add_argument("--folder", type=Path, metavar="PATH", help="where files go (the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    return parser


if __name__ == "__main__":
    command(main)
