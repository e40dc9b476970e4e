"""The verbs that only ask: `status`, `models`, `topology`, `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mesh.cli.frame import Debug, Json, Peer, print_json
from mesh.errors import ConfigError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face id, a folder or a .gguf file.")]
Strategy = Annotated[
    str, typer.Option("--strategy", metavar="NAME", help="auto, tensor_parallelism or pipeline.", show_default=True)
]
ConstraintsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--constraint",
        "-c",
        metavar="KEY=VALUE",
        help="As in min_latency=low, max_token_latency_ms=80, sites=a,b, max_sites=2, dtype=float32; may be repeated.",
    ),
]


def status(*, peer: Peer = None, json: Json = False, debug: Debug = False) -> None:
    """What a peer knows: itself, its members, its devices, its jobs."""
    from mesh.client.blocking import Mesh

    with Mesh(peer) as mesh:
        document = mesh.status()
        if json:
            print_json(document)
            return
        from mesh.cli.tables import show_status

        show_status(document, mesh.address)


def models(*, peer: Peer = None, json: Json = False, debug: Debug = False) -> None:
    """Which models each site holds, whole or in part, and how full its cache of weights is."""
    from mesh.client.blocking import Mesh

    with Mesh(peer) as mesh:
        document = mesh.status()
    sites = document.get("holdings") or []
    if json:
        print_json({"sites": sites})
        return
    from mesh.cli.tables import show_models

    show_models(sites)


def topology(*, peer: Peer = None, json: Json = False, debug: Debug = False) -> None:
    """Sites, devices, and the round-trip times between them."""
    from mesh.client.blocking import Mesh

    with Mesh(peer) as mesh:
        snapshot = mesh.topology()
    if json:
        print_json(snapshot.to_dict())
        return
    from mesh.cli.tables import show_topology

    show_topology(snapshot)


def plan(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="As --model.")] = None,
    *,
    model_option: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="A Hugging Face id, a folder, a .gguf file, or a JSON file of its shape."
        ),
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan for the cluster in this JSON file; no peer is asked.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="latency, throughput, first_token, cost or balanced.", show_default=False),
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="TOKENS", min=1, help="Tokens to size KV caches for [default: 2048].")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", min=1, help="Requests served at once [default: 1].")] = None,
    strategy: Strategy = "auto",
    constraint: ConstraintsOption = None,
    origin: Annotated[
        str | None, typer.Option(metavar="SITE", help="With --cluster: the submitting site, which private=true needs.")
    ] = None,
    schema: Annotated[
        str | None, typer.Option(metavar="cluster|model", help="Print the JSON Schema of a file format instead.")
    ] = None,
    peer: Peer = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The plan a model would get, and why. Runs nothing. With --cluster it needs no mesh either."""
    from mesh.cli.constraints import parse

    if schema is not None:
        from mesh.cli.offline import schema as schema_of

        print_json(schema_of(schema))
        return
    if model is not None and model_option is not None:
        raise ConfigError("give the model once, as MODEL or as --model (see `mesh plan --help`)")
    name = model if model is not None else model_option
    if name is None:
        raise ConfigError("Missing argument 'MODEL' (see `mesh plan --help`)")
    if cluster is not None and peer is not None:
        raise ConfigError("--cluster plans without a mesh: leave --peer out, or --cluster (see `mesh plan --help`)")
    if cluster is None and origin is not None:
        raise ConfigError("--origin goes with --cluster: a peer is its own origin (see `mesh plan --help`)")
    wishes = parse(constraint or [], {"objective": objective, "context": context, "concurrency": batch})
    if cluster is not None:
        from mesh.cli.offline import plan_offline

        made, document = plan_offline(cluster, name, strategy, wishes, origin=origin)
    else:
        from mesh.client.blocking import Mesh

        with Mesh(peer) as mesh:
            made = mesh.plan(name, strategy, wishes)
        document = made.to_dict()
    if json:
        print_json(document)
        return
    from mesh.cli.tables import show_plan

    show_plan(made)
