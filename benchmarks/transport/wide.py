"""Wide-area rows: an emulated link, one plain TCP stream over it, and the transport's own streams."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.transport.rows import LeftOut, Options, Row

WHAT = ("wide",)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every emulated link. Raises LeftOut where links cannot be emulated."""
    raise LeftOut("no emulated links yet")
    yield  # a generator
