"""The verbs that only ask: `status`, `topology`, `plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from mesh.cli.frame import Debug, Json, Peer, print_json

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
    model: Model,
    *,
    strategy: Strategy = "auto",
    constraint: ConstraintsOption = None,
    peer: Peer = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The plan a model would get, and why. Runs nothing."""
    from mesh.cli.constraints import parse
    from mesh.client.blocking import Mesh

    with Mesh(peer) as mesh:
        made = mesh.plan(model, strategy, parse(constraint or []))
    if json:
        print_json(made.to_dict())
        return
    from mesh.cli.tables import show_plan

    show_plan(made)
