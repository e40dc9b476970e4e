"""`make bench`: every measured figure of a whole mesh on this machine, as tables and, with `--json FILE`, as JSON.

    python -m benchmarks [--json FILE] [--model PATH] [--transport auto|tcp|ucx] [--skip peers|plans|whole]...

Figures are the best of three runs unless a table says otherwise, on one thread a device.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers, plans, whole
from benchmarks.command import command
from mesh.cli.tables import mebibytes, say, table
from mesh.errors import MeshError
from simulations.processes import ending_on_signals

PARTS = ("peers", "plans", "whole")
PROMPT_TOKENS, NEW_TOKENS = 512, 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. An error of the mesh is one line and exit code 1."""
    options = _parser().parse_args(arguments)
    document: dict[str, Any] = {"machine": {"processor": _processor(), "python": platform.python_version()}}
    try:
        with ending_on_signals():
            _run(options, document)
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _run(options: argparse.Namespace, document: dict[str, Any]) -> None:
    if "peers" not in options.skip:
        _peers(document)
    rows: list[list[str]] = []
    if "plans" not in options.skip:
        rows += _plans(options, document)
    if "whole" not in options.skip:
        rows.append(_whole(options, document))
    if rows:
        say(f"\none stream, float32, one thread a device; prefill of {PROMPT_TOKENS} tokens, decode of {NEW_TOKENS}")
        table(["plan", "prefill tokens/s", "decode tokens/s", "compute ms", "collectives ms", "waiting ms"], rows)


def _peers(document: dict[str, Any]) -> None:
    figures = peers.measure()
    document["peers"] = figures.to_dict()
    table(
        ["three peers", ""],
        [
            ["mesh up to a converged view, first start", f"{figures.converged_s:.1f} s"],
            ["the same with calibrated devices", f"{figures.converged_again_s:.1f} s"],
            [f"idle daemon, mean of {peers.WATCH_S:.0f} s", f"{figures.idle_core_share * 100:.2f} % of a core"],
            ["memory of a daemon", mebibytes(figures.memory_bytes)],
        ],
    )


def _plans(options: argparse.Namespace, document: dict[str, Any]) -> list[list[str]]:
    rows, parts, links = [], [], []
    document["plans"] = []
    numbers = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    for found in plans.measure(options.model, transport=options.transport, **numbers):
        document["plans"].append(found.to_dict())
        times = [f"{value:.1f}" for value in (found.compute_ms, found.network_ms, found.waiting_ms)]
        rows.append([found.plan, f"{found.prefill_tokens_per_s:.0f}", f"{found.decode_tokens_per_s:.1f}", *times])
        parts += [
            [found.plan, f"{found.ready_s:.1f} s", device, mebibytes(memory), mebibytes(planned)]
            for device, (memory, planned) in found.workers.items()
        ]
        links += [[found.plan, link, f"{count:.0f}"] for link, count in found.bytes_per_token.items() if count >= 1]
    table(["plan", "submit to ready", "worker", "memory", "of it planned"], parts)
    if links:
        say(f"emulated round trip between sites: {plans.RTT_MS:g} ms")
        table(["plan", "link", "bytes a token"], links)
    return rows


def _whole(options: argparse.Namespace, document: dict[str, Any]) -> list[str]:
    figures = whole.measure(options.model, threads=1, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
    document["whole"] = figures
    rates = [f"{figures['prefill_tokens_per_s']:.0f}", f"{figures['decode_tokens_per_s']:.1f}"]
    return ["transformers.generate", *rates, "-", "-", "-"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct"), metavar="PATH")
    # TCP by default: the kernel counts its bytes.
    parser.add_argument("--transport", choices=("auto", "tcp", "ucx"), default="tcp")
    parser.add_argument("--skip", choices=PARTS, action="append", default=[], help="leave a part out; may be repeated")
    return parser


if __name__ == "__main__":
    command(main)
