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
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where others reach this peer, if not where it listens.")
    ] = None,
    invite: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="What `mesh invite` printed: become a site of that cluster, then run."),
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
    from mesh.identity.site import SiteIdentity
    from mesh.peer.config import load
    from mesh.peer.daemon import run

    given = {
        "site": site,
        "listen": listen,
        "join": join or None,
        "advertise": advertise,
        "http": http,
        "data_dir": str(data_dir) if data_dir is not None else None,
        "region": region,
        "device": device or None,
    }
    options = {key: value for key, value in given.items() if value is not None}
    will_have = invite is not None
    loaded = load(
        options, dict(os.environ), config, has_identity=lambda folder: will_have or SiteIdentity.exists(folder)
    )
    if invite is not None:
        from mesh.peer.enrolment import enrol

        _, addresses = enrol(loaded.data_dir, loaded.site, invite)
        loaded = loaded.model_copy(update={"join": (*loaded.join, *addresses)})
    run(loaded)
