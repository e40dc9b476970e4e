"""The verbs about who may take part: `cluster create`, `invite`, `members`, `revoke`, `rotate`, `token`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.cli.frame import Debug, Json, Peer, note, print_json
from mesh.errors import ConfigError

if TYPE_CHECKING:
    from mesh.wire.v1 import identity_pb2

Site = Annotated[str | None, typer.Option("--site", metavar="NAME", help="This site's name.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="Where this peer keeps its state.")]
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The cluster's name.")] = "isthmus",
    *,
    site: Site = None,
    data_dir: DataDir = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a cluster: its authority and the identity of its first site, both in this site's data directory."""
    import time

    from mesh.identity.authority import Authority
    from mesh.peer.config import load

    given = {"site": site, "data_dir": str(data_dir) if data_dir is not None else None}
    config = load({key: value for key, value in given.items() if value is not None}, _without_listeners())
    config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity = Authority.create_cluster(config.data_dir, name, config.site, time.time())
    if json:
        print_json({"cluster": identity.cluster, "site": identity.site, "data_dir": str(config.data_dir)})
        return
    print(f"cluster {identity.cluster}")
    print(
        f"its authority and site {identity.site} are in {config.data_dir}; keep a backup of the folder authority there"
    )


def invite(
    *,
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="Good for this name only [default: any free name].")
    ] = None,
    ttl: Annotated[str, typer.Option(metavar="TIME", help="How long it is good, as in 30m, 12h or 7d.")] = "1h",
    address: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the new site reaches the peer; repeatable [default: where it listens].",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Of a peer that is not running; needs --address as well."),
    ] = None,
    peer: Peer = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A token that lets one new site in, once: `mesh up --invite TOKEN` there."""
    if data_dir is not None:
        import time

        from mesh.identity.authority import Authority

        authority = Authority.load(data_dir.expanduser())
        token = authority.invite(time.time(), address or [], site=site, ttl_s=_seconds(ttl))
    else:
        from mesh.client.admin import Admin

        with Admin(peer) as admin:
            token = admin.invite(site or "", _seconds(ttl), address or [])
    if json:
        print_json({"invitation": token})
    else:
        print(token)


def members(*, peer: Peer = None, json: Json = False, debug: Debug = False) -> None:
    """Who is in the mesh, and with which identity."""
    from mesh.client.blocking import Mesh

    with Mesh(peer) as mesh:
        document = mesh.status()
    if json:
        print_json({key: document[key] for key in ("members", "identity") if key in document})
        return
    from mesh.cli.tables import show_members

    show_members(document)


def revoke(
    site: Annotated[str | None, typer.Argument(metavar="SITE", help="The site to put out of the cluster.")] = None,
    *,
    token: Annotated[
        str | None, typer.Option("--token-id", metavar="ID", help="Withdraw a user's token instead.")
    ] = None,
    peer: Peer = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Put a site out of the cluster, by its key and for good, or withdraw a user's token."""
    from mesh.client.admin import Admin

    if (site is None) == (token is None):
        raise ConfigError("name a SITE to put out, or a token with --token-id (see `mesh revoke --help`)")
    with Admin(peer) as admin:
        state = admin.revoke(site=site or "", token=token or "")
    _tell(state, json)


def rotate(*, peer: Peer = None, json: Json = False, debug: Debug = False) -> None:
    """Bring a new gossip key in. The old one is dropped when all members have the new one; nothing stands still."""
    from mesh.client.admin import Admin

    with Admin(peer) as admin:
        state = admin.rotate()
    _tell(state, json)


def token_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; shown in logs.")],
    *,
    role: Annotated[str, typer.Option(metavar="ROLE", help="observe, submit or administer.")] = "submit",
    ttl: Annotated[str, typer.Option(metavar="TIME", help="How long it is good, as in 12h or 30d.")] = "30d",
    peer: Peer = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """An access token for a user of the API: MESH_TOKEN=TOKEN mesh --peer HOST:PORT ..."""
    from mesh.client.admin import Admin

    with Admin(peer) as admin:
        token = admin.create_token(name, role, _seconds(ttl))
    if json:
        print_json({"token": token})
    else:
        print(token)


def token_list(*, data_dir: DataDir = None, json: Json = False, debug: Debug = False) -> None:
    """The tokens that the authority in this data directory gave out, without their text."""
    from datetime import UTC, datetime

    from mesh.cli.tables import table
    from mesh.identity.authority import Authority
    from mesh.peer.config import load

    where = data_dir.expanduser() if data_dir is not None else load({}, _without_listeners()).data_dir
    tokens = Authority.load(where).tokens()
    if json:
        print_json(tokens)
        return
    rows = [
        [each["id"], each["name"], each["role"], f"{datetime.fromtimestamp(each['expires_s'], UTC):%Y-%m-%d %H:%M}"]
        for each in tokens
    ]
    table(["id", "name", "role", "expires (UTC)"], rows)


def _tell(state: identity_pb2.ClusterState, json: bool) -> None:
    if json:
        print_json(
            {"version": state.version, "ring_version": state.ring_version, "revoked_sites": list(state.revoked_sites)}
        )
        return
    note(f"cluster document {state.version}, gossip keys {state.ring_version}")


def _seconds(text: str) -> float:
    """Seconds of "90", "30m", "12h" or "7d". Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"ttl {text!r}: write a time such as 30m, 12h or 7d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _without_listeners() -> dict[str, str]:
    """The environment without what is said about listening: nothing listens yet."""
    return {key: value for key, value in os.environ.items() if key.upper() not in ("MESH_LISTEN", "MESH_HTTP")}
