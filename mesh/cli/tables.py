"""Tables for people. Every cell is plain text: names come from other sites, and must not be read as markup."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mesh.cli.frame import printable

if TYPE_CHECKING:
    from mesh.client.values import JobStatus
    from topology.plan import Plan
    from topology.snapshot import Device, Link, Snapshot

#: Links are listed one by one up to so many sites.
LISTED_SITES = 12
#: Columns to print in where stdout is no terminal and has no width: enough that nothing is cut.
WIDE = 200


def show_status(document: Mapping[str, Any], address: str) -> None:
    """`mesh status`. Reads what it knows of the document and leaves out what is missing."""
    say(f"{document.get('site', '?')} at {address}")
    for title, key, columns in (
        ("members", "members", ("site", "address", "region", "state", "incarnation", "rtt_ms")),
        ("devices", "devices", ("name", "kind", "vendor", "memory_bytes", "free_bytes", "flops", "memory_bandwidth")),
        ("jobs", "jobs", ("job", "id", "model", "state", "owner", "epoch")),
    ):
        rows = [row for row in document.get(key) or () if isinstance(row, Mapping)]
        present = [column for column in columns if any(column in row for row in rows)]
        if present:
            table([_title(column) for column in present], [[_cell(c, row.get(c)) for c in present] for row in rows])
        else:
            say(f"no {title}")


def show_models(sites: Iterable[Mapping[str, Any]]) -> None:
    """`mesh models`."""
    rows, caches = [], []
    for site in sites:
        name = str(site.get("site", "?"))
        for model in site.get("models") or ():
            runs = ", ".join(_range((int(start), int(end))) for start, end in model.get("layers") or ())
            held = "whole" if model.get("whole") else f"layers {runs}" if runs else "parts of layers"
            size = mebibytes(int(model.get("bytes") or 0))
            total = int(model.get("total_bytes") or 0)
            size = size if model.get("whole") or not total else f"{size} of {mebibytes(total)}"
            kept = "cache" if model.get("cached") else "own files"
            rows.append([name, str(model.get("name", "?")), held, size, kept, str(model.get("root") or "-")[:12]])
        cache = site.get("cache") or {}
        if cache:
            caches.append([name, mebibytes(int(cache["used_bytes"])), mebibytes(int(cache["limit_bytes"]))])
    if rows:
        table(["site", "model", "holds", "size", "where", "root"], rows)
    else:
        say("no site tells of a model")
    if caches:
        table(["site", "cache used", "limit"], caches)


def show_members(document: Mapping[str, Any]) -> None:
    """`mesh members`."""
    identity = document.get("identity")
    if isinstance(identity, Mapping):
        say(f"cluster {identity.get('cluster', '?')}, gossip keys {identity.get('ring', '?')}")
    else:
        say("no cluster: these peers have no identities")
    columns = ("site", "address", "state", "rtt_ms", "fingerprint", "certificate_days", "ring")
    rows = [row for row in document.get("members") or () if isinstance(row, Mapping)]
    present = [column for column in columns if any(column in row for row in rows)]
    table([_title(column) for column in present], [[_cell(c, row.get(c)) for c in present] for row in rows])
    revoked = identity.get("revoked") if isinstance(identity, Mapping) else None
    if revoked:
        say(f"put out: {', '.join(map(str, revoked))}")


def show_topology(snapshot: Snapshot) -> None:
    """`mesh topology`: the sites with their devices, what is known of each link, the matrix of round-trip times."""
    table(
        ["site", "region", "device", "memory", "free", "float32", "memory bandwidth"],
        [
            [
                site.name,
                site.region,
                device.name,
                mebibytes(device.memory_bytes),
                mebibytes(device.free_bytes),
                _flops(device),
                f"{device.memory_bandwidth / 1e9:.1f} GB/s",
            ]
            for site in snapshot.sites
            for device in site.devices
        ],
    )
    if len(snapshot.sites) < 2:
        say("one site: no links")
        return
    if len(snapshot.sites) <= LISTED_SITES:
        say("links (~ nobody measured it yet)")
        table(
            ["from", "to", "rtt ms", "spread ms", "loss", "bandwidth", "transport", "path", "measured"],
            [_link(link) for link in snapshot.links],
            right=range(2, 6),
        )
    names = [site.name for site in snapshot.sites]
    links = {(link.source, link.target): link for link in snapshot.links}
    say("round-trip time in ms (via: through that site, ~ estimated, x unreachable, ? unknown)")
    rows = [[source] + [_rtt(source, target, links.get((source, target))) for target in names] for source in names]
    table(["from \\ to", *names], rows, right=range(1, len(names) + 1))


def show_plan(plan: Plan) -> None:
    """`mesh plan`: stages and shards, ring, predictions, reasons."""
    model = plan.model
    say(f"{model.name}: {model.layers} layers in {model.dtype}, context {plan.context}")
    ring = plan.ring[0] if len(plan.ring) == 1 else " -> ".join((*plan.ring, plan.ring[0]))
    say(f"{plan.strategy}: {ring}")
    table(
        ["stage", "layers", "site", "device", "heads", "KV heads", "MLP columns", "vocabulary", "memory"],
        [
            [
                str(index) if rank == 0 else "",
                _range((stage.start, stage.end)) if rank == 0 else "",
                shard.site,
                shard.device,
                _range(shard.query_heads(model)),
                _range(shard.kv_heads),
                _range(shard.columns),
                _range(shard.vocabulary),
                mebibytes(shard.memory_bytes),
            ]
            for index, stage in enumerate(plan.stages)
            for rank, shard in enumerate(stage.shards)
        ],
    )
    predicted = plan.predicted
    say(
        f"predicted: {predicted.tokens_per_s:.1f} tokens/s, {predicted.token_ms:.1f} ms a token "
        f"({predicted.compute_ms:.1f} compute, {predicted.network_ms:.1f} network), "
        f"first token after {predicted.first_token_ms:.1f} ms"
    )
    for reason in plan.why:
        say(f"- {reason}")


def show_jobs(jobs: Iterable[JobStatus]) -> None:
    """`mesh jobs`."""
    rows = [
        [
            job.id,
            job.model,
            job.state,
            job.owner,
            str(job.epoch),
            ", ".join((job.plan_document or {}).get("sites", [])),
            f"{mebibytes(job.loaded_bytes)} of {mebibytes(job.total_bytes)}" if job.total_bytes else "-",
            job.error,
        ]
        for job in jobs
    ]
    if rows:
        table(["job", "model", "state", "owner", "epoch", "sites", "loaded", "error"], rows)
    else:
        say("no jobs")


def table(head: list[str], rows: list[list[str]], right: Iterable[int] = ()) -> None:
    """One table on stdout. Columns in `right` are aligned to the right."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    aligned = set(right)
    for index, name in enumerate(head):
        result.add_column(Text(printable(name)), justify="right" if index in aligned else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(printable(cell)) for cell in row))
    _console().print(result)


def say(text: str) -> None:
    """A line on stdout, folded to the terminal's width."""
    _console().print(Text(printable(text)), soft_wrap=not sys.stdout.isatty())


def mebibytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def ago(seconds: float) -> str:
    """A time span for people, in its largest unit."""
    for unit, per in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= per:
            return f"{seconds / per:.0f} {unit}"
    return f"{seconds:.0f} s"


class _Pipe(Console):
    """A console that leaves a broken pipe to the command's own handling: rich would end the process with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles a BrokenPipeError."""
        raise BrokenPipeError


def _console() -> Console:
    return _Pipe(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def _flops(device: Device) -> str:
    return f"{device.flops['float32'] / 1e9:.1f} GFLOP/s" if "float32" in device.flops else "?"


def _rtt(source: str, target: str, link: Link | None) -> str:
    if source == target:
        return "-"
    if link is None:
        return "?"
    if link.via:
        return f"via {link.via}"
    if not link.reachable:
        return "x"
    return f"{'' if link.measured else '~'}{link.rtt_s * 1e3:.1f}"


def _link(link: Link) -> list[str]:
    return [
        link.source,
        link.target,
        _rtt(link.source, link.target, replace(link, via="")),
        f"{link.jitter_s * 1e3:.1f}",
        f"{link.loss:.1%}",
        f"{'' if link.bandwidth_measured else '~'}{link.bandwidth / 1e6:.1f} MB/s",
        link.transport or "-",
        f"via {link.via}" if link.via else "direct" if link.reachable else "none",
        "-" if link.age_s is None else f"{ago(link.age_s)} ago",
    ]


def _range(pair: tuple[int, int]) -> str:
    return f"{pair[0]}..{pair[1] - 1}" if pair[1] > pair[0] else "-"


_CELLS: dict[str, Callable[[Any], str]] = {
    "memory_bytes": mebibytes,
    "free_bytes": mebibytes,
    "rtt_ms": lambda value: f"{value:.1f}",
    "memory_bandwidth": lambda value: f"{value / 1e9:.1f} GB/s",
    "flops": lambda value: ", ".join(f"{dtype} {speed / 1e9:.1f} GFLOP/s" for dtype, speed in sorted(value.items())),
}


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    return _CELLS[column](value) if column in _CELLS else str(value)


def _title(column: str) -> str:
    return column.removesuffix("_bytes").replace("_", " ")
