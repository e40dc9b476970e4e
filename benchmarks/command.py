"""How every benchmark ends: the exit code of its `main`, and no trace where nobody reads on or somebody interrupts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from mesh.cli.frame import report


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end the process: 141 after a closed pipe, 130 after Ctrl-C, as the `mesh` command does."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except (BrokenPipeError, KeyboardInterrupt) as error:
        code = report(error)
    sys.exit(code)
