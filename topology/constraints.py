"""What a user may ask of a plan. Parsed from an open mapping (JSON, TOML, keyword arguments) into a checked value.

| key | value | means |
|---|---|---|
| `min_latency` | "low", "medium", "high" | the latency wanted: "low" minimises it at any number of sites; "medium" (default) takes as few sites as fit, then the least latency; "high" tolerates it for throughput over many requests |
| `max_token_latency_ms` | number > 0 | no plan predicted slower than this a token |
| `sites`, `exclude_sites`, `regions` | a name or a list of names | where the model may and may not run |
| `max_sites` | integer >= 1 | how many sites may take part |
| `dtype` | "float32", "bfloat16", "float16" | what the model runs in, instead of its own |
| `context` | integer >= 1 | tokens to size KV caches for; default min(model's, 2048) |
| `stages` | integer >= 1 | expert override: exactly so many pipeline stages |
| `shards` | integer >= 1, or a list, one a stage | expert override: exactly so many tensor-parallel shards |

The overrides exist for tests and benchmarks: they force a plan that the planner would not choose, also one across a
link where tensor parallelism does not pay, and are refused where they cannot be met.
"""  # noqa: E501 - a table row cannot be broken

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from topology.errors import ConstraintError
from topology.model import DTYPE_BYTES

#: Values of `min_latency`.
LATENCIES: Final = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Constraints:
    """Checked constraints; the module's table says what each means. None or empty stands for "not asked"."""

    min_latency: str = "medium"
    max_token_latency_ms: float | None = None
    sites: tuple[str, ...] = ()
    exclude_sites: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    max_sites: int | None = None
    dtype: str | None = None
    context: int | None = None
    stages: int | None = None
    shards: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ConstraintError: a value built in code is held to the same rules as a parsed one."""
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if isinstance(self.shards, tuple) and self.stages is None:
            object.__setattr__(self, "stages", len(self.shards))
        if isinstance(self.shards, tuple) and len(self.shards) != self.stages:
            raise ConstraintError(
                f"shards lists {len(self.shards)} stages but stages is {self.stages}: make them agree"
            )
        both = sorted(set(self.sites) & set(self.exclude_sites))
        if both:
            raise ConstraintError(f"site {both[0]!r} stands in sites and in exclude_sites: take it out of one of them")

    @classmethod
    def parse(cls, mapping: Mapping[str, Any] | Constraints | None) -> Constraints:
        """Check an open mapping. Raises ConstraintError naming the key; for an unknown one also the nearest known."""
        if mapping is None:
            return cls()
        if isinstance(mapping, Constraints):
            return mapping
        if not isinstance(mapping, Mapping):
            raise ConstraintError(f"constraints must be a mapping of names to values, not {type(mapping).__name__}")
        known = [f.name for f in fields(cls)]
        for key in mapping:
            if key not in known:
                raise ConstraintError(f"unknown constraint {key!r}: {nearest(str(key), known, 'known')}")
        return cls(**{key: value for key, value in mapping.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """A JSON document of what was asked, the inverse of `parse`: constraints at their default are left out."""
        document: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                document[f.name] = list(value) if isinstance(value, tuple) else value
        return document

    @property
    def forced(self) -> bool:
        """Whether an expert override asks for a certain shape."""
        return self.stages is not None or self.shards is not None

    def width(self, stage: int) -> int | None:
        """The forced number of shards of stage `stage`, or None."""
        return self.shards[stage] if isinstance(self.shards, tuple) else self.shards


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """Half a sentence for an error: the nearest known name, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"{what} are {', '.join(names)}" if names else f"none are {what}"


def _text(name: str, value: Any, allowed: Iterable[str]) -> str:
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        hint = nearest(str(value), names, "allowed")
        raise ConstraintError(f"{name} must be one of {', '.join(names)}, not {value!r}: {hint}")
    return value


def _latency(name: str, value: Any) -> str:
    return _text(name, value, LATENCIES)


def _dtype(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value, DTYPE_BYTES)


def _names(name: str, value: Any) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple, set, frozenset)) or not all(isinstance(e, str) and e for e in entries):
        raise ConstraintError(f"{name} must be a name or a list of names, not {value!r}")
    return tuple(sorted(set(entries)))


def _count(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConstraintError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def _widths(name: str, value: Any) -> int | tuple[int, ...] | None:
    if isinstance(value, (list, tuple)):
        if not value:
            raise ConstraintError(f"{name} must be a whole number or one number a stage, not an empty list")
        return tuple(_count(name, entry) or 1 for entry in value)
    return _count(name, value)


def _milliseconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ConstraintError(f"{name} must be a number of milliseconds above 0, not {value!r}")
    return float(value)


_CHECKS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "min_latency": _latency,
    "max_token_latency_ms": _milliseconds,
    "sites": _names,
    "exclude_sites": _names,
    "regions": _names,
    "max_sites": _count,
    "dtype": _dtype,
    "context": _count,
    "stages": _count,
    "shards": _widths,
}
