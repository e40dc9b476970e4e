"""Membership and state exchange on a virtual network: the real cores, a latency matrix, a seed and a fault.

    python -m benchmarks.gossip --sites N --minutes M --seed S --rtt FILE.csv --profile NAME --fault SPEC --json
    python -m benchmarks.gossip compare --sites N --minutes M --seeds COUNT --rtt FILE.csv [--fault SPEC]... --json
    python -m benchmarks.gossip calibrate --seeds COUNT --json

Profiles: `isthmus` is ours; `memberlist-lan` and `memberlist-wan` are the same code with memberlist's constants and
fixed time-outs, so that only the algorithm differs. `compare` runs all profiles under every fault; `calibrate` sets the
memberlist profiles on zero latency beside what the real memberlist was measured to take.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from benchmarks.command import command
from benchmarks.gossip import scenario
from benchmarks.gossip.compare import calibrate, compare, faults_for
from mesh.cli.tables import say, table
from mesh.errors import ConfigError, MeshError
from mesh.gossip.profiles import PROFILES
from simulations.faults import parse_fault
from simulations.latency import Matrix, load_rtt, uniform

#: Without a file: a round trip of this many milliseconds between any two sites.
DEFAULT_RTT_MS = 50.0
DEFAULT_SITES = 11
MAX_SITES = 10_000
MAX_MINUTES = 7 * 24 * 60.0

FIGURES = """\
figures (times in virtual seconds; null where one does not apply, or where so much never happened):
  detect_s            per (crashed site, healthy survivor): from the crash until the survivor reports it dead. Under
                      slow, loss, flap-ingress and oneway one healthy site crashes half way through the fault. Under
                      partition: from the cut until a site reports one of the other half dead.
  undetected          such pairs without a report
  false_positives     reports of `dead` by healthy sites about healthy sites that run and can be reached, if only
                      through others. What is said about, and by, the sites that a fault makes ill is counted apart:
                      bad_sites_declared_dead, declared_dead_by_bad_sites. false_suspicions: the same of `suspect`
  converge_s          per (change, site): from the change of an entry at a random site until the other site has it
  rejoin_s            from the end of a partition until every site sees every site alive
  bytes_per_site_s    payload of datagrams, and streams with TCP's headers, sent per site and second in the quiet part:
                      mean over the sites, and the busiest site
  coordinate_error    |estimate - RTT| / RTT over all pairs, at the end of the quiet part, against the file
  events              reports about members after the warm-up, by all sites; events_by_kind
  join_s              from the start of the first site until every site sees every site alive; null for more than 100
                      sites, which know each other from the start
  trace_sha256        of every delivery and every event, in order

a run: start and warm-up of 30 s and 0.05 s a site (not part of M), a quarter of M quiet (at most 60 s), a quarter of M
with one changed entry a second (at most 30 s), then the fault for the rest of M. A run goes on beyond M while a
partition lasts, and at most 15 minutes until a crash is known to all or halves have met.

--rtt: a CSV with a header row of names, a first column of names and round trips in ms (an empty cell: not measured), or
a raw matrix (.tsv, .tsv.gz; 0: not measured). One way from A to B takes half of row A, column B. What was not measured
is taken from the other direction, else the shortest way over a third, else the median. Fewer sites than rows: a sample
drawn by the seed; more: rows are repeated, 0.5 ms apart. Without a file: 50 ms between any two sites.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print. A mistake in the arguments is one line and exit code 2."""
    try:
        options = _parser().parse_args(arguments)
        return {"run": _run, "compare": _compare, "calibrate": _calibrate}[options.what](options)
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    if len(options.fault) > 1:
        raise ConfigError("--fault: a run suffers one; `compare` takes several")
    spec = options.fault[0] if options.fault else "none"
    fault, (matrix, count) = parse_fault(spec), _matrix(options)
    fault.fits(count)
    settings = scenario.Settings(
        matrix=matrix.sites(count, options.seed),
        minutes=options.minutes,
        seed=options.seed,
        timing=PROFILES[options.profile],
        fault=fault,
        loss=options.loss,
        jitter=options.jitter,
    )
    started = time.perf_counter()
    inputs = {name: getattr(options, name) for name in ("minutes", "seed", "rtt", "profile", "loss", "jitter")}
    figures = {"sites": count, "fault": spec, **inputs, **scenario.run(settings)}
    if options.json:
        print(json.dumps(figures))
    else:
        table(["", ""], [[name, _shown(value)] for name, value in figures.items()])
        say(f"{figures['virtual_s']:.0f} virtual seconds in {time.perf_counter() - started:.1f} s")
    return 0


def _compare(options: argparse.Namespace) -> int:
    matrix, count = _matrix(options)
    specs = options.fault or faults_for(count)
    for spec in specs:
        parse_fault(spec).fits(count)
    seeds = range(options.seed, options.seed + options.seeds)
    found = []
    for row in compare(
        matrix,
        sites=count,
        minutes=options.minutes,
        seeds=seeds,
        faults=specs,
        loss=options.loss,
        jitter=options.jitter,
    ):
        found.append(row.to_dict())
        if options.json:
            print(f"{row.fault} {row.profile}: {_shown(row.detect_p50_s)} s", file=sys.stderr)
    _print(options, found, f"{count} sites, {options.seeds} seeds; ratio: detection, times slower than ours")
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    _print(
        options, list(calibrate(range(options.seed, options.seed + options.seeds))), "virtual beside real memberlist"
    )
    return 0


def _print(options: argparse.Namespace, rows: list[dict[str, Any]], title: str) -> None:
    if options.json:
        print(json.dumps(rows))
    else:
        say(title)
        table(list(rows[0]), [[_shown(value) for value in row.values()] for row in rows])


def _matrix(options: argparse.Namespace) -> tuple[Matrix, int]:
    """The matrix of the file, and how many sites are to be laid out by it."""
    whole = uniform(options.sites or DEFAULT_SITES, DEFAULT_RTT_MS) if options.rtt is None else load_rtt(options.rtt)
    return whole, options.sites or len(whole)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = _Parser(
        prog="python -m benchmarks.gossip",
        description=__doc__.splitlines()[0],
        epilog=FIGURES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=("run", "compare", "calibrate"), default="run")
    parser.add_argument(
        "--sites", type=_whole(1, MAX_SITES), metavar="N", help="default: the rows of the file, else 11"
    )
    parser.add_argument("--minutes", type=_number(0.1, MAX_MINUTES), default=5.0, metavar="M", help="default: 5")
    parser.add_argument("--seed", type=_whole(0, 2**63), default=1, metavar="S", help="default: 1")
    parser.add_argument("--rtt", metavar="FILE", help="round trips between sites in ms, see below")
    parser.add_argument(
        "--profile",
        choices=tuple(PROFILES),
        default="isthmus",
        metavar="NAME",
        help=f"{', '.join(PROFILES)}; default: isthmus",
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="SPEC",
        help="none, crash:K, slow:K:SECONDS (paused so long at a time, again and again), loss:K:FRACTION (of their "
        "packets, each way), flap-ingress:K:ON:OFF (hear nothing for OFF seconds, then everything for ON), "
        "partition:SECONDS (two halves), oneway:K (pairs); default: none; compare: all",
    )
    parser.add_argument(
        "--loss", type=_number(0.0, 1.0), default=0.0, metavar="FRACTION", help="of all packets; default: 0"
    )
    parser.add_argument(
        "--jitter",
        type=_number(0.0, 10.0),
        default=0.1,
        metavar="FRACTION",
        help="at most so much of a path's latency is added, evenly spread; default: 0.1",
    )
    parser.add_argument("--seeds", type=_whole(1, 1000), default=5, metavar="COUNT", help="of compare and calibrate")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number between {low} and {high}")
        return value

    return read


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{word!r} is not a number between {low:g} and {high:g}")
        return value

    return read


if __name__ == "__main__":
    command(main)
