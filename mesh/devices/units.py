"""Sizes as people write them: `200MiB`, `1.5 GB`, `10GB/s`."""

from __future__ import annotations

import re

#: Bytes per unit: SI prefixes are powers of 1000, IEC prefixes powers of 1024 (IEC 80000-13).
UNITS: dict[str, int] = {
    "B": 1,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}
_BY_LOWER = {unit.lower(): factor for unit, factor in UNITS.items()}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_LARGEST_BYTES = 2**60


def parse_bytes(text: str) -> int:
    """Bytes in a size such as `200MiB`. Units are B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, in any case.

    Raises ValueError, one line, where the number or the unit is missing or the size is outside 1 B .. 1 EiB.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _BY_LOWER.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit ({', '.join(UNITS)}), such as 200MiB")
    size = round(float(match[1]) * factor)
    if not 1 <= size <= _LARGEST_BYTES:
        raise ValueError(f"{text!r} is out of bounds; a size is between 1B and 1024TiB times 1024")
    return size


def format_bytes(size: int) -> str:
    """A size for people, in IEC units with at most one decimal: 209715200 -> `200MiB`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.1f}".removesuffix(".0") + unit
    return f"{size}B"
