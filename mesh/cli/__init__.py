"""The `mesh` command. `main` is its entry point; the verbs stand in a module per group.

Results go to stdout, everything else to stderr. A mistake is one line, `error: ...`, and the exit code of its class in
`mesh.errors`; with `--json` that line is `{"error": CODE, "message": TEXT}`, also on stderr, so that stdout holds a
result or nothing. `--debug` shows the trace. Ctrl-C ends a command with 130, a closed pipe with 141, a fault of ours
with 70 (sysexits' EX_SOFTWARE).
"""

from mesh.cli.app import main

__all__ = ["main"]
