"""What all commands share: the common options, and how an exception becomes a line and an exit code."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ParamSpec

import typer

from mesh.errors import EXIT_INTERRUPTED, MeshError

P = ParamSpec("P")

#: 128 + SIGPIPE: what a shell sees of a program that the signal ended.
EXIT_BROKEN_PIPE = 141

#: sysexits.h, EX_SOFTWARE: a fault of ours, told apart from every mistake of the user's.
EXIT_INTERNAL = 70

Peer = Annotated[
    str | None,
    typer.Option("--peer", metavar="HOST:PORT", help="The peer to ask [default: $MESH_PEER, else 127.0.0.1:7700]."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON; an error is JSON too, on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]


class Reporter:
    """How this run of the command tells of errors."""

    def __init__(self) -> None:
        self.json = False
        self.debug = False

    def configure(self, arguments: Sequence[str]) -> None:
        """Look for `--json` and `--debug` before parsing, so that an error in parsing heeds them as well."""
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        # `mesh demo` takes a file after --json, and speaks for itself.
        self.json = "--json" in options and options[0] != "demo"
        self.debug = "--debug" in options

    def error(self, code: str, message: str) -> None:
        """One line on stderr."""
        message = printable(" ".join(message.split()))
        line = json.dumps({"error": code, "message": message}) if self.json else f"error: {message}"
        print(line, file=sys.stderr, flush=True)

    def trace(self) -> None:
        """The trace of the exception being handled, where `--debug` asked for it."""
        if self.debug:
            traceback.print_exc()


REPORTER = Reporter()


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose exceptions end as a line on stderr and an exit code, and never as a trace."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except typer.Exit:
            raise
        except BaseException as error:
            raise typer.Exit(report(error)) from None

    return run


def report(error: BaseException) -> int:
    """Tell of `error`, and give the exit code it stands for. SystemExit passes."""
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, KeyboardInterrupt):
        REPORTER.trace()
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Nobody reads us any more. Python would still flush stdout at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    REPORTER.trace()
    if isinstance(error, MeshError):
        REPORTER.error(error.code, str(error))
        return error.exit_code
    REPORTER.error("internal", f"internal: {type(error).__name__}: {error} (run again with --debug for the trace)")
    return EXIT_INTERNAL


def print_json(document: Any) -> None:
    """A result on stdout: indented on a terminal, else one line."""
    print(json.dumps(document, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False), flush=True)


def note(text: str) -> None:
    """A remark on stderr, beside the result."""
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` without control characters but newline and tab: what a peer or a model says must not drive a terminal."""
    return "".join(char for char in text if char in "\n\t" or not (ord(char) < 32 or 127 <= ord(char) < 160))
