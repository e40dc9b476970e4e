"""`mesh up`: run this site's peer until it is told to leave."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mesh.cli.frame import Debug


def up(
    *,
    site: Annotated[str | None, typer.Option(metavar="NAME", help="This site's name, unique in the mesh.")] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Gossip (UDP) and control (TCP) [default: 127.0.0.1:7700]."),
    ] = None,
    join: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="A peer to join through; may be repeated.")
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve /health and /metrics here [default: off].")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where this peer keeps its state.")] = None,
    region: Annotated[str | None, typer.Option(metavar="NAME", help="The region, for constraints.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Instead of discovery, as in cpu,threads=1,memory=200MiB; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="The same options as keys; MESH_* variables win over it.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run this site's peer. SIGTERM or Ctrl-C leaves gracefully."""
    from mesh.peer.config import load
    from mesh.peer.daemon import run

    given = {
        "site": site,
        "listen": listen,
        "join": join or None,
        "http": http,
        "data_dir": str(data_dir) if data_dir is not None else None,
        "region": region,
        "device": device or None,
    }
    run(load({key: value for key, value in given.items() if value is not None}, dict(os.environ), config))
