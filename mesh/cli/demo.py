"""`mesh demo`: hand over to the drill that ships beside `mesh`.

The drill lives in `simulations`, which imports `mesh` and never the other way round. So the distribution declares it as
an entry point, and this command finds it by name: any installed package may bring a `demo` the same way.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer

from mesh.errors import MeshError

#: The entry points' group: a callable that takes the command's arguments and returns its exit code.
GROUP = "isthmus.commands"

#: Arguments, `--help` included, are the drill's own.
SETTINGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "options_metavar": "[--json FILE] [--seed N] [OPTIONS]",
}


def demo(context: typer.Context) -> None:
    """Three sites on this machine, one model, one site killed in mid-sentence."""
    found = entry_points(group=GROUP, name="demo")
    if not found:
        raise MeshError("this installation brings no demo: install isthmus whole, in a checkout with `make setup`")
    raise typer.Exit(int(next(iter(found)).load()(list(context.args)) or 0))
