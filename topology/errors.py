"""What planning refuses, each with the figures a person needs to change their mind. One line each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class TopologyError(ValueError):
    """The base of everything this package raises: an impossible model, or a snapshot that contradicts itself."""


class ConstraintError(TopologyError):
    """A constraint is unknown, of the wrong type, out of bounds, or names a site that the snapshot does not hold."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """How far one constraint is from being met. `required`, `available` and `missing` are in `unit`.

    `missing` is what to add to `available` (or, for a limit such as a latency, what the limit is too low by).
    """

    constraint: str
    required: float
    available: float
    missing: float
    unit: str

    def __str__(self) -> str:
        required, available, missing = (
            _figure(value, self.unit) for value in (self.required, self.available, self.missing)
        )
        best = _BEST.get(self.constraint)
        if best is not None:
            return f"{self.constraint}: {best.format(required=required, available=available, missing=missing)}"
        return f"{self.constraint}: needs {required}, {available} available, {missing} missing"


#: Limits, in words: what is allowed, and what the plan that comes nearest does.
_BEST = {
    "max_token_latency_ms": "allows {required}, the fastest plan takes {available}, {missing} too many",
    "max_first_token_ms": "allows {required}, the quickest plan takes {available}, {missing} too many",
    "min_tokens_per_s": "asks for {required}, the best plan gives {available}, {missing} too few",
    "max_price_per_hour": "allows {required}, the cheapest plan found costs {available}, {missing} too much",
}


@dataclass(frozen=True, slots=True)
class Relaxation:
    """A change of one or two constraints that makes a plan possible; it was planned with, on the same snapshot.

    `changes` are (constraint, value it would need; None: not asked). `constraints` says the same as a mapping to merge
    into the request. `layout` and `token_ms` are of the plan that there would be.
    """

    changes: tuple[tuple[str, Any], ...]
    layout: str
    token_ms: float
    constraints: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{' and '.join(_change(name, value) for name, value in self.changes)} ({self.token_ms:.3g} ms a token)"


def _change(name: str, value: Any) -> str:
    if value in (None, (), False):
        return f"no {name}"
    text = ",".join(value) if isinstance(value, tuple) else f"{value:.6g}" if isinstance(value, float) else f"{value}"
    return f"{name}={text}"


class NoFeasiblePlan(TopologyError):
    """No plan satisfies the constraints. `shortfalls` lists, per constraint, how much is missing (never empty).

    `notes` says what was left out of consideration and why, for example a device with an impossible speed.
    `relaxations` are the smallest changes that would do, where any were found.
    """

    def __init__(
        self,
        model: str,
        shortfalls: tuple[Shortfall, ...],
        notes: tuple[str, ...] = (),
        relaxations: tuple[Relaxation, ...] = (),
    ) -> None:
        self.model = model
        self.shortfalls = shortfalls
        self.notes = notes
        self.relaxations = relaxations
        reasons = "; ".join(str(shortfall) for shortfall in shortfalls)
        ways = f"; possible with {', or '.join(map(str, relaxations))}" if relaxations else ""
        suffix = f" ({'; '.join(notes)})" if notes else ""
        super().__init__(f"no feasible plan for {model}: {reasons}{ways}{suffix}")

    def __reduce__(self) -> tuple[type[NoFeasiblePlan], tuple[Any, ...]]:
        """Pickles with its figures: an exception rebuilt from its message alone would lose them."""
        return type(self), (self.model, self.shortfalls, self.notes, self.relaxations)


def megabytes(value: float) -> str:
    """Bytes as whole decimal megabytes, or gigabytes from ten of those on: "745 MB", "14.2 GB"."""
    return f"{value / 1e9:.1f} GB" if abs(value) >= 10e9 else f"{value / 1e6:.0f} MB"


def ms(seconds: float) -> str:
    """Seconds as milliseconds: "3.21 ms", "164 ms"."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _figure(value: float, unit: str) -> str:
    if unit == "bytes":
        return megabytes(value)
    if unit == "ms":
        return f"{value:.3g} ms" if abs(value) < 100 else f"{value:.0f} ms"
    if unit in ("tokens/s", "an hour"):
        return f"{value:.4g} {unit}"
    singular = unit[:-1] if value == 1 and unit.endswith("s") else unit
    return f"{value:g} {singular}"
