"""The command's assembly: all verbs in one typer application, and the entry point around it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import cast

import typer

from mesh.cli import ask, cluster, demo, jobs, up
from mesh.cli.frame import REPORTER, guarded, report
from mesh.errors import EXIT_INTERRUPTED, ConfigError

#: The base of all errors in parsing a command line. typer brings its own copy of click, or uses the installed one,
#: depending on its version; this class is in both.
_ClickError = cast("type[Exception]", typer.BadParameter.__mro__[2])


def application() -> typer.Typer:
    """A fresh application with all commands."""
    app = typer.Typer(
        name="mesh",
        help="One accelerator pool out of sites that are far apart.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for function in (
        up.up,
        ask.status,
        ask.models,
        ask.topology,
        ask.plan,
        jobs.submit,
        jobs.generate,
        jobs.jobs,
        jobs.cancel,
    ):
        app.command()(guarded(function))
    app.command(**demo.SETTINGS)(guarded(demo.demo))
    for verb in (cluster.invite, cluster.members, cluster.revoke, cluster.rotate):
        app.command()(guarded(verb))
    clusters = _group("cluster", "Make a cluster.")
    clusters.command("create")(guarded(cluster.create))
    tokens = _group("token", "Access tokens for users of the API.")
    tokens.command("create")(guarded(cluster.token_create))
    tokens.command("list")(guarded(cluster.token_list))
    for group in (clusters, tokens):
        app.add_typer(group)
    return app


def _group(name: str, about: str) -> typer.Typer:
    return typer.Typer(name=name, help=about, no_args_is_help=True, rich_markup_mode=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. `arguments` default to the process's own."""
    argv = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    REPORTER.configure(argv)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core writes lines of its own to stderr otherwise
    try:
        result = application()(argv, prog_name="mesh", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return EXIT_INTERRUPTED
    except _ClickError as error:
        return _usage(error)
    except Exception as error:
        return report(error)
    return result if isinstance(result, int) else 0


def _usage(error: BaseException) -> int:
    """A command line that does not parse is a ConfigError with a pointer to the help."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "mesh"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    REPORTER.trace()
    REPORTER.error(ConfigError.code, f"{message.rstrip('.')} (see `{path} --help`)")
    return ConfigError.exit_code
