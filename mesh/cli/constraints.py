"""`--constraint KEY=VALUE`: text to the values that `topology.Constraints` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.errors import RequestError

#: Keys whose value is a list, written with commas.
LISTS = frozenset({"sites", "exclude_sites", "regions", "exclude_regions", "vendors", "needs", "codes"})

#: Words for what is on and off.
FLAGS = {"true": True, "yes": True, "false": False, "no": False}


def parse(options: list[str], named: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The constraints as a mapping. A list's key may be repeated. `named` have options of their own, None is not given.

    Raises RequestError for what is not KEY=VALUE.
    """
    result: dict[str, Any] = {key: value for key, value in (named or {}).items() if value is not None}
    for option in options:
        key, equals, text = option.partition("=")
        key, text = key.strip().replace("-", "_"), text.strip()
        if not equals or not key or not text:
            raise RequestError(f"--constraint: {option!r} is not KEY=VALUE, as in sites=a,b")
        if key in LISTS:
            result.setdefault(key, []).extend(part.strip() for part in text.split(",") if part.strip())
        elif key in result:
            raise RequestError(f"--constraint: {key} is given twice")
        elif key in ("shards", "dtype") and "," in text:
            result[key] = [_number(part.strip()) for part in text.split(",") if part.strip()]
        else:
            result[key] = _number(text)
    return result


def _number(text: str) -> bool | int | float | str:
    if text.lower() in FLAGS:
        return FLAGS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
