"""The `mesh` command. `main` is its entry point; the verbs stand in a module per group.

Results go to stdout, everything else to stderr. A mistake is one line, `error: ...`, and the exit code of its class in
`mesh.errors`; with `--json` that line is `{"error": CODE, "message": TEXT}`, also on stderr, so that stdout holds a
result or nothing. `--debug` shows the trace. Ctrl-C ends a command with 130, a closed pipe with 141, a fault of ours
with 70 (sysexits' EX_SOFTWARE).
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.errors import EXIT_INTERRUPTED

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. `arguments` default to the process's own."""
    try:
        # Imported in here, so that Ctrl-C while the command is still being loaded leaves no trace either.
        from mesh.cli.app import main as run

        return run(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
