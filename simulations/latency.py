"""Matrices of round trips from files, and the sites of a virtual mesh that are laid out by them.

Two formats. A CSV has a header row of names and a first column of the same names, RTTs in milliseconds, an empty cell
where nobody measured. A raw matrix (".tsv", ".tsv.gz", as the PlanetLab one of Zhu et al., IEEE/ACM ToN 25, 2017) has
no names, tabs between cells, and 0 off the diagonal where nobody measured.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mesh.errors import ConfigError

Milliseconds = npt.NDArray[np.float64]

#: Round trip in milliseconds between two sites that stand for the same row: neighbours in one region.
NEIGHBOURS_MS = 0.5
#: A longer round trip is a mistake of units.
MAX_RTT_MS = 60_000.0
#: Bytes of a row's name that go into a site's name, so that a number still fits behind.
NAME_BYTES = 40


@dataclass(frozen=True, slots=True)
class Matrix:
    """`rtt_ms[i, j]` is the round trip in milliseconds as `names[i]` measured it to `names[j]`; 0 on the diagonal."""

    names: tuple[str, ...]
    rtt_ms: Milliseconds

    def __len__(self) -> int:
        return len(self.names)

    def one_way_s(self) -> Milliseconds:
        """One-way latency in seconds, [from, to]: half of what the sender measured.

        What a pair then measures, from either end, is the mean of its two cells (`pair_ms`).
        """
        return self.rtt_ms / 2000.0

    def pair_ms(self) -> Milliseconds:
        """The round trip of every pair on the virtual network: the same from both ends."""
        return (self.rtt_ms + self.rtt_ms.T) / 2.0

    def sites(self, count: int, seed: int) -> Matrix:
        """The matrix of `count` sites, with names that gossip accepts.

        Fewer sites than rows: a sample of the rows, drawn by `seed`, in the order of the file. More: the rows are
        repeated ("Oregon", "Oregon-2", ...), `NEIGHBOURS_MS` apart.
        """
        rows = len(self.names)
        if count <= rows:
            chosen = sorted(random.Random(f"{seed}/sites").sample(range(rows), count))
        else:
            chosen = [number % rows for number in range(count)]
        picked = np.array(chosen)
        rtt_ms = self.rtt_ms[np.ix_(picked, picked)]
        twins = (picked[:, None] == picked[None, :]) & ~np.eye(count, dtype=bool)
        rtt_ms[twins] = NEIGHBOURS_MS
        return Matrix(_site_names([self.names[row] for row in chosen]), rtt_ms)


def uniform(count: int, rtt_ms: float) -> Matrix:
    """A matrix with the same round trip between any two of `count` sites, named s0, s1, ..."""
    apart = np.full((count, count), rtt_ms)
    np.fill_diagonal(apart, 0.0)
    return Matrix(tuple(f"s{number}" for number in range(count)), apart)


def load_rtt(path: str | Path) -> Matrix:
    """Read a matrix. Pairs that nobody measured are filled in, see `filled`.

    Raises ConfigError, with the file and the place in it, for what is not a square matrix of round trips.
    """
    place = Path(path)
    try:
        data = place.read_bytes()
        if place.suffix == ".gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{place}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{place}: not a text file: expected a CSV of round trips in ms") from None
    raw = place.name.removesuffix(".gz").endswith(".tsv")
    return _raw(place, text) if raw else _named(place, text)


def filled(rtt_ms: Milliseconds) -> Milliseconds:
    """Put a figure where there is NaN.

    The other direction's where that was measured, else the shortest way over one other site, else the median of all
    that was measured (0 where nothing was).
    """
    rtt_ms = np.where(np.isnan(rtt_ms), rtt_ms.T, rtt_ms)
    known = rtt_ms[~np.isnan(rtt_ms) & ~np.eye(len(rtt_ms), dtype=bool)]
    usual = float(np.median(known)) if known.size else 0.0
    open_ended = np.where(np.isnan(rtt_ms), np.inf, rtt_ms)
    for one, other in np.argwhere(np.isnan(rtt_ms)):
        around = float(np.min(open_ended[one] + open_ended[:, other]))
        rtt_ms[one, other] = around if math.isfinite(around) else usual
    return rtt_ms


def _named(place: Path, text: str) -> Matrix:
    try:
        rows = [
            (number, row) for number, row in enumerate(csv.reader(text.splitlines()), 1) if any(map(str.strip, row))
        ]
    except csv.Error as error:
        raise ConfigError(f"{place}: not a CSV: {error}") from None
    if len(rows) < 2:
        raise ConfigError(f"{place}: expected a header row of names, then a row per site")
    names = [name.strip() for name in rows[0][1][1:]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{place}, line {rows[0][0]}: the name {twice[0]!r} stands there twice")
    if len(rows) - 1 != len(names):
        raise ConfigError(f"{place}: {len(names)} names in the header, but {len(rows) - 1} rows: it must be square")
    rtt_ms = np.zeros((len(names), len(names)))
    for row, (line, cells) in enumerate(rows[1:]):
        if len(cells) != len(names) + 1:
            raise ConfigError(f"{place}, line {line}: {len(cells)} cells, expected a name and {len(names)} round trips")
        if cells[0].strip() != names[row]:
            raise ConfigError(f"{place}, line {line}: row of {cells[0]!r}, expected {names[row]!r} as in the header")
        for column, cell in enumerate(cells[1:]):
            rtt_ms[row, column] = _cell(cell, f"{place}, line {line}, column {names[column]!r}")
    return _matrix(place, names, rtt_ms)


def _raw(place: Path, text: str) -> Matrix:
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    count = len(lines)
    rtt_ms = np.zeros((count, count))
    for row, (line, cells) in enumerate(lines):
        if len(cells) != count:
            raise ConfigError(
                f"{place}, line {line}: {len(cells)} cells in a matrix of {count} rows: it must be square"
            )
        for column, cell in enumerate(cells):
            rtt_ms[row, column] = _cell(cell, f"{place}, line {line}, column {column + 1}") or math.nan
    return _matrix(place, [f"s{row}" for row in range(count)], rtt_ms)


def _matrix(place: Path, names: list[str], rtt_ms: Milliseconds) -> Matrix:
    if not names:
        raise ConfigError(f"{place}: no sites in it")
    np.fill_diagonal(rtt_ms, 0.0)
    return Matrix(tuple(names), filled(rtt_ms))


def _cell(cell: str, where: str) -> float:
    cell = cell.strip()
    if not cell or cell.lower() == "nan":
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        raise ConfigError(f"{where}: {cell!r} is not a round trip in ms") from None
    if not 0.0 <= value <= MAX_RTT_MS:
        raise ConfigError(f"{where}: {cell} ms is not between 0 and {MAX_RTT_MS:g}")
    return value


def _site_names(rows: list[str]) -> tuple[str, ...]:
    taken: dict[str, int] = {}
    names: list[str] = []
    for row in rows:
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", row)[:NAME_BYTES].strip("-") or "site"
        number = taken.get(base, 0) + 1
        while (name := base if number == 1 else f"{base}-{number}") in taken:
            number += 1
        taken[base] = number
        taken.setdefault(name, 1)
        names.append(name)
    return tuple(names)
