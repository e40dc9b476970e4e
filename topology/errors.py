"""What planning refuses, each with the figures a person needs to change their mind. One line each."""

from __future__ import annotations

from dataclasses import dataclass


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
        if self.constraint == "max_token_latency_ms":
            return f"{self.constraint}: allows {required}, the fastest plan takes {available}, {missing} too many"
        return f"{self.constraint}: needs {required}, {available} available, {missing} missing"


class NoFeasiblePlan(TopologyError):
    """No plan satisfies the constraints. `shortfalls` lists, per constraint, how much is missing (never empty).

    `notes` says what was left out of consideration and why, for example a device with an impossible speed.
    """

    def __init__(self, model: str, shortfalls: tuple[Shortfall, ...], notes: tuple[str, ...] = ()) -> None:
        self.model = model
        self.shortfalls = shortfalls
        self.notes = notes
        reasons = "; ".join(str(shortfall) for shortfall in shortfalls)
        suffix = f" ({'; '.join(notes)})" if notes else ""
        super().__init__(f"no feasible plan for {model}: {reasons}{suffix}")

    def __reduce__(self) -> tuple[type[NoFeasiblePlan], tuple[str, tuple[Shortfall, ...], tuple[str, ...]]]:
        """Pickles with its figures: an exception rebuilt from its message alone would lose them."""
        return type(self), (self.model, self.shortfalls, self.notes)


def megabytes(value: float) -> str:
    """Bytes as whole decimal megabytes, or gigabytes from ten of those on: "745 MB", "14.2 GB"."""
    return f"{value / 1e9:.1f} GB" if abs(value) >= 10e9 else f"{value / 1e6:.0f} MB"


def _figure(value: float, unit: str) -> str:
    if unit == "bytes":
        return megabytes(value)
    if unit == "ms":
        return f"{value:.3g} ms" if abs(value) < 100 else f"{value:.0f} ms"
    singular = unit[:-1] if value == 1 and unit.endswith("s") else unit
    return f"{value:g} {singular}"
